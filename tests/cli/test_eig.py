"""`vllm-score eig`: what it refuses, and real runs against float64 of Hugging Face."""

from __future__ import annotations

import json
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import Field

from tests.helpers import token_logprobs
from vllm.score.checks import Whole, describe, limits_of, settings
from vllm.score.cli import main
from vllm.score.cli.eig import make_options, make_rule
from vllm.score.cli.inputs import Questions, read_questions
from vllm.score.eig import RULES, FixedBudget, Options, rules
from vllm.score.eig.options import parameters_of


@pytest.fixture
def refusal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refusal(*arguments)`: the one line that the command ends with, before any engine."""
    from vllm.score.cli import model

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(model, "open_llm", started)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["eig", *map(str, arguments)])
        assert exit_.value.code in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.strip().splitlines()
        assert re.match("vllm-score( eig)?: ", line)
        return line

    return run


Q = ["M", "--question", "7+4="]
THRESHOLD = ["--scaler", "entropy_threshold_reasoning"]
OPTIONS: list[tuple[list[str], str]] = [
    (["M"], "no question; give --question TEXT or --file PATH"),
    ([*Q, "--file", "q.jsonl"], "--file and --question each name questions"),
    ([*Q, "--question-column", "q"], "--question-column is 'q', but no file"),
    ([*Q, "--answer-column", "q"], "--answer-column is 'q', but no file"),
    ([*Q, "--choices-column", "q"], "--choices-column is 'q', but no file"),
    ([*Q, "--model", "N"], "two models.*'M'.*'N'"),
    (["--tokenizer", "T"], "--tokenizer is 'T', but no model"),
    ([*Q, "--scaler", "entropy_treshold_reasoning"], "did you mean 'entropy_threshold_reasoning'"),
    (
        [*Q, *THRESHOLD, "--mc-samples", "3"],
        "--mc-samples is '3', which entropy.*not take",
    ),
    ([*Q, *THRESHOLD, "--estimator", "mutual_information"], "--estimator is .*not take"),
    ([*Q, "--entropy-threshold", "1"], "--entropy-threshold is '1', which expected.*not take"),
    ([*Q, "--strict", "--beam-size", "21"], "beam_size must be .* from 1 to 20, got '21'"),
    ([*Q, "--lambda-cost", "nan"], "lambda_cost must be a number from 0 to 10, got 'nan'"),
    ([*Q, "--estimator", "entropy"], "estimator must be .*mutual_information, got 'entropy'"),
    (
        [*Q, "--estimator", "mutual_information", "--mc-samples", "1"],
        "mc_samples is 1; .*least 2",
    ),
    ([*Q, "--candidates", "bean"], "candidates 'bean' is unknown .did you mean 'beam'"),
    ([*Q, "--decide-at", "once"], "decide_at must be one of step, end, got 'once'"),
    ([*Q, "--length-normalization", "words"], "length_normalization must be .*bytes, got 'words'"),
    ([*Q, "--answer-cue", r"\n"], r"cue is '\\n'; give a text that asks"),
    ([*Q, "--think-end", ""], "--think-end is ''"),
    ([*Q, "--max-tokens-thinking", "-1"], "max_tokens_thinking must be .*least 0.* got -1"),
    ([*Q, "--seed", "-1"], "seed must be a whole number of at least 0.* got -1"),
    ([*Q, "--concurrency", "0"], "--concurrency must be .* at least 1, got 0"),
    ([*Q, "--dtype", "float31"], "--dtype: invalid choice: 'float31'"),
    ([*Q, "--output", "o.csv"], r"--output 'o.csv'.*\.jsonl"),
    ([*Q, "--plot", "o.gif"], r"--plot 'o.gif'.*\.png or \.svg"),
    (["M", "--file", "q.txt"], "'q.txt' is of no kind that holds questions.*csv"),
    (["M", "--file", "nowhere.csv"], "'nowhere.csv' does not exist"),
    ([*Q, "--skip-empty"], "--skip-empty is given, but no file is named; add --file"),
    (["./nowhere", "--question", "a"], "'./nowhere' does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), OPTIONS, ids=lambda value: str(value)[:60])
def test_options_are_refused(
    refusal: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert re.search(message, refusal(*arguments))


def test_files_without_questions_are_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    def message(name: str, content: str, *options: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return refusal("M", "--file", tmp_path / name, *options)

    assert "'question' is not in " in message("a.csv", "q,answer\na,b")
    assert "its columns are 'q', 'answer'" in refusal("M", "--file", tmp_path / "a.csv")
    assert "column 'gold' is not in" in message("b.csv", "question\na\n", "--answer-column", "gold")
    assert "has no rows" in message("c.csv", "question\n")
    assert "row 2: 'question' is missing (it has 'x')" in message(
        "d.jsonl", '{"question": "a"}\n{"x": 1}\n'
    )
    assert "line 2 is not JSON" in message("e.jsonl", '{"question": "a"}\n{"con')
    assert "line 1 is [1]; give an object" in message("f.jsonl", "[1]")
    assert "cannot be read" in message("g.parquet", "no parquet")
    assert "row 1: 'c' is 'a;b'; give a list" in message(
        "h.csv", "question,c\nx,a;b\n", "--choices-column", "c"
    )
    many = json.dumps({"question": "a", "c": [str(i) for i in range(21)]})
    assert "21 choices, more than --beam-size 20 (at most 20)" in message(
        "i.jsonl", many, "--choices-column", "c"
    )
    two = json.dumps({"question": "a", "c": ["x", "y"]})
    assert "each name candidates" in message(
        "j.jsonl", two, "--choices-column", "c", "--candidates", "beam"
    )
    table = tmp_path / "j.jsonl"
    assert "is the text itself" in refusal("M", "--file", table, "--output", table)


def test_questions_that_a_model_cannot_take(
    refusal: Callable[..., str], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_dir("llama")  # 2,048 positions, no chat template
    assert "leaves no room for a step" in refusal(model, "--question", "漢" * 2000)
    assert "the chat template does not take" in refusal(model, "--question", "a", "--chat")
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "a", "c": ["x", "y\\nz"]}\n')
    line = refusal(model, "--file", rows, "--choices-column", "c")
    assert re.search(r"q\.jsonl, row 1: answers: 'y\\nz' holds the end", line)


def read(files: list[Path], **options: Any) -> Questions:
    """The questions that the command reads."""
    given = {"question": [], "chat": False, "skip_empty": False, **options}
    columns = dict.fromkeys(("question_column", "answer_column", "choices_column"))
    found = read_questions(Namespace(file=list(map(str, files)), **columns, **given))
    assert found is not None
    return found


def test_tables_of_every_kind_say_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": "a\nb", "answer": "1"}, {"question": "c", "answer": ""}]
    (tmp_path / "q.csv").write_text('question,answer\n"a\nb",1\nc,\n')
    (tmp_path / "q.tsv").write_text('question\tanswer\n"a\nb"\t1\nc\t\n')
    (tmp_path / "q.jsonl").write_text('{"question": "a\\nb", "answer": 1}\n\n{"question": "c"}\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        found = read([tmp_path / f"q.{ending}"])
        assert (found.texts, found.gold, found.choices) == (["a\nb", "c"], ["1", None], [])
    files = [tmp_path / "q.csv", tmp_path / "q.parquet"]
    (tmp_path / "more.json").write_text('[{"question": ""}, {"question": null}, {"question": "d"}]')
    found = read([*files, tmp_path / "more.json"], skip_empty=True)
    assert (found.texts, found.gold) == (["a\nb", "c"] * 2 + ["d"], ["1", None] * 2 + [None])
    assert found.names[-1].endswith("more.json, row 3")
    (note,) = found.notes
    assert note.startswith("2 rows were skipped, without a value in 'question'")
    (message,) = read([], question=["a"], chat=True).given
    assert message == [{"role": "user", "content": "a"}]


def test_the_parameters_are_those_of_the_rules(caplog: Any) -> None:
    def make(name: str, choices: Any = (), **given: Any) -> Any:
        return make_rule({"scaler": name, "strict": False, **given}, choices)

    for name, kind in RULES.items():
        known = kind.parameters()
        for key, parameter in known.items():
            if parameter.annotation not in (int, float):
                continue
            high = limits_of(parameter.rebuild_annotation())["le"]
            rule = make(name, **{key: str(high + 1)})
            assert getattr(rule, key) == high
            others = set(known) - {key}
            assert all(getattr(rule, other) == known[other].default for other in others)
            assert f"{key} is '{high + 1}', and must be" in caplog.text
    assert make_options({"answer_end": "EOS", "answer_cue": r"\nA:"}, []).answer_end is None
    choices = make("fixed_budget_reasoning", [["a"], ["b", "c"]])
    assert choices.beam_size == 2 and choices.cost is None


@settings
class Own(FixedBudget):
    """A rule of a user."""

    patience: Annotated[Whole, Field(ge=1, le=77, description="steps to take")] = 3


def shown(capsys: Any) -> str:
    """The help of the command."""
    with pytest.raises(SystemExit) as exit_:
        main(["eig", "-h"])
    assert exit_.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_names_parameters_and_bounds(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is shown before vLLM is imported, which has them written down once more."""
    monkeypatch.setenv("COLUMNS", "200")
    for own in (False, True):
        if own:
            monkeypatch.setitem(RULES, "own", Own)
        else:
            monkeypatch.delitem(sys.modules, "vllm.score.eig.rules")
        text = shown(capsys)
        monkeypatch.setitem(sys.modules, rules.__name__, rules)
        for rule in RULES.values():
            for name, field in rule.parameters().items():
                words = rf"--{name.replace('_', '-')} [A-Z]+ [^;]+; {re.escape(describe(field))}"
                assert re.search(rf"{words} \(default: {field.default}\)", text)
        for name in parameters_of(Options).keys() - {"prompts", "seed", "metrics"}:
            assert f"--{name.replace('_', '-')} " in text
        described = "steps to take; a whole number from 1 to 77 (default: 3)"
        assert (described in text) == own == ("fixed_budget_reasoning, own" in text)


CUE, END = "\nSo: ", "."


@pytest.mark.engine
def test_a_run_has_hugging_faces_entropies(
    llm: Any,
    model_dir: Callable[..., Path],
    reference: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    from transformers import AutoTokenizer

    from vllm.score.cli import model

    # The engine that runs already has what the command would start another with.
    given: dict[str, Any] = {}
    monkeypatch.setattr(model, "open_llm", lambda _, **o: given.update(o) or llm)
    choices = [["yes", "no"], ["a list", "12", "none of them"], ["A", "B"]]
    rows = [
        {"q": f"The value of {number}", "gold": gold, "c": each}
        for number, (each, gold) in enumerate(zip(choices, ["no", "12.0", None], strict=True))
    ]
    questions, output, plot = (tmp_path / name for name in ("q.jsonl", "t.jsonl", "t.html"))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eig", model_dir("llama"), "--file", questions, "--question-column", "q"]
    command += ["--answer-column", "gold", "--choices-column", "c", "--lambda-cost", 0]
    command += ["--answer-cue", r"\nSo: ", "--answer-end", END, "--max-tokens-thinking", 8]
    command += ["--mc-samples", 2, "--sample-length", 4, "--output", output, "--plot", plot]
    main([*map(str, command), "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "Reasoning" in err and f"wrote {plot}" in err and "<svg" in plot.read_text()
    assert found["parameters"]["beam_size"] == 3 and found["parameters"]["temperature"] == 1.0

    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    traces = [json.loads(line) for line in output.read_text().splitlines()]
    steps = [step for trace in traces for step in trace["steps"]]
    for row, trace, each in zip(rows, traces, choices, strict=True):
        head = tokenizer.encode(row["q"])
        assert trace["prompt_token_ids"] == head and trace["question"] == row["q"]
        assert len(head) + 8 + 4 + 64 <= given["context_length"]
        position = trace["steps"][-1]["position"]
        assert position == trace["reasoning_tokens"] <= 8
        for step in trace["steps"]:
            context = head + trace["reasoning_token_ids"][: step["position"]]
            total = []
            for answer in each:
                ids = context + tokenizer.encode(CUE + answer + END, add_special_tokens=False)
                total.append(token_logprobs(reference("llama", ids), ids)[len(context) - 1 :].sum())
            posterior = np.exp(np.array(total) - np.logaddexp.reduce(total))
            entropy = -(posterior * np.log(posterior)).sum()
            assert step["entropy"] == pytest.approx(entropy, abs=1e-4)
            shares = [candidate["posterior"] for candidate in step["candidates"]]
            assert shares == pytest.approx(list(posterior), abs=1e-4)
        assert trace["answer"] == each[int(np.argmax(posterior))]

    right = [traces[0]["answer"] == "no", traces[1]["answer"] == "12"]
    summary, metrics = found["summary"], found["metrics"]
    assert (summary["questions"], summary["judged"], summary["correct"]) == (3, 2, sum(right))
    assert summary["decisions"] == metrics["decisions"] == len(steps)
    assert metrics["tokens_scored"] == sum(step["tokens_scored"] for step in steps)
    assert metrics["continued"] == sum(step["go_on"] for step in steps)
    assert [each["answer"] for each in found["questions"]] == [t["answer"] for t in traces]
    assert [each["gold"] for each in found["questions"]] == ["no", "12.0", None]


KEPT: list[Any] = []  # engines of a session stay alive


@pytest.mark.engine
def test_without_a_model_it_adds_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, llm: Any
) -> None:
    """On a model that has been trained for a moment only: its answers are poor, and all is real."""
    from vllm.score.cli import model
    from vllm.score.tiny import additions
    from vllm.score.tiny.additions import AdditionsRecipe

    brief = partial(
        additions.additions_model, tmp_path, recipe=AdditionsRecipe(steps=20, sequences=16)
    )
    monkeypatch.setattr(additions, "additions_model", brief)
    start = model.open_llm

    def keep(*arguments: Any, **options: Any) -> Any:
        KEPT.append(start(*arguments, **options))
        return KEPT[-1]

    monkeypatch.setattr(model, "open_llm", keep)
    monkeypatch.setattr(logging.getLogger("vllm_score.eig"), "propagate", False)
    command = ["eig", "--quiet", "--max-tokens-thinking", "2"]
    main([*command, "--beam-size", "2", "--mc-samples", "2"])
    out, _ = capsys.readouterr()
    assert re.search(r"questions +32 ", out) and re.search(r"correct .* of 32, 95 %", out)
    assert "information gain" in out and "continue rate" in out and "candidates" in out
    assert KEPT[-1].llm_engine.model_config.max_model_len <= 9 + 2 + 2 + 64


@pytest.mark.engine
def test_a_run_without_answers_ends_with_what_to_change(
    llm: Any,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    caplog: Any,
) -> None:
    from vllm.score.cli import model
    from vllm.score.eig import expected_information_gain_reasoning

    monkeypatch.setattr(model, "open_llm", lambda *_, **__: llm)
    # As on a machine where all 30 seconds have passed.
    meter = rules.Meter.__init__
    monkeypatch.setattr(
        rules.Meter, "__init__", lambda self, reasoner, limit=None: meter(self, reasoner, -1.0)
    )
    with pytest.raises(SystemExit) as exit_:
        main(["eig", str(model_dir("llama")), "--question", "7+4=", "--json", "--quiet"])
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["questions"][0]["answer"] is None
    assert re.search(
        "vllm-score: 1 of 1 questions have no answer; 1 stopped at the time limit.*"
        "raise --max-computation-time, or lower --concurrency",
        err.strip().splitlines()[-1],
    )
    expected_information_gain_reasoning(llm, ["7+4=", "1+1="], use_tqdm=False)
    assert "2 of 2 questions have no answer" in caplog.text
    assert "raise max_computation_time, or lower concurrency" in caplog.text
