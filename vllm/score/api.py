"""`score`: the one way from Python to the scores; everything above the engine goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from numbers import Integral
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores
from vllm.score.tokens import encode_texts, own_prefix_note

if TYPE_CHECKING:
    from tqdm import tqdm

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

NOTES = "notes"  # of a prompt, for its result


def score(
    llm: LLM,
    requests: Iterable[Any],
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
        requests: each a text, a list of token ids, or a prompt as `LLM.generate` takes it:
            `{"prompt_token_ids": [...]}` or `{"prompt": "..."}`, with `target_token_ids` (m ids,
            or m lists of k candidates) for the last m positions. Without targets all tokens of
            the prompt but the first are scored. Texts get the tokenizer's special tokens, once
            (`vllm.score.tokens`).
        statistics: names from `vllm.score.engine.statistics`.
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
        One `TokenScores` a request, in the order of the requests. (They are sent so that those
        with a common context follow each other, and share its computation.)

    Raises:
        ScoreModeError: a request is malformed (before anything runs), or came back unsound.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    from vllm.score.armed import require_score_mode
    from vllm.score.engine.feed import run_requests
    from vllm.score.engine.output import FailedScores
    from vllm.score.engine.support import check_llm

    require_score_mode()
    check_llm(llm)
    skip_prefix_cache = bool(skip_prefix_cache or reproducible)
    policy = {"score_temperature": temperature, "score_top_p": top_p}
    params = _sampling_params(statistics, policy, top, full_vocabulary, skip_prefix_cache)
    prompts = _prompts(llm, requests)
    adapters = _adapters(llm, lora_request, len(prompts))
    _check(llm, prompts, params, full_vocabulary)
    results: list[TokenScores | None] = [None] * len(prompts)
    again = True
    orders = _orders(prompts, params, adapters)
    with _progress(use_tqdm, prompts) as bar:
        while orders:
            running = run_requests(llm, prompts, orders[0], params, adapters, reproducible)
            # At an error the rest is aborted now, not when the traceback is let go.
            with closing(running):
                for index, output in running:
                    result = output.scores
                    if again and isinstance(result, FailedScores) and result.nan:
                        # It may be the KV cache's, which the next request finds empty.
                        again = False
                        break
                    if result is None:
                        raise ScoreModeError(
                            f"requests[{index}] was aborted; score it again when the engine is "
                            "free."
                        )
                    len(result)  # failed scores raise their reason
                    results[index] = result
                    bar.update(len(prompts[index]["prompt_token_ids"]))
                else:
                    del orders[0]
                    continue
            orders[0] = [i for i in orders[0] if results[i] is None]
    return [r for r in results if r is not None]


def _prompts(llm: LLM, requests: Iterable[Any]) -> list[dict[str, Any]]:
    """Every request as a token prompt."""
    if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable):
        raise ScoreModeError(
            f"requests must be a list, got one {type(requests).__name__}; write [request]."
        )
    requests = list(requests)
    texts = [i for i, r in enumerate(requests) if _text_of(r) is not None]
    prompts: list[dict[str, Any]] = [{} for _ in requests]
    if texts:
        tokenizer = llm.get_tokenizer()
        encoded = encode_texts(
            tokenizer,
            [str(_text_of(requests[i])) for i in texts],
            [f"requests[{i}]" for i in texts],
        )
        for i, tokens in zip(texts, encoded, strict=True):
            prompts[i] = {"prompt_token_ids": tokens.ids}
            if tokens.own_prefix:
                prompts[i][NOTES] = (own_prefix_note(tokenizer),)
    for i, request in enumerate(requests):
        if isinstance(request, Mapping):
            unknown = set(request) - {"prompt", "prompt_token_ids", "target_token_ids"}
            if unknown:
                raise ScoreModeError(
                    f"requests[{i}] has the keys {sorted(unknown)}, which are not supported; use "
                    "prompt or prompt_token_ids, and target_token_ids."
                )
            if not prompts[i]:
                prompts[i] = {"prompt_token_ids": request.get("prompt_token_ids")}
            if request.get("target_token_ids") is not None:
                prompts[i]["target_token_ids"] = request["target_token_ids"]
        elif not prompts[i]:
            prompts[i] = {"prompt_token_ids": request}
    return prompts


def _text_of(request: Any) -> str | None:
    if isinstance(request, str):
        return request
    if isinstance(request, Mapping) and request.get("prompt_token_ids") is None:
        text = request.get("prompt")
        return text if isinstance(text, str) else None
    return None


def _sampling_params(
    statistics: Sequence[str],
    policy: dict[str, float],
    top: int,
    full_vocabulary: bool,
    skip: bool,
) -> SamplingParams:
    from vllm import SamplingParams

    whole = isinstance(top, Integral) and not isinstance(top, bool) and top >= 0
    if not whole or (top and full_vocabulary):
        raise ScoreModeError(
            f"top={top!r}: give a number of tokens from 0 on, or full_vocabulary=True, not both."
        )
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        score_mode=True,
        score_statistics=statistics or None,
        **policy,
        prompt_logprobs=None if full_vocabulary else top,
        skip_reading_prefix_cache=skip,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _adapters(
    llm: LLM, given: LoRARequest | Sequence[LoRARequest | None] | None, count: int
) -> Sequence[LoRARequest | None]:
    """One adapter or None a request."""
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


def _check(
    llm: LLM, prompts: list[dict[str, Any]], params: SamplingParams, full_vocabulary: bool
) -> None:
    """Refuse a malformed request by its index, before the first one runs."""
    from vllm.score.engine.request import PLAN, ModelFacts, plan_request
    from vllm.score.engine.support import check_configuration

    check_configuration(llm.llm_engine.vllm_config)
    model = llm.llm_engine.model_config
    facts = ModelFacts(model.get_vocab_size(), model.max_model_len)
    in_use = 0
    for i, prompt in enumerate(prompts):
        try:
            ids = prompt["prompt_token_ids"]
            if full_vocabulary and prompt.get("target_token_ids") is not None:
                raise ScoreModeError(
                    "full_vocabulary=True and target_token_ids exclude each other."
                )
            targets, notes = prompt.get("target_token_ids"), prompt.pop(NOTES, ())
            plan = plan_request(ids, targets, params, facts, in_use, notes)
        except ValueError as error:
            raise ScoreModeError(f"requests[{i}]: {error}") from error
        prompt["prompt_token_ids"] = plan.prompt_token_ids
        prompt[PLAN] = plan
        if full_vocabulary:
            rows, width = plan.result_shape
            in_use += 4 * rows * width


def _orders(
    prompts: list[dict[str, Any]],
    params: SamplingParams,
    adapters: Sequence[LoRARequest | None],
) -> list[list[int]]:
    """The requests that are sent together, those with a common context after each other."""
    from vllm.platforms import current_platform
    from vllm.score.engine.request import PLAN
    from vllm.score.shared_prefixes import shared_prefix_order

    order = list(range(len(prompts)))
    if not params.skip_reading_prefix_cache:
        order = shared_prefix_order([p[PLAN].ids for p in prompts])
    if not any(adapters) or not current_platform.is_cpu():
        return [order]
    # On a CPU vLLM computes rows without an adapter with one, if there are both in a step.
    apart = [[i for i in order if (adapters[i] is None) is without] for without in (True, False)]
    return [group for group in apart if group]


def _progress(use_tqdm: bool | Callable[..., tqdm], prompts: Iterable[dict[str, Any]]) -> Any:
    from tqdm import tqdm as default

    make = use_tqdm if callable(use_tqdm) else default
    return make(
        total=sum(len(p["prompt_token_ids"]) for p in prompts),
        desc="Scoring",
        unit="tok",
        unit_scale=True,
        disable=not use_tqdm,
        dynamic_ncols=True,
    )
