"""`score`: the one way from Python to the scores; everything above the engine goes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import Field

from vllm.score.checks import Whole, check
from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores
from vllm.score.tokens import encode_inputs, own_prefix_note

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.score.engine.request import AdmittedRequest

NOTES = "notes"  # of a prompt, for its result


class ScoreRequest(TypedDict, total=False):
    """One request of `score`, as `LLM.generate` takes prompts.

    Attributes:
        prompt: a text, which gets the tokenizer's special tokens (`vllm.score.tokens`); or
        prompt_token_ids: [n] ids, with what stands in front of them.
        target_token_ids: m ids, or m lists of k candidates, for the last m positions; without them
            all tokens of the prompt but the first are scored.
    """

    prompt: str
    prompt_token_ids: Sequence[int] | np.ndarray
    target_token_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray


def score(
    llm: LLM,
    requests: Iterable[str | Sequence[int] | np.ndarray | ScoreRequest | Mapping[str, Any]],
    *,
    statistics: Sequence[str] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    top: int = 0,
    full_vocabulary: bool = False,
    use_tqdm: bool | Callable[..., tqdm] = True,
    skip_prefix_cache: bool = False,
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    reproducible: bool = False,
) -> list[TokenScores]:
    """Log-probabilities of given tokens under the model, in nats.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        requests: each a text, a list of token ids, or a `ScoreRequest`, which is a prompt as
            `LLM.generate` takes it, with or without targets.
        statistics: names from `vllm.score.ops.statistics`.
        temperature: divides the logits.
        top_p: the scores are those of the most likely tokens whose probabilities first add up to
            it, renormalised, as sampling with this `top_p` has it; -inf for any other token.
        top: also return that many most likely tokens of every position.
        full_vocabulary: return [m, V] log-probabilities of every token instead of targets.
        use_tqdm: show a progress bar; or a function that makes one.
        skip_prefix_cache: compute every token anew. The cached part of a context was computed in
            another batch, which can move the last bits.
        lora_request: an adapter for all requests, or one (or None) for each.
        reproducible: the same call gives the same bits again: nothing is read from the prefix
            cache, and the engine begins when all requests (the first 4,096, or 2**20 tokens) have
            reached it, so that the batches are the same (not under data parallelism).

    Returns:
        One `TokenScores` per request, in the order of the requests. (They are sent so that those
        with a common context follow each other, and share its computation.)

    Raises:
        ScoreModeError: a request is malformed (before anything runs), or came back unsound.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.score.armed import require_score_mode
    from vllm.score.engine.configuration import check_llm
    from vllm.score.engine.feed import run_requests
    from vllm.score.engine.output import FailedScores

    require_score_mode()
    check_llm(llm)
    check("top", top, Annotated[Whole, Field(ge=0)], "it is a number of tokens")
    if top and full_vocabulary:
        raise ScoreModeError(f"top={top} and full_vocabulary=True: give one of them, not both.")
    params = SamplingParams(
        score_mode=True,
        score_statistics=statistics or None,
        score_temperature=temperature,
        score_top_p=top_p,
        prompt_logprobs=None if full_vocabulary else top,
        skip_reading_prefix_cache=bool(skip_prefix_cache or reproducible),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts = _prompts(llm, requests)
    adapters = _adapters(llm, lora_request, len(prompts))
    admitted = _admitted(llm, prompts, params)
    results: dict[int, TokenScores] = {}
    retry_nan = True
    with _progress(use_tqdm, sum(len(request.ids) for request in admitted)) as bar:
        for order in _orders(llm, admitted, params.skip_reading_prefix_cache, adapters):
            while left := [i for i in order if i not in results]:
                running = run_requests(llm, admitted, left, adapters, reproducible)
                # At an error the rest is aborted now, not when the traceback is let go.
                with closing(running):
                    for index, output in running:
                        found = output.scores
                        if retry_nan and isinstance(found, FailedScores) and found.nan:
                            # It may be the KV cache's, which the next request finds empty.
                            retry_nan = False
                            break
                        if found is None:
                            raise ScoreModeError(
                                f"requests[{index}] was aborted; score it again when the engine "
                                "is free."
                            )
                        len(found)  # failed scores raise their reason
                        results[index] = found
                        bar.update(len(admitted[index].ids))
    return [results[i] for i in range(len(prompts))]


def _prompts(llm: LLM, requests: Any) -> list[dict[str, Any]]:
    """Every request as a token prompt."""
    if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable):
        raise ScoreModeError(
            f"requests must be a list, got one {type(requests).__name__}; write [request]."
        )
    prompts = [_prompt(i, request) for i, request in enumerate(requests)]
    texts = {i: prompt.pop("prompt") for i, prompt in enumerate(prompts) if "prompt" in prompt}
    if texts:
        tokenizer = llm.get_tokenizer()
        names = [f"requests[{i}]" for i in texts]
        encoded = encode_inputs(tokenizer, list(texts.values()), names)
        for i, tokens in zip(texts, encoded, strict=True):
            prompts[i]["prompt_token_ids"] = tokens.ids
            if tokens.own_prefix:
                prompts[i][NOTES] = (own_prefix_note(tokenizer),)
    return prompts


def _prompt(index: int, request: Any) -> dict[str, Any]:
    """A request as a dict with either "prompt" (a text) or "prompt_token_ids"."""
    if isinstance(request, str):
        return {"prompt": request}
    if not isinstance(request, Mapping):
        return {"prompt_token_ids": request}
    unknown = request.keys() - ScoreRequest.__annotations__.keys()
    if unknown:
        raise ScoreModeError(
            f"requests[{index}] has the keys {sorted(unknown)}, which are not supported; use "
            "prompt or prompt_token_ids, and target_token_ids."
        )
    prompt = dict(request)
    ids, text = prompt.pop("prompt_token_ids", None), prompt.pop("prompt", None)
    if ids is None and isinstance(text, str):
        return {**prompt, "prompt": text}
    return {**prompt, "prompt_token_ids": ids}


def _adapters(
    llm: LLM, given: LoRARequest | Sequence[LoRARequest | None] | None, count: int
) -> Sequence[LoRARequest | None]:
    """One adapter or None per request."""
    adapters = list(given) if isinstance(given, Sequence) else [given] * count
    if len(adapters) != count:
        raise ScoreModeError(
            f"lora_request has {len(adapters)} entries for {count} requests; give one for all, or "
            "one or None for each."
        )
    if any(adapters) and llm.llm_engine.vllm_config.lora_config is None:
        raise ScoreModeError(
            "lora_request is given, but the engine has no LoRA: LLM(enable_lora=True)."
        )
    return adapters


def _admitted(
    llm: LLM, prompts: list[dict[str, Any]], params: SamplingParams
) -> list[AdmittedRequest]:
    """Each request checked, the first malformed one refused by its index before any runs."""
    from vllm.score.engine.configuration import check_configuration
    from vllm.score.engine.request import ModelFacts, admit

    check_configuration(llm.llm_engine.vllm_config)
    facts = ModelFacts.of(llm.llm_engine.input_processor)
    full_vocabulary = params.prompt_logprobs is None
    admitted: list[AdmittedRequest] = []
    bytes_in_use = 0
    for i, prompt in enumerate(prompts):
        ids, targets = prompt["prompt_token_ids"], prompt.get("target_token_ids")
        if full_vocabulary and targets is not None:
            raise ScoreModeError(
                f"requests[{i}]: full_vocabulary=True and target_token_ids exclude each other."
            )
        try:
            request = admit(ids, targets, params, facts, bytes_in_use, prompt.get(NOTES, ()))
        except ValueError as error:
            raise ScoreModeError(f"requests[{i}]: {error}") from error
        admitted.append(request)
        if full_vocabulary:
            bytes_in_use += 4 * math.prod(request.spec.result_shape)
    return admitted


def _orders(
    llm: LLM,
    requests: Sequence[AdmittedRequest],
    skip_prefix_cache: bool,
    adapters: Sequence[LoRARequest | None],
) -> list[list[int]]:
    """The requests that are sent together, those with a common context after each other."""
    from vllm.score.engine.configuration import confuses_adapters
    from vllm.score.engine.feed import shared_prefix_order

    order = list(range(len(requests)))
    if not skip_prefix_cache:
        order = shared_prefix_order([request.ids for request in requests])
    if not any(adapters) or not confuses_adapters(llm.llm_engine.vllm_config):
        return [order]
    return [[i for i in order if (adapters[i] is None) is without] for without in (True, False)]


def _progress(use_tqdm: bool | Callable[..., tqdm], tokens: int) -> Any:
    from tqdm import tqdm as default

    make = use_tqdm if callable(use_tqdm) else default
    return make(
        total=tokens,
        desc="Scoring",
        unit="tok",
        unit_scale=True,
        disable=not use_tqdm,
        dynamic_ncols=True,
    )
