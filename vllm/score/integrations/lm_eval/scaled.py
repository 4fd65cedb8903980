"""Requests with a scaler: the model reasons as long as its rule has it, and then answers.

The text of such a request is the reasoning, a closing, and the answer written after it. The closing
is `think_end_token` where the model has one, else the cue of the answer where the rule stopped the
reasoning; where the model had ended by itself, its text is complete as it stands.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.options import Options, parameters_of, unescape
from vllm.score.eig.reasoning import ANSWER_ROOM, reason
from vllm.score.eig.report import get_eig_metrics_summary, print_eig_metrics
from vllm.score.eig.rules import StoppingRule, all_rules, find_rule
from vllm.score.eig.trace import Trace
from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.requests import Generation, fit_context

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds


SCALER_KEY = "scale_func_name"
# Options of all rules that `gen_kwargs` may hold; their values are checked where they are used.
OPTIONS = tuple(parameters_of(Options).keys() - {"think_end", "prompts", "seed", "metrics"})
SWITCHES = ("strict", "debug")
# Ordinary generation takes these, too.
SHARED = ("temperature", "top_p")
# A key at least so similar to one of ours is a slip; vLLM's `top_k` is less so to `top_p`.
_SLIP = 0.85


@dataclass(frozen=True)
class ScalerCall:
    """What a user asked of a scaler.

    Attributes:
        rule: with its parameters.
        options: of `OPTIONS` those given, as given.
        debug: log each decision, and print the metrics.
    """

    rule: StoppingRule
    options: dict[str, Any]
    debug: bool = False


def split_settings(
    settings: Sequence[Mapping[str, Any]],
) -> list[tuple[ScalerCall | None, dict[str, Any]]]:
    """What belongs to a scaler, and to ordinary generation, in the `gen_kwargs` of each request.

    Equal settings are split once, so that what is wrong with them is said once, and have the same
    call and the same rest. `temperature` and `top_p` are the scaler's; with `do_sample=True` the
    answers are sampled by them, too. `temperature=0` without `do_sample` asks for greedy answers,
    as lm-eval has it; reasoning is sampled all the same.

    Raises:
        ScoreModeError: as `split_kwargs`.
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
            key that looks like a misspelt one; values as in `StoppingRule.checked`.
    """
    rest = dict(options)
    name = rest.pop(SCALER_KEY, None)
    rules = all_rules()
    known = {key for each in rules.values() for key in each.parameters()}
    if name is None:
        ours = {*known, *OPTIONS, *SWITCHES} - {*SHARED}
        if stray := [f"{key}={value!r}" for key, value in rest.items() if key in ours]:
            raise ScoreModeError(
                f"gen_kwargs has {', '.join(stray)}, which only scalers take; add {SCALER_KEY} "
                f"({', '.join(rules)}) or remove it."
            )
        return None, rest
    kind = find_rule(name)
    own = {*kind.parameters(), *OPTIONS, *SWITCHES}
    for key, value in rest.items():
        if key in own or key in SHARED:
            continue
        if key in known:
            raise ScoreModeError(
                f"gen_kwargs has {key}={value!r}, which the scaler {name!r} does not take; it "
                f"takes {', '.join(kind.parameters())}. Remove it."
            )
        if close := difflib.get_close_matches(key, own, n=1, cutoff=_SLIP):
            raise ScoreModeError(
                f"gen_kwargs has {key}={value!r}, which nobody takes; did you mean {close[0]!r}?"
            )
    switches = {key: _switch(key, rest.pop(key)) for key in SWITCHES if key in rest}
    # A task's way to ask for greedy answers, as opposed to a user's mistaken temperature.
    sampled = _switch("do_sample", rest.get("do_sample", True))
    zero = isinstance(rest.get("temperature"), int | float) and rest["temperature"] == 0
    held = {"temperature": rest.pop("temperature")} if not sampled and zero else {}
    if held:
        logger.info("do_sample=False: answers are greedy; reasoning is sampled.")
    values, rest = kind.split(rest)
    rule = kind.checked(switches.get("strict", False), **values)
    found = {key: rest.pop(key) for key in OPTIONS if key in rest}
    for key in ("answer_cue", "answer_end"):  # a command line writes line breaks as \\n
        if isinstance(found.get(key), str):
            found[key] = unescape(found[key])
    return ScalerCall(rule, found, switches.get("debug", False)), {**rest, **held}


def _switch(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ScoreModeError(f"{key} is {value!r}; set it to true or false.")


@dataclass(frozen=True)
class ScaledRequest:
    """A request that a scaler governs.

    Attributes:
        context: token ids, of any length.
        call: the scaler and its settings.
        generation: how the answer is generated, and how long the whole text may be.
    """

    context: list[int]
    call: ScalerCall
    generation: Generation


@dataclass(frozen=True)
class Draft:
    """A text without its answer.

    Attributes:
        text: so far.
        prompt: token ids to write the answer behind; None where the text is complete.
        room: tokens that the answer may have.
        stops: texts that end it, beside those of the request.
    """

    text: str
    prompt: list[int] | None = None
    room: int = 0
    stops: tuple[str, ...] = ()


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


def make_closing(tokenizer: Any, think_end: str | None, answer: AnswerFormat) -> Closing:
    """The text that ends a model's reasoning; where it has none, the cue of the answer.

    Args:
        tokenizer: of Hugging Face or vLLM.
        think_end: such as "</think>".
        answer: how it is asked for.

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
    stops = (answer.end,) if answer.end else ()
    return Closing(answer.cue.rstrip(" "), answer.cue_tokens(tokenizer), False, stops)


class ScaledGeneration:
    """Generation under scalers, on a running engine.

    Args:
        llm: on which nothing else is running.
        prefix_token_id: what an empty context is replaced by; asked for when there is one.
        max_length: tokens of a context and its text together.
        think_end: text that ends the reasoning, as "</think>"; None where the model has none.
        truncation_side: of contexts that are too long.
        lora_request: an adapter for all.
        use_tqdm: show progress bars.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        prefix_token_id: Callable[[], int],
        max_length: int,
        think_end: str | None = None,
        truncation_side: str = "left",
        lora_request: LoRARequest | None = None,
        use_tqdm: bool = True,
    ) -> None:
        self._llm, self._tokenizer = llm, llm.get_tokenizer()
        self._engine_length = int(llm.llm_engine.model_config.max_model_len)
        self._prefix_token_id, self._max_length = prefix_token_id, max_length
        self._think_end, self._truncation_side = think_end, truncation_side
        self._lora_request, self._use_tqdm = lora_request, use_tqdm

    def texts(self, requests: Sequence[ScaledRequest]) -> list[str]:
        """By request: reasoning, closing and answer, the answer up to its first stop sequence.

        Raises:
            ScoreModeError: a setting cannot be used, or does not go with the others.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr((request.call, request.generation)), []).append(index)
        drafts: dict[int, Draft] = {}
        for indexes in groups.values():
            found = self._drafts([requests[index] for index in indexes])
            drafts.update(zip(indexes, found, strict=True))
        texts = self._answered([drafts[index] for index in range(len(requests))], requests)
        logger.info("Decisions of this process: %s", get_eig_metrics_summary())
        if any(request.call.debug for request in requests):
            print_eig_metrics(file=sys.stderr)
        return texts

    def _drafts(self, group: Sequence[ScaledRequest]) -> list[Draft]:
        """Reason about requests with equal settings, side by side."""
        call, generation = group[0].call, group[0].generation
        options = dict(call.options)
        asked = Options(**options)
        closing = make_closing(self._tokenizer, self._think_end, asked.answer_format)
        prompts, length = self._fit([request.context for request in group], call, generation)
        budget = closing.reasoning_room(length)
        most = call.rule.budget(asked.max_tokens_thinking)
        if most is not None and most > budget:
            logger.warning(
                "%d tokens of reasoning are asked for, but max_gen_toks leaves room for %d.",
                most,
                budget,
            )
            options["max_tokens_thinking"] = budget
        options.setdefault("max_tokens_thinking", budget)
        traces = reason(
            self._llm,
            prompts,
            rule=call.rule,
            think_end=generation.until if self._think_end is None else self._think_end,
            seed=generation.options.get("seed") or 0,
            lora_request=self._lora_request,
            use_tqdm=self._use_tqdm,
            debug=call.debug,
            **options,
        )
        return [
            self._draft(
                trace, prompt, min(length, self._max_length - len(prompt)), closing, generation
            )
            for trace, prompt in zip(traces, prompts, strict=True)
        ]

    def _fit(
        self, contexts: Sequence[list[int]], call: ScalerCall, generation: Generation
    ) -> tuple[list[list[int]], int]:
        """Contexts that leave room for the text, and how many tokens the longest text may have."""
        wanted = generation.max_gen_toks
        least = call.rule.sample_length + ANSWER_ROOM
        if least >= self._max_length:
            raise ScoreModeError(
                f"sample_length is {call.rule.sample_length}, which with {ANSWER_ROOM} tokens for "
                f"an answer leaves no room for a context in max_model_len={self._max_length}: "
                "lower it or raise max_model_len."
            )
        clipped = wanted >= self._max_length
        room = self._max_length - (least if clipped else max(wanted, least))
        prompts = [
            fit_context(ids, room, self._truncation_side) or [self._prefix_token_id()]
            for ids in contexts
        ]
        if not clipped:
            return prompts, wanted
        # The scalers know the engine's length: they keep each question within it by themselves.
        own = self._max_length >= self._engine_length - 1
        lengths = [len(prompt) for prompt in prompts]
        length = self._max_length - (min(lengths) if own else max(lengths))
        logger.warning(
            "max_gen_toks is %d, as long as max_model_len=%d or longer: a text may have the tokens "
            "that its context leaves, at most %d.",
            wanted,
            self._max_length,
            length,
        )
        return prompts, length

    def _draft(
        self, trace: Trace, prompt: list[int], length: int, closing: Closing, generation: Generation
    ) -> Draft:
        ids, text, ended = list(trace.reasoning_token_ids), trace.reasoning, trace.ended
        most = max(length - len(closing.token_ids) - 1, 0)
        if len(ids) > most:  # the budget is that of a shorter context
            ids, ended = ids[:most], False
            text = self._tokenizer.decode(ids)
        if not closing.always:
            cut = _up_to_stop(text, trace, generation.until)
            if ended or len(cut) < len(text):
                return Draft(cut)
        return Draft(
            text + closing.text,
            [*prompt, *ids, *closing.token_ids],
            length - len(ids) - len(closing.token_ids),
            closing.stops,
        )

    def _answered(self, drafts: Sequence[Draft], requests: Sequence[ScaledRequest]) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        prompts, parameters = [], []
        for draft, request in zip(drafts, requests, strict=True):
            if draft.prompt is not None:
                prompts.append({"prompt_token_ids": draft.prompt})
                parameters.append(request.generation.limited(draft.room, *draft.stops))
        outputs = iter(
            self._llm.generate(
                prompts, parameters, use_tqdm=self._use_tqdm, lora_request=self._lora_request
            )
            if prompts
            else ()
        )
        texts = []
        for draft, request in zip(drafts, requests, strict=True):
            text = draft.text
            if draft.prompt is not None:
                answer = next(outputs).outputs[0].text
                until = request.generation.until
                if self._think_end is None:
                    text += postprocess_generated_text(answer, [*until, *draft.stops], None)
                else:
                    text = postprocess_generated_text(text + answer, until, self._think_end)
            texts.append(text)
        return texts


def _up_to_stop(text: str, trace: Trace, until: Sequence[str]) -> str:
    """Without a stop sequence that lies across two steps; those in inserted prompts are meant."""
    inserted = [step.prompt for step in trace.steps if step.prompt]
    for stop in until:
        if not any(stop in prompt for prompt in inserted):
            text = text.split(stop)[0]
    return text
