"""The V1 model runner, which serves CPUs and GPUs: score the rows of each step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch

READY = "score_mode_ready"
BUFFER = "score_mode_scores"


def apply(module: ModuleType) -> None:
    """Wrap the place of prompt log-probabilities, and the hand-over of a step's results."""

    def prompt_logprobs(wrapped: Any, runner: Any, args: Any, kwargs: Any) -> Any:
        def call(hidden_states: Any, num_scheduled_tokens: Any) -> Any:
            setattr(runner, READY, _score(runner, hidden_states, num_scheduled_tokens))
            return wrapped(hidden_states, num_scheduled_tokens)

        return call(*args, **kwargs)

    def sample_tokens(wrapped: Any, runner: Any, args: Any, kwargs: Any) -> Any:
        setattr(runner, READY, {})
        output = wrapped(*args, **kwargs)
        ready = getattr(runner, READY)
        if ready:
            # Asynchronous scheduling wraps the output.
            step = getattr(output, "_model_runner_output", output)
            step.prompt_token_id_logprobs_dict = ready
        return output

    wrapt.wrap_function_wrapper(module, "GPUModelRunner._get_prompt_logprobs_dict", prompt_logprobs)
    wrapt.wrap_function_wrapper(module, "GPUModelRunner.sample_tokens", sample_tokens)


def _score(runner: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> Any:
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
        row = runner.input_batch.req_id_to_index[request_id]
        scheduled.append(
            ScheduledRows(
                request_id,
                scores,
                request.num_computed_tokens,
                num_tokens,
                len(request.prompt_token_ids),
                int(runner.query_start_loc.np[row]),
            )
        )
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


PATCH = Patch(
    target="vllm.v1.worker.gpu_model_runner",
    contract={
        "GPUModelRunner._get_prompt_logprobs_dict": (
            "self",
            "hidden_states",
            "num_scheduled_tokens",
        ),
        "GPUModelRunner.sample_tokens": ("self", "grammar_output"),
    },
    apply=apply,
    roles=("worker",),
    why="The V1 runner does not serve prompt_logprob_token_ids.",
    how="Called once a step with every hidden state; the rows of all score requests are reduced "
    "together and handed over with the step's output.",
    risk="Relies on num_computed_tokens being that of the step's start at this point.",
    upstream="Pull request: prompt_logprob_token_ids in the V1 runner.",
    remove_when="The V1 runner is gone, or serves the channel.",
)
