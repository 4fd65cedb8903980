"""Diagnostics of sampled responses, from the values of their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.policy import SamplingPolicy, check_logits, step_values
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import DiagnosticsPack, SequenceDiagnostics, TokenStepDiagnostics

EARLY_STEPS = 16
_NEEDED = (
    "rb_entropy",
    "head_mass",
    "top1_prob",
    "margin",
    "collision",
    "logit_mean",
    "logit_var",
)


class DistributionDiagnostics:
    """Diagnostics of the distributions that responses were sampled from.

    Args:
        top_p: of the sampling policy.
        temperature: of the sampling policy.
        eos_token_id: the end-of-sequence token or tokens; None leaves their probability out.

    Raises:
        ScoreModeError: a value out of range.
    """

    def __init__(
        self,
        *,
        top_p: float = 1.0,
        temperature: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        self.policy = SamplingPolicy(temperature, top_p)
        if eos_token_id is None:
            eos_token_id = ()
        elif isinstance(eos_token_id, int):
            eos_token_id = (eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_id)

    @torch.no_grad()
    def compute_from_logits(self, gen_logits: Tensor, realized_tokens: Tensor) -> DiagnosticsPack:
        """Diagnostics of one response.

        Args:
            gen_logits: [T, V], the model's logits that the tokens were drawn from; half precision
                is computed in float32.
            realized_tokens: integers [T], the tokens.

        Returns:
            Arrays of float32, or float64 for logits of that dtype.

        Raises:
            ScoreModeError: wrong shapes, tokens or end-of-sequence tokens beyond the vocabulary,
                NaN.
        """
        check_logits(gen_logits, realized_tokens)
        for token in self.eos_token_ids:
            if not 0 <= token < gen_logits.shape[1]:
                raise ScoreModeError(
                    f"eos_token_id {token} is beyond the {gen_logits.shape[1]} columns of "
                    "gen_logits."
                )
        if gen_logits.dtype != torch.float64:
            gen_logits = gen_logits.float()
        tokens = realized_tokens.to(gen_logits.device, torch.int64)
        values = step_values(gen_logits, tokens, self.policy, eos_token_ids=self.eos_token_ids)
        return diagnostics_pack(values.map(lambda value: value.cpu().numpy()))


def diagnostics_pack(values: StepValues[np.ndarray]) -> DiagnosticsPack:
    """The diagnostics of a response.

    Args:
        values: arrays [T] with everything but, perhaps, `eos_prob`; T may be 0.
    """
    step = _steps(values)
    early, late = step.rb_entropy[:EARLY_STEPS], step.rb_entropy[EARLY_STEPS:]
    sequence = SequenceDiagnostics(
        T=len(values.logprob),
        rb_entropy_sum=_sum(step.rb_entropy),
        rb_entropy_mean=_mean(step.rb_entropy),
        rb_entropy_max=float(step.rb_entropy.max()) if len(step.rb_entropy) else math.nan,
        rb_entropy_min=float(step.rb_entropy.min()) if len(step.rb_entropy) else math.nan,
        early_rb_entropy_mean=_mean(early),
        late_rb_entropy_mean=_mean(late),
        naive_surprisal_sum=-_sum(values.logprob),
        naive_surprisal_mean=-_mean(values.logprob),
        margin_mean=_mean(step.margin),
        margin_sum=_sum(step.margin),
        top1_prob_mean=_mean(step.top1_prob),
        collision_mean=_mean(step.collision),
        renyi2_mean=_mean(step.renyi2),
        eff_support_mean=_mean(step.eff_support),
        eos_prob_mean=None if step.eos_prob is None else _mean(step.eos_prob),
    )
    return DiagnosticsPack(step=step, seq=sequence)


def baseline_features(values: StepValues[Tensor]) -> Tensor:
    """Tensor [T, 7], detached, of the columns that `LogprobResults` lists.

    Args:
        values: tensors [T] with the diagnostics.
    """
    v = _diagnosed(values.map(Tensor.detach))
    s = v["head_mass"]
    two_point = torch.special.entr(s) + torch.special.entr(1 - s)
    place = torch.arange(len(s), dtype=s.dtype, device=s.device) / max(1, len(s))
    columns = [v["rb_entropy"], v["top1_prob"], v["margin"], s, two_point, v["logit_var"], place]
    return torch.stack(columns, dim=1)


def _diagnosed(values: StepValues[Any]) -> dict[str, Any]:
    found = {name: getattr(values, name) for name in _NEEDED}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ScoreModeError(f"no diagnostics without {', '.join(missing)}; compute them too.")
    return found


def _steps(values: StepValues[np.ndarray]) -> TokenStepDiagnostics:
    given = _diagnosed(values)
    head, tail = given["head_mass"], 1 - given["head_mass"]
    return TokenStepDiagnostics(
        **given,
        tail_mass=tail,
        two_point_entropy=entr(head) + entr(tail),
        # Rounding may lift a collision probability of 1 above it; and no -0.
        renyi2=np.maximum(-np.log(given["collision"]), 0.0) + 0.0,
        eff_support=np.exp(given["rb_entropy"]),
        eos_prob=values.eos_prob,
    )


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan
