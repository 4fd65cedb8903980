"""The scripts that evaluate tasks of lm-eval under scalers, started as a user does."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "eig"
SCRIPTS = ["eval_eig.sh", "eval_eig_fast.sh", "eval_eig_precision.sh", "eval_eig_comparative.sh"]
EIG = "expected_information_gain_reasoning"


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_bash_and_slurm_can_read_them(script: str) -> None:
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)
    if script == "common.sh":
        return
    lines = (EXAMPLES / script).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    headers = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    # Slurm reads them up to the first command; whose account it is, nobody else knows.
    assert headers and max(headers) < first and lines[first] == "set -euo pipefail"
    assert not any(re.search("account|partition", lines[i]) for i in headers)
    assert os.access(EXAMPLES / script, os.X_OK)


def bash(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """With the programs of this environment."""
    names = ("MODEL", "TASK", "GEN_KWARGS", "MODEL_ARGS", "SAMPLE_LENGTH", "MAX_GEN_TOKS")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**kept, "PATH": path, **variables},
    )


@pytest.mark.parametrize("folder", [EXAMPLES, EXAMPLES.parents[1]])
def test_a_copy_that_slurm_runs_finds_the_rest(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copy(EXAMPLES / SCRIPTS[0], tmp_path / "slurm_script")
    done = bash(Path(copy), "M", SLURM_SUBMIT_DIR=str(folder))
    assert done.returncode == 1
    assert done.stderr == "give MODEL and TASK, or neither: MODEL=M TASK=\n"


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Path:
    """The folder that local_task.py writes, with a model trained for a moment only."""
    from vllm.score.tiny import additions
    from vllm.score.tiny.additions import AdditionsRecipe

    brief = partial(
        additions.additions_model, tmp_path, recipe=AdditionsRecipe(steps=5, sequences=8)
    )
    monkeypatch.setattr(additions, "additions_model", brief)
    folder = tmp_path / "tasks"
    assert run("local_task.py", monkeypatch, folder, "--problems", "0") == 1
    assert "--problems is 0; it must be at least 1" in capsys.readouterr().err
    assert run("local_task.py", monkeypatch, folder, "--problems", "3") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert (Path(line) / "config.json").is_file()
    return folder


@pytest.mark.engine
def test_a_task_made_on_the_spot_is_evaluated(
    task: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    rows = [json.loads(line) for line in (task / "additions.jsonl").read_text().splitlines()]
    for row in rows:
        terms = re.findall("[0-9]", row["question"])
        assert sum(map(int, terms)) == int(row["answer"])
    assert len(rows) == 3
    done = bash(
        EXAMPLES / "eval_eig_fast.sh",
        str(model_dir("llama")),
        "additions",
        "--limit",
        "2",
        INCLUDE_PATH=str(task),
        MODEL_ARGS="dtype=float32,max_model_len=256,kv_cache_memory_bytes=67108864",
        GEN_KWARGS="beam_size=2,mc_samples=2,sample_length=8,max_tokens_thinking=8",
        OUTPUT=str(tmp_path / "found"),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
        LMEVAL_LOG_LEVEL="INFO",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "exact_match" in done.stdout and f"max_gen_toks=32768,scale_func_name={EIG}" in done.stderr
    )
    # max_gen_toks is longer than the model: clipped, once said.
    assert done.stderr.count("max_gen_toks is 32768, as long as max_model_len=256 or") == 1
    assert "Decisions of this process: {'decisions': " in done.stderr
    assert re.search(r"decisions +[1-9]", done.stderr) and "continue rate" in done.stderr

    (results,) = (tmp_path / "found").rglob("results_*.json")
    (samples,) = (tmp_path / "found").rglob("samples_*.jsonl")
    texts = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(texts) == 2
    value = json.loads(results.read_text())["results"]["additions"]["exact_match,last_number"]
    assert run("compare.py", monkeypatch, tmp_path / "found", "eig-fast") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "task", "metric", "value", "±", "stderr", "characters"]
    name, shown, metric, number, _, characters = line.split()
    assert (name, shown, metric) == ("eig-fast", "additions", "exact_match,last_number")
    assert (float(number), float(characters)) == (
        pytest.approx(value, abs=1e-4),
        pytest.approx(sum(map(len, texts)) / 2, abs=0.06),
    )
    assert run("compare.py", monkeypatch, tmp_path / "found", "nothing") == 1
    assert "has no results_*.json" in capsys.readouterr().err
