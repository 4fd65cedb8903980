"""Imports go downward: no file imports from a floor above its own, and no files in a circle.

Imports inside functions count as well. Those that only type checkers see do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm.score"

# From the ground up. What stands on one floor does not know of each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("checks", "armed", "tokens"),
    ("ops",),
    ("engine",),
    ("results",),
    ("launch",),  # starts engines; `patches` explains failed starts by it
    ("server",),  # what the patches of the endpoints call, as `engine` is for the other patches
    ("patches",),
    ("api",),
    ("continuations",),
    ("data",),
    ("tiny", "report"),
    ("perplexity", "sequence", "processor", "eig"),
    ("integrations",),
    ("cli",),
)
HEIGHTS = {unit: height for height, floor in enumerate(FLOORS) for unit in floor}
# The names of the package itself are those of `score()` and its results.
HEIGHTS[""] = HEIGHTS["api"]


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name."""
    files = (path.relative_to(ROOT) for path in (ROOT / "vllm" / "score").rglob("*.py"))
    return {".".join(f.with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in `node`, without those for type checkers."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
        return
    typing = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for part in node.orelse if typing else ast.iter_child_nodes(node):
        yield from statements(part)


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The files of the package that a file imports."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for statement in statements(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
            continue
        base = [] if not statement.level else here[: len(here) + 1 - statement.level]
        module = ".".join([*base, *filter(None, [statement.module])])
        for alias in statement.names:
            full = f"{module}.{alias.name}"
            found.add(full if full in known else module)
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def unit(name: str) -> str:
    return name.removeprefix(PACKAGE).strip(".").partition(".")[0]


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [
        (name, other)
        for name, others in sorted(graph.items())
        for other in sorted(others)
        if unit(name) != unit(other) and HEIGHTS[unit(other)] >= HEIGHTS[unit(name)]
    ]


def test_every_part_has_its_floor(graph: dict[str, set[str]]) -> None:
    assert {unit(name) for name in graph} <= HEIGHTS.keys()
    assert graph[f"{PACKAGE}.api"] >= {f"{PACKAGE}.errors", f"{PACKAGE}.armed"}


def test_imports_go_downward(graph: dict[str, set[str]]) -> None:
    assert upward(graph) == []


def test_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        steps = [f"{b} imports {a}" for a, b in pairwise(error.args[1])]
        pytest.fail("; ".join(steps))


def test_an_import_upward_and_a_circle_are_found() -> None:
    source = {"vllm.score.errors": {"vllm.score.cli"}, "vllm.score.cli": {"vllm.score.errors"}}
    assert upward(source) == [("vllm.score.errors", "vllm.score.cli")]
    with pytest.raises(CycleError):
        TopologicalSorter(source).prepare()
