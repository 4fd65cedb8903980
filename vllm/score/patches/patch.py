"""One amendment of one upstream module: what it is, whether it may be applied, whether it is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeVar

import wrapt

from vllm.score.armed import UPSTREAM_VERSION, Role

State = Literal["not imported", "applied", "failed"]
Hook = Callable[[ModuleType], None]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """An entry of the register.

    Why, how, at which risk and until when stands in the docstring of the module that makes the
    patch, under the target's name; the documents quote it.

    Attributes:
        target: the upstream module.
        roles: the processes in which score requests need it.
        contract: what is amended, and what must be found there: dotted attribute to parameter
            names, in order. `wrap` adds to it.
        apply: amends the imported module; not needed where functions are only wrapped.
        holds: read-back for amendments that are not wrapped functions; None: `contract` says all.
        refuse: applied instead when the contract does not hold, so that a score request gets a
            sentence and not a stock error.
        wrappers: dotted attribute to the function called in its place.
    """

    target: str
    roles: tuple[Role, ...]
    contract: dict[str, tuple[str, ...]] = field(default_factory=dict)
    apply: Callable[[ModuleType], None] | None = None
    holds: Callable[[ModuleType], bool] | None = None
    refuse: Callable[[ModuleType], None] | None = None
    wrappers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def wrap(self, dotted: str) -> Callable[[F], F]:
        """Decorator: have `f(stock, self, ...)` called in the place of `dotted`.

        `stock` is the upstream function, bound. From `self` on, the parameters of `f` are the first
        ones of the upstream function under their own names, which makes the contract; `*args` and
        `**kwargs` take those that `f` only passes on. Where `f` lacks these, a function that
        takes more, as one of a later release may, breaks the contract.
        """

        def register(f: F) -> F:
            _, *own = inspect.signature(f).parameters.values()
            names = (p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD)
            self.contract[dotted] = tuple(names)
            self.wrappers[dotted] = f
            return f

        return register

    def put_in_place(self, module: ModuleType) -> None:
        """Amend the imported module."""
        for dotted, f in self.wrappers.items():
            wrapt.wrap_function_wrapper(module, dotted, _calling(f))
        if self.apply is not None:
            self.apply(module)

    def contract_problem(self, module: ModuleType, version: str) -> str | None:
        """Why the module found, of that version of vLLM, must not be amended; or None."""
        if not version.startswith(UPSTREAM_VERSION):
            return f"written for vLLM {UPSTREAM_VERSION}*"
        for dotted, expected in self.contract.items():
            try:
                *_, found = wrapt.resolve_path(module, dotted)
            except AttributeError:
                return f"{dotted} does not exist"
            function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
            names = tuple(inspect.signature(function).parameters)
            if names[: len(expected)] != expected:
                return f"{dotted} takes {names}, not {expected}"
            wrapper = self.wrappers.get(dotted)
            if names != expected and wrapper is not None and not _passes_on(wrapper):
                return f"{dotted} takes {names}, more than {expected}"
        return None


def _passes_on(f: Callable[..., Any]) -> bool:
    """Whether `f` takes any more parameters, by its `*args` and `**kwargs`."""
    kinds = {parameter.kind for parameter in inspect.signature(f).parameters.values()}
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds


def _calling(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(stock, self, ...)` as wrapt calls wrappers."""

    def wrapper(stock: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if instance is None:
            # Called through the class, with an object that is none of it, as LoRA's layers do.
            instance, *args = args
            stock = partial(stock, instance)
        return f(stock, instance, *args, **kwargs)

    return wrapper


@dataclass
class Application:
    """The state of a patch in this process."""

    patch: Patch
    state: State = "not imported"
    reason: str = ""
    module: ModuleType | None = field(default=None, repr=False)
    places: dict[str, tuple[Any, str, Any]] = field(default_factory=dict, repr=False)

    def run(self, module: ModuleType, version: str) -> None:
        """Check the contract, apply, read back. Never raises: ordinary vLLM must go on."""
        if self.state != "not imported":
            return
        self.module = module
        try:
            problem = self.patch.contract_problem(module, version)
            if problem is None:
                self.patch.put_in_place(module)
                self.places = {d: wrapt.resolve_path(module, d) for d in self.patch.contract}
                problem = self._undone(module)
            elif self.patch.refuse is not None:
                self.patch.refuse(module)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.state, self.reason = ("applied", "") if problem is None else ("failed", problem)

    def check(self) -> None:
        """Read back again: another plugin may have undone the amendment since."""
        settle(self.patch.target)
        problem = None
        if self.state == "applied":
            problem = self._lost()
        elif self.state == "not imported" and is_complete(self.patch.target):
            problem = "the module is imported, but the import hook did not run"
        if problem is not None:
            self.state, self.reason = "failed", problem

    def _lost(self) -> str | None:
        if sys.modules.get(self.patch.target) is not self.module:
            return "the module was imported a second time"
        # This runs for every score request: where nothing moved, there is nothing to look up.
        places = self.places.values()
        if self.patch.holds is None and all(vars(at).get(name) is f for at, name, f in places):
            return None
        try:
            return self._undone(self.module)
        except AttributeError as error:
            return f"what was amended is gone: {error}"

    def _undone(self, module: Any) -> str | None:
        if self.patch.holds is not None:
            return None if self.patch.holds(module) else "the amendment is not in place"
        for dotted, (_, _, wrapper) in self.places.items():
            if not isinstance(wrapper, wrapt.FunctionWrapper):
                return f"{dotted} is not wrapped"
            if not _calls(wrapt.resolve_path(module, dotted)[2], wrapper):
                return f"{dotted} was replaced after it was wrapped"
        return None


def _calls(function: Any, wrapper: Any) -> bool:
    """Whether `function` is `wrapper`, or somebody's wrapper around it."""
    while function is not None:
        # Read through the class, a wrapt wrapper is a bound one, which knows its parent. Identity:
        # a wrapt wrapper is equal to what it wraps.
        if function is wrapper or getattr(function, "_self_parent", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


# --- when: once the module is completely imported


def when_imported(name: str, hook: Hook) -> None:
    """Call `hook(module)` once the module `name` is imported: now, or right after its import.

    vLLM calls plugins in the middle of its import of `vllm.config`, when some of its modules are
    partly executed. For those an import hook comes too late: they are amended at the first
    attribute read after their import, before anybody can take a name from them.
    """
    module = sys.modules.get(name)
    if module is None:
        wrapt.register_post_import_hook(hook, name)
    elif _is_initializing(module):
        _when_first_read(module, hook)
    else:
        hook(module)


def settle(name: str) -> None:
    """Run the hook of a module that is complete, but that nobody has read yet."""
    module = sys.modules.get(name)
    if module is not None:
        getattr(module, "score_mode", None)


def is_complete(name: str) -> bool:
    """Whether the module `name` is imported, and its import is over."""
    module = sys.modules.get(name)
    return module is not None and not _is_initializing(module)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _when_first_read(module: ModuleType, hook: Hook) -> None:
    original = type(module)

    class Completing(original):  # type: ignore[misc, valid-type]
        def __getattribute__(self, attribute: str) -> Any:
            spec = ModuleType.__getattribute__(self, "__spec__")
            # Dunder reads are the import machinery's own, some before the module is complete.
            if not attribute.startswith("__") and not getattr(spec, "_initializing", False):
                self.__class__ = original  # type: ignore[assignment]
                hook(self)
            return original.__getattribute__(self, attribute)

    module.__class__ = Completing
