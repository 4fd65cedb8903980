"""`score`: the one way from Python to the scores; everything above the engine goes through it.

Every request is checked before the first is sent. They are sent in the order in which the engine
computes shared contexts once, and so many at a time that it is never short of work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import numpy as np
from pydantic import Field

from vllm.score.armed import require_score_mode
from vllm.score.checks import Whole, check, check_list
from vllm.score.engine.configuration import check_configuration, check_llm, confuses_adapters
from vllm.score.engine.parts import EMBEDS, MEDIA, TEXT, Parts, check_keys, prompt_ids
from vllm.score.engine.request import TARGETS, AdmittedRequest, ModelFacts, admit
from vllm.score.errors import ScoreModeError, first_line
from vllm.score.results import FailedScores, TokenScores, scores_of
from vllm.score.tokens import encode_inputs, own_prefix_note, read_token_ids

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

# Enough to keep any engine full, few enough that a long list costs no memory before its turn.
MAX_REQUESTS_IN_FLIGHT = 4096
MAX_TOKENS_IN_FLIGHT = 1 << 20
# Shorter prefixes are not worth another order: they fill no block of the cache.
SHARED_TOKENS = 16
# Sent before the engine begins, at most: more would keep it waiting for us.
HELD_REQUESTS = 256
SECONDS_BETWEEN_LOOKS = 0.2  # at whether the engine's process is alive

NOTES = "notes"  # of a prompt, for its result


class ScoreRequest(TypedDict, total=False):
    """One request of `score`, as `LLM.generate` takes prompts.

    Attributes:
        prompt: a text, which gets the tokenizer's special tokens (`vllm.score.tokens`); or
        prompt_token_ids: [n] ids, with what stands in front of them.
        prompt_embeds: [n, H] embeddings, a tensor, which only score with `target_token_ids`; some
            positions may be ids, by `prompt_token_ids` and `prompt_is_token_ids`, [n] each.
        target_token_ids: m ids, or m lists of k candidates, for the last m positions; without them
            all tokens of the prompt but the first are scored, or all behind the last image.
        multi_modal_data: images, videos or sound for the placeholders in the prompt, which are
            context: no target may stand on one. `TokenScores.start` counts vLLM's placeholders.
        mm_processor_kwargs: for the model's processor.
        multi_modal_uuids: names of the items in vLLM's caches.
    """

    prompt: str
    prompt_token_ids: Sequence[int] | np.ndarray
    prompt_embeds: torch.Tensor
    prompt_is_token_ids: Sequence[bool]
    target_token_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray
    multi_modal_data: Mapping[str, Any]
    mm_processor_kwargs: Mapping[str, Any]
    multi_modal_uuids: Mapping[str, Any]


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
        EngineDeadError: vLLM's, where the engine has failed or its process has ended.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

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
        prompt_logprobs=-1 if full_vocabulary else top,
        skip_reading_prefix_cache=bool(skip_prefix_cache or reproducible),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts = _prompts(llm, requests)
    adapters = _adapters(llm, lora_request, len(prompts))
    admitted = _admitted(llm, prompts, params)
    results: dict[int, TokenScores] = {}
    retry_nan = True
    if any(request.given for request in admitted):
        # Items reach the engine past vLLM's cache here, which must not count on what it has sent
        # before: the engine's cache drops the oldest.
        llm.llm_engine.renderer.clear_mm_cache()
    with _progress(use_tqdm, sum(len(request.ids) for request in admitted)) as bar:
        for order in _orders(llm, admitted, params.skip_reading_prefix_cache, adapters):
            while left := [i for i in order if i not in results]:
                # At an error the rest is aborted now, not when the traceback is let go.
                with (
                    dead_engine_raises(llm.llm_engine),
                    closing(run_requests(llm, admitted, left, adapters, reproducible)) as running,
                ):
                    for index, output in running:
                        found = output.scores
                        if retry_nan and isinstance(found, FailedScores) and found.nan:
                            # It may be the KV cache's, which the next request finds empty.
                            retry_nan = False
                            break
                        results[index] = scores_of(output, f"requests[{index}]")
                        bar.update(len(admitted[index].ids))
    return [results[i] for i in range(len(prompts))]


def _prompts(llm: LLM, requests: Any) -> list[dict[str, Any]]:
    """Every request as a prompt of tokens or embeddings."""
    check_list("requests", requests, Iterable)
    prompts = [_prompt(i, request) for i, request in enumerate(requests)]
    texts = {
        i: prompt["prompt"]
        for i, prompt in enumerate(prompts)
        if prompt.get("prompt_token_ids") is None and isinstance(prompt.get("prompt"), str)
    }
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
    """A request as a dict with the keys of a `ScoreRequest`."""
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
    given = {name: value for name, value in request.items() if value is not None}
    check_keys(given, f"requests[{index}]")
    return given


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
    check_configuration(llm.llm_engine.vllm_config)
    facts = ModelFacts.of(llm.llm_engine.input_processor)
    admitted: list[AdmittedRequest] = []
    bytes_in_use = 0
    for i, prompt in enumerate(prompts):
        ids, targets = prompt.get("prompt_token_ids"), prompt.get(TARGETS)
        notes, parts = prompt.pop(NOTES, ()), TEXT
        try:
            if given := _beside_tokens(prompt, facts):
                rendered = _rendered(llm, given)
                ids, parts = prompt_ids(rendered, facts.embedding_size), Parts.of(rendered)
            request = admit(ids, targets, params, facts, bytes_in_use, notes, parts=parts)
        except ValueError as error:
            raise ScoreModeError(f"requests[{i}]: {error}") from error
        admitted.append(request._replace(given=given))
        bytes_in_use += request.spec.full_vocabulary_bytes
    return admitted


def _beside_tokens(prompt: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any] | None:
    """A prompt as vLLM's renderer takes it, if it is not tokens alone."""
    given = {name: prompt[name] for name in (*MEDIA, *EMBEDS) if name in prompt}
    if given and (ids := prompt.get("prompt_token_ids")) is not None:
        given["prompt_token_ids"] = read_token_ids(
            ids, facts.vocab_size, "prompt_token_ids"
        ).tolist()
    return given or None


def _rendered(llm: LLM, given: dict[str, Any]) -> Any:
    """The engine's input for a prompt that is not tokens alone.

    vLLM's cache of items is passed by, since it takes all that it has seen for sent: a request is
    rendered when all are checked, and again when it is sent, so that few lie in memory.

    Raises:
        ScoreModeError: what the model's processor says of the prompt.
    """
    try:
        (rendered,) = llm.llm_engine.renderer.render_cmpl([{**given}], skip_mm_cache=True)
    except Exception as error:  # of the model's own processor
        raise ScoreModeError(first_line(error)) from error
    return rendered


def _orders(
    llm: LLM,
    requests: Sequence[AdmittedRequest],
    skip_prefix_cache: bool,
    adapters: Sequence[LoRARequest | None],
) -> list[list[int]]:
    """The requests that are sent together, those with a common context after each other."""
    order = list(range(len(requests)))
    if not skip_prefix_cache:
        order = shared_prefix_order([request.ids for request in requests])
    if not any(adapters) or not confuses_adapters(llm.llm_engine.vllm_config):
        return [order]
    return [[i for i in order if (adapters[i] is None) is without] for without in (True, False)]


def shared_prefix_order(prompts: Sequence[np.ndarray]) -> list[int]:
    """Indices of `prompts`, those that share a prefix next to each other.

    The engine computes a prefix once while its blocks stay in the cache, from the step on in which
    they are first computed. Neighbours find them there however small the cache is.

    Groups that share at least `SHARED_TOKENS` tokens stay in the order of their first members. In
    a group the order is that of the token ids, so that longer shared prefixes are adjacent too.
    The order is unchanged where nothing is shared.

    Args:
        prompts: arrays of token ids, [n] each, of one dtype.
    """
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        # Prompts too short to share so much are groups of their own.
        long_enough = len(prompt) >= SHARED_TOKENS
        prefix = prompt[:SHARED_TOKENS].tobytes() if long_enough else b"%d" % i
        groups.setdefault(prefix, []).append(i)

    # Bytes compare fast; big-endian ones compare like the numbers.
    def key(i: int) -> bytes:
        return prompts[i].astype(">i4").tobytes()

    groups_in_order = (g if len(g) == 1 else sorted(g, key=key) for g in groups.values())
    return list(chain.from_iterable(groups_in_order))


def run_requests(
    llm: LLM,
    requests: Sequence[AdmittedRequest],
    order: Sequence[int],
    adapters: Sequence[LoRARequest | None],
    queue_first: bool,
) -> Generator[tuple[int, Any], None, None]:
    """Yield (index, output) as requests finish; whatever is unfinished at an error is aborted.

    Args:
        requests: of a call, with equal options.
        order: indices of `requests`, in which they are sent.
        adapters: of each request.
        queue_first: let the engine begin only when all requests have reached it.

    Raises:
        ScoreModeError: the engine is busy.
    """
    engine = llm.llm_engine
    if engine.has_unfinished_requests():
        raise ScoreModeError("llm has unfinished requests; score() needs an idle engine.")
    waiting = deque(order)
    running: dict[str, tuple[int, str]] = {}  # index and internal id by request id
    tokens_in_flight = 0
    # What the engine has to compute of the requests sent so far, up to a step's work.
    work, step = 0, engine.vllm_config.scheduler_config.max_num_batched_tokens
    last = np.zeros(0, dtype=np.int64)
    hold = _held(engine)
    try:
        while waiting or running:
            while (
                waiting
                and len(running) < MAX_REQUESTS_IN_FLIGHT
                and tokens_in_flight < MAX_TOKENS_IN_FLIGHT
            ):
                index = waiting.popleft()
                request, request_id = requests[index], str(next(llm.request_counter))
                prompt = _rendered(llm, request.given) if request.given else request.prompt
                internal_id = engine.add_request(
                    request_id, prompt, request.params, lora_request=adapters[index]
                )
                running[request_id] = index, internal_id
                tokens_in_flight += len(request.ids)
                if not queue_first and work < step:
                    skips = request.params.skip_reading_prefix_cache
                    work += len(request.ids) - (0 if skips else common_prefix(last, request.ids))
                    last = request.ids
                    if work >= step or len(running) >= HELD_REQUESTS:
                        hold.close()
            hold.close()
            for output in engine.step():
                if output.finished and output.request_id in running:
                    index, _ = running.pop(output.request_id)
                    tokens_in_flight -= len(requests[index].ids)
                    yield index, output
    finally:
        hold.close()
        if running:
            engine.abort_request([own_id for _, own_id in running.values()], internal=True)


@contextmanager
def dead_engine_raises(engine: Any) -> Iterator[None]:
    """Within, calls that wait for an engine in another process raise once it is dead.

    vLLM's own wait for ever where the process is killed, or ends at Ctrl-C: then it sends no last
    message, and what vLLM finds out about its end reaches nobody who waits.

    Raises:
        EngineDeadError: the engine is dead; names the signal that ended it, if one did.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    core, left = engine.engine_core, Event()

    def watch() -> None:
        while not left.wait(SECONDS_BETWEEN_LOOKS):
            if core.resources.engine_dead:
                core.outputs_queue.put_nowait(EngineDeadError())
                while core.utility_results:
                    core.utility_results.popitem()[1].set_exception(EngineDeadError())
                return

    if hasattr(core, "engine_core"):  # in this process
        yield
        return
    Thread(target=watch, name="score-engine-watch", daemon=True).start()
    try:
        yield
    except EngineDeadError as error:
        processes = getattr(core.resources.engine_manager, "processes", ())
        if killed := [-each.exitcode for each in processes if (each.exitcode or 0) < 0]:
            error.args = (f"the engine's process was ended by signal {killed[0]}; start it anew.",)
        raise
    finally:
        left.set()


def _held(engine: Any) -> ExitStack:
    """Keep an engine in another process from its first step until the `close` of what is returned.

    It would begin with the one request that arrives first: a step for a single context, and
    another batch each time.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    def release() -> None:
        with suppress(EngineDeadError):  # the next step raises it; at Ctrl-C nothing has to
            engine.wake_up(tags=["scheduling"])

    with ExitStack() as hold:
        # An engine in this process runs only when it is told to; ranks of data parallelism pause
        # and go on together, which is not ours to do.
        alone = engine.vllm_config.parallel_config.data_parallel_size == 1
        if alone and not hasattr(engine.engine_core, "engine_core"):
            hold.callback(release)
            engine.sleep(level=0, mode="keep")
        return hold.pop_all()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that two arrays of ids, [n] and [m], begin with in common."""
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    return int(different.argmax()) if different.any() else shorter


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
