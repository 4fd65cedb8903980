"""The README's first example as a script, pasted, in vLLM's default processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import token_logprobs

ROOT = Path(__file__).parents[2]
TEXT = "The capital of France is Paris."
GUARD = 'if __name__ == "__main__":'


def example(model: Path) -> str:
    """The code, with a model; nothing is compiled, and the other tests keep their memory."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "score(llm" in block)
    assert 'LLM(model="MODEL")' in code and TEXT in code and GUARD in code
    settings = "kv_cache_memory_bytes=128 << 20, enforce_eager=True"
    return code.replace('"MODEL"', f'"{model}", {settings}')


def start(script: Path, code: str) -> subprocess.Popen[str]:
    script.write_text(code)
    ours = ("VLLM_ENABLE", "VLLM_WORKER", "VLLM_LOGGING", "TORCH_COMPILE", "PYTHON")
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={k: v for k, v in os.environ.items() if not k.startswith(ours)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_it_runs_and_without_the_guard_says_what_is_missing(
    model_dir: Callable[..., Path], reference: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = model_dir("llama")
    code = example(model)
    guarded = start(tmp_path / "guarded.py", code + "    print('values', *values.tolist())\n")
    bare = start(tmp_path / "bare.py", code.replace(GUARD, "if True:"))

    out, err = guarded.communicate(timeout=500)
    assert guarded.returncode == 0, err[-3000:]
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    (line,) = (line for line in out.splitlines() if line.startswith("values "))
    values = np.array(line.split()[1:], dtype=np.float64)
    # The model's weights are float32, which vLLM's default rounds to bfloat16.
    np.testing.assert_allclose(values, token_logprobs(reference("llama", ids), ids), atol=0.5)

    _, err = bare.communicate(timeout=500)
    if bare.returncode or not torch.cuda.is_available():  # on a CPU vLLM spawns its processes
        assert bare.returncode == 1
        last = err.strip().splitlines()[-1]
        assert str(tmp_path / "bare.py") in last and f"below `{GUARD}`" in last
