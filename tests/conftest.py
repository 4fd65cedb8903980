"""Shared engines. Starting vLLM costs seconds, so a configuration is started once a session.

All engines of a session stay alive: the first one that dies takes vLLM's process groups along.
"""

from __future__ import annotations

import itertools
import os
import sys

# Before vLLM is imported: one process, no compilation, a KV cache that fits a small machine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Engines in other processes must not inherit this one's threads.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# Tests that run side by side have a core each: two engines' threads on the same cores wait for
# each other.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

MAX_MODEL_LEN = 2048
SMALL_CHUNKS = 256
# All engines of a session share the memory of a small machine; a GPU has enough.
SMALL_CACHE = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 128 << 20}


# Begun first, so that none of them runs alone at the end.
LONGEST = (
    "patches/test_engine_core.py",
    "patches/test_switches.py",
    "patches/test_import_order.py",
    "perplexity/test_engine.py",
    "engine/test_tensor_parallel.py",
    "cli/test_doctor.py",
    "examples/test_eval_eig.py",
    "tiny/test_additions.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests marked `cuda` are skipped where there is no GPU."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def engines_start_after_numba() -> Iterator[None]:
    """Stock vLLM 0.32.0 on a CPU cannot start an engine once numba is loaded, as n-gram speculation
    loads it: it asks every object in every module for its `__dict__`, and one in this module of
    numba's answers with a function to whatever it is asked for.
    """
    yield
    sys.modules.pop("llvmlite.binding.ffi", None)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_dir(architecture, **options)`: a folder with a random model, made once.

    `scheme` (and `quantise_head`) among the options make a quantised copy of the model without
    them, `dequantised=True` the plain float32 model that this copy stands for.
    """
    from tests.support.dequantised import dequantise_model
    from tests.support.quantised import quantise_model
    from vllm.score.tiny.random_models import make_random_model

    made: dict[Any, Path] = {}
    root = tmp_path_factory.mktemp("models")
    numbers = itertools.count()

    def make(architecture: str, **options: Any) -> Path:
        key = (architecture, repr(sorted(options.items())))
        if key not in made:
            folder = root / f"{architecture}-{next(numbers)}"
            if options.pop("dequantised", False):
                made[key] = dequantise_model(make(architecture, **options), folder)
            elif scheme := options.pop("scheme", None):
                head = options.pop("quantise_head", False)
                plain = make(architecture, **options)
                made[key] = quantise_model(plain, folder, scheme, quantise_head=head)
            else:
                made[key] = make_random_model(folder, architecture, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The default model that has learned additions; made once for all processes."""
    from vllm.score.tiny.additions import additions_model

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return additions_model(shared / "additions", progress=False)


@pytest.fixture(scope="session")
def engine(model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """`engine(architecture, **options)`: a running `LLM`, started once for equal options."""
    from vllm import LLM

    running: dict[Any, Any] = {}

    def start(
        architecture: str = "llama", model_options: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        key = (
            architecture,
            repr(model_options),
            tuple(sorted((k, repr(v)) for k, v in options.items())),
        )
        if key not in running:
            settings: dict[str, Any] = {
                "dtype": "float32",
                "enforce_eager": True,
                "gpu_memory_utilization": 0.3,
                **SMALL_CACHE,
                "distributed_executor_backend": "uni",
                "max_model_len": MAX_MODEL_LEN,
                "max_num_batched_tokens": SMALL_CHUNKS,
                "max_num_seqs": 64,
                **options,
            }
            running[key] = LLM(str(model_dir(architecture, **(model_options or {}))), **settings)
        return running[key]

    return start


@pytest.fixture(scope="session")
def llm(engine: Callable[..., Any]) -> Any:
    """A tiny float32 Llama whose steps are smaller than most prompts, prefix cache on."""
    return engine("llama")


@pytest.fixture(scope="session")
def reference(model_dir: Callable[..., Path]) -> Callable[..., np.ndarray]:
    """`reference(architecture, ids)`: float64 log-softmax of Hugging Face, [n, V]."""
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    def log_softmax(architecture: str, ids: list[int], **options: Any) -> np.ndarray:
        folder = str(model_dir(architecture, **options))
        if folder not in loaded:
            loaded[folder] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64
            ).eval()
        with torch.no_grad():
            logits = loaded[folder](torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1).numpy()

    return log_softmax
