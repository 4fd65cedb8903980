"""From a task's `generation_kwargs` to vLLM's sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.score.checks import did_you_mean
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm import SamplingParams

# Set from the task's own names, or no business of a generation task.
RESERVED = {"max_tokens", "stop", "output_kind", "n", "detokenize"}


@dataclass(frozen=True)
class Generation:
    """How one request is generated.

    Attributes:
        options: of `vllm.SamplingParams`, all but `max_tokens` and `stop`.
        stops: texts that end it.
        until: the task's stop sequences and the end-of-text token.
        max_gen_toks: room to leave in the context.
    """

    options: dict[str, Any]
    stops: list[str]
    until: list[str]
    max_gen_toks: int

    @property
    def params(self) -> SamplingParams:
        """For vLLM."""
        return self.limited(self.max_gen_toks)

    def limited(self, max_tokens: int, *more_stops: str) -> SamplingParams:
        """The same with another number of tokens, and further texts that end it."""
        from vllm import SamplingParams

        options = dict(self.options)
        if options.get("min_tokens"):
            options["min_tokens"] = min(options["min_tokens"], max_tokens)
        return SamplingParams(
            max_tokens=max_tokens, stop=list(dict.fromkeys([*self.stops, *more_stops])), **options
        )


def read_generation_kwargs(
    given: Mapping[str, Any],
    *,
    eos: str | None,
    max_gen_toks: int,
    stop_at_eos_only: bool = False,
    task: str | None = None,
) -> Generation:
    """Read what lm-eval hands to `generate_until`.

    Without `do_sample` and `temperature` the generation is greedy, as with lm-eval's `hf`.

    Args:
        given: `until`, `max_gen_toks` (or an alias that lm-eval knows), `do_sample`, and any
            parameter of `vllm.SamplingParams`.
        eos: text that ends every generation.
        max_gen_toks: where the task names none.
        stop_at_eos_only: a reasoning model may write the task's stop sequences while it thinks.
        task: for the message.

    Raises:
        ScoreModeError: a key means nothing to vLLM.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    stop = options.pop("stop", None) or []
    until = [*_texts("until", options.pop("until")), *_texts("stop", stop)]
    until = [text for text in handle_stop_sequences(until, eos) if text]
    length = int(options.pop("max_gen_toks"))
    if not options.pop("do_sample"):
        options["temperature"] = 0.0
    _refuse_unknown(options, task)
    # Stop sequences may be special tokens; as with lm-eval's `vllm`.
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": False, **options}
    stops = [text for text in until if text == eos] if stop_at_eos_only else until
    found = Generation(options, stops, until, length)
    _ = found.params  # vLLM refuses values out of range, before anything runs
    return found


def _texts(name: str, given: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise ScoreModeError(f"{name} is {given!r:.60}; give a text or a list of texts.")
    return list(listed)


def _refuse_unknown(options: Mapping[str, Any], task: str | None) -> None:
    from vllm import SamplingParams

    known = {
        name
        for name in SamplingParams.__struct_fields__
        if not name.startswith(("_", "score_")) and name not in RESERVED
    }
    for key, value in options.items():
        if key not in known:
            where = f" of the task {task!r}" if task else ""
            raise ScoreModeError(
                f"gen_kwargs{where} has {key}={value!r}, which vLLM's SamplingParams does not take"
                f"{did_you_mean(key, sorted(known))}. Remove it from --gen_kwargs or the task's "
                "generation_kwargs."
            )
