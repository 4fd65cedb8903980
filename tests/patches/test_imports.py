"""Import hooks on modules that are still to come, half executed, or complete."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from vllm.score.patches.patch import is_complete, settle, when_imported

HALF_EXECUTED = """
from vllm.score.patches.patch import when_imported
from {hooks} import hook
when_imported(__name__, hook)
early = "stock"
import {reader}
value = "stock"
"""
READER = """
from {target} import early
"""
HOOKS = """
seen = []
def hook(module):
    seen.append(dict(vars(module)))
    module.value = "amended"
"""


@pytest.fixture
def write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[str, str], str]:
    """`write(suffix, source)`: a module of that source, to be imported under the returned name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules)
    prefix = f"hooked_{abs(hash(request.node.nodeid))}"

    def module(suffix: str, source: str) -> str:
        name = f"{prefix}_{suffix}"
        names = {part: f"{prefix}_{part}" for part in ("target", "reader", "hooks")}
        (tmp_path / f"{name}.py").write_text(source.format(**names))
        request.addfinalizer(lambda: sys.modules.pop(name, None))
        return name

    return module


def test_a_module_to_come_is_amended_by_its_import(write: Callable[[str, str], str]) -> None:
    name = write("target", "value = 'stock'")

    def hook(module: ModuleType) -> None:
        module.value = "amended"  # type: ignore[attr-defined]

    when_imported(name, hook)
    assert not is_complete(name)
    assert import_module(name).value == "amended"
    assert is_complete(name)


def test_a_complete_module_is_amended_at_once(write: Callable[[str, str], str]) -> None:
    name = write("target", "value = 'stock'")
    module = import_module(name)
    seen: list[ModuleType] = []
    when_imported(name, seen.append)
    assert seen == [module]


def half_executed(write: Callable[[str, str], str]) -> tuple[str, list[dict[str, object]]]:
    """A module that registers a hook for itself in mid-import, imported; and what hooks saw."""
    write("reader", READER)
    seen = import_module(write("hooks", HOOKS)).seen
    name = write("target", HALF_EXECUTED)
    import_module(name)
    return name, seen


def test_a_half_executed_module_is_amended_when_somebody_reads_it(
    write: Callable[[str, str], str],
) -> None:
    name, seen = half_executed(write)
    # A module that it imports read a name of it, which must not have run the hook too early.
    assert seen == []
    assert sys.modules[name].value == "amended"
    assert len(seen) == 1 and seen[0]["value"] == "stock"
    assert type(sys.modules[name]) is ModuleType


def test_a_half_executed_module_is_amended_by_settling(write: Callable[[str, str], str]) -> None:
    name, seen = half_executed(write)
    settle(name)
    assert len(seen) == 1
    settle(name)
    assert len(seen) == 1
    assert vars(sys.modules[name])["value"] == "amended"


def test_settling_does_not_import(write: Callable[[str, str], str]) -> None:
    name = write("target", "value = 'stock'")
    settle(name)
    assert name not in sys.modules
