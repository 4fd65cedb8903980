"""One patch: its contract, and the read-back that finds what others did to it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import wrapt

from vllm.score.patches.patch import Application, Call, Patch

NAME = "amended_by_test_patch"
STEP = "self, request, tokens="
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
        "contract": {"Engine.step": (STEP,)},
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


def amending(**forms: tuple[str, ...]) -> Patch:
    """A patch of the engine's functions of these names, and the forms that they may have."""
    return Patch(NAME, ("engine core",), contract={f"Engine.{n}": f for n, f in forms.items()})


def wrapped(amended: Patch, name: str, f: Any) -> None:
    """`Patch.wrap` for a function that is on no record."""
    forms = amended.contract[f"Engine.{name}"]
    amended.wrap(f"Engine.{name}")(f)
    amended.contract[f"Engine.{name}"] = forms


def test_wrap_binds_the_arguments(module: Any) -> None:
    amended = amending(step=(STEP,), make=("cls, config",), check=("config",))

    def step(call: Call, self: Any, request: Any) -> Any:
        return "ours", type(self).__name__, call(request=request + 1)

    def make(call: Call, cls: Any, config: Any) -> Any:
        return cls, config, call()

    wrapped(amended, "step", step)
    wrapped(amended, "make", make)
    wrapped(amended, "check", lambda call, self: ("ours", call()))
    application = Application(amended)
    application.run(module, version="0.32.0")
    assert (application.state, application.reason) == ("applied", "")
    for call in (
        lambda: module.Engine().step(1),
        lambda: module.Engine().step(request=1, tokens=(2,)),
        lambda: module.Engine.step(module.Engine(), 1),
    ):
        assert call() == ("ours", "Engine", ("stock", 2))
    assert module.Engine.step(Other(), 1, tokens=()) == ("ours", "Other", ("stock", 2))
    cls, config, made = module.Engine.make(3)
    assert cls is module.Engine and config == 3 and type(made) is cls
    assert module.Engine.check(4) == ("ours", 4)


def test_a_call_hands_on_what_it_does_not_know(module: Any) -> None:
    """A later release may call with more than its own signature says; stock decides about it."""
    amended = amending(step=(STEP,))
    wrapped(amended, "step", lambda call, self, request: call())
    Application(amended).run(module, version="0.32.0")
    with pytest.raises(TypeError, match="unexpected keyword argument 'more'"):
        module.Engine().step(1, more=2)
    with pytest.raises(TypeError, match="positional argument"):
        module.Engine().step(1, (), 3)
    with pytest.raises(TypeError, match="'request'"):
        module.Engine().step()


def test_a_call_by_name() -> None:
    seen: list[Any] = []

    def stock(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    empty = inspect.Parameter.empty
    call = Call(stock, {"a": empty, "b": 2, "c": 3}, (1,), {"c": 4, "z": 9})
    assert [call.argument(name) for name in "abcz"] == [1, 2, 4, 9]
    assert call.takes("b") and not call.takes("z")
    with pytest.raises(LookupError, match="y"):
        call.argument("y")
    call()
    call(a=5, b=6, c=7)
    assert seen == [((1,), {"c": 4, "z": 9}), ((5,), {"b": 6, "c": 7, "z": 9})]


@pytest.mark.parametrize(
    "contract",
    [
        {"Engine.step": (STEP,)},
        {"Engine.step": ("self, request", STEP)},
        {"Engine.make": ("cls, config",)},
        {"Engine.check": ("config",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["0.31.0", "0.32.5", "0.33.0+cpu"])
def test_a_contract_that_holds(contract: Any, version: str, module: Any) -> None:
    assert patch(contract=contract).contract_problem(module, version) is None


@pytest.mark.parametrize(
    ("contract", "version", "words"),
    [
        ({"Engine.step": ("self, prompt",)}, "0.32.0", ("Engine.step", STEP, "self, prompt")),
        ({"Engine.step": ("self, request",)}, "0.32.0", ("Engine.step", STEP)),
        ({"Engine.step": ("self, request, tokens",)}, "0.32.0", ("Engine.step", STEP)),
        ({"Engine.run": ("self",)}, "0.32.0", ("Engine.run does not exist",)),
        ({"Core.step": ("self",)}, "0.32.0", ("Core.step does not exist",)),
        ({"Engine.step": (STEP,)}, "0.30.0", ("0.31 to 0.33",)),
        ({"Engine.step": (STEP,)}, "0.34.0", ("0.31 to 0.33",)),
        ({"Engine.step": (STEP,)}, "0.320.0", ("0.31 to 0.33",)),
        ({"Engine.step": (STEP,)}, "dev", ("0.31 to 0.33",)),
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


def test_another_version_at_the_users_risk(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SCORE_ANY_VERSION", "1")
    assert patch().contract_problem(module, "0.34.0") is None
    problem = patch(contract={"Engine.step": ("self",)}).contract_problem(module, "0.34.0")
    assert problem is not None and "Engine.step takes" in problem


def test_a_wrapper_that_reads_what_is_not_there_breaks_the_contract(module: Any) -> None:
    amended = amending(step=(STEP,))
    wrapped(amended, "step", lambda call, self, prompt: call())
    assert amended.contract_problem(module, "0.32.0") == "Engine.step takes no prompt"


def test_a_patch_is_applied_once(module: Any) -> None:
    application = applied(module)
    assert application.state == "applied"
    application.run(module, version="0.32.0")
    assert module.Engine().step(1) == ("ours", ("stock", 1))


def test_a_broken_contract_leaves_the_module_alone(module: Any) -> None:
    stock = vars(module.Engine)["step"]
    application = applied(module, contract={"Engine.step": ("self, prompt",)})
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
