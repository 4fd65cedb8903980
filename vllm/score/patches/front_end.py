"""In the front end: a score request on its way in, what the engine sees to before it admits it, and
its scores on their way out.

vllm.renderers.base
    Why: The targets travel with the prompt that they belong to.
    How: The wrapped functions copy the key onto the engine's input.
    Risk: A renderer that overrides both functions loses the key; the request then scores the
        prompt's own tokens over the whole vocabulary, which the shape of the result shows.
    Upstream: Pull request: the key in TokensPrompt and TokensInput.
    Deleted when: vLLM carries the key itself.

vllm.v1.engine.input_processor
    Why: Targets are checked before anything runs, and travel to the worker with the request.
    How: The stock function sees an ordinary one-token request for the prompt without its last
        token; the ScoreSpec is set on the engine request that it returns.
    Risk: Checks that upstream adds for prompt_logprob_token_ids are not seen by score requests.
    Upstream: Pull request: a branch in process_inputs that calls the same planning function.
    Deleted when: process_inputs fills the channel for score requests.

vllm.v1.engine.llm_engine
    Why: Fail closed across processes; and `LLM(model=...)` scores the whole vocabulary without
        max_logprobs, which protects servers from their clients. A function run in the workers may
        hook or change the model: scores must not rest on prefixes cached before.
    How: One status call before the first score request of an engine. After collective_rpc the next
        score request resets the prefix cache or, beside running requests, does not read it. After
        a NaN it has the KV cache emptied, or does not read it. Where an engine process died of
        importing an unguarded script, the error gets a note.
    Risk: Workers replaced later (elastic scaling) are not asked again.
    Upstream: Not needed in a merged fork, but for the limit.
    Deleted when: Score mode is part of vLLM.

vllm.v1.engine.async_llm
    Why: Fail closed across processes, as for LLMEngine.
    How: As for LLMEngine.
    Risk: Workers replaced later (elastic scaling) are not asked again.
    Upstream: Not needed in a merged fork.
    Deleted when: Score mode is part of vLLM.

vllm.outputs
    Why: The scores as arrays, beside the stock-looking prompt_logprobs.
    How: A class attribute; finished score requests set it on the instance.
    Risk: None known.
    Upstream: Pull request: a field of RequestOutput.
    Deleted when: RequestOutput has the field.

vllm.v1.engine.output_processor
    Why: Users read arrays, or what looks like stock prompt_logprobs; no dict is built unread.
    How: The state remembers the ScoreSpec of admission; the output gets the scores after the stock
        function built it, and is checked for shape, NaN and stray tokens. A token generated behind
        an echo has a text for every id of the model.
    Risk: An output path that bypasses _new_request_output returns the bare array.
    Upstream: Pull request: in LogprobsProcessor and RequestOutput.
    Deleted when: RequestOutput carries scores.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm.score.engine.configuration import check_configuration, confuses_adapters
from vllm.score.engine.parts import forget_items, prompt_ids, to_engine
from vllm.score.engine.request import (
    NO_CLIENT_LIMIT,
    NO_VIEW,
    TARGETS,
    InvalidScoreRequest,
    ModelFacts,
    ScoreSpec,
    admit_tokenised,
    check_prompt,
    check_truncation,
)
from vllm.score.errors import ScoreModeUnavailable
from vllm.score.patches.engine_core import first_problem
from vllm.score.patches.patch import Call, Patch
from vllm.score.results import ANY_ID, EveryId, FailedScores, attach_scores

RENDERER = Patch(
    "vllm.renderers.base",
    ("front end",),
    calls={
        "_process_singleton": ("BaseRenderer.process_for_engine",),
        "_process_singleton_async": ("BaseRenderer.process_for_engine_async",),
    },
)
INPUTS = Patch(
    "vllm.v1.engine.input_processor",
    ("front end",),
    relies_on=("InputProcessor._validate_params", "InputProcessor._validate_model_input"),
)
OUTPUT = Patch(
    "vllm.outputs",
    ("front end",),
    contract={"RequestOutput.__init__": ()},
    apply=lambda module: setattr(module.RequestOutput, "scores", None),
    holds=lambda module: module.RequestOutput.scores is None,
)
OUTPUTS = Patch(
    "vllm.v1.engine.output_processor",
    ("front end",),
    calls={
        "_new_request_output": ("RequestState.make_request_output",),
        "from_new_request": ("OutputProcessor.add_request",),
    },
    relies_on=(
        "OutputProcessor.process_outputs",
        "vllm.v1.engine.logprobs:LogprobsProcessor.update_from_output",
    ),
)
LLM_ENGINE = Patch(
    "vllm.v1.engine.llm_engine",
    ("front end",),
    calls={"process_inputs": ("LLMEngine.add_request",)},
)
ASYNC_LLM = Patch(
    "vllm.v1.engine.async_llm",
    ("front end",),
    calls={"process_inputs": ("AsyncLLM.add_request",)},
    relies_on=("AsyncLLM.generate",),
)

# On an input processor: a score was NaN, so a part of the KV cache may be.
NAN_SEEN = "score_mode_nan_seen"
# On an input processor: bytes of the whole-vocabulary results of its unfinished requests.
BYTES_IN_USE = "score_mode_bytes_in_use"
# On an engine: all its processes have said that they can score.
CHECKED = "score_mode_checked"
# On an engine: something was run in the workers since, a hook or a change of weights, and the
# prefix cache may be another model's.
TOUCHED = "score_mode_model_touched"


# --- the way in


@RENDERER.wrap("BaseRenderer._process_singleton")
def process_singleton(call: Call, self: Any, prompt: Any, tok_params: Any) -> Any:
    """Keep the targets, which rendering drops with all keys that it does not know."""
    return _with_targets(prompt, tok_params, call())


@RENDERER.wrap("BaseRenderer._process_singleton_async")
async def process_singleton_async(call: Call, self: Any, prompt: Any, tok_params: Any) -> Any:
    """The same."""
    return _with_targets(prompt, tok_params, await call())


def _with_targets(prompt: Any, tok_params: Any, engine_input: Any) -> Any:
    if not isinstance(prompt, dict) or prompt.get(TARGETS) is None:
        return engine_input
    check_truncation(getattr(tok_params, "truncate_prompt_tokens", None))
    engine_input[TARGETS] = prompt[TARGETS]
    return engine_input


@INPUTS.wrap("InputProcessor.process_inputs")
def process_inputs(call: Call, self: Any, prompt: Any, params: Any) -> Any:
    """Admission: a score request becomes an engine request with targets and no token to generate.

    Instances bind the method when they are made, so the class must be amended.
    """
    if not getattr(params, "score_mode", False):
        if isinstance(prompt, dict) and prompt.get(TARGETS) is not None:
            raise InvalidScoreRequest(
                f"{TARGETS} is given, but the sampling parameters do not ask for scores: set "
                "SamplingParams(score_mode=True).",
                parameter=TARGETS,
            )
        request = call()
        if hasattr(params, ANY_ID):
            setattr(request.sampling_params, ANY_ID, True)  # the stock function copies them
        return request
    prompt = _rendered(self, prompt, call.argument("tokenization_kwargs"))
    try:
        ids, spec = _admitted(self, prompt, params, bool(call.argument("resumable")))
    except ValueError:
        forget_items(self.renderer, prompt)
        raise
    lease = BytesLease(self, spec)
    prompt = to_engine(prompt, ids, len(spec.unread))
    prompt.pop(TARGETS, None)
    skip = bool(params.skip_reading_prefix_cache)
    if confuses_adapters(self.vllm_config):  # a cached prefix may have another request's adapter
        skip |= call.argument("lora_request") is None
    request = call(prompt=prompt, params=copy.copy(_template(params.output_kind, skip)))
    _mark(request.sampling_params, spec, lease)
    return request


def _rendered(processor: Any, prompt: Any, tokenization_kwargs: Any) -> Any:
    """The engine's input for a raw prompt, whose length the targets must be checked against."""
    if isinstance(prompt, dict) and "type" in prompt:
        return prompt
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    renderer = processor.renderer
    tok_params = renderer.default_cmpl_tok_params.with_kwargs(**(tokenization_kwargs or {}))
    parsed = parse_model_prompt(processor.model_config, prompt)
    return renderer.render_cmpl([parsed], tok_params)[0]


def _admitted(
    processor: Any, prompt: Any, params: Any, resumable: bool
) -> tuple[list[int], ScoreSpec]:
    """The whole prompt, and what is scored of it."""
    if params._score is not None:  # score() has checked everything once for all its requests
        return prompt_ids(prompt), params._score
    check_configuration(processor.vllm_config)
    params._verify_score_mode()  # again: fields may have been set since construction
    check_prompt(prompt, resumable)
    admitted = admit_tokenised(
        prompt,
        params,
        ModelFacts.of(processor),
        processor.renderer.tokenizer,
        bytes_in_use=getattr(processor, BYTES_IN_USE, 0),
        view=not hasattr(params, NO_VIEW),
    )
    return admitted.ids.tolist(), admitted.spec


class BytesLease:
    """Counts a full-vocabulary result against the processor's limit while its request lives.

    The engine request hands it to the request's state in the output processor, which dies when
    the request finishes or is aborted.
    """

    def __init__(self, processor: Any, spec: ScoreSpec) -> None:
        def count(change: int) -> None:
            setattr(processor, BYTES_IN_USE, getattr(processor, BYTES_IN_USE, 0) + change)

        count(spec.full_vocabulary_bytes)
        weakref.finalize(self, count, -spec.full_vocabulary_bytes)
        self._processor = processor

    def found_nan(self) -> None:
        """Have the KV cache emptied before another score request."""
        setattr(self._processor, NAN_SEEN, True)


@functools.cache
def _template(output_kind: Any, skip_reading_prefix_cache: bool) -> Any:
    """An ordinary request for one token: what the stock checks are shown."""
    from vllm import SamplingParams

    # Its copies skip the checks at construction, which take longer than the rest of admission.
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        ignore_eos=True,
        watermarking=False,
        skip_reading_prefix_cache=skip_reading_prefix_cache,
        output_kind=output_kind,
        skip_clone=True,
    )


@functools.cache
def _somebody_reads() -> Any:
    """What says in prompt_logprob_token_ids, of either of its types, that prompt rows are read."""
    import msgspec

    from vllm import SamplingParams

    types = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
    rows = "ndarray" in repr(types["prompt_logprob_token_ids"])
    return np.zeros((1, 1), np.int32) if rows else [0]


def _mark(engine_params: Any, spec: ScoreSpec, lease: BytesLease) -> None:
    engine_params.score_mode = True
    engine_params._score = spec
    engine_params.max_tokens = 0
    # Models that leave out prompt rows which nobody reads look at these two.
    engine_params.prompt_logprob_token_ids = _somebody_reads()
    engine_params.prompt_logprob_start = spec.start
    # The generation config's end-of-sequence ids mean nothing here.
    engine_params.stop_token_ids = []
    engine_params._all_stop_token_ids = set()
    # For the output processor of this same process; not a field, so it stays off the wire.
    engine_params.score_lease = lease


# --- what an engine sees to before it admits a request


def ask_engine(engine: Any) -> Any:
    """Status of every process behind an `LLMEngine`, a list of `process_status`.

    Raises:
        ScoreModeUnavailable: the engine core does not know the question.
    """
    return _at_once(_statuses(engine))


async def _statuses(engine: Any) -> Any:
    try:
        return await _ask(engine, "score_status")
    except Exception as error:
        raise ScoreModeUnavailable(
            f"score mode is not armed in the engine core or one of its workers: {error}; install "
            "the same vllm-score wherever they run, and set VLLM_PLUGINS there as here."
        ) from error


async def _ask(engine: Any, method: str) -> Any:
    """What a method that we added to the engine core says."""
    client = engine.engine_core
    core = getattr(client, "engine_core", None)  # the in-process client holds the core itself
    if core is not None:
        return getattr(core, method)()
    if hasattr(client, "call_utility"):
        return client.call_utility(method)
    return await client.call_utility_async(method)


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing: an `LLMEngine` answers at once."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("an LLMEngine has to answer at once.")


async def _let_in(engine: Any, params: Any, unfinished: Callable[[], bool]) -> Any:
    """The parameters of a score request as they may be sent.

    Args:
        unfinished: whether the engine has requests.

    Raises:
        ScoreModeUnavailable: a process behind the engine cannot score.
        InvalidScoreRequest: its configuration cannot be scored.
    """
    if not getattr(engine, CHECKED, False):
        check_configuration(engine.vllm_config)
        statuses = await _statuses(engine)
        if (problem := first_problem(statuses)) is not None:
            raise ScoreModeUnavailable(problem)
        for text in sorted({text for s in statuses for text in s.get("warnings", ())}):
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        setattr(engine, CHECKED, True)
    fresh = True
    for owner, flag, clear in (
        (engine.input_processor, NAN_SEEN, lambda: _ask(engine, "score_empty_cache")),
        (engine, TOUCHED, engine.reset_prefix_cache),
    ):
        if getattr(owner, flag, False):
            cleared = False if unfinished() else clear()
            if await cleared if inspect.isawaitable(cleared) else cleared:
                setattr(owner, flag, False)
            else:
                fresh = False
    return params if fresh else without_cache(params)


def without_cache(params: Any) -> Any:
    """A copy of sampling parameters whose request reads no cached prefix."""
    copied = params.clone()
    vars(copied).update(vars(params))  # the marks of a server's request, which a copy lacks
    copied.skip_reading_prefix_cache = True
    return copied


@contextmanager
def _touching(engine: Any) -> Iterator[None]:
    """Have the next score request check the engine again and forget its cache.

    Marked before and after: requests that are admitted meanwhile see either model.
    """
    marks = {TOUCHED: True, CHECKED: False}
    vars(engine).update(marks)
    try:
        yield
    finally:
        vars(engine).update(marks)


@LLM_ENGINE.wrap("LLMEngine.__init__")
def init(call: Call, self: Any) -> None:
    """No limit of a client; a note on a start that failed."""
    try:
        call()
    except RuntimeError as error:
        from vllm.score.launch.reasons import unguarded_script_note

        if note := unguarded_script_note(error):
            error.add_note(note)
        raise
    setattr(self.input_processor, NO_CLIENT_LIMIT, True)


@LLM_ENGINE.wrap("LLMEngine.add_request")
def add_request(call: Call, self: Any, params: Any) -> Any:
    """Admit a score request, or refuse it."""
    if not getattr(params, "score_mode", False):
        return call()
    return call(params=_at_once(_let_in(self, params, self.has_unfinished_requests)))


@ASYNC_LLM.wrap("AsyncLLM.add_request")
async def add_request_async(call: Call, self: Any, params: Any) -> Any:
    """The same, for an engine that is waited for."""
    if not getattr(params, "score_mode", False):
        return await call()
    unfinished = self.output_processor.has_unfinished_requests
    return await call(params=await _let_in(self, params, unfinished))


@LLM_ENGINE.wrap("LLMEngine.collective_rpc")
def collective_rpc(call: Call, self: Any) -> Any:
    """Note that the model may have changed."""
    with _touching(self):
        return call()


@ASYNC_LLM.wrap("AsyncLLM.collective_rpc")
async def collective_rpc_async(call: Call, self: Any) -> Any:
    """The same."""
    with _touching(self):
        return await call()


# --- the way out


@OUTPUTS.wrap("RequestState.from_new_request")
def from_new_request(call: Call, cls: Any, tokenizer: Any, request: Any) -> Any:
    """Remember with the request's state what is scored."""
    state = call()
    params = request.sampling_params
    if params is not None and params.score_mode:
        state.score_spec = params._score
        state.score_lease = params.__dict__.pop("score_lease")
        state.score_tokenizer = tokenizer
    elif tokenizer is not None and hasattr(params, ANY_ID):
        state.logprobs_processor.tokenizer = EveryId(tokenizer)
    return state


@OUTPUTS.wrap("RequestState._new_request_output")
def new_request_output(call: Call, self: Any) -> Any:
    """Turn the engine's array into `scores`, and the view in `prompt_logprobs`."""
    output = call()
    spec = getattr(self, "score_spec", None)
    if spec is not None:
        attach_scores(output, spec, self.score_tokenizer)
        if isinstance(output.scores, FailedScores) and output.scores.nan:
            self.score_lease.found_nan()
    return output
