"""`SamplingParams(score_mode=True)`: a subclass with six more fields in the stock place."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import ModuleType
from typing import Any

from vllm.score.armed import front_end_problem
from vllm.score.patches.patch import Patch


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def apply(module: ModuleType) -> None:
    """Put the subclass in the stock class's place."""
    from vllm.score.engine.invalid import InvalidScoreRequest as invalid

    base: Any = module.SamplingParams

    class SamplingParams(base, omit_defaults=True, dict=True):  # type: ignore[call-arg]
        __doc__ = base.__doc__

        score_mode: bool = False
        """Return log-probabilities of given tokens instead of generating; sets max_tokens=0."""
        score_statistics: list[str] | None = None
        """Names of further statistics of every scored position."""
        score_temperature: float = 1.0
        """Divides the logits before they are scored; `temperature` is for sampling only."""
        score_top_p: float = 1.0
        """Scores are those of the most likely tokens whose probabilities first add up to it."""
        _score_top: int | None = None
        _score_vocab_size: int = 0
        """Set at admission, which makes later copies exempt from the checks of user input."""

        def __post_init__(self) -> None:
            asked = self.skip_reading_prefix_cache  # type: ignore[has-type]
            super().__post_init__()
            if self.score_mode:
                # The stock default skips the cache for prompt_logprobs; here a hit is capped at
                # the first scored row, so only an explicit wish counts.
                self.skip_reading_prefix_cache = asked

        def _verify_args(self) -> None:
            if self.score_mode:
                self.max_tokens = 0
                self._verify_score_mode()
            elif self.score_statistics or (self.score_temperature, self.score_top_p) != (1.0, 1.0):
                raise invalid(
                    "score_statistics, score_temperature and score_top_p need score_mode=True.",
                    parameter="score_statistics",
                )
            if self.max_tokens is not None and self.max_tokens < 0:
                raise invalid(
                    f"max_tokens must be at least 0, got {self.max_tokens}.",
                    parameter="max_tokens",
                    value=self.max_tokens,
                )
            if self.max_tokens != 0:
                return base._verify_args(self)
            if not self.score_mode:
                raise invalid("max_tokens=0 is only allowed in score_mode")
            self.max_tokens = 1  # what the stock check accepts; also when copied or decoded
            try:
                base._verify_args(self)
            finally:
                self.max_tokens = 0

        def _verify_score_mode(self) -> None:
            from vllm.score.engine.statistics import check_statistics
            from vllm.score.engine.support import check_options
            from vllm.score.errors import ScoreModeUnavailable

            if self._score_top is not None:
                return
            problem = front_end_problem()
            if problem is not None:
                raise ScoreModeUnavailable(problem)
            if self.score_statistics is not None:
                try:
                    self.score_statistics = list(check_statistics(self.score_statistics))
                except ValueError as error:
                    raise invalid(str(error), parameter="score_statistics") from None
            if not isinstance(self.score_mode, bool):
                raise invalid(
                    f"score_mode must be True or False, got {self.score_mode!r}.",
                    parameter="score_mode",
                    value=self.score_mode,
                )
            asked = self.prompt_logprobs
            if asked is not None and not isinstance(asked, Integral):
                raise invalid(
                    f"prompt_logprobs must be a whole number, got {asked!r}.",
                    parameter="prompt_logprobs",
                    value=asked,
                )
            temperature = self.score_temperature
            if not (_is_number(temperature) and 0 < temperature < math.inf):
                raise invalid(
                    f"score_temperature must be a finite number above 0, got {temperature!r}.",
                    parameter="score_temperature",
                    value=temperature,
                )
            if not (_is_number(self.score_top_p) and 0 < self.score_top_p <= 1):
                raise invalid(
                    f"score_top_p must be in (0, 1], got {self.score_top_p!r}.",
                    parameter="score_top_p",
                    value=self.score_top_p,
                )
            check_options(self)

        @staticmethod
        def from_optional(
            *args: Any,
            score_mode: bool | None = False,
            score_statistics: list[str] | None = None,
            score_temperature: float | None = 1.0,
            score_top_p: float | None = 1.0,
            **kwargs: Any,
        ) -> Any:
            if score_mode and kwargs.get("max_tokens") == 0:
                del kwargs["max_tokens"]
            params = base.from_optional(*args, **kwargs)
            params.score_mode = bool(score_mode)
            params.score_statistics = score_statistics
            params.score_temperature = 1.0 if score_temperature is None else score_temperature
            params.score_top_p = 1.0 if score_top_p is None else score_top_p
            params._verify_args()
            return params

        def __repr__(self) -> str:
            text: str = base.__repr__(self)
            if not self.score_mode:
                return text
            return (
                f"{text[:-1]}, score_mode=True, score_statistics={self.score_statistics}, "
                f"score_temperature={self.score_temperature}, score_top_p={self.score_top_p})"
            )

    _take_place(module, SamplingParams)


def refuse(module: ModuleType) -> None:
    """For a vLLM that the patch does not fit: know the field, and refuse to set it."""
    base: Any = module.SamplingParams

    class SamplingParams(base, omit_defaults=True, dict=True):  # type: ignore[call-arg]
        __doc__ = base.__doc__

        score_mode: bool = False

        def __post_init__(self) -> None:
            if self.score_mode:
                from vllm.score.errors import ScoreModeUnavailable

                raise ScoreModeUnavailable(front_end_problem() or "score mode is off.")
            super().__post_init__()

        @staticmethod
        def from_optional(*args: Any, score_mode: bool | None = False, **kwargs: Any) -> Any:
            if score_mode:
                SamplingParams(score_mode=True)  # raises
            return base.from_optional(*args, **kwargs)

    _take_place(module, SamplingParams)


def _take_place(module: ModuleType, ours: Any) -> None:
    """Under the stock name, so that pickling and type hints find the subclass."""
    ours.__module__ = module.SamplingParams.__module__
    ours.__qualname__ = module.SamplingParams.__qualname__
    module.SamplingParams = ours  # type: ignore[attr-defined]


def holds(module: ModuleType) -> bool:
    """The class in place has the field, and modules that took the name hold the same class."""
    import sys

    ours = module.SamplingParams
    takers = ("vllm.v1.engine", "vllm.v1.engine.input_processor", "vllm.entrypoints.llm")
    taken = [getattr(sys.modules.get(name), "SamplingParams", ours) for name in takers]
    return "score_mode" in ours.__struct_fields__ and all(cls is ours for cls in taken)


PATCH = Patch(
    target="vllm.sampling_params",
    contract={
        "SamplingParams.__post_init__": ("self",),
        "SamplingParams._verify_args": ("self",),
        "SamplingParams.from_optional": ("n",),
        "SamplingParams.clone": ("self",),
    },
    apply=apply,
    holds=holds,
    refuse=refuse,
    roles=("front end", "engine core", "worker"),
    why="A request says that it wants scores; max_tokens=0 must be legal for it.",
    how="A msgspec subclass takes the stock name before anybody imports it; its own checks run "
    "first, then the stock ones with max_tokens=1.",
    risk="A module that took the stock class earlier would decode requests without the fields; "
    "the read-back compares the classes.",
    upstream="Pull request: the fields and the relaxed check in SamplingParams itself.",
    remove_when="SamplingParams has a score mode, or prompt_logprob_token_ids allows max_tokens=0.",
)
