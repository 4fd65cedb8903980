"""The patches are in place for a wheel and for an editable install."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.test_install import Environment, environment, source, wheel  # noqa: F401
from tests.patches.findings import check_findings
from tests.patches.processes import run_script

ORDER = "from vllm import SamplingParams"


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled() -> Iterator[None]:
    """The kernels do not matter here, and take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SCORE_BUILD", "none")
        yield


def check_install(environment: Environment, requirement: tuple[object, ...], score: Path) -> None:  # noqa: F811
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *requirement)
    found = run_script("import_order.py", ORDER, python=environment.python)
    assert Path(found["vllm"]) == environment.site / "vllm" / "__init__.py"
    assert Path(found["score"]) == score / "__init__.py"
    check_findings(found)


def test_a_wheel(environment: Environment, wheel: Path) -> None:  # noqa: F811
    check_install(environment, (wheel,), environment.site / "vllm" / "score")


def test_an_editable_install(environment: Environment, source: Path) -> None:  # noqa: F811
    check_install(environment, ("-e", source), source / "vllm" / "score")
