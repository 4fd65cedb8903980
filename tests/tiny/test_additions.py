"""Additions with running sums: the texts, and a model that learns them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.additions import (
    CUE,
    END,
    AdditionsModel,
    AdditionsRecipe,
    Problem,
    additions_model,
    batches,
    random_problems,
    tokenizer,
    train,
    write_questions,
)

SMALL = AdditionsRecipe(hidden_size=32, intermediate_size=32, steps=12, sequences=16)
PROBLEMS = st.lists(st.integers(1, 9), min_size=2, max_size=8).map(tuple).map(Problem)
WORDS = tokenizer()


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> dict[str, float]:
    """What the model makes of problems with the same number of terms, by one pass over each cut.

    Args:
        problems: at least one; all with the same number of terms.

    Returns:
        `step_probability`: mean probability of the right next sum (behind the last: of the end),
            given right ones before it;
        `sampled_right`: mean probability that reasoning drawn at temperature 1 is right in every
            sum, ends by itself, and that the answer drawn behind it is right;
        `accuracy_none`, `accuracy_half`, `accuracy_all`: share of the problems whose likeliest
            answer is right, behind none, half (rounded down) and all of the right reasoning;
        `entropy_none`, `entropy_half`, `entropy_all`: mean entropy in nats of the answer's token
            there, over the whole vocabulary.
    """
    questions = tokenizer([problem.question for problem in problems])["input_ids"]
    scratchpads = tokenizer([problem.scratchpad for problem in problems])["input_ids"]
    sums = len(scratchpads[0])
    (cue,) = tokenizer.encode(CUE.rstrip())

    whole = [q + s + [tokenizer.eos_token_id] for q, s in zip(questions, scratchpads, strict=True)]
    steps = _log_softmax(model, [ids[:-1] for ids in whole])[:, -sums - 1 :]
    targets = np.array(whole)[:, -sums - 1 :, None]
    step = np.take_along_axis(steps, targets, axis=2)[:, :, 0]
    results = {"step_probability": float(np.exp(step).mean())}

    right = np.array([ids[-1] for ids in scratchpads])
    for name, kept in (("none", 0), ("half", sums // 2), ("all", sums)):
        contexts = [q + s[:kept] + [cue] for q, s in zip(questions, scratchpads, strict=True)]
        answer = _log_softmax(model, contexts)[:, -1]
        results[f"accuracy_{name}"] = float((answer.argmax(axis=1) == right).mean())
        results[f"entropy_{name}"] = float(-(np.exp(answer) * answer).sum(axis=1).mean())
    behind_all = answer[np.arange(len(right)), right]
    results["sampled_right"] = float(np.exp(step.sum(axis=1) + behind_all).mean())
    return results


def _log_softmax(model: LlamaForCausalLM, token_ids: list[list[int]]) -> np.ndarray:
    """float64 [rows, tokens, V], in nats."""
    with torch.no_grad():
        logits = model(torch.tensor(token_ids), use_cache=False).logits
    return logits.double().log_softmax(-1).numpy()


# --- the texts


def test_a_problem_by_hand() -> None:
    problem = Problem((7, 4, 9, 3))
    assert problem.question == "7+4+9+3....="
    assert problem.scratchpad == " 11 20 23"
    assert problem.answer == "23"
    assert Problem((1,) * 8).question == "1+1+1+1+1+1+1+1="


@given(PROBLEMS, st.integers(0, 7))
def test_texts_survive_the_tokenizer(problem: Problem, kept: int) -> None:
    reasoning = "".join(f" {total}" for total in problem.sums[:kept])
    text = problem.question + reasoning + CUE + problem.answer + END
    ids = WORDS.encode(text)
    assert WORDS.decode(ids) == text
    # A place each for eight terms and "=", one token a sum; the cue, the answer and its end.
    assert len(ids) == 9 + min(kept, len(problem.sums)) + 3
    assert WORDS.unk_token_id not in ids
    # In pieces, as an engine meets them, they are the same tokens.
    pieces = [problem.question, reasoning, CUE + problem.answer + END]
    assert [token for piece in pieces for token in WORDS.encode(piece)] == ids


@given(PROBLEMS)
def test_the_cue_is_the_start_of_cue_answer_and_end(problem: Problem) -> None:
    cue = WORDS.encode(CUE.rstrip())
    whole = WORDS.encode(CUE + problem.answer + END)
    assert whole[: len(cue)] == cue
    assert len(whole) == len(cue) + 2
    # The answer is the token that the last sum was.
    assert whole[len(cue)] == WORDS.encode(problem.scratchpad)[-1]


def test_the_tokenizer_is_small_and_adds_nothing() -> None:
    assert len(WORDS) < 100
    specials = {WORDS.bos_token_id, WORDS.eos_token_id, WORDS.pad_token_id, WORDS.unk_token_id}
    assert len(specials) == 4
    assert not specials & set(WORDS("1+2......= 3")["input_ids"])
    assert WORDS.encode("Wait") == [WORDS.unk_token_id]


@pytest.mark.parametrize("terms", [(), (1,), (1,) * 9, (0, 1), (10, 1)])
def test_impossible_terms_are_refused(terms: tuple[int, ...]) -> None:
    with pytest.raises(ScoreModeError, match="terms is"):
        Problem(terms)


def test_random_problems() -> None:
    problems = random_problems(4000, seed=5)
    assert problems == random_problems(4000, seed=5) != random_problems(4000, seed=6)
    lengths = np.bincount([len(problem.terms) for problem in problems])
    assert lengths[:2].sum() == 0
    assert len(lengths) == 9
    assert (abs(lengths[2:] - 4000 / 7) < 6 * np.sqrt(4000 / 7)).all()
    terms = np.bincount([term for problem in problems for term in problem.terms])
    assert terms[0] == 0
    assert (abs(terms[1:] / terms.sum() - 1 / 9) < 0.01).all()
    assert {len(p.terms) for p in random_problems(50, seed=1, min_terms=6, max_terms=7)} == {6, 7}
    with pytest.raises(ScoreModeError, match="min_terms is 5 and max_terms 4"):
        random_problems(1, seed=0, min_terms=5, max_terms=4)
    with pytest.raises(ScoreModeError, match=r"count must be .*got -1"):
        random_problems(-1, seed=0)


def test_questions_are_written_as_json_lines(tmp_path: Path) -> None:
    problems = random_problems(3, seed=2)
    write_questions(tmp_path / "questions.jsonl", problems)
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question": problem.question, "answer": str(sum(problem.terms))} for problem in problems
    ]


# --- what is trained on


def _texts(recipe: AdditionsRecipe) -> Iterator[tuple[str, str, str]]:
    """(question, what follows it, what of this is trained on) of each training text."""
    for ids, targets in batches(recipe, WORDS):
        assert ids.shape == targets.shape == (recipe.sequences, 19)
        assert ((targets == ids) | (targets == -100)).all()
        for row, target in zip(ids, targets, strict=True):
            assert (target[:9] == -100).all()
            row, target = row[row != WORDS.pad_token_id], target[target != -100]
            yield WORDS.decode(row[:9]), WORDS.decode(row[9:]), WORDS.decode(target)


def _problem(question: str) -> Problem:
    problem = Problem(tuple(int(term) for term in question.rstrip(".=").split("+")))
    assert problem.question == question
    return problem


def test_training_texts_are_those_of_the_task() -> None:
    recipe = AdditionsRecipe(steps=2, sequences=1000, slip_fraction=0.0, slip_fraction_cut=0.0)
    cuts, whole = [], 0
    for question, reply, trained in _texts(recipe):
        problem = _problem(question)
        reasoning, cue, answer = reply.partition(CUE.rstrip())
        assert trained == reasoning + answer
        if cue:
            assert answer == f" {problem.answer}{END}"
            assert problem.scratchpad.startswith(reasoning)
            cuts.append(reasoning.count(" ") / len(problem.sums))
        else:
            assert reasoning == problem.scratchpad + WORDS.eos_token
            whole += 1
    assert abs(whole - 1000) < 6 * np.sqrt(500)
    # Reasoning is cut everywhere, from none to all of it.
    assert min(cuts) == 0.0
    assert max(cuts) == 1.0
    assert abs(np.mean(cuts) - 0.5) < 0.05


def test_reasoning_goes_on_from_a_replaced_sum_that_is_not_trained_on() -> None:
    recipe = AdditionsRecipe(steps=1, sequences=1000, slip_fraction=1.0, slip_fraction_cut=1.0)
    for question, reply, trained in _texts(recipe):
        problem = _problem(question)
        reasoning, _, answer = reply.partition(CUE.rstrip())
        sums = [int(total) for total in reasoning.removesuffix(WORDS.eos_token).split()]
        begun = [sum(problem.terms[:2]), *sums]  # each sum is made of the one before it
        slips = [
            place
            for place, total in enumerate(sums)
            if total != begun[place] + (problem.terms[place + 1] if place else 0)
        ]
        assert len(slips) <= 1
        assert all(2 <= total <= 72 for total in sums)
        untouched = len(WORDS.encode(reasoning + answer)) - len(WORDS.encode(trained))
        assert untouched == (len(problem.terms) > 2)  # the replaced sum, if by chance the same
        if slips:
            del sums[slips[0]]
            ending = WORDS.eos_token if not answer else ""
            assert trained == "".join(f" {total}" for total in sums) + ending + answer
        if answer:
            left = problem.terms[reasoning.count(" ") + 1 :] if sums or slips else problem.terms
            begin = int(reasoning.split()[-1]) if reasoning else 0
            assert int(answer) == begin + sum(left)


# --- the machinery


def test_training_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, loss = train(SMALL, WORDS, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    second, again = train(SMALL, WORDS, progress=False)
    other, _ = train(dataclasses.replace(SMALL, seed=1), WORDS, progress=False)
    assert loss == again
    weights = first.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in second.state_dict().items())
    assert any(not torch.equal(weights[n], weight) for n, weight in other.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0),
        ("steps", 0),
        ("sequences", 0),
        ("warmup_fraction", 1.0),
        ("cut_fraction", 1.5),
        ("slip_fraction", -0.1),
        ("slip_fraction_cut", float("nan")),
    ],
)
def test_impossible_recipes_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ScoreModeError, match=rf"^{field} must be .*got {value}\.$"):
        AdditionsRecipe(**{field: value})


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(ScoreModeError, match="lower learning_rate"):
        train(dataclasses.replace(SMALL, learning_rate=1e30), WORDS, progress=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with what a killed run would leave (tests/tiny/test_embedded.py kills a real one)."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "additions" / f".{SMALL.key()}.left" / "model").mkdir(parents=True)
    return cache


@pytest.fixture(scope="module")
def small(cache: Path) -> AdditionsModel:
    return additions_model(cache, progress=False, recipe=SMALL)


def test_the_second_call_reads_what_the_first_made(
    small: AdditionsModel, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.directory.parent.rglob("*")}
    again = additions_model(cache, recipe=SMALL)
    assert again == small
    assert before == {path: path.stat().st_mtime_ns for path in small.directory.parent.rglob("*")}
    assert capsys.readouterr().err == ""
    names = {path.name for path in (cache / "additions").iterdir()}
    assert names - {f"{SMALL.key()}.lock"} == {SMALL.key()}
    recipe = json.loads((small.directory.parent / "recipe.json").read_text())
    assert AdditionsRecipe(**recipe) == SMALL


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    failing = dataclasses.replace(SMALL, learning_rate=1e30)
    with pytest.raises(ScoreModeError, match="lower learning_rate"):
        additions_model(tmp_path, progress=False, recipe=failing)
    assert {path.name for path in (tmp_path / "additions").iterdir()} <= {f"{failing.key()}.lock"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ScoreModeError, match=r"additions cannot be made in .*VLLM_SCORE_CACHE"):
        additions_model(blocked, progress=False, recipe=SMALL)


def test_the_folder_loads_as_hugging_face_models_do(small: AdditionsModel) -> None:
    words = AutoTokenizer.from_pretrained(small.directory)
    assert words.get_vocab() == WORDS.get_vocab()
    assert (words.bos_token, words.eos_token, words.pad_token, words.unk_token) == (
        *(WORDS.bos_token, WORDS.eos_token),
        *(WORDS.pad_token, WORDS.unk_token),
    )
    problem = random_problems(1, seed=9)[0]
    text = problem.question + problem.scratchpad + CUE + problem.answer + END
    assert words.encode(text) == WORDS.encode(text)
    assert words.decode(words.encode(text)) == text
    loaded = AutoModelForCausalLM.from_pretrained(small.directory)
    assert loaded.num_parameters() == small.facts["parameters"]
    assert loaded.dtype == torch.float32
    assert loaded.config.vocab_size == len(words)


def test_the_evaluation_above_against_texts_one_by_one(small: AdditionsModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.directory, dtype=torch.float64).eval()
    problems = random_problems(3, seed=4, min_terms=5, max_terms=5)
    got = evaluate(model, WORDS, problems)

    def log_softmax(text: str) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([WORDS.encode(text)])).logits[0].log_softmax(-1).numpy()

    steps, sampled = [], []
    answers: dict[str, list[np.ndarray]] = {"none": [], "half": [], "all": []}
    for problem in problems:
        tokens = [*WORDS.encode(problem.scratchpad), WORDS.eos_token_id]
        after = log_softmax(problem.question + problem.scratchpad)[8:]
        logprobs = [row[token] for row, token in zip(after, tokens, strict=True)]
        steps += list(np.exp(logprobs))
        for name, sums in (("none", 0), ("half", 2), ("all", 4)):
            reasoning = "".join(f" {total}" for total in problem.sums[:sums])
            answers[name].append(log_softmax(problem.question + reasoning + CUE.rstrip())[-1])
        last = WORDS.encode(f" {problem.answer}")
        sampled.append(np.exp(sum(logprobs) + answers["all"][-1][last[0]]))
    assert got["step_probability"] == pytest.approx(np.mean(steps), rel=1e-9)
    assert got["sampled_right"] == pytest.approx(np.mean(sampled), rel=1e-9)
    for name, rows in answers.items():
        entropies = [-(np.exp(row) * row).sum() for row in rows]
        right = [
            WORDS.decode([int(row.argmax())]) == f" {problem.answer}"
            for row, problem in zip(rows, problems, strict=True)
        ]
        assert got[f"entropy_{name}"] == pytest.approx(np.mean(entropies), rel=1e-9)
        assert got[f"accuracy_{name}"] == pytest.approx(np.mean(right))


# --- the model by the default recipe


@pytest.fixture(scope="module")
def held_out(additions: AdditionsModel) -> dict[int, dict[str, float]]:
    """Figures of 200 problems that training did not see, by number of terms."""
    model = AutoModelForCausalLM.from_pretrained(additions.directory).eval()
    return {
        terms: evaluate(
            model,
            WORDS,
            random_problems(200, seed=1_000_003 + terms, min_terms=terms, max_terms=terms),
        )
        for terms in range(2, 9)
    }


def test_the_model_has_learned_to_add(held_out: dict[int, dict[str, float]]) -> None:
    for figures in held_out.values():
        assert figures["step_probability"] > 0.95
        assert figures["sampled_right"] > 0.8
        assert figures["accuracy_all"] > 0.9
        assert figures["entropy_all"] < 0.6


def test_uncertainty_shrinks_as_sums_are_written(held_out: dict[int, dict[str, float]]) -> None:
    for terms in (6, 7, 8):
        figures = held_out[terms]
        assert figures["entropy_none"] > 1.3
        assert figures["entropy_none"] > figures["entropy_half"] + 0.03
        assert figures["entropy_half"] > figures["entropy_all"] + 0.5
        assert figures["accuracy_none"] < 0.7 < figures["accuracy_all"]


def test_the_posterior_without_reasoning_is_honest(additions: AdditionsModel) -> None:
    """Its surprise at the true answers is its own entropy, up to the noise of 400 problems."""
    model = AutoModelForCausalLM.from_pretrained(additions.directory).eval()
    problems = random_problems(400, seed=77, min_terms=6, max_terms=8)
    ids = [WORDS.encode(problem.question + CUE.rstrip()) for problem in problems]
    with torch.no_grad():
        posterior = model(torch.tensor(ids)).logits[:, -1].double().log_softmax(-1).numpy()
    right = [WORDS.encode(f" {problem.answer}")[0] for problem in problems]
    surprise = -posterior[np.arange(len(right)), right]
    entropy = -(np.exp(posterior) * posterior).sum(axis=1)
    noise = np.std(surprise - entropy) / np.sqrt(len(problems))
    assert abs(np.mean(surprise - entropy)) < 0.15 + 5 * noise
