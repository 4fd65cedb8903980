"""In the workers: the scored rows of a step are reduced where the model has their hidden states.

vllm.v1.worker.gpu_model_runner
    Why: The V1 runner does not serve prompt_logprob_token_ids.
    How: Called once per step with every hidden state; the rows of all score requests are reduced
        together and handed over with the step's output.
    Risk: Relies on num_computed_tokens being that of the step's start at this point.
    Upstream: Pull request: prompt_logprob_token_ids in the V1 runner.
    Deleted when: The V1 runner is gone, or serves the channel.

vllm.v1.worker.gpu.sample.prompt_logprob
    Why: Upstream's loop scores one request at a time, from logits rounded to the model's dtype, and
        leaves out the last row.
    How: Score requests are kept from upstream's state; their rows are reduced together, and the
        finished results lie in pinned host memory before the step's copies are waited for.
    Risk: Relies on the step's output being waited for before it is read, as its own copies are.
    Upstream: Pull request: one reduction per step for prompt_logprob_token_ids.
    Deleted when: Upstream scores all requests of a step in one reduction.

vllm.model_executor.layers.logits_processor
    Why: Scores are reduced on each rank's own part of the head, in float32, without ever holding a
        row of logits; stock gathers them, rounded to the model's dtype.
    How: Inside a thread-local scope that only scoring opens, the call gives its arguments away and
        returns a tensor that nothing may touch; a model that does touch it is asked for its logits
        instead.
    Risk: None for generation: outside the scope the wrapper calls the stock function.
    Upstream: Related: get_top_k_tokens, which reduces shards in the same way.
    Deleted when: LogitsProcessor offers a reduction over the shard.

vllm.lora.layers.logits_processor
    Why: Upstream applies an adapter's head with an index made for sampled rows, one per request; on
        prompt rows it would take other rows' adapters.
    How: The slots with such weights are remembered; scoring adds their product itself, by the
        adapter of each row, and skips it when there are none.
    Risk: An adapter whose head weights were loaded past these two functions would be left out.
    Upstream: Issue: prompt log-probabilities with an adapter on the LM head.
    Deleted when: LogitsProcessorWithLoRA takes the rows' adapters as an argument.
"""

from __future__ import annotations

from typing import Any

from vllm.score.patches.patch import Call, Patch

V1_RUNNER = Patch(
    "vllm.v1.worker.gpu_model_runner",
    ("worker",),
    fields=("vllm.v1.outputs:ModelRunnerOutput.prompt_token_id_logprobs_dict",),
    calls={"_get_prompt_logprobs_dict": ("GPUModelRunner._bookkeeping_sync",)},
    relies_on=("GPUModelRunner._update_states", "GPUModelRunner._prepare_inputs"),
)
V2_RUNNER = Patch(
    "vllm.v1.worker.gpu.sample.prompt_logprob",
    ("worker",),
    relies_on=(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner._remove_request",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        "vllm.v1.worker.gpu.input_batch:InputBatch.num_computed_prefill_tokens_np",
        "vllm.v1.worker.gpu.input_batch:InputBatch.num_scheduled_tokens",
        "vllm.v1.worker.gpu.input_batch:InputBatch.query_start_loc_np",
        "vllm.v1.worker.gpu.async_utils:AsyncOutput.__init__",
        "vllm.v1.worker.gpu.async_utils:AsyncOutput.get_output",
        "vllm.models.deepseek_v41.nvidia.model_state:DeepseekV41ModelState.add_request",
    ),
)
HEAD = Patch(
    "vllm.model_executor.layers.logits_processor",
    ("worker",),
    relies_on=("LogitsProcessor._get_logits", "LogitsProcessor.__init__"),
)
LORA_HEAD = Patch(
    "vllm.lora.layers.logits_processor",
    ("worker",),
    relies_on=("LogitsProcessorWithLoRA._get_logits", "LogitsProcessorWithLoRA.forward"),
)

# On the V1 runner: results of the step that is under way.
READY = "score_mode_ready"
# On the V1 runner's state of a request: its rows so far.
BUFFER = "score_mode_scores"
# On the V2 runner's PromptLogprobsWorker: the running score requests by id.
REQUESTS = "score_mode_requests"


@V1_RUNNER.wrap("GPUModelRunner._get_prompt_logprobs_dict")
def get_prompt_logprobs(
    call: Call, self: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]
) -> Any:
    """Score the rows of the step."""
    setattr(self, READY, _score_v1(self, hidden_states, num_scheduled_tokens))
    return call()


@V1_RUNNER.wrap("GPUModelRunner.sample_tokens")
def sample_tokens(call: Call, self: Any) -> Any:
    """Hand over what the step has completed."""
    setattr(self, READY, {})
    output = call()
    ready = getattr(self, READY)
    if ready:
        # Asynchronous scheduling wraps the output.
        step = getattr(output, "_model_runner_output", output)
        step.prompt_token_id_logprobs_dict = ready
    return output


def _score_v1(runner: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> Any:
    from vllm.score.engine.worker import RequestScores, ScheduledRows, score_step

    spoils = _spoils_rows_without_adapter(runner, num_scheduled_tokens)
    scheduled = []
    for request_id, num_tokens in num_scheduled_tokens.items():
        request = runner.requests.get(request_id)
        params = None if request is None else request.sampling_params
        if params is None or not params.score_mode:
            continue
        scores = getattr(request, BUFFER, None)
        if scores is None:
            scores = RequestScores(params._score)
            setattr(request, BUFFER, scores)
        scores.spoiled |= spoils and request.lora_request is None
        first = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
        begin = request.num_computed_tokens
        scheduled.append(ScheduledRows(request_id, scores, begin, num_tokens, first))
    if not scheduled:
        return {}
    ready = score_step(scheduled, hidden_states, runner.model.compute_logits)
    if ready and hidden_states.is_cuda:
        import torch

        torch.cuda.current_stream(hidden_states.device).synchronize()
    return ready


def _spoils_rows_without_adapter(runner: Any, num_scheduled_tokens: dict[str, int]) -> bool:
    """Whether the step has requests with a LoRA adapter and others without, which it confuses."""
    from vllm.score.engine.configuration import confuses_adapters

    if not confuses_adapters(runner.vllm_config):
        return False
    kinds = {runner.requests[r].lora_request is None for r in num_scheduled_tokens}
    return len(kinds) == 2


@V2_RUNNER.wrap("PromptLogprobsWorker.add_request")
def add_request(call: Call, self: Any, req_id: str, sampling_params: Any) -> Any:
    """Keep a score request from upstream's state."""
    if not sampling_params.score_mode:
        return call()
    from vllm import SamplingParams
    from vllm.score.engine.worker import RequestScores

    _requests(self)[req_id] = RequestScores(sampling_params._score)
    # Upstream is told of a request without prompt scores: its own state would cost three launches
    # per request and compute everything a second time.
    return call(sampling_params=SamplingParams())


@V2_RUNNER.wrap("PromptLogprobsWorker.remove_request")
def remove_request(call: Call, self: Any, req_id: str) -> Any:
    """Forget a request, also an aborted one."""
    _requests(self).pop(req_id, None)
    return call()


@V2_RUNNER.wrap("PromptLogprobsWorker.compute_prompt_token_id_logprobs")
def compute(call: Call, self: Any, logits_fn: Any, hidden_states: Any, input_batch: Any) -> Any:
    """Score the rows of the step."""
    ready = call()
    requests = _requests(self)
    if not requests:
        return ready
    from vllm.score.engine.worker import ScheduledRows, score_step

    scheduled = [
        ScheduledRows(
            request_id,
            requests[request_id],
            int(input_batch.num_computed_prefill_tokens_np[i]),
            int(input_batch.num_scheduled_tokens[i]),
            int(input_batch.query_start_loc_np[i]),
        )
        for i, request_id in enumerate(input_batch.req_ids)
        if request_id in requests
    ]
    return {**ready, **score_step(scheduled, hidden_states, logits_fn)}


def _requests(worker: Any) -> dict[str, Any]:
    found: dict[str, Any] = vars(worker).setdefault(REQUESTS, {})
    return found


@HEAD.wrap("LogitsProcessor.forward")
def forward(call: Call, self: Any, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
    """Give the arguments of the call that ends nearly every model's compute_logits away."""
    from vllm.score.engine.model_head import captured_call, capturing

    if not capturing():
        return call()
    return captured_call(self, lm_head, hidden_states, embedding_bias)


@LORA_HEAD.wrap("LogitsProcessorWithLoRA.set_lora")
def set_lora(call: Call, self: Any, index: int) -> Any:
    """Remember a slot whose adapter has weights for the head."""
    from vllm.score.engine.model_head import adapter_slots

    result = call()
    adapter_slots(self).add(index)
    return result


@LORA_HEAD.wrap("LogitsProcessorWithLoRA.reset_lora")
def reset_lora(call: Call, self: Any, index: int) -> Any:
    """Forget the slot."""
    from vllm.score.engine.model_head import adapter_slots

    adapter_slots(self).discard(index)
    return call()
