from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eig.exact import ExactModel, character_tokenizer
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import (
    BeamCandidates,
    ExtractedCandidates,
    GivenCandidates,
    NoCandidates,
    SampledCandidates,
    State,
    candidate_source,
)
from vllm.score.eig.records import Batch, Continuation, Next, Sample
from vllm.score.errors import ScoreModeError

TOKENIZER = character_tokenizer("\n=ab 0123456789,.")
EOS = TOKENIZER.eos_token_id
FORMAT = AnswerFormat("=")
SEEDS = st.integers(0, 10**6)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def propose(source: Any, reasoner: Any, *, count: int, form: AnswerFormat = FORMAT, text="a"):
    """What a source proposes behind a reasoning of this text."""
    state = State(ids(text), text)
    return asyncio.run(source.propose(reasoner, state, count, form))


def all_answers(
    model: ExactModel, format: AnswerFormat, depth: int, context: list[int]
) -> dict[str, float]:
    """Every answer within `depth` tokens, its likeliest log-probability in nats."""
    found: dict[str, float] = {}
    for length in range(1, depth + 1):
        for tokens in itertools.product(model.tokens, repeat=length):
            texts = [TOKENIZER.decode([t for t in tokens[:n] if t != EOS]) for n in (-1, length)]
            ended = [format.end and format.end in text for text in texts]
            complete = ended[1] or tokens[-1] == EOS or (format.end == "" and length == depth)
            if not complete or ended[0] or EOS in tokens[:-1]:
                continue
            answer = (texts[1].split(format.end)[0] if format.end else texts[1]).strip()
            # "a" before the end "aa" reads as "", then "a".
            legible = not format.end or (answer + format.end).split(format.end)[0] == answer
            if answer and legible:
                rows = [
                    model.log_softmax((*context, *tokens[:i]))[tokens[i]] for i in range(length)
                ]
                found[answer] = max(found.get(answer, -np.inf), float(np.sum(rows)))
    return found


@given(
    seed=SEEDS,
    tokens=st.sampled_from(["\nab", "\na ", "ab", "\na"]),
    end=st.sampled_from(["\n", None, "", "aa", "b\n"]),
    depth=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_a_beam_that_holds_everything_is_exact(seed, tokens, end, depth):
    form = AnswerFormat("=", end)
    model = ExactModel(TOKENIZER, [EOS, *ids(tokens)], seed)
    truth = all_answers(model, form, depth, ids("a="))
    expected = sorted(truth, key=lambda answer: -truth[answer])[:20]
    if not expected:
        with pytest.raises(NoCandidates, match=f"within {depth} tokens behind the cue '='"):
            propose(BeamCandidates(depth), model, count=20, form=form)
        return
    # 27 hypotheses live before the last of 4 steps where nothing but EOS ends one.
    if len(ids(tokens)) ** (depth - 1) <= 9:
        assert propose(BeamCandidates(depth), model, count=20, form=form) == expected


def textbook_beam(row: Any, context: list[int], count: int, depth: int, ends: Any) -> list[Any]:
    """(log-probability, tokens) of complete hypotheses, best first, over the full vocabulary.

    `row(ids)` is the float64 log-softmax behind `ids`.
    """
    live, done = [(0.0, ())], []
    for _ in range(depth):
        extended = []
        for logprob, tokens in live:
            for token, step in enumerate(row([*context, *tokens])):
                extended.append((logprob + step, (*tokens, token)))
        extended.sort(key=lambda h: (-h[0], h[1]))
        best = extended[: 2 * count]
        done += [h for h in best if ends(h[1])]
        live = [h for h in best if not ends(h[1])][:count]
    return sorted(done, key=lambda h: (-h[0], h[1]))


@given(seed=SEEDS, count=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_narrow_beam_is_a_beam_search(seed, count):
    model = ExactModel(TOKENIZER, [EOS, *ids("\nab0123")], seed)
    found = textbook_beam(
        lambda context: model.log_softmax(tuple(context)),
        ids("a="),
        count,
        5,
        lambda tokens: tokens[-1] in (EOS, *ids("\n")),
    )
    texts = [TOKENIZER.decode(tokens[:-1]) for logprob, tokens in found if logprob > -np.inf]
    expected = [text for text in dict.fromkeys(texts) if text][:count]
    if expected:
        assert propose(BeamCandidates(5), model, count=count) == expected


class Ties:
    """All tokens but those of the end are equally likely; the end follows two of them."""

    tokenizer = TOKENIZER

    async def run(self, batch: Batch) -> list[Any]:
        return [self._next(work) for work in batch.work if isinstance(work, Next)]

    def _next(self, work: Next) -> Any:
        likely = ids("\n") if len(work.context) == 4 else ids("210ba")
        order = np.array(likely[: work.top])
        return order, np.full(len(order), -np.log(len(likely)), np.float32)


def test_equals_are_ordered_by_token_ids():
    every = ["".join(pair) for pair in itertools.product("ab012", repeat=2)]
    assert propose(BeamCandidates(3), Ties(), count=8) == every[:8]


def test_the_search_stops_when_nothing_can_overtake():
    model = ExactModel(TOKENIZER, [EOS, *ids("\nab")], 3, sharpness=0.5)
    patient = propose(BeamCandidates(12), model, count=3)
    steps = len(model.batches)
    assert steps < 12
    model.batches.clear()
    assert propose(BeamCandidates(steps), model, count=3) == patient
    for batch in model.batches:
        assert 1 <= len(batch.work) <= 3
        assert all(work.top == 6 for work in batch.work)
    assert batch.work[0].context[:2] == ids("a=")


def test_a_beam_has_at_most_twenty_tokens_a_step():
    few = character_tokenizer("\n=a")
    model = ExactModel(few, [0, 1, 3], 1)
    state = State([3], "a")
    asyncio.run(BeamCandidates(2).propose(model, state, 15, FORMAT))
    assert {work.top for batch in model.batches for work in batch.work} == {len(few)}


@given(seed=SEEDS, count=st.integers(1, 6), samples=st.sampled_from([None, 1, 7]))
@settings(max_examples=20, deadline=None)
def test_samples_by_frequency_then_order(seed, count, samples):
    model = ExactModel(TOKENIZER, [EOS, *ids("\nab ")], seed)
    work = Sample(ids("a="), samples or 2 * count, 5, stop=("\n",))
    (draws,) = asyncio.run(model.run(Batch([work])))
    texts = [draw.text.split("\n")[0].strip() for draw in draws if draw.finished]
    texts = [text for text in texts if text]
    ranked = sorted(set(texts), key=lambda text: (-texts.count(text), texts.index(text)))
    source = SampledCandidates(samples=samples, max_tokens=5)
    if ranked:
        assert propose(source, model, count=count) == ranked[:count]
        assert model.batches[-1] == Batch([work])
    else:
        with pytest.raises(NoCandidates, match=r"SampledCandidates found no answer that comes to"):
            propose(source, model, count=count)


def test_samples_without_an_end_are_cut_by_max_tokens():
    model = ExactModel(TOKENIZER, ids("ab"), 5)  # never ends
    with pytest.raises(NoCandidates, match="the end-of-sequence token within 2 tokens"):
        propose(SampledCandidates(9, 2), model, count=4, form=AnswerFormat("=", None))
    answers = propose(SampledCandidates(30, 2), model, count=9, form=AnswerFormat("=", ""))
    assert set(answers) <= {"aa", "ab", "ba", "bb"}
    assert model.batches[-1].work[0].stop == ()


class Texts:
    """Continuations read from a list."""

    tokenizer = TOKENIZER

    def __init__(self, *texts: str, finished: bool = True) -> None:
        self.draws = [Continuation(ids(text), text, finished) for text in texts]

    async def run(self, batch: Batch) -> list[Any]:
        (work,) = batch.work
        assert isinstance(work, Sample) and work.stop == ()
        return [self.draws]


def extracted(reasoning: str, *texts: str, kind: Any = "numeric", count=8, finished=True):
    source = ExtractedCandidates(kind, fallback=None)
    return propose(source, Texts(*texts, finished=finished), count=count, text=reasoning)


def test_what_most_texts_end_with_comes_first():
    texts = ["3 + 4 = 7", "3 + 4 = 8", "4 + 3 is 7.0", "so 7"]
    assert extracted("3, 4: ", *texts) == ["7", "8", "3", "4"]
    assert extracted("3, 4: ", *texts, count=2) == ["7", "8"]


def test_a_number_may_begin_in_the_reasoning_and_end_in_the_continuation():
    assert extracted("a 1", "2 b", "2, ", "3 b") == ["12", "13"]
    assert extracted("a 1", " b", ",000") == ["1", "1000"]
    # Settled numbers of the reasoning are counted once, not once a continuation.
    assert extracted("5 5 6 b", " 7", " 8 7", " ") == ["7", "6", "5", "8"]
    assert extracted("5 b", " 8 7", " 8 7") == ["7", "8", "5"]


def test_numbers_that_were_cut_off_do_not_count():
    assert extracted("", "5 12", "5 1", finished=False) == ["5"]
    assert extracted("", "5 12", "5 12") == ["12", "5"]


def test_boxes_and_patterns():
    assert extracted("", r"\boxed{2}", r"\boxed{3} \boxed{2.0}", kind="boxed") == ["2", "3"]
    assert extracted("", "a1", "b1 ", "b2", kind=re.compile("b([0-9])")) == ["1", "2"]
    # An answer with the end in it could never be complete.
    assert extracted("", "b\nb", "bb", kind=re.compile("b\\s*b")) == ["b b", "bb"]


def test_the_fallback_fills_up():
    model = ExactModel(TOKENIZER, [EOS, *ids("\nab")], 1)
    beams = propose(BeamCandidates(), model, count=4)
    source = ExtractedCandidates(samples=2, sample_length=3)
    assert propose(source, model, count=4) == beams  # "a" and "b" are no numbers
    one = propose(ExtractedCandidates(samples=2, sample_length=3), model, count=4, text="7 b")
    beams = propose(BeamCandidates(), model, count=4, text="7 b")
    assert one == ["7", *beams][:4]
    two = propose(ExtractedCandidates(samples=2, sample_length=3), model, count=4, text="7 8 b")
    assert sorted(two) == ["7", "8"]


def test_the_fallback_does_not_repeat_an_answer():
    source = ExtractedCandidates(fallback=GivenCandidates(["7.0", "8"]))
    assert propose(source, Texts("7 "), count=4, text="a ") == ["7", "8"]


def test_nothing_to_extract():
    never = ExactModel(TOKENIZER, ids("ab"), 5)
    with pytest.raises(NoCandidates, match="no answer of kind 'numeric' in the reasoning or in 4"):
        propose(ExtractedCandidates(fallback=None), never, count=4)
    with pytest.raises(NoCandidates, match="BeamCandidates found no answer"):
        propose(ExtractedCandidates(), never, count=4)
    assert propose(ExtractedCandidates(), never, count=4, text="7 b") == ["7"]


def test_given_answers():
    source = GivenCandidates(["A", "B", "C"])
    model = ExactModel(TOKENIZER, [EOS], 1)
    assert propose(source, model, count=3) == ["A", "B", "C"]
    assert not model.batches
    with pytest.raises(ScoreModeError, match="3 answers are given, but beam_size is 2; raise"):
        propose(source, model, count=2)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "give a list of at least one"),
        ("yes", "answers is 'yes'; give a list"),
        (["a", " "], "' ' is no answer"),
        ([1], "1 is no answer"),
        (["a", "a"], "'a' is given twice"),
    ],
)
def test_given_answers_that_cannot_be_used(answers, message):
    with pytest.raises(ScoreModeError, match=message):
        GivenCandidates(answers)


def test_sources_by_name():
    assert candidate_source("beam") == BeamCandidates()
    assert candidate_source("sampled") == SampledCandidates()
    assert candidate_source("numeric") == ExtractedCandidates("numeric")
    assert candidate_source("boxed") == ExtractedCandidates("boxed")
    assert candidate_source(("A", "B")) == GivenCandidates(["A", "B"])
    pattern = re.compile("[A-D]")
    assert candidate_source(pattern) == ExtractedCandidates(pattern)
    own = SampledCandidates(3)
    assert candidate_source(own) is own


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("given", "no answers are; pass the list of answers itself"),
        (
            "beams",
            r"'beams' is unknown \(did you mean 'beam'\?\); there are beam, sampled, numeric",
        ),
        ("??", r"'\?\?' is unknown; there are beam"),
        (3, "candidates is 3; give one of"),
        (BeamCandidates, "BeamCandidates'>; give one of"),
        ([], r"answers is \[\]"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(ScoreModeError, match=message):
        candidate_source(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamCandidates(0), "max_tokens must be a whole number of at least 1, got 0"),
        (lambda: BeamCandidates(True), "max_tokens must be .* got True"),
        (lambda: SampledCandidates(0), "samples must be .* got 0"),
        (
            lambda: SampledCandidates(temperature=-1),
            "temperature must be .* at least 0, got -1",
        ),
        (lambda: SampledCandidates(top_p=0), "top_p must be .* got 0"),
        (lambda: ExtractedCandidates("number"), "kind is 'number'; it must be 'numeric'"),
        (lambda: ExtractedCandidates(re.compile(b"a")), "kind is re.compile"),
        (lambda: ExtractedCandidates(sample_length=2.5), "sample_length must be .* got 2.5"),
        (lambda: ExtractedCandidates(top_p=1.1), "top_p must be .* got 1.1"),
    ],
)
def test_sources_with_values_out_of_range(make, message):
    with pytest.raises(ScoreModeError, match=message):
        make()


class EngineReasoner:
    """The next tokens from an engine in score mode."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.tokenizer = llm, llm.get_tokenizer()

    async def run(self, batch: Batch) -> list[Any]:
        from vllm.score import score

        (top,) = {work.top for work in batch.work if isinstance(work, Next)}
        prompts = [
            {"prompt_token_ids": [*work.context, 0], "target_token_ids": [0]} for work in batch.work
        ]
        scored = score(self.llm, prompts, top=top, use_tqdm=False)
        return [(s.top_token_ids[0], s.top_logprobs[0]) for s in scored]


@pytest.mark.engine
@pytest.mark.parametrize("end", ["e", "t"])
def test_beams_on_an_engine(llm, reference, end):
    count, depth = 6, 4
    reasoner = EngineReasoner(llm)
    tokenizer = reasoner.tokenizer
    form = AnswerFormat("\nIt is: ", end)
    context = tokenizer.encode("A question about numbers.")
    cue = tokenizer.encode("\nIt is:", add_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    found = textbook_beam(
        lambda tokens: reference("llama", tokens)[-1],
        context + cue,
        count,
        depth,
        lambda tokens: tokens[-1] in special or end in tokenizer.decode(tokens),
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for _, tokens in found]
    answers = [text.split(end)[0].strip() for text in texts]
    answers = [text for text in dict.fromkeys(answers) if text and "\ufffd" not in text]
    proposed = BeamCandidates(depth).propose(reasoner, State(context), count, form)
    assert len(answers) >= count
    assert asyncio.run(proposed) == answers[:count]
