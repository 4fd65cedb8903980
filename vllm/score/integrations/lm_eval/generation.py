"""From a task's `generation_kwargs` to vLLM's sampling parameters, and to what stands between the
reasoning of a model and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.score.checks import did_you_mean
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.problems import ANSWER_ROOM
from vllm.score.eig.registry import SHARED, ScalerCall, split_kwargs
from vllm.score.errors import ScoreModeError
from vllm.score.escapes import unescape

if TYPE_CHECKING:
    from vllm import SamplingParams

# Set from the task's own names, or no business of a generation task.
RESERVED = {"max_tokens", "stop", "output_kind", "n", "detokenize"}

# Options of scalers that make an `AnswerFormat`, and its names for them.
_FORMAT = {"answer_cue": "cue", "answer_end": "end"}


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


def split_settings(
    settings: Sequence[Mapping[str, Any]],
) -> list[tuple[ScalerCall | None, dict[str, Any]]]:
    """What belongs to a scaler, and to ordinary generation, in the `gen_kwargs` of each request.

    Equal settings are split once, so that what is wrong with them is said once, and have the same
    call and the same rest. `temperature` and `top_p` are the scaler's; with `do_sample=True` the
    answers are sampled by them, too. `temperature=0` without `do_sample` asks for greedy answers,
    as lm-eval has it; reasoning is sampled all the same.

    Raises:
        ScoreModeError: as `vllm.score.eig.registry.split_kwargs`.
    """
    found: dict[str, tuple[ScalerCall | None, dict[str, Any]]] = {}
    keys = []
    for given in settings:
        if not isinstance(given, Mapping):
            raise ScoreModeError(f"gen_kwargs is {given!r:.60}; give a dict, e.g. {{}}.")
        key = repr(sorted(given.items()))
        keys.append(key)
        if key in found:
            continue
        greedy = "do_sample" not in given and given.get("temperature") == 0
        call, rest = split_kwargs({**given, "do_sample": False} if greedy else given)
        if call is not None and given.get("do_sample") is True:
            rest = {**{name: given[name] for name in SHARED if name in given}, **rest}
        found[key] = call, rest
    return [found[key] for key in keys]


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


@dataclass(frozen=True)
class Closing:
    """What comes between reasoning and answer.

    Attributes:
        text: of it.
        token_ids: at least one.
        always: also where the model ended its reasoning by itself.
        stops: texts that end the answer behind it.
    """

    text: str
    token_ids: list[int]
    always: bool
    stops: tuple[str, ...] = ()

    def reasoning_room(self, length: int) -> int:
        """Tokens of reasoning in a text of `length` tokens, with room for an answer behind it.

        Raises:
            ScoreModeError: the closing alone is as long.
        """
        left = length - len(self.token_ids)
        if left < 1:
            raise ScoreModeError(
                f"max_gen_toks is {length}, and {self.text!r} before the answer has "
                f"{len(self.token_ids)} tokens: raise max_gen_toks."
            )
        return left - min(ANSWER_ROOM, max(left // 2, 1))


def make_closing(tokenizer: Any, think_end: str | None, options: Mapping[str, Any]) -> Closing:
    """The text that ends a model's reasoning; where it has none, the cue of the answer.

    Args:
        tokenizer: of Hugging Face or vLLM.
        think_end: e.g. "</think>".
        options: of a scaler.

    Raises:
        ScoreModeError: the text has no tokens.
    """
    if think_end is not None:
        ids = list(tokenizer.encode(think_end, add_special_tokens=False))
        if not ids:
            raise ScoreModeError(
                f"think_end_token is {think_end!r}, of which the tokenizer makes no token; name "
                "the text that ends this model's reasoning."
            )
        return Closing(think_end, ids, always=True)
    answer = AnswerFormat(**{_FORMAT[key]: options[key] for key in _FORMAT if key in options})
    stops = (answer.end,) if answer.end else ()
    return Closing(answer.cue.rstrip(" "), answer.cue_tokens(tokenizer), False, stops)


def with_line_breaks(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with line breaks where a command line had to write `\\n` in cue or end."""
    return {
        key: unescape(value) if key in _FORMAT and isinstance(value, str) else value
        for key, value in options.items()
    }


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
