"""lm-eval finds the model by itself, whatever is imported first, and by its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.tasks import LETTERS

ORDERS = {
    "torch first": "import torch; import lm_eval",
    "lm-eval first": "import lm_eval.models; assert 'torch' not in sys.modules; import torch",
    "our package": "import vllm.score.integrations.lm_eval",
}
LOOK_UP = """
from lm_eval.api.registry import get_model, model_registry
assert get_model("vllm-score").__name__ == "VLLMScoreLM"
assert get_model("vllm-score") is get_model("vllm-score")
assert "hf" in model_registry and "vllm" in model_registry
import vllm_score_lm_eval; vllm_score_lm_eval.register()  # nothing happens twice
"""


def run_python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Not in the checkout: what a build left there would be read before what is installed."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("order", ORDERS)
def test_the_model_is_known(order: str, tmp_path: Path) -> None:
    autoload = "0" if order == "our package" else "1"
    done = run_python(ORDERS[order] + LOOK_UP, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert done.returncode == 0, done.stderr


def test_torch_alone_imports_neither_vllm_nor_lm_eval(tmp_path: Path) -> None:
    names = "{'vllm', 'vllm.score', 'lm_eval', 'vllm_score_lm_eval'}"
    code = f"import torch; print(sorted({names} & set(sys.modules)))"
    done = run_python(code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert done.stdout.strip() == "['vllm_score_lm_eval']", done.stderr


def test_an_older_lm_eval_breaks_nothing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    import lm_eval.api.registry
    import lm_eval.models

    import vllm_score_lm_eval

    monkeypatch.delattr(lm_eval.api.registry, "model_registry")
    vllm_score_lm_eval._add(lm_eval.models)
    assert "lm-eval 0.4.10 or newer" in caplog.text


@pytest.mark.engine
def test_the_command(
    tasks: Path,
    model_dir: Callable[..., Path],
    hf: Any,
    evaluate: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """`lm_eval --model vllm-score` in a process of its own, as a user types it."""
    arguments = f"pretrained={model_dir('llama')},dtype=float32,max_model_len=256"
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "vllm-score"]
    command += ["--model_args", arguments + ",kv_cache_memory_bytes=67108864"]
    command += ["--tasks", LETTERS, "--include_path", str(tasks), "--limit", "4"]
    command += ["--output_path", str(tmp_path / "found"), "--log_samples"]
    variables = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "LMEVAL_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert LETTERS in done.stdout
    (results,) = (tmp_path / "found").rglob("results_*.json")
    (samples,) = (tmp_path / "found").rglob("samples_*.jsonl")
    expected = evaluate(hf, [LETTERS], limit=4)
    found = json.loads(results.read_text())
    assert found["results"][LETTERS]["acc,none"] == expected["results"][LETTERS]["acc,none"]
    rows = {r["doc_id"]: r for r in map(json.loads, samples.read_text().splitlines())}
    for sample in expected["samples"][LETTERS]:
        answers = rows[sample["doc_id"]]["resps"]
        for ((logprob, greedy),), ((other, flag),) in zip(answers, sample["resps"], strict=True):
            assert float(logprob) == pytest.approx(other, abs=1e-4)
            assert str(greedy) == str(flag)
