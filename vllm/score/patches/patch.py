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

from vllm.score.armed import Role, may_be_amended, tested_releases
from vllm.score.patches.contract import annotation_of, form_of, names_in, recorded_forms

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
        contract: what is amended or called: dotted attribute to the forms that it may have; none
            stands for those on record. `wrap` adds to it.
        fields: fields that are written or read, `Class.field` of the target or `module:Class.field`
            of a module that it imports; they must be typed as on record.
        calls: what is wrapped to the functions of the target, in any release, that call it: one of
            them must.
        relies_on: further functions, named like fields, whose behaviour is relied on. Their changes
            are reported (`vllm.score.patches.drift`), and break no contract.
        apply: amends the imported module; not needed where functions are only wrapped.
        holds: read-back for amendments that are not wrapped functions; None: `contract` says all.
        refuse: applied instead when the contract does not hold, so that a score request gets a
            sentence and not a stock error.
        wrappers: dotted attribute to the function called in its place.
    """

    target: str
    roles: tuple[Role, ...]
    contract: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    calls: dict[str, tuple[str, ...]] = field(default_factory=dict)
    relies_on: tuple[str, ...] = ()
    apply: Callable[[ModuleType], None] | None = None
    holds: Callable[[ModuleType], bool] | None = None
    refuse: Callable[[ModuleType], None] | None = None
    wrappers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def wrap(self, dotted: str) -> Callable[[F], F]:
        """Decorator: have `f(call, self, ...)` called in the place of `dotted`.

        `call` is the `Call`. From the third on, the parameters of `f` are those of the upstream
        function that it reads, under their own names.
        """

        def register(f: F) -> F:
            self.contract[dotted] = ()
            self.wrappers[dotted] = f
            return f

        return register

    def put_in_place(self, module: ModuleType) -> None:
        """Amend the imported module."""
        for dotted, f in self.wrappers.items():
            found = wrapt.resolve_path(module, dotted)[2]
            wrapt.wrap_function_wrapper(module, dotted, calling(f, found))
        if self.apply is not None:
            self.apply(module)

    def contract_problem(self, module: ModuleType, version: str) -> str | None:
        """Why the module found, of that version of vLLM, must not be amended; or None."""
        if not may_be_amended(version):
            return f"written for vLLM {tested_releases()}"
        for dotted, forms in self.contract.items():
            try:
                *_, found = wrapt.resolve_path(module, dotted)
            except AttributeError:
                return f"{dotted} does not exist"
            expected = forms or recorded_forms(f"{self.target}:{dotted}")
            if form_of(found) not in expected:
                return f"{dotted} takes ({form_of(found)}), not ({') or ('.join(expected)})"
            for name in reads(self.wrappers[dotted]) if dotted in self.wrappers else ():
                if name not in inspect.signature(_function(found)).parameters:
                    return f"{dotted} takes no {name}"
        for name in self.fields:
            full = name if ":" in name else f"{self.target}:{name}"
            typed, expected = _annotation(module, full), recorded_forms(full)
            if typed not in expected:
                return f"{name} is typed {typed}, not {' or '.join(expected)}"
        for called, callers in self.calls.items():
            functions = [f for c in callers if (f := _look_up(module, c)) is not None]
            if not any(called in names_in(f) for f in functions):
                return f"{called} is not called by {' or '.join(callers)}"
        return None


class Call:
    """A call of a wrapped function: `call()` hands it on as it came, whatever it was called with.

    `call(name=value)` changes the arguments of those names.
    """

    __slots__ = ("_args", "_kwargs", "_parameters", "_stock")

    def __init__(self, stock: Any, parameters: dict[str, Any], args: Any, kwargs: Any) -> None:
        self._stock, self._parameters, self._args, self._kwargs = stock, parameters, args, kwargs

    def __call__(self, **changes: Any) -> Any:
        if not changes:
            return self._stock(*self._args, **self._kwargs)
        args, kwargs, places = list(self._args), dict(self._kwargs), list(self._parameters)
        for name, value in changes.items():
            place = places.index(name) if name in self._parameters else len(args)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return self._stock(*args, **kwargs)

    def takes(self, name: str) -> bool:
        """Whether this release's function has a parameter of that name."""
        return name in self._parameters

    def argument(self, name: str) -> Any:
        """What was given for a parameter, or its default.

        Raises:
            LookupError: nothing was, and it has no default.
        """
        if name in self._kwargs:
            return self._kwargs[name]
        place = list(self._parameters).index(name) if name in self._parameters else len(self._args)
        if place < len(self._args):
            return self._args[place]
        default = self._parameters.get(name, inspect.Parameter.empty)
        if default is inspect.Parameter.empty:
            raise LookupError(name)
        return default


def reads(wrapper: Callable[..., Any]) -> list[str]:
    """The upstream parameters that a wrapper reads."""
    return list(inspect.signature(wrapper).parameters)[2:]


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def _annotation(module: ModuleType, field_name: str) -> str | None:
    home, _, dotted = field_name.partition(":")
    owner, _, name = dotted.partition(".")
    place = module if home == module.__name__ else sys.modules.get(home)
    cls = getattr(place, owner, None)
    return None if cls is None else annotation_of(cls, name)


def _look_up(module: ModuleType, dotted: str) -> Any:
    try:
        return wrapt.resolve_path(module, dotted)[2]
    except AttributeError:
        return None


def calling(f: Callable[..., Any], found: Any) -> Callable[..., Any]:
    """`f(call, self, ...)` as wrapt calls wrappers; `found` is what it is called in place of."""
    wanted = reads(f)
    parameters = {
        p.name: p.default for p in inspect.signature(_function(found)).parameters.values()
    }
    if not isinstance(found, staticmethod):
        del parameters[next(iter(parameters))]

    def wrapper(stock: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if instance is None and not isinstance(found, staticmethod):
            # Called through the class, with an object that is none of it, as LoRA's layers do.
            instance, *args = args
            stock = partial(stock, instance)
        call = Call(stock, parameters, args, kwargs)
        try:
            read = [call.argument(name) for name in wanted]
        except LookupError:
            return call()  # raises the error that the caller is to see
        return f(call, instance, *read)

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
