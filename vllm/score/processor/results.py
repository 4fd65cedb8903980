"""What a `SequenceProcessor` returns, and how it follows from the values of the steps.

B prompts, G responses per prompt, T generated tokens of one response. All log-probabilities and
entropies in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.policy import StepValues, Wanted, step_values
from vllm.score.processor.sequences import Response
from vllm.score.tokens import read_token_ids

Made = TypeVar("Made")
EARLY_STEPS = 16
# What diagnostics are made of, beside the log-probabilities and, perhaps, `eos_prob`.
_NEEDED = [f.name for f in fields(StepValues) if f.name not in ("logprob", "logq", "eos_prob")]


@dataclass
class LogprobResults:
    """Scores of the generated tokens, [B][G] lists of one entry per response.

    Attributes:
        logprobs: tensors [T], log p of each token under the model itself (temperature 1, whole
            vocabulary).
        entropies: arrays [T], the surprisals -log p (one-sample estimates of the entropy).
        sequence_logprobs: sums of log p.
        rb_entropies: arrays [T], the exact (Rao-Blackwellised) entropies of the sampling policy at
            every step; empty where not asked for.
        rewards: [B][G], 0 where no gold answer is known.
        rb_entropies_torch: the same as tensors with a graph.
        baseline_feats_torch: tensors [T, 7], detached: entropy, top-1 probability, margin, head
            mass, two-point entropy, logit variance, t/T.
        token_logqs: tensors [T], log q of each token under the sampling policy; -inf for a token
            that it never samples.
        sequence_logqs: sums of log q.
    """

    logprobs: list[list[Tensor]]
    entropies: list[list[np.ndarray]]
    sequence_logprobs: list[list[float]]
    rb_entropies: list[list[np.ndarray]]
    rewards: list[list[float]]
    rb_entropies_torch: list[list[Tensor]] | None = None
    baseline_feats_torch: list[list[Tensor]] | None = None
    token_logqs: list[list[Tensor]] | None = None
    sequence_logqs: list[list[float]] | None = None


@dataclass
class TokenStepDiagnostics:
    """The distributions that the T tokens were drawn from, arrays [T].

    With a = logits / temperature, p = softmax(a), S the tokens kept by top-p (the fewest most
    likely ones whose p add up to it), and q the sampling policy: p on S, renormalised.

    Attributes:
        rb_entropy: H(q) = -sum q log q.
        head_mass: p(S), 1 at top-p 1.
        tail_mass: 1 - p(S).
        two_point_entropy: -s log s - (1 - s) log (1 - s) of s = p(S).
        top1_prob: max q.
        margin: largest less second largest a.
        collision: sum q**2.
        renyi2: -log collision, the Rényi entropy of order 2.
        eff_support: exp(H(q)), the number of tokens of a uniform distribution as uncertain.
        logit_mean: E_q[a].
        logit_var: Var_q[a].
        eos_prob: q of the end-of-sequence tokens together; None where there is none.
    """

    rb_entropy: np.ndarray
    head_mass: np.ndarray
    tail_mass: np.ndarray
    two_point_entropy: np.ndarray
    top1_prob: np.ndarray
    margin: np.ndarray
    collision: np.ndarray
    renyi2: np.ndarray
    eff_support: np.ndarray
    logit_mean: np.ndarray
    logit_var: np.ndarray
    eos_prob: np.ndarray | None


@dataclass
class SequenceDiagnostics:
    """Aggregates of `TokenStepDiagnostics` over a response.

    A sum over no tokens is 0; a mean, minimum or maximum over none is NaN, as is
    `late_rb_entropy_mean` of a response without late steps. "Early" are the first 16 steps.
    """

    T: int
    rb_entropy_sum: float
    rb_entropy_mean: float
    rb_entropy_max: float
    rb_entropy_min: float
    early_rb_entropy_mean: float
    late_rb_entropy_mean: float
    naive_surprisal_sum: float
    naive_surprisal_mean: float
    margin_mean: float
    margin_sum: float
    top1_prob_mean: float
    collision_mean: float
    renyi2_mean: float
    eff_support_mean: float
    eos_prob_mean: float | None


@dataclass
class DiagnosticsPack:
    """One response's diagnostics, per step and aggregated."""

    step: TokenStepDiagnostics
    seq: SequenceDiagnostics


@dataclass
class DiagnosticsResults:
    """`diagnostics[b][g]` of every response."""

    diagnostics: list[list[DiagnosticsPack]]


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
        self.config = GenerationConfig(temperature, top_p)
        if isinstance(eos_token_id, int):
            eos_token_id = (eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_id or ())

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
        if gen_logits.dim() != 2 or not gen_logits.shape[1] or not gen_logits.is_floating_point():
            raise ScoreModeError(
                f"gen_logits must be floating-point [T, V] with V above 0, got {gen_logits.dtype} "
                f"{tuple(gen_logits.shape)}."
            )
        steps, columns = gen_logits.shape
        ids = read_token_ids(realized_tokens, columns, "realized_tokens")
        read_token_ids(self.eos_token_ids, columns, "eos_token_id")
        if len(ids) != steps:
            raise ScoreModeError(
                f"realized_tokens must be {steps} token ids, one per row of gen_logits, got "
                f"{len(ids)}."
            )
        if gen_logits.isnan().any():
            step = int(gen_logits.isnan().any(1).nonzero()[0])
            raise ScoreModeError(f"gen_logits[{step}] has NaN: the model's output is broken there.")
        if gen_logits.dtype != torch.float64:
            gen_logits = gen_logits.float()
        tokens = torch.tensor(ids, device=gen_logits.device)
        wanted = Wanted(self.config)
        return diagnostics_pack(step_values(gen_logits, tokens, wanted, self.eos_token_ids))


def logprob_results(
    responses: Sequence[Response],
    values: Sequence[StepValues],
    *,
    compute_rb: bool = False,
    rb_requires_grad: bool = False,
    features: bool = False,
) -> LogprobResults:
    """The results [B][G] of responses from the values of their steps.

    Log-probabilities are the values themselves, on the device and with the graph that they have.

    Args:
        compute_rb: with `rb_entropies`.
        rb_requires_grad: with `rb_entropies_torch`, if `compute_rb`.
        features: with `baseline_feats_torch`.
    """

    def of(make: Callable[[StepValues], Made]) -> list[list[Made]]:
        return grid(responses, values, make)

    def entropy(v: StepValues) -> Tensor:
        return v.computed()["rb_entropy"]

    return LogprobResults(
        logprobs=of(lambda v: v.logprob),
        entropies=of(lambda v: -to_numpy(v.logprob)),
        sequence_logprobs=of(lambda v: _sum(to_numpy(v.logprob))),
        rb_entropies=of(lambda v: to_numpy(entropy(v) if compute_rb else v.logprob[:0])),
        rewards=of(lambda v: 0.0),
        rb_entropies_torch=of(entropy) if compute_rb and rb_requires_grad else None,
        baseline_feats_torch=of(baseline_features) if features else None,
        token_logqs=of(lambda v: v.logq),
        sequence_logqs=of(lambda v: _sum(to_numpy(v.logq))),
    )


def diagnostics_pack(values: StepValues) -> DiagnosticsPack:
    """The diagnostics of a response.

    Args:
        values: tensors [T] of everything but, perhaps, `eos_prob`; T may be 0.
    """
    given = _diagnosed(values)
    head = given["head_mass"]
    made = given | {
        "tail_mass": 1 - head,
        "two_point_entropy": _two_point_entropy(head),
        # Rounding may lift a collision probability of 1 above it; and no -0.
        "renyi2": (-given["collision"].log()).clamp_min(0.0) + 0.0,
        "eff_support": given["rb_entropy"].exp(),
    }
    eos = None if values.eos_prob is None else to_numpy(values.eos_prob)
    step = TokenStepDiagnostics(**{k: to_numpy(v) for k, v in made.items()}, eos_prob=eos)
    entropy, logprob = step.rb_entropy, to_numpy(values.logprob)
    means = ("rb_entropy", "margin", "top1_prob", "collision", "renyi2", "eff_support")
    sequence = SequenceDiagnostics(
        T=len(logprob),
        rb_entropy_sum=_sum(entropy),
        rb_entropy_max=float(entropy.max()) if len(entropy) else math.nan,
        rb_entropy_min=float(entropy.min()) if len(entropy) else math.nan,
        early_rb_entropy_mean=_mean(entropy[:EARLY_STEPS]),
        late_rb_entropy_mean=_mean(entropy[EARLY_STEPS:]),
        naive_surprisal_sum=-_sum(logprob),
        naive_surprisal_mean=-_mean(logprob),
        margin_sum=_sum(step.margin),
        eos_prob_mean=None if eos is None else _mean(eos),
        **{f"{name}_mean": _mean(getattr(step, name)) for name in means},
    )
    return DiagnosticsPack(step=step, seq=sequence)


def baseline_features(values: StepValues) -> Tensor:
    """Tensor [T, 7], detached, of the columns that `LogprobResults` lists.

    Args:
        values: tensors [T] with the diagnostics.
    """
    v = _diagnosed(values)
    s = v["head_mass"]
    place = torch.arange(len(s), dtype=s.dtype, device=s.device) / max(1, len(s))
    first = [v[name] for name in ("rb_entropy", "top1_prob", "margin")]
    return torch.stack([*first, s, _two_point_entropy(s), v["logit_var"], place], dim=1)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Detached, on the CPU, float32 or float64."""
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def _diagnosed(values: StepValues) -> dict[str, Tensor]:
    """The values that diagnostics need, detached."""
    found = values.computed()
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ScoreModeError(f"no diagnostics without {', '.join(missing)}; compute them too.")
    return {name: found[name].detach() for name in _NEEDED}


def _two_point_entropy(s: Tensor) -> Tensor:
    return torch.special.entr(s) + torch.special.entr(1 - s)


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def grid(
    responses: Sequence[Response], values: Sequence[StepValues], make: Callable[[StepValues], Made]
) -> list[list[Made]]:
    """[B][G] of what `make` makes of each response's values."""
    found: list[list[Made]] = [[] for _ in range(responses[-1].prompt + 1)]
    for response, value in zip(responses, values, strict=True):
        found[response.prompt].append(make(value))
    return found
