"""The V2 model runner (the default on GPUs): score the rows of each step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch

# On upstream's PromptLogprobsWorker: the running score requests by id.
REQUESTS = "score_mode_requests"


def apply(module: ModuleType) -> None:
    """Wrap the state that upstream keeps for a request's prompt scores, and their computation."""

    def add_request(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
        def call(req_id: str, req_idx: int, sampling_params: Any) -> Any:
            if not sampling_params.score_mode:
                return wrapped(req_id, req_idx, sampling_params)
            from vllm import SamplingParams
            from vllm.score.engine.worker import RequestScores

            _requests(worker)[req_id] = RequestScores(sampling_params._score)
            # Upstream is told of a request without prompt scores: its own state would cost three
            # launches a request and compute everything a second time.
            return wrapped(req_id, req_idx, SamplingParams())

        return call(*args, **kwargs)

    def remove_request(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
        def call(req_id: str) -> Any:
            _requests(worker).pop(req_id, None)
            return wrapped(req_id)

        return call(*args, **kwargs)

    def compute(wrapped: Any, worker: Any, args: Any, kwargs: Any) -> Any:
        def call(logits_fn: Any, hidden_states: Any, input_batch: Any, prompt_lens: Any) -> Any:
            ready = wrapped(logits_fn, hidden_states, input_batch, prompt_lens)
            requests = _requests(worker)
            if requests:
                scored = _score(requests, logits_fn, hidden_states, input_batch, prompt_lens)
                ready = {**ready, **scored}
            return ready

        return call(*args, **kwargs)

    name = "PromptLogprobsWorker"
    wrapt.wrap_function_wrapper(module, f"{name}.add_request", add_request)
    wrapt.wrap_function_wrapper(module, f"{name}.remove_request", remove_request)
    wrapt.wrap_function_wrapper(module, f"{name}.compute_prompt_token_id_logprobs", compute)


def _requests(worker: Any) -> dict[str, Any]:
    requests: dict[str, Any] | None = getattr(worker, REQUESTS, None)
    if requests is None:
        requests = {}
        setattr(worker, REQUESTS, requests)
    return requests


def _score(
    requests: dict[str, Any], logits_fn: Any, hidden_states: Any, batch: Any, prompt_lens: Any
) -> dict[str, Any]:
    from vllm.score.engine.worker import ScheduledRows, score_step

    scheduled = []
    for i, request_id in enumerate(batch.req_ids):
        scores = requests.get(request_id)
        if scores is None:
            continue
        scheduled.append(
            ScheduledRows(
                request_id,
                scores,
                int(batch.num_computed_prefill_tokens_np[i]),
                int(batch.num_scheduled_tokens[i]),
                int(prompt_lens[batch.idx_mapping_np[i]]),
                int(batch.query_start_loc_np[i]),
            )
        )
    return score_step(scheduled, hidden_states, logits_fn)


PATCH = Patch(
    target="vllm.v1.worker.gpu.sample.prompt_logprob",
    contract={
        "PromptLogprobsWorker.add_request": ("self", "req_id", "req_idx", "sampling_params"),
        "PromptLogprobsWorker.remove_request": ("self", "req_id"),
        "PromptLogprobsWorker.compute_prompt_token_id_logprobs": (
            "self",
            "logits_fn",
            "hidden_states",
            "input_batch",
            "prompt_lens",
        ),
    },
    apply=apply,
    roles=("worker",),
    why="Upstream's loop scores one request at a time, from logits rounded to the model's dtype, "
    "and leaves out the last row.",
    how="Score requests are kept from upstream's state; their rows are reduced together, and the "
    "finished results lie in pinned host memory before the step's copies are waited for.",
    risk="Relies on the step's output being waited for before it is read, as its own copies are.",
    upstream="Pull request: one reduction a step for prompt_logprob_token_ids.",
    remove_when="Upstream scores all requests of a step in one reduction.",
)
