"""One amendment of one upstream module: what it is, whether it may be applied, whether it is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import wrapt

from vllm.score.armed import UPSTREAM_VERSION, Role
from vllm.score.patches.imports import is_complete, settle

State = Literal["not imported", "applied", "failed"]


@dataclass(frozen=True)
class Patch:
    """An entry of the register.

    Attributes:
        target: the upstream module.
        contract: what is amended, and what must be found there: dotted attribute to parameter
            names, in order.
        apply: amends the imported module.
        holds: read-back for amendments that are not wrapped functions; None: `contract` says all.
        refuse: applied instead when the contract does not hold, so that a score request gets a
            sentence and not a stock error.
        roles: the processes in which score requests need it.
        why, how, risk: for the reviewer.
        upstream: the reference of a related upstream change, or what a pull request would hold.
        remove_when: the condition under which the patch is deleted.
    """

    target: str
    contract: Mapping[str, tuple[str, ...]]
    apply: Callable[[ModuleType], None]
    roles: tuple[Role, ...]
    why: str
    how: str
    risk: str
    upstream: str
    remove_when: str
    holds: Callable[[ModuleType], bool] | None = None
    refuse: Callable[[ModuleType], None] | None = None


@dataclass
class Application:
    """The state of a patch in this process."""

    patch: Patch
    state: State = "not imported"
    reason: str = ""
    module: ModuleType | None = field(default=None, repr=False)
    placed: dict[str, Any] = field(default_factory=dict, repr=False)
    places: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list, repr=False)

    def run(self, module: ModuleType, version: str) -> None:
        """Check the contract, apply, read back. Never raises: ordinary vLLM must go on."""
        if self.state != "not imported":
            return
        self.module = module
        try:
            problem = contract_problem(self.patch, module, version)
            if problem is None:
                self.patch.apply(module)
                self.placed = {d: _static(module, d) for d in self.patch.contract}
                problem = self._lost()
                if self.patch.holds is None:
                    self.places = [_place(module, d) for d in self.patch.contract]
            elif self.patch.refuse is not None:
                self.patch.refuse(module)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.state, self.reason = ("applied", "") if problem is None else ("failed", problem)

    def _lost(self) -> str | None:
        if sys.modules.get(self.patch.target) is not self.module:
            return "the module was imported a second time"
        # This runs for every score request: where nothing moved, there is nothing to look up.
        if self.places and all(scope.get(name) is found for scope, name, found in self.places):
            return None
        try:
            return self._undone(self.module)
        except AttributeError as error:
            return f"what was amended is gone: {error}"

    def _undone(self, module: Any) -> str | None:
        if self.patch.holds is not None:
            return None if self.patch.holds(module) else "the amendment is not in place"
        for dotted, wrapper in self.placed.items():
            if not isinstance(wrapper, wrapt.FunctionWrapper):
                return f"{dotted} is not wrapped"
            if not _calls(_static(module, dotted), wrapper):
                return f"{dotted} was replaced after it was wrapped"
        return None

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


def _calls(function: Any, wrapper: Any) -> bool:
    """Whether `function` is `wrapper`, or somebody's wrapper around it."""
    while function is not None:
        # Read through the class, a wrapt wrapper is a bound one, which knows its parent. Identity:
        # a wrapt wrapper is equal to what it wraps.
        if function is wrapper or getattr(function, "_self_parent", None) is wrapper:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _static(owner: Any, dotted: str) -> Any:
    """The attribute as it is stored, unbound."""
    return _place(owner, dotted)[2]


def _place(owner: Any, dotted: str) -> tuple[Mapping[str, Any], str, Any]:
    """(namespace, name, object) of an attribute; the namespace is live."""
    scope: Mapping[str, Any] = {}
    name = ""
    for name in dotted.split("."):
        owners = owner.__mro__ if isinstance(owner, type) else (owner,)
        found = next((o for o in owners if name in vars(o)), None)
        if found is None:
            raise AttributeError(f"{owner!r} has no attribute {name!r}")
        scope = vars(found)
        owner = scope[name]
    return scope, name, owner


def contract_problem(patch: Patch, module: ModuleType, version: str) -> str | None:
    """Why `patch` must not be applied to the module found, or None."""
    if not version.startswith(UPSTREAM_VERSION):
        return f"written for vLLM {UPSTREAM_VERSION}*"
    for dotted, expected in patch.contract.items():
        try:
            found = _static(module, dotted)
        except AttributeError:
            return f"{dotted} does not exist"
        function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
        names = tuple(inspect.signature(function).parameters)
        if names[: len(expected)] != expected:
            return f"{dotted} takes {names}, not {expected}"
    return None
