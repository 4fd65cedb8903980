"""Engines that do not start: the cause and what helps in one line, and the log in a file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm.score.cli import main
from vllm.score.errors import ScoreModeError, ScoreModeUnavailable

PAIR = ["--context", "a", "--target", " b"]
Broken = Callable[..., Path]


@pytest.fixture
def broken(model_dir: Callable[..., Path], tmp_path: Path) -> Broken:
    """`broken(config fields, without=...)`: a copy of a good model with changes."""

    def make(fields: dict[str, Any] | str | None = None, without: str = "nothing") -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_dir("llama"), folder)
        for path in folder.glob(without):
            path.unlink()
        config = folder / "config.json"
        if isinstance(fields, str):
            config.write_text(fields)
        elif fields is not None:
            config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return folder

    return make


def last_line(capsys: Any, *arguments: object) -> str:
    """What the command says last; before it there are no tracebacks and no results."""
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err, err
    line: str = err.strip().splitlines()[-1]
    assert line.startswith("vllm-score: "), err
    return line


def log_of(line: str) -> Path:
    found = re.search(r"; the whole log is (\S+\.log)$", line)
    assert found, line
    return Path(found[1])


# Config fields, what is deleted, the cause, and what helps.
FOLDERS: list[tuple[Any, str, str, str]] = [
    ('{"model_type": "llama", ', "nothing", "not a valid JSON file", "mend its config.json"),
    ({"num_attention_heads": 3}, "nothing", r"hidden size \(128\) is not a multiple", "mend its"),
    ({"num_hidden_layers": "two"}, "nothing", "'num_hidden_layers' expected int, got", "mend its"),
    ({"model_type": "frob"}, "nothing", "model type `frob`", "mend its config.json"),
    (None, "*token*", "has no tokenizer in its folder", "name another with --tokenizer"),
]


@pytest.mark.parametrize(("fields", "without", "cause", "cure"), FOLDERS, ids=lambda v: str(v)[:30])
def test_a_folder_that_cannot_be_read(
    broken: Broken, capsys: Any, fields: Any, without: str, cause: str, cure: str
) -> None:
    line = last_line(capsys, "sequence", broken(fields, without), *PAIR)
    assert re.search(cause, line) and re.search(cure, line)


def test_a_single_file(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    line = last_line(capsys, "perplexity", tmp_path / "m.gguf", "--text", "a b")
    assert "m.gguf' is a single file" in line and "name the folder" in line


# Refused by vLLM in this process, before it loads anything.
EARLY = [
    ({"architectures": ["FrobForCausalLM"]}, [], r"\['FrobForCausalLM'\] are not", "causal"),
    (
        {"architectures": ["BertModel"], "model_type": "bert"},
        [],
        "runner generate",
        "model that generates text",
    ),
    ({}, ["--quantization", "awk"], "Unknown quantization method: awk", "leave --quantization out"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("fields", "options", "cause", "cure"), EARLY, ids=lambda v: str(v)[:30])
def test_what_vllm_refuses(
    broken: Broken, capsys: Any, fields: Any, options: list[str], cause: str, cure: str
) -> None:
    line = last_line(capsys, "perplexity", broken(fields), "--text", "a b c", *options)
    assert re.search("^vllm-score: vLLM does not start '.*/model': .*" + cause, line)
    assert re.search(cure, line) and len(line) < 1000
    log = log_of(line)
    text = log.read_text()
    assert "Traceback (most recent call last):" in text and re.search(cause, text)
    log.unlink()


@pytest.mark.engine
def test_debug_shows_the_error_as_it_is(broken: Broken, capsys: Any) -> None:
    model = broken({"architectures": ["FrobForCausalLM"]})
    with pytest.raises(ValueError, match="FrobForCausalLM") as raised:
        main(["sequence", str(model), *PAIR, "--debug"])
    assert not isinstance(raised.value, ScoreModeError)
    # The flag ends with the command.
    assert "the whole log is" in last_line(capsys, "sequence", model, *PAIR)


@pytest.mark.engine
def test_the_lm_eval_model_says_it_too(broken: Broken) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    with pytest.raises(ScoreModeError) as found:
        VLLMScoreLM(str(broken()), max_model_len=4096)
    line = str(found.value)
    assert re.search(r"max_model_len \(4096\).*; shorten max_model_len to what the model", line)
    log_of(line).unlink()


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    program = "from vllm.score.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.engine
@pytest.mark.parametrize(
    ("without", "options", "environment", "causes", "cures"),
    [
        # In this process: the engine runs there.
        ("*.safetensors", [], {}, ["Cannot find any model weights"], ["fetch the model's"]),
        # In the engine's process, whose words are in the log only.
        (
            "nothing",
            ["-tp", "4"],
            {"VLLM_CPU_OMP_THREADS_BIND": "0"},
            ["doesn't match local world size 4"],
            ["VLLM_CPU_OMP_THREADS_BIND", "lower --tensor-parallel-size"],
        ),
    ],
    ids=["no weights", "tensor parallel"],
)
def test_an_engine_that_fails_while_it_starts(
    broken: Broken,
    without: str,
    options: list[str],
    environment: dict[str, str],
    causes: list[str],
    cures: list[str],
) -> None:
    done = run_command("sequence", broken(without=without), *PAIR, *options, **environment)
    assert done.returncode == 1 and done.stdout == ""
    begins, line = done.stderr.splitlines()
    assert begins.startswith("Starting vLLM with '")
    assert all(text in line for text in (*causes, *cures)), line
    log = log_of(line)
    assert causes[0] in log.read_text() and "INFO" in log.read_text()
    log.unlink()


def interrupted(program: str, *arguments: str, after: float = 0) -> tuple[int, str]:
    """Exit code and errors of a program that gets Ctrl-C, some seconds after its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it runs in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_an_interruption_while_vllm_is_imported_is_one_line() -> None:
    program = "from vllm_score_command import main; print(flush=True); main()"
    code, errors = interrupted(program, "sequence", *PAIR, after=1)
    assert (code, errors.splitlines()[-1]) == (130, "vllm-score: interrupted")
    assert "Traceback" not in errors


def test_an_interruption_ends_what_waits_for_a_process_that_has_gone() -> None:
    waiting = "threading.Event().wait()"
    program = (
        "import atexit, threading, vllm_score_command as command\n"
        "command.SECONDS_TO_END = 1\n"
        f"atexit.register(lambda: {waiting})\n"
        "with command.interruptible('vllm-score'):\n"
        "    try:\n"
        "        print(flush=True)\n"
        f"        {waiting}\n"
        "    finally:\n"
        f"        {waiting}\n"
    )
    assert interrupted(program) == (130, "vllm-score: interrupted\n")


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as it is where vLLM has not loaded the plugin."""
    from vllm.score import armed
    from vllm.score.cli import eig, model, perplexity, sequence

    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("something was made or started")

    monkeypatch.setattr(armed, "APPLICATIONS", [])
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    for module, name in (
        (model, "open_llm"),
        (perplexity, "embedded_model"),
        (sequence, "embedded_model"),
        (eig.additions, "additions_model"),
    ):
        monkeypatch.setattr(module, name, begun)


@pytest.mark.parametrize("command", [["perplexity"], ["eig"], ["sequence", *PAIR]], ids=str)
def test_commands_ask_before_anything_begins(off: None, capsys: Any, command: list[str]) -> None:
    line = last_line(capsys, *command)
    assert "score mode is off in the front end: VLLM_PLUGINS is 'others'" in line


@pytest.mark.engine
def test_python_asks_before_anything_begins(llm: Any, off: None) -> None:
    from vllm.score import score
    from vllm.score.eig import expected_information_gain_reasoning
    from vllm.score.integrations.lm_eval import VLLMScoreLM
    from vllm.score.perplexity import perplexity
    from vllm.score.processor import SequenceProcessor

    ways: list[Callable[[], Any]] = [
        lambda: score(llm, ["a b"]),
        lambda: perplexity(llm, "a b"),
        lambda: VLLMScoreLM("no such model"),
        lambda: VLLMScoreLM.from_llm(llm),
        lambda: SequenceProcessor(llm=llm),
        lambda: expected_information_gain_reasoning(llm, ["7+4="]),
    ]
    for way in ways:
        with pytest.raises(ScoreModeUnavailable, match="VLLM_PLUGINS is 'others'"):
            way()
