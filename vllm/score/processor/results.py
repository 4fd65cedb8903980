"""What a model's logits say about sampled tokens, and what a `SequenceProcessor` returns of it.

The sampling policy is that of `GenerationConfig`, temperature and top-p.

B prompts, G responses per prompt, T generated tokens of one response. All log-probabilities and
entropies in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.ops.top_p import nucleus
from vllm.score.processor.config import GenerationConfig
from vllm.score.tokens import read_token_ids

EARLY_STEPS = 16
# Tensors [T] of one response, an entry per generated token, by name: what `step_values` returns.
# Every backend computes them, and all results are made of them.
StepValues = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """Which values of the steps to compute, beside the log-probabilities.

    Attributes:
        config: what the tokens were sampled by, and how many sequences are scored at once.
        entropy: with `rb_entropy`.
        diagnostics: with all.
    """

    config: GenerationConfig
    entropy: bool = True
    diagnostics: bool = True


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
        diagnostics: of every response; None where not asked for.
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
    diagnostics: DiagnosticsResults | None = None


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
    eos_prob: np.ndarray | None = None


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
        ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(ends or ())

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
        if len(bad := gen_logits.isnan().any(1).nonzero()):
            raise ScoreModeError(
                f"gen_logits[{int(bad[0])}] has NaN: the model's output is broken there."
            )
        logits = gen_logits.to(torch.promote_types(gen_logits.dtype, torch.float32))
        tokens = torch.tensor(ids, device=logits.device)
        values = step_values(logits, tokens, Wanted(self.config), self.eos_token_ids)
        return diagnostics_pack(values)


def step_values(
    logits: Tensor, tokens: Tensor, wanted: Wanted, eos_token_ids: Sequence[int] = ()
) -> StepValues:
    """What a model's logits say about the tokens drawn from them, in nats.

    All values have gradients in `logits`; which tokens the nucleus holds counts as constant. Where
    several equal tokens at its boundary do not all fit in, sums take the number that does, and each
    of them has the same finite log q.

    Args:
        logits: [N, V], float32 or float64, which is also the precision of the arithmetic.
        tokens: int64 [N].
        wanted: which values are computed.
        eos_token_ids: of "eos_prob".

    Returns:
        Tensors [N] by name: "logprob", log p of the token under the model itself, and "logq", log q
        under the sampling policy; with `wanted.entropy` "rb_entropy", with `wanted.diagnostics`
        also "head_mass", "top1_prob", "margin", "collision", "logit_mean", "logit_var" and, with
        `eos_token_ids`, "eos_prob", as `TokenStepDiagnostics` defines them.
    """
    places, top_p = tokens[:, None], wanted.config.top_p
    a = logits if wanted.config.temperature == 1 else logits / wanted.config.temperature
    # The maximum is a constant: every value depends on differences only, or adds it again.
    top = a.detach().amax(1, keepdim=True)
    b = a - top
    e = b.exp()
    token, total = b.gather(1, places), e.sum(1, keepdim=True)
    # What top-p keeps: the smallest b, and e of the kept tokens and else 0.
    floor: Tensor | float = -torch.inf
    weights = e
    if top_p < 1:
        floor, surplus, _ = (each[:, None] for each in nucleus(b.detach(), top_p))
        # Of equal tokens at the boundary none is preferred: each is kept in part.
        equal = b.detach() == floor
        share = 1 - surplus / equal.sum(1, keepdim=True).clamp_min(1).to(b.dtype)
        weights = torch.where(b > floor, e, torch.where(equal, e * share, 0.0))
    kept = weights.sum(1, keepdim=True)
    values = {
        "logprob": token - total.log() if a is logits else logits.log_softmax(1).gather(1, places),
        "logq": torch.where(token < floor, -torch.inf, token - kept.log()),
    }
    if wanted.diagnostics or wanted.entropy:
        # 0 log 0 = 0
        finite = torch.where(weights > 0, b, 0.0)
        mean = (weights * finite).sum(1, keepdim=True) / kept
        # Rounding may leave less than 0, which no entropy is.
        values["rb_entropy"] = (kept.log() - mean).clamp_min(0.0)
    if wanted.diagnostics:
        # Rounding may lift the part above the whole.
        values["head_mass"] = (kept / total).clamp_max(1.0)
        values["top1_prob"] = e.amax(1, keepdim=True) / kept
        largest = a.topk(min(2, a.shape[1]), dim=1).values
        values["margin"] = largest[:, :1] - largest[:, -1:]
        values["collision"] = (weights * e).sum(1, keepdim=True) / kept.square()
        values["logit_mean"] = top + mean
        squares = (finite - mean).square()
        values["logit_var"] = (weights * squares).sum(1, keepdim=True) / kept
        if eos_token_ids:
            ends = b[:, list(dict.fromkeys(eos_token_ids))]
            held = torch.where(ends < floor, 0.0, ends.exp()).sum(1, keepdim=True)
            values["eos_prob"] = (held / kept).clamp_max(1.0)
    return {name: value.squeeze(1) for name, value in values.items()}


def diagnostics_pack(values: StepValues) -> DiagnosticsPack:
    """The diagnostics of a response.

    Args:
        values: tensors [T] of everything but, perhaps, `eos_prob`; T may be 0.
    """
    given = {name: value.detach() for name, value in values.items()}
    logprob, _ = to_numpy(given.pop("logprob")), given.pop("logq")
    head = given["head_mass"]
    made = given | {
        "tail_mass": 1 - head,
        "two_point_entropy": _two_point_entropy(head),
        # Rounding may lift a collision probability of 1 above it; and no -0.
        "renyi2": (-given["collision"].log()).clamp_min(0.0) + 0.0,
        "eff_support": given["rb_entropy"].exp(),
    }
    step = TokenStepDiagnostics(**{name: to_numpy(value) for name, value in made.items()})
    entropy, eos = step.rb_entropy, step.eos_prob
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
    names = ("rb_entropy", "top1_prob", "margin", "head_mass", "logit_var")
    *first, s, variance = (values[name].detach() for name in names)
    place = torch.arange(len(s), dtype=s.dtype, device=s.device) / max(1, len(s))
    return torch.stack([*first, s, _two_point_entropy(s), variance, place], dim=1)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Detached, on the CPU, float32 or float64."""
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def _two_point_entropy(s: Tensor) -> Tensor:
    return torch.special.entr(s) + torch.special.entr(1 - s)


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan
