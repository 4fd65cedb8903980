"""One patch: its contract, and the read-back that finds what others did to it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import wrapt

from vllm.score.patches.patch import Application, Patch

NAME = "amended_by_test_patch"
SOURCE = """
class Engine:
    def step(self, request, tokens=()):
        return "stock", request

    @classmethod
    def make(cls, config):
        return cls()

    @staticmethod
    def check(config):
        return config
"""


@pytest.fixture
def module() -> Iterator[Any]:
    made = ModuleType(NAME)
    exec(SOURCE, vars(made))
    sys.modules[NAME] = made
    yield made
    del sys.modules[NAME]


def wrap(module: ModuleType) -> None:
    def step(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return "ours", wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "Engine.step", step)


def patch(**changes: Any) -> Patch:
    fields: dict[str, Any] = {
        "target": NAME,
        "contract": {"Engine.step": ("self", "request")},
        "apply": wrap,
        "roles": ("engine core",),
    }
    return Patch(**{**fields, **changes})


def applied(module: ModuleType, **changes: Any) -> Application:
    application = Application(patch(**changes))
    application.run(module, version="0.32.0")
    application.check()
    return application


class Other:
    """No engine, but handed to an engine's function."""


def test_wrap_makes_the_contract_and_binds_the_arguments(module: Any) -> None:
    amended = Patch(NAME, ("engine core",))

    @amended.wrap("Engine.step")
    def step(stock: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return "ours", type(self).__name__, stock(request + 1, *args, **kwargs)

    @amended.wrap("Engine.make")
    def make(stock: Any, cls: Any, config: Any) -> Any:
        return cls, stock(config)

    assert amended.contract == {
        "Engine.step": ("self", "request"),
        "Engine.make": ("cls", "config"),
    }
    application = Application(amended)
    application.run(module, version="0.32.0")
    assert application.state == "applied"
    for call in (
        lambda: module.Engine().step(1),
        lambda: module.Engine().step(request=1, tokens=(2,)),
        lambda: module.Engine.step(module.Engine(), 1),
    ):
        assert call() == ("ours", "Engine", ("stock", 2))
    assert module.Engine.step(Other(), 1, tokens=()) == ("ours", "Other", ("stock", 2))
    cls, made = module.Engine.make(3)
    assert cls is module.Engine and type(made) is cls


@pytest.mark.parametrize(
    "contract",
    [
        {"Engine.step": ("self", "request")},
        {"Engine.step": ("self", "request", "tokens")},
        {"Engine.make": ("cls", "config")},
        {"Engine.check": ("config",)},
    ],
    ids=str,
)
def test_a_contract_that_holds(contract: Any, module: Any) -> None:
    assert patch(contract=contract).contract_problem(module, "0.32.5") is None


@pytest.mark.parametrize(
    ("contract", "version", "words"),
    [
        ({"Engine.step": ("self", "prompt")}, "0.32.0", ("Engine.step", "'request'", "'prompt'")),
        ({"Engine.step": ("self", "request", "tokens", "x")}, "0.32.0", ("Engine.step", "'x'")),
        ({"Engine.run": ("self",)}, "0.32.0", ("Engine.run does not exist",)),
        ({"Core.step": ("self",)}, "0.32.0", ("Core.step does not exist",)),
        ({"Engine.step": ("self",)}, "0.33.0", ("0.32.*",)),
        ({"Engine.step": ("self",)}, "0.320.0", ("0.32.*",)),
        ({"Engine.step": ("self",)}, "dev", ("0.32.*",)),
    ],
    ids=str,
)
def test_a_contract_that_does_not_hold(
    contract: Any, version: str, words: tuple[str, ...], module: Any
) -> None:
    problem = patch(contract=contract).contract_problem(module, version)
    assert problem is not None
    for word in words:
        assert word in problem


@pytest.mark.parametrize(
    ("wrapper", "fits"),
    [
        (lambda stock, self, request, *args, **kwargs: stock(request), True),
        (lambda stock, self, request, tokens: stock(request), True),
        (lambda stock, self, request: stock(request), False),
        (lambda stock, self, request, *args: stock(request), False),
        (lambda stock, self, request, **kwargs: stock(request), False),
    ],
)
def test_a_wrapper_that_cannot_pass_on_a_parameter_breaks_the_contract(
    wrapper: Any, fits: bool, module: Any
) -> None:
    amended = Patch(NAME, ("engine core",))
    amended.wrap("Engine.step")(wrapper)
    problem = amended.contract_problem(module, "0.32.0")
    assert (problem is None) == fits
    assert fits or "more than ('self', 'request'" in str(problem)


def test_a_patch_is_applied_once(module: Any) -> None:
    application = applied(module)
    assert application.state == "applied"
    application.run(module, version="0.32.0")
    assert module.Engine().step(1) == ("ours", ("stock", 1))


def test_a_broken_contract_leaves_the_module_alone(module: Any) -> None:
    stock = vars(module.Engine)["step"]
    application = applied(module, contract={"Engine.step": ("self", "prompt")})
    assert application.state == "failed"
    assert vars(module.Engine)["step"] is stock


def test_a_broken_contract_calls_refuse(module: Any) -> None:
    refused: list[ModuleType] = []
    applied(module, contract={"Engine.run": ("self",)}, refuse=refused.append)
    assert refused == [module]


def test_an_error_while_applying_does_not_reach_the_import(module: Any) -> None:
    def fail(module: ModuleType) -> None:
        raise LookupError("no such thing")

    application = applied(module, apply=fail)
    assert (application.state, application.reason) == ("failed", "LookupError: no such thing")


def test_an_amendment_that_does_nothing_is_found(module: Any) -> None:
    application = applied(module, apply=lambda module: None)
    assert (application.state, application.reason) == ("failed", "Engine.step is not wrapped")


def test_a_read_back_that_says_no_is_believed(module: Any) -> None:
    application = applied(module, holds=lambda module: False)
    assert (application.state, application.reason) == ("failed", "the amendment is not in place")


def test_a_wrapper_around_ours_is_fine(module: Any) -> None:
    application = applied(module)
    ours = module.Engine.step

    @functools.wraps(ours)
    def traced(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    module.Engine.step = traced
    wrapt.wrap_function_wrapper(module, "Engine.step", lambda w, i, a, k: w(*a, **k))
    application.check()
    assert application.state == "applied"


def undo(module: Any) -> None:
    module.Engine.step = vars(module.Engine)["step"].__wrapped__


def undo_and_wrap(module: Any) -> None:
    """The wrapper of another plug-in, which took the stock function before us."""
    undo(module)
    wrapt.wrap_function_wrapper(module, "Engine.step", lambda w, i, a, k: w(*a, **k))


def delete(module: Any) -> None:
    del module.Engine.step


def import_again(module: Any) -> None:
    sys.modules[NAME] = ModuleType(NAME)
    exec(SOURCE, vars(sys.modules[NAME]))


@pytest.mark.parametrize(
    ("other_plugin", "words"),
    [
        (undo, "Engine.step was replaced"),
        (undo_and_wrap, "Engine.step was replaced"),
        (delete, "is gone"),
        (import_again, "imported a second time"),
    ],
)
def test_what_another_plug_in_undoes_is_found(other_plugin: Any, words: str, module: Any) -> None:
    application = applied(module)
    other_plugin(module)
    application.check()
    assert application.state == "failed"
    assert words in application.reason


def test_a_read_back_whose_object_is_gone_is_a_failure(module: Any) -> None:
    application = applied(module, holds=lambda module: module.Engine.step is not None)
    assert application.state == "applied"
    delete(module)
    application.check()
    assert application.state == "failed"


def test_an_import_that_no_hook_saw_is_found(module: Any) -> None:
    module.__spec__ = None
    application = Application(patch())
    application.check()
    assert (application.state, application.reason) == (
        "failed",
        "the module is imported, but the import hook did not run",
    )


def test_a_module_that_nobody_imported_is_no_failure() -> None:
    application = Application(patch())
    application.check()
    assert application.state == "not imported"
