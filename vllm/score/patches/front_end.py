"""In the front end: a score request on its way in, and its scores on their way out.

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
import weakref
from types import ModuleType
from typing import Any

from vllm.score.engine.configuration import check_configuration, confuses_adapters
from vllm.score.engine.request import (
    NO_VIEW,
    TARGETS,
    InvalidScoreRequest,
    ModelFacts,
    ScoreSpec,
    admit_tokenised,
    check_prompt,
    check_truncation,
)
from vllm.score.patches.patch import Patch
from vllm.score.results import ANY_ID, EveryId, FailedScores, attach_scores


def _give_outputs_scores(module: ModuleType) -> None:
    module.RequestOutput.scores = None


RENDERER = Patch("vllm.renderers.base", ("front end",))
INPUTS = Patch("vllm.v1.engine.input_processor", ("front end",))
OUTPUT = Patch(
    "vllm.outputs",
    ("front end",),
    contract={"RequestOutput.__init__": ("self", "request_id", "prompt", "prompt_token_ids")},
    apply=_give_outputs_scores,
    holds=lambda module: module.RequestOutput.scores is None,
)
OUTPUTS = Patch("vllm.v1.engine.output_processor", ("front end",))

# On an input processor: a score was NaN, so a part of the KV cache may be.
NAN_SEEN = "score_mode_nan_seen"
# On an input processor: bytes of the whole-vocabulary results of its unfinished requests.
BYTES_IN_USE = "score_mode_bytes_in_use"


@RENDERER.wrap("BaseRenderer._process_singleton")
def process_singleton(stock: Any, self: Any, prompt: Any, **kwargs: Any) -> Any:
    """Keep the targets, which rendering drops with all keys that it does not know."""
    return _with_targets(prompt, kwargs.get("tok_params"), stock(prompt, **kwargs))


@RENDERER.wrap("BaseRenderer._process_singleton_async")
async def process_singleton_async(stock: Any, self: Any, prompt: Any, **kwargs: Any) -> Any:
    """The same."""
    return _with_targets(prompt, kwargs.get("tok_params"), await stock(prompt, **kwargs))


def _with_targets(prompt: Any, tok_params: Any, engine_input: Any) -> Any:
    if not isinstance(prompt, dict) or prompt.get(TARGETS) is None:
        return engine_input
    check_truncation(getattr(tok_params, "truncate_prompt_tokens", None))
    engine_input[TARGETS] = prompt[TARGETS]
    return engine_input


@INPUTS.wrap("InputProcessor.process_inputs")
def process_inputs(
    stock: Any,
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    supported_tasks: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
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
        request = stock(request_id, prompt, params, supported_tasks, *args, **kwargs)
        if hasattr(params, ANY_ID):
            setattr(request.sampling_params, ANY_ID, True)  # the stock function copies them
        return request
    prompt = _rendered(self, prompt, kwargs.get("tokenization_kwargs"))
    ids, spec = _admitted(self, prompt, params, bool(kwargs.get("resumable")))
    lease = BytesLease(self, spec)
    prompt = {**prompt, "prompt_token_ids": ids[: len(ids) - len(spec.unread)]}
    prompt.pop(TARGETS, None)
    carrier = _carrier(params, _cache_may_be_spoiled(self, *args, **kwargs))
    request = stock(request_id, prompt, carrier, supported_tasks, *args, **kwargs)
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
        return prompt["prompt_token_ids"], params._score
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


def _cache_may_be_spoiled(
    processor: Any, arrival_time: Any = None, lora_request: Any = None, *_: Any, **__: Any
) -> bool:
    """Whether cached prefixes of this request may have been computed with another's adapter."""
    return lora_request is None and confuses_adapters(processor.vllm_config)


def _carrier(params: Any, skip_cache: bool) -> Any:
    """An ordinary request for one token: what the stock checks are shown."""
    skip = skip_cache or bool(params.skip_reading_prefix_cache)
    return copy.copy(_template(params.output_kind, skip))


@functools.cache
def _template(output_kind: Any, skip_reading_prefix_cache: bool) -> Any:
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


def _mark(engine_params: Any, spec: ScoreSpec, lease: BytesLease) -> None:
    engine_params.score_mode = True
    engine_params._score = spec
    engine_params.max_tokens = 0
    # The generation config's end-of-sequence ids mean nothing here.
    engine_params.stop_token_ids = []
    engine_params._all_stop_token_ids = set()
    # For the output processor of this same process; not a field, so it stays off the wire.
    engine_params.score_lease = lease


@OUTPUTS.wrap("RequestState.from_new_request")
def from_new_request(
    stock: Any, cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Remember with the request's state what is scored."""
    state = stock(tokenizer, request, *args, **kwargs)
    params = request.sampling_params
    if params is not None and params.score_mode:
        state.score_spec = params._score
        state.score_lease = params.__dict__.pop("score_lease")
        state.score_tokenizer = tokenizer
    elif tokenizer is not None and hasattr(params, ANY_ID):
        state.logprobs_processor.tokenizer = EveryId(tokenizer)
    return state


@OUTPUTS.wrap("RequestState._new_request_output")
def new_request_output(
    stock: Any,
    self: Any,
    external_req_id: str,
    outputs: Any,
    finished: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Turn the engine's array into `scores`, and the view in `prompt_logprobs`."""
    output = stock(external_req_id, outputs, finished, *args, **kwargs)
    spec = getattr(self, "score_spec", None)
    if spec is not None:
        attach_scores(output, spec, self.score_tokenizer)
        if isinstance(output.scores, FailedScores) and output.scores.nan:
            self.score_lease.found_nan()
    return output
