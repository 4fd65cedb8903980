"""The embedded model, by a recipe of seconds: made once, whole or not at all; and its baselines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.embedded import (
    EmbeddedModel,
    Phase,
    Recipe,
    embedded_model,
    unigram_perplexity,
)
from vllm.score.tiny.training import default_cache_dir

SMALL = Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    phases=(Phase(32, 16, 150),),
    learning_rate=1e-2,
)
# The same call in another process; it says what it got.
SCRIPT = f"""
import json, sys
from pathlib import Path
from vllm.score.tiny.embedded import Phase, Recipe, embedded_model
model = embedded_model(Path(sys.argv[1]), progress=False, recipe={SMALL!r})
print(json.dumps([str(model.directory), dict(model.facts)]))
"""


def _start(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(cache)], stdout=subprocess.PIPE, text=True
    )


def _wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the other process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which a process was killed in the middle of making the model."""
    cache = tmp_path_factory.mktemp("cache")
    process = _start(cache)
    _wait_for(lambda: list((cache / "embedded").glob(f".{SMALL.key()}.*")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list((cache / "embedded").glob(".*")), "nothing was left behind: killed too late"
    assert not (cache / "embedded" / SMALL.key()).exists()
    return cache


@pytest.fixture(scope="module")
def model(killed: Path) -> EmbeddedModel:
    """Made in the cache of the killed run, by two processes at once."""
    left = set((killed / "embedded").glob(".*"))
    process = _start(killed)
    _wait_for(lambda: set((killed / "embedded").glob(".*")) - left, process)
    mine = embedded_model(killed, progress=False, recipe=SMALL)
    theirs, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    # The other made it, this one waited: both have the same, down to the seconds it took.
    assert json.loads(theirs) == [str(mine.directory), mine.facts]
    return mine


def test_nothing_is_left_but_the_model(model: EmbeddedModel, killed: Path) -> None:
    names = {path.name for path in (killed / "embedded").iterdir()}
    assert names - {f"{SMALL.key()}.lock"} == {SMALL.key()}
    folder = killed / "embedded" / SMALL.key()
    assert json.loads((folder / "recipe.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(SMALL))
    )


def test_the_second_call_reads_what_the_first_made(
    model: EmbeddedModel, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.directory.rglob("*")}
    again = embedded_model(killed, recipe=SMALL)
    assert again.facts == model.facts
    assert np.array_equal(again.train_counts, model.train_counts)
    assert before == {path: path.stat().st_mtime_ns for path in model.directory.rglob("*")}
    assert capsys.readouterr().err == ""


def test_facts_against_hugging_face_in_float64(model: EmbeddedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    text = model.held_out_text.read_bytes().decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == model.facts["held_out_tokens"]
    assert len(text.encode()) == model.facts["held_out_bytes"]

    loaded = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float64).eval()
    assert sum(p.numel() for p in loaded.parameters()) == model.facts["parameters"]
    total, count = 0.0, 0
    for start in range(0, len(ids), 2048):
        window = torch.tensor(ids[start : start + 2048])
        with torch.no_grad():
            logprobs = loaded(window[None]).logits[0].log_softmax(-1)
        total -= float(logprobs[range(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    perplexity = math.exp(total / count)
    assert model.facts["held_out_perplexity"] == pytest.approx(perplexity, rel=1e-6)

    unigram = model.unigram_perplexity(ids[1:])
    assert model.facts["held_out_unigram_perplexity"] == pytest.approx(unigram, rel=1e-12)
    assert perplexity < unigram < model.uniform_perplexity() == 512.0


def test_counts_are_those_of_the_training_text(model: EmbeddedModel) -> None:
    assert model.train_counts.shape == (512,)
    text = model.facts["training_text"]
    assert model.train_counts.sum() == text["tokens"]
    assert model.train_counts[0] == model.train_counts[1] == text["files"]  # a BOS, an EOS each
    assert model.facts["training_tokens_seen"] == 32 * 16 * 150


def test_a_model_with_a_file_missing_is_not_used(model: EmbeddedModel, tmp_path: Path) -> None:
    target = tmp_path / "embedded" / SMALL.key()
    target.parent.mkdir()
    os.symlink(model.directory.parent, target)
    assert embedded_model(tmp_path, recipe=SMALL).directory == target / "model"
    target.unlink()
    (target / "model").mkdir(parents=True)
    (target / "facts.json").write_text("{}")
    impossible = dataclasses.replace(SMALL, held_out_fraction=2.0)
    target.rename(target.parent / impossible.key())
    with pytest.raises(ScoreModeError, match=r"held_out_fraction must be .*got 2\.0"):
        embedded_model(tmp_path, progress=False, recipe=impossible)
    # The failed attempt left no half-made folder either.
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ScoreModeError, match=r"cannot be made in .*file.*set VLLM_SCORE_CACHE"):
        embedded_model(blocked, progress=False, recipe=SMALL)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SCORE_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("VLLM_SCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "vllm-score"


def test_the_default_recipe_gives_a_model_for_contexts_of_2048() -> None:
    recipe = Recipe()
    assert recipe.max_position_embeddings >= 2048
    assert max(phase.sequence_length for phase in recipe.phases) == 2048


# --- the unigram baseline against straightforward code in float64

V = 7
ids_of = st.lists(st.integers(0, V - 1), min_size=1, max_size=40)


def count(tokens: list[int], vocab_size: int = V) -> np.ndarray:
    return np.bincount(np.array(tokens, dtype=np.int64), minlength=vocab_size)


@given(train=st.lists(st.integers(0, V - 1), max_size=60), held_out=ids_of)
def test_unigram_perplexity_is_the_textbook_one(train: list[int], held_out: list[int]) -> None:
    seen = Counter(train)
    product = 1.0
    for token in held_out:
        product *= ((seen[token] + 1) / (len(train) + V)) ** (1 / len(held_out))
    assert unigram_perplexity(held_out, count(train)) == pytest.approx(1 / product, rel=1e-12)


def test_without_training_text_unigram_is_uniform() -> None:
    assert unigram_perplexity([0, 3, 3], np.zeros(V, dtype=np.int64)) == pytest.approx(V)


def test_on_its_own_training_text_it_tends_to_the_entropy() -> None:
    # p = 1/2, 1/4, 1/4: entropy 1.5 bits; with many tokens the smoothing no longer shows.
    tokens = [0, 0, 1, 2] * 100_000
    result = unigram_perplexity(tokens, count(tokens, 3))
    assert result == pytest.approx(2**1.5, rel=1e-5)


def test_large_counts_do_not_overflow() -> None:
    counts = np.full(2, 2**62 - 1, dtype=np.int64)
    counts[1] //= 2
    assert unigram_perplexity([0], counts) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "token_ids is empty"),
        ([0, 7], r"token_ids\[1\] is 7, outside the vocabulary 0\.\.6"),
        ([-1], r"token_ids\[0\] is -1, outside"),
        ([0.5], r"token_ids must be integers, got 0\.5 at \[0\]"),
        ([[1, 2]], r"token_ids must be integers, got \[1, 2\] at \[0\]"),
        ([True], r"token_ids must be integers, got True at \[0\]"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(token_ids: list, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        unigram_perplexity(token_ids, np.ones(V, dtype=np.int64))


@pytest.mark.parametrize(
    "counts", [np.ones((2, 2), dtype=int), np.ones(3), np.array([1, -1]), np.array([], dtype=int)]
)
def test_counts_that_are_none_are_refused(counts: np.ndarray) -> None:
    with pytest.raises(ScoreModeError, match="counts has shape"):
        unigram_perplexity([0], counts)
