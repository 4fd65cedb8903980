"""The example scripts, started as a user does."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_perplexity import run_program
from tests.report.conftest import sliding_losses

EXAMPLES = Path(__file__).parents[2] / "examples"
PLAIN, OPTIMIZED = "score_mode_perplexity.py", "score_mode_perplexity_optimized.py"
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 60
FLAGS = ("model", "dataset", "dataset-config", "context-length", "stride", "text")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, str, str]]:
    """`run(script, *arguments)` in this process: exit code, standard output, standard error."""

    def run_script(script: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run_script


@pytest.mark.parametrize(("script", "sizes"), [(PLAIN, (2048, 512)), (OPTIMIZED, (512, 256))])
def test_the_help_names_every_flag_and_default(run, script, sizes):
    code, out, _ = run(script, "-h")
    assert code == 0
    for flag in FLAGS:
        assert f"--{flag} " in out
    assert "--quantization" in out
    assert re.findall(r"default:\s(\d+)\)", out) == [str(size) for size in sizes]


@pytest.mark.parametrize("script", [PLAIN, OPTIMIZED])
def test_an_error_is_one_line(run, script):
    code, out, err = run(script, "--model", "./nowhere", "--text", "a b")
    assert (code, out) == (1, "")
    (line,) = err.strip().splitlines()
    assert line.startswith(f"{script}: model './nowhere' does not exist")


@pytest.mark.engine
def test_a_run_in_little_memory_prints_hugging_faces_perplexity(model_dir, reference):
    from transformers import AutoTokenizer

    model = model_dir("llama", max_position_embeddings=512)
    done = run_program(sys.executable, EXAMPLES / OPTIMIZED, "--model", model, "--text", TEXT)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    assert len(ids) > 1024

    def log_softmax(window: list[int]) -> object:
        return reference("llama", window, max_position_embeddings=512)

    expected = math.exp(sliding_losses(log_softmax, ids, 512, 256).mean())
    found = re.match(r"Perplexity ([\d.]+) ", done.stdout)
    assert found is not None, done.stdout
    # The scripts leave the dtype to vLLM, which takes bfloat16.
    assert float(found[1]) == pytest.approx(expected, rel=0.02)
    assert "windows of 512, stride 256" in done.stdout
