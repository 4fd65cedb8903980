"""Requests with a scaler: the model reasons as long as its rule has it, and then answers.

The text of such a request is the reasoning, a closing, and the answer written after it. The closing
is `think_end_token` where the model has one, else the cue of the answer where the rule stopped the
reasoning; where the model had ended by itself, its text is complete as it stands.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.score.eig.metrics import get_eig_metrics_summary, print_eig_metrics
from vllm.score.eig.problems import ANSWER_ROOM
from vllm.score.eig.registry import ScalerCall
from vllm.score.eig.types import Trace
from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.generation import (
    Closing,
    Generation,
    make_closing,
    with_line_breaks,
)
from vllm.score.integrations.lm_eval.requests import fit_context

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds


@dataclass(frozen=True)
class ScaledRequest:
    """A request that a scaler governs.

    Attributes:
        context: token ids, of any length.
        call: the scaler and its settings; one object for equal settings.
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
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(id(request.call), []).append(index)
        drafts: dict[int, Draft] = {}
        for indexes in groups.values():
            found = self._drafts([requests[index] for index in indexes])
            drafts.update(zip(indexes, found, strict=True))
        texts = self._answered([drafts[index] for index in range(len(requests))], requests)
        logger.info("Decisions of this process: %s", get_eig_metrics_summary())
        if any(request.call.options.get("debug") for request in requests):
            print_eig_metrics(file=sys.stderr)
        return texts

    def _drafts(self, group: Sequence[ScaledRequest]) -> list[Draft]:
        """Reason about requests with equal settings, side by side."""
        call, generation = group[0].call, group[0].generation
        options = with_line_breaks(call.options)
        closing = make_closing(self._tokenizer, self._think_end, options)
        prompts, length = self._fit([request.context for request in group], call, generation)
        budget = closing.reasoning_room(length)
        think_end = generation.until if self._think_end is None else [self._think_end]
        traces = self._reason(
            prompts,
            ScalerCall(call.scaler, call.parameters, options),
            budget,
            think_end,
            generation.options.get("seed"),
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
        least = int(call.parameters.get("sample_length", 0)) + ANSWER_ROOM
        if least >= self._max_length:
            raise ScoreModeError(
                f"sample_length is {least - ANSWER_ROOM}, which with {ANSWER_ROOM} tokens for an "
                f"answer leaves no room for a context in max_model_len={self._max_length}: lower "
                "it or raise max_model_len."
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

    def _reason(
        self,
        prompts: list[list[int]],
        call: ScalerCall,
        budget: int,
        think_end: list[str],
        seed: int | None,
    ) -> list[Trace]:
        function = call.scaler.load()
        given = {**call.parameters, **call.options}
        if self._lora_request is not None:
            given["lora_request"] = self._lora_request
        for name in ("max_tokens_thinking", "fixed_budget"):
            if type(given.get(name)) is int and given[name] > budget:
                logger.warning(
                    "%s is %d, but max_gen_toks leaves room for %d tokens of reasoning.",
                    name,
                    given[name],
                    budget,
                )
                given[name] = budget
        offered = {
            "max_tokens_thinking": budget,
            "think_end": think_end,
            "use_tqdm": self._use_tqdm,
            **({} if seed is None else {"seed": seed}),
        }
        arguments = _accepted(call.scaler.name, function, given, offered)
        traces = function(self._llm, prompts, **arguments)
        good = isinstance(traces, Sequence) and len(traces) == len(prompts)
        if not good or not all(isinstance(trace, Trace) for trace in traces):
            raise ScoreModeError(
                f"the scaler {call.scaler.name!r} returned {traces!r:.80}; it has to return a list "
                "of one vllm.score.eig.types.Trace for each question."
            )
        return list(traces)

    def _draft(
        self, trace: Trace, prompt: list[int], length: int, closing: Closing, generation: Generation
    ) -> Draft:
        ids, text, ended = list(trace.reasoning_token_ids), trace.reasoning, trace.ended
        most = max(length - len(closing.token_ids) - 1, 0)
        if len(ids) > most:  # a scaler that knows no budget
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


def _accepted(
    name: str, function: Callable[..., Any], given: dict[str, Any], offered: dict[str, Any]
) -> dict[str, Any]:
    """What was given, and of what is offered that which the function takes."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return {**offered, **given}
    if refused := [f"{key}={value!r}" for key, value in given.items() if key not in parameters]:
        raise ScoreModeError(
            f"the scaler {name!r} does not take {', '.join(refused)}; remove it, or let the "
            "function take it."
        )
    return {**{key: value for key, value in offered.items() if key in parameters}, **given}


def _up_to_stop(text: str, trace: Trace, until: Sequence[str]) -> str:
    """Without a stop sequence that lies across two steps; those in inserted prompts are meant."""
    inserted = [step.prompt for step in trace.steps if step.prompt]
    for stop in until:
        if not any(stop in prompt for prompt in inserted):
            text = text.split(stop)[0]
    return text
