"""Teacher forcing by the vLLM engine in score mode: the worker computes the statistics, and no
logits leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.errors import ScoreModeError
from vllm.score.processor.batches import Response
from vllm.score.processor.policy import SamplingPolicy
from vllm.score.processor.steps import StepValues

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.score.results import TokenScores

DIAGNOSTICS = (
    "head_mass",
    "argmax_logprob",
    "margin",
    "collision_probability",
    "logsumexp",
    "varentropy",
)


def score_with_engine(
    llm: LLM,
    responses: Sequence[Response],
    policy: SamplingPolicy,
    *,
    eos_token_ids: Sequence[int] = (),
    entropy: bool = True,
    diagnostics: bool = True,
    lora_request: LoRARequest | None = None,
) -> list[StepValues[np.ndarray]]:
    """The values of every response's steps, float32 [T], in the order of `responses`.

    Args:
        policy: what the responses were sampled with.
        eos_token_ids: whose probability is wanted, with `diagnostics`.
        entropy: with `rb_entropy`.
        diagnostics: with everything else.

    Raises:
        ScoreModeError: a sequence is too long for the engine, or its scores are unsound.
    """
    from vllm.score.api import score

    _check_lengths(llm, responses)
    eos = list(eos_token_ids) if diagnostics else []
    names = list(DIAGNOSTICS) if diagnostics else []
    if entropy or diagnostics:
        names.append("entropy")
    if not policy.is_model:
        names.append("model_logprob")
    scored = [r for r in responses if r.length]
    scores = score(
        llm,
        [_request(r, eos) for r in scored],
        statistics=names,
        temperature=policy.temperature,
        top_p=policy.top_p,
        use_tqdm=False,
        lora_request=lora_request,
    )
    found = iter(scores)
    return [_values(next(found) if r.length else None, names, len(eos)) for r in responses]


def _check_lengths(llm: LLM, responses: Sequence[Response]) -> None:
    longest = llm.llm_engine.model_config.max_model_len
    for r in responses:
        if len(r.ids) > longest:
            raise ScoreModeError(
                f"sequences[{r.prompt}, {r.number}] has {len(r.ids)} tokens, the engine's "
                f"max_model_len is {longest}: start it with a larger one, or shorten the sequence."
            )


def _request(response: Response, eos: list[int]) -> dict[str, Any]:
    tokens = response.generated.tolist()
    targets = [[token, *eos] for token in tokens] if eos else tokens
    return {"prompt_token_ids": response.ids.tolist(), "target_token_ids": targets}


def _values(scores: TokenScores | None, names: list[str], num_eos: int) -> StepValues[np.ndarray]:
    """The scores of one response; of none, where nothing was generated."""
    if scores is None:
        statistics = {name: np.empty(0, dtype=np.float32) for name in names}
        logq, eos = np.empty(0, dtype=np.float32), np.empty((0, num_eos), dtype=np.float32)
    else:
        statistics = scores.statistics
        columns = scores.logprobs.reshape(len(scores.logprobs), -1)
        logq, eos = np.ascontiguousarray(columns[:, 0]), columns[:, 1:]
    logprob = statistics.get("model_logprob", logq)
    if "varentropy" not in statistics:
        return StepValues(logprob, logq, rb_entropy=statistics.get("entropy"))
    entropy = statistics["entropy"]
    return StepValues(
        logprob=logprob,
        logq=logq,
        rb_entropy=entropy,
        head_mass=statistics["head_mass"],
        top1_prob=np.exp(statistics["argmax_logprob"]),
        margin=statistics["margin"],
        collision=statistics["collision_probability"],
        # H(q) = log sum exp a - E_q[a].
        logit_mean=statistics["logsumexp"] - entropy,
        logit_var=statistics["varentropy"],
        eos_prob=np.exp(eos).sum(axis=1) if num_eos else None,
    )
