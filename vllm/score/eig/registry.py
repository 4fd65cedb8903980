"""Scalers by name: rules for how long a model reasons, and the options that belong to them.

Importing this loads none of them; `Scaler.load` does.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.eig.parameters import (
    BOUNDS,
    RIVAL_BOUNDS,
    Bound,
    check_values,
    did_you_mean,
)
from vllm.score.errors import ScoreModeError

logger = logging.getLogger("vllm_score.eig")

SCALER_KEY = "scale_func_name"
# Every scaler takes them; their values are checked where they are used.
OPTIONS = (
    "candidates",
    "answer_cue",
    "answer_end",
    "length_normalization",
    "estimator",
    "decide_at",
    "thinking_n_ignore",
    "max_tokens_thinking",
)
SWITCHES = ("strict", "debug")
# Ordinary generation takes these, too.
SHARED = ("temperature", "top_p")
# A key at least so similar to one of ours is a slip; vLLM's `top_k` is less so to `top_p`.
_SLIP = 0.85


@dataclass(frozen=True)
class Scaler:
    """A rule for how long to reason.

    Attributes:
        name: as in `scale_func_name`.
        function: callable, or "module:function", imported when it is first needed.
        parameters: names of its numeric parameters.
        bounds: of each.
    """

    name: str
    function: str | Callable[..., Any]
    parameters: tuple[str, ...]
    bounds: Mapping[str, Bound]

    def load(self) -> Callable[..., Any]:
        """The function.

        Raises:
            ScoreModeError: it cannot be imported.
        """
        if callable(self.function):
            return self.function
        module, _, name = self.function.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ScoreModeError(
                f"The scaler {self.name!r} is registered as {self.function!r}, which cannot be "
                f"imported ({error}); register it with a callable or 'module:function'."
            ) from error
        if not callable(found):
            raise ScoreModeError(
                f"The scaler {self.name!r} is registered as {self.function!r}, which is no "
                "function; register it with a callable or 'module:function'."
            )
        return found


@dataclass(frozen=True)
class ScalerCall:
    """What a user asked of a scaler.

    Attributes:
        scaler: which one.
        parameters: all of its numeric parameters, within their ranges; defaults where not given.
        options: of `OPTIONS` those given, as given, and `debug`, a bool, if given.
    """

    scaler: Scaler
    parameters: dict[str, Any]
    options: dict[str, Any]


SCALERS: dict[str, Scaler] = {}


def register_scaler(
    name: str,
    function: str | Callable[..., Any],
    parameters: Sequence[str] = (),
    bounds: Mapping[str, Bound] | None = None,
    *,
    replace: bool = False,
) -> Scaler:
    """Make a scaler known under a name.

    Args:
        function: callable, or "module:function".
        parameters: names of its numeric parameters.
        bounds: of the parameters that the built-in scalers do not have; may redefine others.
        replace: the name may be taken.

    Raises:
        ScoreModeError: the name is taken, a parameter has no bounds or the name of an option, or
            `function` is neither a callable nor "module:function".
    """
    if name in SCALERS and not replace:
        raise ScoreModeError(
            f"A scaler {name!r} is registered already; choose another name or set replace=True."
        )
    if not callable(function):
        module, _, attribute = str(function).partition(":")
        if not (module and attribute.isidentifier()):
            raise ScoreModeError(
                f"function of the scaler {name!r} is {function!r}; give a callable or text like "
                "'package.module:function'."
            )
    reserved = {SCALER_KEY, *OPTIONS, *SWITCHES}
    names = tuple(dict.fromkeys((*parameters, *(bounds or {}))))
    if taken := [each for each in names if each in reserved]:
        raise ScoreModeError(
            f"The scaler {name!r} names its parameters {', '.join(taken)} like options that all "
            "scalers take; rename them."
        )
    known = {**BOUNDS, **RIVAL_BOUNDS, **(bounds or {})}
    if missing := [each for each in names if each not in known]:
        raise ScoreModeError(
            f"The scaler {name!r} has no bounds for {', '.join(missing)}; add them to bounds."
        )
    made = Scaler(name, function, names, {each: known[each] for each in names})
    SCALERS[name] = made
    return made


def scaler(name: str) -> Scaler:
    """A scaler by its name.

    Raises:
        ScoreModeError: there is none; names the nearest.
    """
    if name in SCALERS:
        return SCALERS[name]
    close = did_you_mean(name, SCALERS)
    raise ScoreModeError(f"{SCALER_KEY} is {name!r}, which is no scaler{close}")


def split_kwargs(options: Mapping[str, Any]) -> tuple[ScalerCall | None, dict[str, Any]]:
    """Part what belongs to a scaler from what belongs to ordinary generation.

    Args:
        options: lm-eval's `gen_kwargs`; not changed.

    Returns:
        The call (None without `scale_func_name`), and the rest in its order. `do_sample=False`
        with temperature 0, which many tasks have, asks for greedy answers: that temperature stays
        in the rest, and the scaler's own is the default.

    Raises:
        ScoreModeError: an unknown scaler; an option of scalers without one, or of another one; a
            key that looks like a misspelt one; values as in `check_values`.
    """
    rest = dict(options)
    name = rest.pop(SCALER_KEY, None)
    if name is None:
        _refuse_without_scaler(rest)
        return None, rest
    chosen = scaler(name)
    _refuse_foreign(rest, chosen)
    switches = {key: _switch(key, rest.pop(key)) for key in SWITCHES if key in rest}
    if _greedy(rest) and "temperature" in chosen.bounds:
        default = chosen.bounds["temperature"].default
        logger.info("do_sample=False: answers are greedy; reasoning is sampled at %g.", default)
        given = [key for key in chosen.parameters if key in rest and key != "temperature"]
    else:
        given = [key for key in chosen.parameters if key in rest]
    values = {key: rest.pop(key) for key in given}
    checked = check_values(values, chosen.bounds, strict=switches.get("strict", False))
    parameters = {
        key: checked.get(key, bound.kind(bound.default)) for key, bound in chosen.bounds.items()
    }
    found = {key: rest.pop(key) for key in OPTIONS if key in rest}
    if "debug" in switches:
        found["debug"] = switches["debug"]
    return ScalerCall(chosen, parameters, found), rest


def _refuse_without_scaler(rest: Mapping[str, Any]) -> None:
    ours = {*BOUNDS, *RIVAL_BOUNDS, *OPTIONS, *SWITCHES} - set(SHARED)
    if stray := [f"{key}={value!r}" for key, value in rest.items() if key in ours]:
        raise ScoreModeError(
            f"gen_kwargs has {', '.join(stray)}, which only scalers take; add {SCALER_KEY} "
            f"({', '.join(SCALERS)}) or remove it."
        )


def _refuse_foreign(rest: Mapping[str, Any], chosen: Scaler) -> None:
    own = {*chosen.parameters, *OPTIONS, *SWITCHES}
    others = {key for each in SCALERS.values() for key in each.parameters} - own
    for key, value in rest.items():
        if key in own or key in SHARED:
            continue
        if key in others and (key in BOUNDS or key in RIVAL_BOUNDS):
            raise ScoreModeError(
                f"gen_kwargs has {key}={value!r}, which the scaler {chosen.name!r} does not take; "
                f"it takes {', '.join(chosen.parameters)}. Remove it."
            )
        if close := difflib.get_close_matches(key, own, n=1, cutoff=_SLIP):
            raise ScoreModeError(
                f"gen_kwargs has {key}={value!r}, which nobody takes; did you mean {close[0]!r}?"
            )


def _switch(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ScoreModeError(f"{key} is {value!r}; set it to true or false.")


def _greedy(rest: Mapping[str, Any]) -> bool:
    """Whether the task asks for greedy answers, as opposed to a user's mistaken temperature."""
    if "do_sample" not in rest or _switch("do_sample", rest["do_sample"]):
        return False
    temperature = rest.get("temperature", None)
    return isinstance(temperature, int | float) and temperature == 0


_ENGINE = ("beam_size", "sample_length", "temperature", "top_p", "max_computation_time")
_MODULE = "vllm.score.eig.scalers"
for _name, _parameters in {
    "expected_information_gain_reasoning": tuple(BOUNDS),
    "entropy_threshold_reasoning": (*_ENGINE, "entropy_threshold"),
    "fixed_budget_reasoning": (*_ENGINE, "fixed_budget"),
}.items():
    register_scaler(_name, f"{_MODULE}:{_name}", _parameters)
