"""Whole runs with a model in numpy: interrupted and resumed, streamed, refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from tests.perplexity import slow_run
from tests.perplexity.bigram import IDENTITY, Bigram
from tests.perplexity.texts import PROSE, byte_level, byte_level_with_bos
from vllm.score.data import TextSource, as_source
from vllm.score.data.tokenize import BLOCK
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import Job, PerplexityResult, Settings, bootstrap, prepare
from vllm.score.perplexity.run import score_job
from vllm.score.perplexity.windows import Window

TEXT = PROSE[:20_000]
NAMES = ("hf-stride", "gptq:96", "llama.cpp:64", "lm-eval-rolling")


SIZES: dict[str, Any] = {"context_length": 96, "stride": 40, "group_tokens": 1000}


def job_for(
    source: Any = TEXT, tokenizer: Any = None, max_model_len: int | None = None, **options: Any
) -> Job:
    settings = Settings(**{**SIZES, **options})
    return prepare(settings, as_source(source), tokenizer or byte_level(), max_model_len)


def run(job: Job, model: Bigram | None = None, **options: Any) -> PerplexityResult:
    model = model or Bigram(len(byte_level()))
    return score_job(job, model.score, IDENTITY, use_tqdm=False, **options)


class Interrupted(Exception):
    pass


class Interrupting(Bigram):
    """Gives up after so many calls."""

    def __init__(self, size: int, calls: int) -> None:
        super().__init__(size)
        self.calls = calls

    def score(self, windows: Sequence[Window]) -> list[np.ndarray]:
        if self.calls == 0:
            raise Interrupted
        self.calls -= 1
        return super().score(windows)


@pytest.mark.parametrize("calls", [0, 1, 7, 14])
def test_resumed_is_uninterrupted_to_the_last_bit(tmp_path: Path, calls: int) -> None:
    whole_model = Bigram(len(byte_level()))
    whole = run(job_for(conventions=NAMES), whole_model)
    first = Interrupting(whole_model.size, calls)
    with pytest.raises(Interrupted):
        run(job_for(conventions=NAMES), first, store=tmp_path)
    second = Bigram(whole_model.size)
    resumed = run(job_for(conventions=NAMES), second, store=tmp_path, resume=True)
    assert resumed.figures == whole.figures
    assert resumed.tokens() == whole.tokens()
    assert first.prompts + second.prompts == whole_model.prompts  # nothing twice
    third = Bigram(whole_model.size)
    assert run(job_for(conventions=NAMES), third, store=tmp_path, resume=True).figures == (
        whole.figures
    )
    assert third.prompts == []


def test_conventions_may_be_added_later(tmp_path: Path) -> None:
    model = Bigram(len(byte_level()))
    run(job_for(), model, store=tmp_path)
    own = len(model.prompts)
    later = run(job_for(conventions=NAMES), model, store=tmp_path, resume=True)
    assert later.figures == run(job_for(conventions=NAMES)).figures
    assert model.prompts[own:] and model.prompts[own] not in model.prompts[:own]


def test_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    store, root = tmp_path / "store", Path(__file__).parents[2]
    stored: set[str] = set()
    for groups in (3, 7):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.perplexity.slow_run", str(store)],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(groups):
            assert process.stdout.readline() == "scored\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        now = {str(path) for path in store.rglob("*.parquet")}
        assert stored <= now and len(now) >= len(stored) + groups - 1
        stored = now
    result = slow_run.run(Bigram(slow_run.VOCABULARY), store)
    whole = slow_run.run(Bigram(slow_run.VOCABULARY), None)
    assert result.figures == whole.figures
    assert result.tokens() == whole.tokens()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 41}, r"settings\.stride was 40, is now 41"),
        ({"context_length": 97}, r"settings\.context_length was 96, is now 97"),
        ({"separator": " "}, r"settings\.separator was '\\n\\n', is now ' '"),
        ({"bos": "start"}, r"settings\.bos was 'auto', is now 'start'"),
        ({"max_tokens": 100}, r"settings\.max_tokens was 'all', is now 100"),
        ({"group_tokens": 999}, r"settings\.group_tokens was 1000, is now 999"),
        ({"source": TEXT + "."}, r"text\.sha256 was '[0-9a-f]{64}', is now '[0-9a-f]{64}'"),
        ({"tokenizer": "other"}, r"tokenizer\.sha256 was '[0-9a-f]{64}', is now"),
    ],
)
def test_a_change_refuses_to_resume(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(job_for(), store=tmp_path)
    if change.get("tokenizer"):
        change = {"tokenizer": byte_level_with_bos(), "bos": "auto"}
    with pytest.raises(ScoreModeError, match=message):
        run(job_for(**change), store=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"model": {"name": "b", "weights_sha256": "0"}}, "model.weights_sha256 was '0000"),
        ({"engine": {"dtype": "bfloat16"}}, "engine.dtype was 'float64', is now 'bfloat16'"),
        ({"versions": {"numpy": "0.1"}}, "versions.numpy was .*, is now '0.1'"),
    ],
)
def test_another_model_refuses_to_resume(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    run(job_for(), store=tmp_path)
    model = Bigram(len(byte_level()))
    with pytest.raises(ScoreModeError, match=message):
        score_job(job_for(), model.score, {**IDENTITY, **identity}, store=tmp_path, resume=True)
    assert model.prompts == []


@pytest.mark.parametrize("changed", ["Z" + TEXT[1:], TEXT[:10_000], TEXT[:10_000] + "Z"])
def test_a_stream_that_changed_is_noticed(tmp_path: Path, changed: str) -> None:
    """With a limit no hash is known beforehand: the prompts are compared as they are made again."""
    run(job_for(iter([TEXT]), max_tokens=10**6), store=tmp_path)
    with pytest.raises(ScoreModeError, match="text changed since the stored run"):
        run(job_for(iter([changed]), max_tokens=10**6), store=tmp_path, resume=True)


def test_a_stream_resumes_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(job_for(iter([TEXT])), Interrupting(len(byte_level()), 3), store=tmp_path)
    resumed = run(job_for(iter([TEXT])), store=tmp_path, resume=True)
    assert resumed.tokens() == run(job_for()).tokens()


def test_a_text_without_end_is_read_as_it_is_scored() -> None:
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        while True:
            read += 30_000
            yield PROSE[:30_000]

    model = Bigram(len(byte_level()))
    result = run(job_for(documents(), max_tokens=5000), model)
    assert result.provenance.scored_tokens == 4999
    assert read < 3 * BLOCK


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_AUTOCOVARIANCE_TERMS", 1000)
    monkeypatch.setattr(bootstrap.BlockBootstrap.__init__, "__defaults__", (1 << 10,))
    random, size = np.random.default_rng(0), len(byte_level())

    def score(windows: Sequence[Window]) -> list[np.ndarray]:
        return [np.full(window.num_targets, -1, dtype=np.float32) for window in windows]

    most = []
    # The first run imports. The scores of the last alone have 0.5 MB, for each plan.
    for number in (20, 20, 120):
        documents = [random.integers(size, size=1000).tolist() for _ in range(number)]
        job = job_for(documents, conventions=NAMES[1:3], separator="", group_tokens=10_000)
        tracemalloc.start()
        result = score_job(job, score, IDENTITY, use_tqdm=False)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.provenance.scored_tokens == number * 1000 - 1
    assert most[2] < most[1] + 3e5


def test_rows_of_the_result() -> None:
    result = run(job_for())
    ids = byte_level()(TEXT)["input_ids"]
    table = result.tokens()
    assert table.column_names == ["position", "token_id", "text", "logprob", "window"]
    assert table["position"].to_pylist() == list(range(1, len(ids)))
    assert table["token_id"].to_pylist() == ids[1:]
    first = len(byte_level().decode([ids[0]]))
    assert "".join(table["text"].to_pylist()) == TEXT[first:]
    logprobs = table["logprob"].to_numpy()
    assert logprobs.dtype == np.float32
    assert -logprobs.astype(float).mean() == pytest.approx(result.nll, rel=1e-12)
    assert np.all(np.diff(table["window"].to_numpy()) >= 0)


def test_parquet_file(tmp_path: Path) -> None:
    result = run(job_for(conventions="gptq:96"))
    result.write_parquet(tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").replace_schema_metadata() == result.tokens()
    metadata = pq.read_schema(tmp_path / "out.parquet").metadata
    assert json.loads(metadata[b"vllm_score.figures"]) == json.loads(json.dumps(result.to_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_json_has_every_figure() -> None:
    result = run(job_for(conventions=NAMES))
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["perplexity"] == result.perplexity
    assert len(found["figures"]) == len(result.figures)
    for figure in found["figures"]:
        provenance = figure["provenance"]
        for field in ("context_length", "stride", "bos", "scored_tokens", "text_sha256"):
            assert provenance[field] not in (None, "")
        assert provenance["tokenizer_sha256"] and provenance["dtype"] == "float64"


def test_a_missing_figure_lists_those_there() -> None:
    with pytest.raises(ScoreModeError, match=r"'nll' of convention 'gptq'.* it has: nll \(run\)"):
        run(job_for()).figure("nll", "gptq")


def test_max_tokens_scores_the_beginning() -> None:
    ids = byte_level()(TEXT)["input_ids"]
    cut = run(job_for(max_tokens=500))
    assert cut.tokens() == run(job_for(ids[:500])).tokens().set_column(
        2, cut.tokens().field("text"), cut.tokens()["text"]
    )
    assert cut.provenance.text_tokens == 500


def test_progress_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    job = job_for()
    score_job(job, Bigram(len(job.tokenizer)).score, IDENTITY)
    shown = capsys.readouterr().err
    assert "Scoring: 100%" in shown and "tok/s" in shown


def test_the_bar_shows_the_perplexity_so_far() -> None:
    shown: list[str] = []

    class Bar(tqdm):
        def refresh(self, *arguments: Any, **options: Any) -> None:
            shown.append(str(self))

    job, model = job_for(), Bigram(len(byte_level()))
    result = score_job(job, model.score, IDENTITY, use_tqdm=lambda **options: Bar(**options))
    losses = -result.tokens()["logprob"].to_numpy().astype(float)
    found = [re.search(r"perplexity ([\d.]+)", text) for text in shown]
    values = [float(match[1]) for match in found if match]
    assert len(values) > 5
    first_group = sum(targets for _, targets in model.prompts[: 1000 // 96])
    assert values[0] == pytest.approx(np.exp(losses[:first_group].mean()), rel=1e-5)
    assert values[-1] == pytest.approx(result.perplexity, rel=1e-5)
    assert len(set(values)) > 5  # it settles, group by group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 97}, "stride is 97, more than context_length 96"),
        ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
        ({"context_length": 1}, "context_length must be a whole number of at least 2, got 1"),
        ({"context_length": True}, "context_length must be a whole number .* got True"),
        ({"context_length": 96.0}, r"context_length must be a whole number .* got 96\.0"),
        ({"bos": "both"}, "bos must be one of auto, start, window, never, got 'both'"),
        ({"separator": 1}, "separator must be a text or None, got 1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1 or None, got 0"),
        ({"group_tokens": 1.5}, r"group_tokens must be a whole number .* got 1\.5"),
        ({"group_tokens": 1 << 21}, "group_tokens must be a whole number .* 1,?048,?576"),
        ({"strid": 5}, "Settings has no strid .did you mean 'stride'"),
        ({"conventions": "gtpq"}, "did you mean 'gptq'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        job_for(**options)


@pytest.mark.parametrize("source", ["", "a", [5], ["", ""]])
def test_nothing_to_score_is_an_error(source: Any) -> None:
    with pytest.raises(ScoreModeError, match="nothing can be scored"):
        run(job_for(source, separator=None))


def test_windows_longer_than_the_model() -> None:
    job_for(max_model_len=96)
    with pytest.raises(ScoreModeError, match=r"context_length .* is 96, more than the engine's"):
        job_for(max_model_len=95)
    with pytest.raises(ScoreModeError, match=r"convention 'gptq' .* 2048 .* ask for 'gptq:96'"):
        job_for(conventions="gptq", max_model_len=96)


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(ScoreModeError, match="the engine has no tokenizer"):
        prepare(Settings(), as_source(TEXT), None)


def test_token_ids_without_a_tokenizer() -> None:
    ids = byte_level()(TEXT)["input_ids"]
    job = replace(job_for(ids), tokenizer=None)
    result = run(job)
    assert result.nll == run(job_for(ids)).nll
    assert result.tokens()["text"].null_count == result.provenance.scored_tokens


@pytest.mark.parametrize("name", ["run:1", "s3:x", "a::b", "x[1]", "a=1"])
def test_stores_and_outputs_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = run(job_for(), store=name)
    resumed = run(job_for(), Interrupting(1, calls=0), store=name, resume=True)
    assert resumed.figures == whole.figures
    resumed.write_parquet(f"{name}.parquet")
    with Path(f"{name}.parquet").open("rb") as file:
        assert pq.read_table(file).cast(whole.tokens().schema) == whole.tokens()


def test_rows_without_a_text_are_counted_in_the_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [TEXT[:300], "", None, TEXT[300:900]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ScoreModeError, match="row 3: 'text' is null"):
        run(job_for(path), store=tmp_path / "not begun")
    assert not (tmp_path / "not begun").exists()
    store = tmp_path / "store"
    result = run(job_for(as_source(path, skip_empty=True)), store=store)
    assert result.nll == run(job_for([TEXT[:300], TEXT[300:900]])).nll
    assert result.notes[0].startswith("2 rows were skipped, without a value in 'text': the first")
    path.write_text("".join(json.dumps({"text": text or "x"}) + "\n" for text in texts))
    with pytest.raises(ScoreModeError, match=r"text\.sha256 was .*; text\.skip_empty was True, is"):
        run(job_for(path), store=store, resume=True)


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode() * 100 + b"\xff")
    result = run(job_for(path, max_tokens=200))
    assert result.nll == run(job_for(TEXT, max_tokens=200)).nll
    with pytest.raises(ScoreModeError, match="is not UTF-8"):
        run(job_for(path), Interrupting(1, calls=0))


@pytest.mark.parametrize(("limit", "passes"), [(None, 2), (500, 1)])
def test_the_text_is_read_to_be_checked_and_once_to_be_scored(
    limit: int | None, passes: int
) -> None:
    class Counting(TextSource):
        begun = 0

        def pieces(self) -> Iterator[tuple[int, str]]:
            self.begun += 1
            return super().pieces()

    source = Counting(TEXT)
    result = run(job_for(source, max_tokens=limit))
    assert source.begun == passes
    assert result.nll == run(job_for(max_tokens=limit)).nll


def test_of_a_text_with_a_limit_only_what_is_scored_must_be_the_same(tmp_path: Path) -> None:
    whole = run(job_for(max_tokens=500), store=tmp_path)
    shorter = run(job_for(TEXT[:10_000], max_tokens=500), store=tmp_path, resume=True)
    assert shorter.tokens() == whole.tokens()
    with pytest.raises(ScoreModeError, match="text changed since the stored run"):
        run(job_for("x" + TEXT, max_tokens=500), store=tmp_path, resume=True)


def test_resume_needs_a_store() -> None:
    with pytest.raises(ScoreModeError, match="resume=True needs store="):
        run(job_for(), resume=True)


def test_impossible_scores_are_not_stored(tmp_path: Path) -> None:
    class Broken(Bigram):
        def score(self, windows: Sequence[Window]) -> list[np.ndarray]:
            found = super().score(windows)
            found[-1][0] = np.nan
            return found

    with pytest.raises(ScoreModeError, match=r"logprobs of windows 0 to .* is nan"):
        run(job_for(), Broken(len(byte_level())), store=tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_missing_scores_are_an_error() -> None:
    class Short(Bigram):
        def score(self, windows: Sequence[Window]) -> list[np.ndarray]:
            return [found[1:] for found in super().score(windows)]

    with pytest.raises(ScoreModeError, match=r"window 0: 95 targets were sent, .* \(94,\) came"):
        run(job_for(), Short(len(byte_level())))


@pytest.mark.parametrize("bos", ["auto", "start", "window", "never"])
@pytest.mark.parametrize("separator", ["\n\n", None])
def test_a_text_that_begins_with_bos_gets_no_second_one(bos: str, separator: str | None) -> None:
    tokenizer = byte_level_with_bos()
    plain = [PROSE[:300], PROSE[400:900], PROSE[1000:1100]]
    own = [f"<|bos|>{text}" for text in plain]
    joined = separator is not None
    documents = [separator.join(own)] if separator is not None else own
    expected = []  # each token with all that a model sees before it in one long window
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        assert ids[0] == 0
        expected += [(ids[:i], ids[i]) for i in range(1, len(ids))]
    model = Bigram(len(tokenizer))
    job = job_for(own, tokenizer, bos=bos, separator=separator, context_length=2000, stride=500)
    result = run(job, model)
    losses = [-model.logprob(before, token) for before, token in expected]
    assert result.provenance.scored_tokens == len(expected)
    assert result.nll == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert [prompt[:2].count(0) for prompt, _ in model.prompts] == [1] * len(documents)
    if bos == "never":
        return
    begin = "the text begins" if joined else "3 of 3 texts begin"
    assert any(note.startswith(begin) for note in result.notes)
    assert any("inside, 2 times" in note for note in result.notes) == joined


def test_a_bos_per_window_replaces_the_texts_own() -> None:
    tokenizer = byte_level_with_bos()
    plain, own = Bigram(len(tokenizer)), Bigram(len(tokenizer))
    first = run(job_for(PROSE[:3000], tokenizer, bos="window"), plain)
    second = run(job_for("<|bos|>" + PROSE[:3000], tokenizer, bos="window"), own)
    assert own.prompts == plain.prompts
    assert first.nll == second.nll
    positions = second.tokens().column("position").to_pylist()
    assert positions == [p + 1 for p in first.tokens().column("position").to_pylist()]


def test_conventions_double_the_bos_as_their_tools_do() -> None:
    tokenizer = byte_level_with_bos()
    model = Bigram(len(tokenizer))
    text = "<|bos|>" + PROSE[:3000]
    ids = tokenizer(text)["input_ids"]
    run(job_for(text, tokenizer, conventions=["hf-stride"]), model)
    assert ids[:2] == [0, 0]
    assert any(prompt == ids[: len(prompt)] for prompt, _ in model.prompts)


def test_the_remedy_for_a_text_with_nothing_to_score_leads_somewhere() -> None:
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ScoreModeError, match="longer text, or put a BOS in front"):
        job_for("a")
    job_for("a", bos="start")
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    for bos in ("auto", "never"):
        with pytest.raises(ScoreModeError, match=r"give a longer text$"):
            job_for("a", bare, bos=bos)
    with pytest.raises(ScoreModeError, match=r"give a longer text$"):
        job_for("", bos="start")
    with pytest.raises(ScoreModeError, match="use bos='never'"):
        job_for("a", bare, bos="start")


@pytest.mark.parametrize("name", ["gptq", "llama.cpp", "exllamav3"])
def test_the_size_that_a_convention_is_offered_fits(name: str) -> None:
    text = "word " * 100
    with pytest.raises(ScoreModeError, match=f"convention '{name}'") as error:
        job_for(text, conventions=name)
    size = str(error.value).rpartition("NAME:")[2].rstrip(")")
    job_for(text, conventions=f"{name}:{size}")
    with pytest.raises(ScoreModeError, match="need at least"):
        job_for(text, conventions=f"{name}:{int(size) + 1}")
