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
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.options import Options, parameters_of, unescape
from vllm.score.eig.reasoning import ANSWER_ROOM, reason
from vllm.score.eig.records import Trace
from vllm.score.eig.report import get_eig_metrics_summary, print_eig_metrics
from vllm.score.eig.rules import StoppingRule, all_rules, find_rule
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


class ScaledRequest(NamedTuple):
    """A request that a scaler governs.

    Attributes:
        context: token ids, of any length.
        call: the scaler and its settings.
        generation: how the answer is generated, and how long the whole text may be.
    """

    context: list[int]
    call: ScalerCall
    generation: Generation


class Closing(NamedTuple):
    """What comes between reasoning and answer.

    Attributes:
        text: of it.
        token_ids: at least one.
        stops: texts that end the answer behind it, beside those of the request.
    """

    text: str
    token_ids: list[int]
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScaledGeneration:
    """Generation under scalers, on a running engine.

    Attributes:
        llm: on which nothing else is running.
        prefix_token_id: what an empty context is replaced by; asked for when there is one.
        max_length: tokens of a context and its text together.
        think_end: text that ends the reasoning, as "</think>"; None where the model has none.
        truncation_side: of contexts that are too long.
        lora_request: an adapter for all.
        use_tqdm: show progress bars.
    """

    llm: LLM
    prefix_token_id: Callable[[], int]
    max_length: int
    think_end: str | None
    truncation_side: str
    lora_request: LoRARequest | None
    use_tqdm: bool

    def texts(self, requests: Sequence[ScaledRequest]) -> list[str]:
        """By request: reasoning, closing and answer, the answer up to its first stop sequence.

        Raises:
            ScoreModeError: a setting cannot be used, or does not go with the others.
        """
        groups: dict[str, list[int]] = {}
        for index, (_, call, generation) in enumerate(requests):
            groups.setdefault(repr((call, generation)), []).append(index)
        texts: dict[int, str] = {}
        for indexes in groups.values():
            _, call, generation = requests[indexes[0]]
            found = self._texts([requests[index].context for index in indexes], call, generation)
            texts.update(zip(indexes, found, strict=True))
        logger.info("Decisions of this process: %s", get_eig_metrics_summary())
        if any(request.call.debug for request in requests):
            print_eig_metrics(file=sys.stderr)
        return [texts[index] for index in range(len(requests))]

    def _texts(
        self, contexts: Sequence[list[int]], call: ScalerCall, generation: Generation
    ) -> list[str]:
        """Those of requests with equal settings, side by side."""
        asked = Options(**call.options)
        closing = self._closing(asked.answer_format)
        prompts, length = self._fit(contexts, call.rule.sample_length, generation.max_gen_toks)
        budget = _reasoning_room(length, closing)
        most = call.rule.budget(asked.max_tokens_thinking)
        options = {"max_tokens_thinking": budget, **call.options}
        if most is not None and most > budget:
            logger.warning(
                "%d tokens of reasoning are asked for, but max_gen_toks leaves room for %d.",
                most,
                budget,
            )
            options["max_tokens_thinking"] = budget
        traces = reason(
            self.llm,
            prompts,
            rule=call.rule,
            think_end=generation.until if self.think_end is None else self.think_end,
            seed=generation.options.get("seed") or 0,
            lora_request=self.lora_request,
            use_tqdm=self.use_tqdm,
            debug=call.debug,
            **options,
        )
        texts, inputs, parameters = [], {}, []
        for index, (trace, prompt) in enumerate(zip(traces, prompts, strict=True)):
            room = min(length, self.max_length - len(prompt))
            text, ids = self._draft(trace, room, closing, generation.until)
            texts.append(text)
            if ids is not None:
                inputs[index] = {"prompt_token_ids": prompt + ids}
                parameters.append(generation.limited(room - len(ids), *closing.stops))
        if inputs:
            outputs = self.llm.generate(
                list(inputs.values()),
                parameters,
                use_tqdm=self.use_tqdm,
                lora_request=self.lora_request,
            )
            for index, output in zip(inputs, outputs, strict=True):
                answer = output.outputs[0].text
                texts[index] = self._joined(texts[index], answer, generation.until, closing.stops)
        return texts

    def _closing(self, answer: AnswerFormat) -> Closing:
        """The text that ends the model's reasoning; where it has none, the cue of the answer.

        Raises:
            ScoreModeError: the text has no tokens.
        """
        tokenizer: Any = self.llm.get_tokenizer()
        if self.think_end is None:
            stops = (answer.end,) if answer.end else ()
            return Closing(answer.cue.rstrip(" "), answer.cue_tokens(tokenizer), stops)
        ids = list(tokenizer.encode(self.think_end, add_special_tokens=False))
        if not ids:
            raise ScoreModeError(
                f"think_end_token is {self.think_end!r}, of which the tokenizer makes no token; "
                "name the text that ends this model's reasoning."
            )
        return Closing(self.think_end, ids)

    def _fit(
        self, contexts: Sequence[list[int]], step: int, wanted: int
    ) -> tuple[list[list[int]], int]:
        """Contexts that leave room for the text, and how many tokens the longest text may have."""
        least = step + ANSWER_ROOM
        if least >= self.max_length:
            raise ScoreModeError(
                f"sample_length is {step}, which with {ANSWER_ROOM} tokens for an answer leaves no "
                f"room for a context in max_model_len={self.max_length}: lower it or raise "
                "max_model_len."
            )
        clipped = wanted >= self.max_length
        room = self.max_length - (least if clipped else max(wanted, least))
        prompts = [
            fit_context(ids, room, self.truncation_side) or [self.prefix_token_id()]
            for ids in contexts
        ]
        if not clipped:
            return prompts, wanted
        # The scalers know the engine's length: they keep each question within it by themselves.
        own = self.max_length >= self.llm.llm_engine.model_config.max_model_len - 1
        length = self.max_length - (min if own else max)(map(len, prompts))
        logger.warning(
            "max_gen_toks is %d, as long as max_model_len=%d or longer: a text may have the tokens "
            "that its context leaves, at most %d.",
            wanted,
            self.max_length,
            length,
        )
        return prompts, length

    def _draft(
        self, trace: Trace, length: int, closing: Closing, until: Sequence[str]
    ) -> tuple[str, list[int] | None]:
        """A text without its answer, and its tokens; none where it is complete as it stands."""
        ids, text, ended = list(trace.reasoning_token_ids), trace.reasoning, trace.ended
        most = max(length - len(closing.token_ids) - 1, 0)
        if len(ids) > most:  # the budget is that of a shorter context
            ids, ended = ids[:most], False
            text = self.llm.get_tokenizer().decode(ids)
        if self.think_end is None:
            cut = _up_to_stop(text, trace, until)
            if ended or len(cut) < len(text):
                return cut, None
        return text + closing.text, [*ids, *closing.token_ids]

    def _joined(self, text: str, answer: str, until: list[str], stops: Sequence[str]) -> str:
        from lm_eval.models.utils import postprocess_generated_text

        if self.think_end is None:
            return text + str(postprocess_generated_text(answer, [*until, *stops], None))
        return str(postprocess_generated_text(text + answer, until, self.think_end))


def _reasoning_room(length: int, closing: Closing) -> int:
    """Tokens of reasoning in a text of `length` tokens, with room for an answer behind it.

    Raises:
        ScoreModeError: the closing alone is as long.
    """
    left = length - len(closing.token_ids)
    if left < 1:
        raise ScoreModeError(
            f"max_gen_toks is {length}, and {closing.text!r} before the answer has "
            f"{len(closing.token_ids)} tokens: raise max_gen_toks."
        )
    return left - min(ANSWER_ROOM, max(left // 2, 1))


def _up_to_stop(text: str, trace: Trace, until: Sequence[str]) -> str:
    """Without a stop sequence that lies across two steps; those in inserted prompts are meant."""
    inserted = [step.prompt for step in trace.steps if step.prompt]
    for stop in until:
        if not any(stop in prompt for prompt in inserted):
            text = text.split(stop)[0]
    return text
