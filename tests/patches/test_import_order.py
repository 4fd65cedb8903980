"""Whatever a program imports first, it ends up with the amended vLLM."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.patches.findings import check_findings
from tests.patches.processes import run_script

pytestmark = pytest.mark.timeout(600)

ORDERS = (
    "from vllm import SamplingParams",
    "import vllm",
    "import vllm.sampling_params",
    "from vllm import LLM",
    "from vllm.score import score",
    "import vllm.v1.engine.core",
    "from vllm.v1.engine.async_llm import AsyncLLM",
    # These two are half executed when vLLM asks for plug-ins.
    "import vllm.outputs",
    "import vllm.v1.worker.gpu_model_runner",
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, pool: ThreadPoolExecutor) -> Callable[[str], Any]:
    selected = {item.name.partition("[")[2] for item in request.session.items}
    running: dict[str, Future[Any]] = {
        order: pool.submit(run_script, "import_order.py", order)
        for order in ORDERS
        if f"{order}]" in selected
    }
    return lambda order: running[order].result()


@pytest.mark.parametrize("order", ORDERS)
def test_every_patch_is_in_place_after(order: str, found: Callable[[str], Any]) -> None:
    check_findings(found(order))
