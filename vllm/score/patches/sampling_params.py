"""In every process: `SamplingParams(score_mode=True)`, a subclass with five more fields.

vllm.sampling_params
    Why: A request says that it wants scores; max_tokens=0 must be legal for it.
    How: A msgspec subclass takes the stock name before anybody imports it; its own checks run
        first, then the stock ones with max_tokens=1.
    Risk: A module that took the stock class earlier would decode requests without the fields; the
        read-back compares the classes.
    Upstream: Pull request: the fields and the relaxed check in SamplingParams itself.
    Deleted when: SamplingParams has a score mode, or prompt_logprob_token_ids allows max_tokens=0.
"""

import sys
from types import ModuleType
from typing import Any

from vllm.score.armed import front_end_problem
from vllm.score.engine.request import InvalidScoreRequest as Invalid
from vllm.score.engine.request import ScoreSpec, check_options
from vllm.score.errors import ScoreModeUnavailable
from vllm.score.patches.patch import Patch

# Fields of a score request, which an ordinary one must leave alone; None means the default, too.
DEFAULTS = {"score_statistics": None, "score_temperature": 1.0, "score_top_p": 1.0}


def apply(module: ModuleType) -> None:
    """Put the subclass in the stock class's place."""
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
        # Private: no client of a server can set it. A type, not its name: msgspec and pydantic look
        # names up in the stock module.
        _score: ScoreSpec | None = None
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
                raise Invalid(
                    "score_statistics, score_temperature and score_top_p need score_mode=True.",
                    parameter="score_statistics",
                )
            if self.max_tokens != 0:
                return base._verify_args(self)
            if not self.score_mode:
                raise Invalid("max_tokens=0 is only allowed in score_mode")
            self.max_tokens = 1  # what the stock check accepts; also when copied or decoded
            try:
                base._verify_args(self)
            finally:
                self.max_tokens = 0

        def _verify_score_mode(self) -> None:
            if self._score is not None:
                return
            if (problem := front_end_problem()) is not None:
                raise ScoreModeUnavailable(problem)
            check_options(self)

        @staticmethod
        def from_optional(*args: Any, score_mode: bool | None = False, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name, None) for name in DEFAULTS}
            if score_mode and kwargs.get("max_tokens") == 0:
                del kwargs["max_tokens"]
            params = base.from_optional(*args, **kwargs)
            params.score_mode = bool(score_mode)
            for name, default in DEFAULTS.items():
                setattr(params, name, default if given[name] is None else given[name])
            params._verify_args()
            return params

        def __repr__(self) -> str:
            text: str = base.__repr__(self)
            if not self.score_mode:
                return text
            ours = (f"{name}={getattr(self, name)}" for name in ("score_mode", *DEFAULTS))
            return f"{text[:-1]}, {', '.join(ours)})"

    _take_place(module, SamplingParams)


def refuse(module: ModuleType) -> None:
    """For a vLLM that the patch does not fit: know the field, and refuse to set it."""
    base: Any = module.SamplingParams

    class SamplingParams(base, omit_defaults=True, dict=True):  # type: ignore[call-arg]
        __doc__ = base.__doc__

        score_mode: bool = False

        def __post_init__(self) -> None:
            if self.score_mode:
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
    ours = module.SamplingParams
    takers = ("vllm.v1.engine", "vllm.v1.engine.input_processor", "vllm.entrypoints.llm")
    taken = [getattr(sys.modules.get(name), "SamplingParams", ours) for name in takers]
    return "score_mode" in ours.__struct_fields__ and all(cls is ours for cls in taken)


PATCH = Patch(
    "vllm.sampling_params",
    ("front end", "engine core", "worker"),
    contract={
        "SamplingParams.__post_init__": (),
        "SamplingParams._verify_args": (),
        "SamplingParams.from_optional": (),
        "SamplingParams.clone": (),
    },
    fields=(
        "SamplingParams.max_tokens",
        "SamplingParams.prompt_logprob_token_ids",
        "SamplingParams.prompt_logprob_start",
        "SamplingParams.skip_reading_prefix_cache",
        "SamplingParams.stop_token_ids",
    ),
    apply=apply,
    holds=holds,
    refuse=refuse,
)
