"""`vllm-score perplexity`: what it refuses, and a real run as users start it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.conftest import sliding_losses
from vllm.score.cli import main

TEXT = "The quick brown fox jumps over the lazy dog, again & again: 漢字!\n" * 40


@pytest.fixture
def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """`refusal(*arguments)`: the one line that the command ends with, before any engine."""
    from vllm.score.cli import model

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(model, "open_llm", started)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["perplexity", *map(str, arguments)])
        assert exit_.value.code in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert re.match("vllm-score( perplexity)?: ", lines[0])
        return lines[0]

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# Options alone: neither model nor text are looked at.
OPTIONS = [
    (["M", "--text", "a b", "--stride", "600", "--context-length", "512"], "stride is 600.*512"),
    (["M", "--text", "a b", "--context-length", "1"], "context_length must be .*at least 2, got 1"),
    (["M", "--text", "a b", "--stride", "0"], "stride must be .*at least 1, got 0"),
    (["M", "--text", "a b", "--limit", "0"], "--limit must be .* of at least 1.*got 0"),
    (["M", "--text", "a b", "-tp", "0"], "--tensor-parallel-size must be .* at least 1, got 0"),
    (
        ["M", "--text", "a b", "--max-num-seqs", "-1"],
        "--max-num-seqs must be .* at least 1, got -1",
    ),
    (["M", "--text", "a b", "--convention", "gptg"], "'gptg' is unknown .did you mean 'gptq'"),
    (["M", "--text", "a b", "--convention", "gptq:x"], "'gptq:x'.* number of tokens"),
    (
        ["M", "--text", "a b", "--bos", "maybe"],
        "bos must be one of auto, start, window, never, got 'maybe'",
    ),
    (["M", "--text", "a b", "--dtype", "float31"], "--dtype: invalid choice: 'float31'.*bfloat16"),
    (
        ["M", "--text", "a b", "--gpu-memory-utilization", "90"],
        "--gpu-memory-utilization must be .*got 90",
    ),
    (["M", "--text", "a b", "--resume"], "--resume .*without --store"),
    (["M", "--text", "a b", "--output", "tokens.csv"], r"--output 'tokens.csv'.*\.parquet"),
    (["M", "--text", "a b", "--plot", "loss.jpg"], r"--plot 'loss.jpg'.*\.png or \.html"),
    (["M", "--text", "a b", "--output", "no/where/t.parquet"], "does not exist; make it first"),
    (["M", "--text", "a b", "--file", "t.txt"], "--text and --file each name a text"),
    (["M", "--text", "a b", "--text-column", "t"], "--text-column is 't'.*no columns"),
    (["M", "--text", "a b", "--skip-empty"], "--skip-empty is given, but .*no columns"),
    (["M", "--dataset-config", "c"], "--dataset-config is 'c'.*--dataset"),
    (["M", "--split", "train"], "--split is 'train'.*--dataset"),
    (["M", "--file", "-", "--file", "t.txt"], "--file - .*other files"),
    (["M"], "a model is named and no text; give --file"),
    (["M", "--model", "N", "--text", "a b"], "two models.*'M'.*'N'"),
    (["-"], "--file -"),
    (["--quantization", "awq", "--text", "a b"], "--quantization is 'awq', but no model"),
    (["M", "--file", "nowhere.txt"], "'nowhere.txt' does not exist"),
    (["M", "--text", "a b", "--max-num-seq", "3"], "--max-num-seq 3 .did you mean --max-num-seqs"),
    (["M", "--text", "a b", "--stride", "many"], "--stride: invalid int value: 'many'"),
    (["M", "--text", "a b", "--config", "no.yaml"], "no.yaml"),
    (["M", "--text", "a b", "--skip-tokenizer-init"], "--skip-tokenizer-init is given"),
]


@pytest.mark.parametrize(("arguments", "message"), OPTIONS, ids=lambda value: str(value)[:50])
def test_options_are_refused(refusal, arguments, message):
    assert re.search(message, refusal(*arguments))


def test_a_place_that_cannot_be_written_is_refused(refusal, tmp_path, text_file):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "is a directory" in refusal("M", "--file", text_file, "--plot", folder)
    table = tmp_path / "table.parquet"
    assert "is the text itself" in refusal("M", "--file", table, "--output", table)
    assert "is a file; name a directory" in refusal("M", "--file", text_file, "--store", text_file)


def test_a_store_with_a_run_is_refused_without_resume(refusal, tmp_path, text_file):
    (tmp_path / "manifest.json").write_text("{}")
    message = refusal("M", "--file", text_file, "--store", tmp_path)
    assert "already holds a run; add --resume" in message


def test_models_that_are_not_there_are_refused(refusal, tmp_path):
    text = ("--text", "a b c")
    assert "'./nowhere' does not exist" in refusal("./nowhere", *text)
    assert "without a config.json" in refusal(tmp_path, *text)
    # HF_HUB_OFFLINE stands for a machine without network.
    message = refusal("somebody/something", *text)
    assert "'somebody/something'" in message and "no such folder or model on this" in message
    assert "HF_ENDPOINT" in message
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    assert "nonsense" in refusal(tmp_path, *text)


def test_a_folder_that_vllm_takes_for_a_pattern_is_refused(refusal, model_dir, tmp_path):
    for name in ("m[1]", "m1"):
        (tmp_path / name).symlink_to(model_dir("llama"))
    message = refusal(tmp_path / "m[1]", "--text", "a b c")
    assert "m[1]' is a folder whose name vLLM takes for a pattern" in message
    (tmp_path / "link").symlink_to(tmp_path / "m[1]")
    assert "token of context" in refusal(tmp_path / "link", "--text", "a")


def test_texts_that_cannot_be_read_are_refused(refusal, model_dir, tmp_path, monkeypatch):
    model = model_dir("llama")
    message = refusal(model, "--dataset", "somebody/something")
    assert "'somebody/something' is not on this machine" in message
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "is empty" in refusal(model, "--file", tmp_path / "empty.txt")
    assert "is empty" in refusal(model, "--text", "")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    assert "byte 0 is not UTF-8" in refusal(model, "--file", tmp_path / "latin.txt")
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "t.parquet")
    assert "its columns are 'body'" in refusal(model, "--file", tmp_path / "t.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    assert "line 1 is not JSON" in refusal(model, "--file", tmp_path / "broken.jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "(standard input) is empty" in refusal(model, "--file", "-")


def test_windows_beyond_the_model_are_refused(refusal, model_dir, text_file):
    model = model_dir("llama")  # 2,048 positions
    message = refusal(model, "--file", text_file, "--context-length", 4096)
    assert re.search("--context-length.* is 4096.*2048.*give 2048 or less", message)
    message = refusal(model, "--file", text_file, "--convention", "gptq:4096")
    assert re.search("gptq.* has windows of 4096 tokens.*2048.*ask for 'gptq:2048'", message)


def test_texts_too_short_are_refused(refusal, model_dir, text_file):
    model = model_dir("llama")
    assert "token of context" in refusal(model, "--text", "a")
    message = refusal(model, "--file", text_file, "--limit", 900, "--convention", "gptq")
    assert re.search("convention 'gptq': .*only 900 tokens.*2048", message)


def test_a_bos_that_the_tokenizer_lacks_is_refused(refusal, model_dir, tmp_path, text_file):
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refusal(model, "--file", text_file, "--bos", "start")
    assert "tokenizer has none" in message


def test_faults_at_the_end_of_a_text_are_refused(refusal, model_dir, tmp_path, monkeypatch):
    model = model_dir("llama")
    late = TEXT.encode() * 400 + b"\xff"
    (tmp_path / "late.txt").write_bytes(late)
    assert "byte 1088000 is not UTF-8" in refusal(model, "--file", tmp_path / "late.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(late)))
    assert "standard input: byte 1088000 is not UTF-8" in refusal(model, "--file", "-")
    rows = '{"text": "some text"}\n' * 999
    (tmp_path / "late.jsonl").write_text(rows + "{}\n")
    assert "row 1000: 'text' is missing" in refusal(model, "--file", tmp_path / "late.jsonl")


def test_several_files_after_one_option(refusal, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text('{"text": "a"}\n{}\n')
    Path("c.jsonl").write_text("{}\n")
    last = "file 'a.jsonl', row 2: 'text' is missing"
    for files in (
        ["--file", "a.jsonl", "b.jsonl", "c.jsonl"],
        ["--file=a.jsonl", "b.jsonl", "--file", "c.jsonl"],
    ):
        assert last in refusal("M", *files)
        assert last in refusal(*files, "M")
        # All three are read.
        line = refusal("M", *files, "--skip-empty")
        assert "column 'text' is not in file 'c.jsonl'; it has no columns" in line


def test_help_is_short_of_nothing(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["perplexity", "-h"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--dataset", "--file", "--convention", "--store", "--json", "--plot"):
        assert option in text


def check_log(text: str, scoring: str, wrote: Sequence[Path]) -> None:
    """Where standard error is no terminal: each long step in two lines; no bar, nothing of vLLM."""
    begins, ready, *lines = text.splitlines()
    assert begins.startswith("Starting vLLM with '")
    assert re.fullmatch(r"vLLM is ready \(\d+\.\d s\)", ready)
    assert lines[0] == scoring and re.fullmatch(r"Scored \(\d+\.\d s\)", lines[1])
    assert lines[2:] == [f"wrote {path}" for path in wrote]


def run_program(*command: object, timeout: int = 280, **variables: str) -> Any:
    """A program as a user starts it: none of the settings that tests make for themselves."""
    ours = ("VLLM_", "TORCH_COMPILE", "HF_HUB_OFFLINE", "PYTHONWARNINGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [str(part) for part in command],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.engine
def test_a_run_gives_hugging_faces_perplexity(model_dir, reference, tmp_path, text_file):
    from transformers import AutoTokenizer

    model = model_dir("llama")
    tokens, page = tmp_path / "tokens.parquet", tmp_path / "loss.html"
    program = Path(sys.executable).with_name("vllm-score")
    options = ["--context-length", 256, "--stride", 64, "--dtype", "float32", "--json"]
    files = ["--output", tokens, "--plot", page, "--store", tmp_path / "store"]
    done = run_program(program, "perplexity", model, "--file", text_file, *options, *files)
    assert done.returncode == 0, done.stderr[-3000:]

    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    losses = sliding_losses(lambda window: reference("llama", window), ids, 256, 64)
    report = json.loads(done.stdout)
    assert report["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert report["figures"][0]["provenance"]["scored_tokens"] == len(ids) - 1
    assert report["baselines"] == {}
    assert pq.read_table(tokens)["logprob"].to_numpy() == pytest.approx(-losses, abs=5e-5)
    assert page.read_text().startswith("<!doctype html>")
    check_log(done.stderr, f"Scoring {text_file}", wrote=(tokens, page))


@pytest.mark.engine
def test_without_arguments_the_embedded_model_reads_its_held_out_text(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm.score.tiny.embedded import Phase, Recipe, embedded_model

    # A model of seconds in the place of the one that takes a minute.
    small = Recipe(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        phases=(Phase(32, 16, 150),),
        learning_rate=1e-2,
    )
    made = embedded_model(tmp_path, progress=False, recipe=small)
    place = made.directory.parent.rename(made.directory.parent.with_name(Recipe().key()))

    program = Path(sys.executable).with_name("vllm-score")
    done = run_program(
        program, "perplexity", "--limit", 3000, "--json", VLLM_SCORE_CACHE=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ids = tokenizer((place / "held_out.txt").read_text(encoding="utf-8"))["input_ids"][:3000]
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)

    def log_softmax(window: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([window])).logits[0].log_softmax(-1).numpy()

    losses = sliding_losses(log_softmax, ids, 2048, 512)
    assert report["figures"][0]["provenance"]["dtype"] == "float32"
    assert report["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)

    assert report["baselines"]["uniform"] == 512
    counts = np.load(place / "train_counts.npy") + 1
    frequencies = -np.log(counts[ids[1:]] / counts.sum())
    assert report["baselines"]["unigram"] == pytest.approx(np.exp(frequencies.mean()), rel=1e-9)
    # Trained: better than a guess by frequencies, which is better than a blind one.
    assert report["perplexity"] < report["baselines"]["unigram"] < 512
