"""The sampling policy, temperature and top-p, and the values of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.ops.top_p import nucleus
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import GenerationConfig


@dataclass(frozen=True)
class SamplingPolicy:
    """q: softmax(logits / temperature), restricted to its nucleus and renormalised.

    Attributes:
        temperature: above 0.
        top_p: in (0, 1]; 1 restricts nothing.

    Raises:
        ScoreModeError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        GenerationConfig(temperature=self.temperature, top_p=self.top_p)  # the same limits

    @classmethod
    def of(cls, config: GenerationConfig) -> SamplingPolicy:
        """The policy that `config` generates with."""
        return cls(config.temperature, config.top_p)

    @property
    def is_model(self) -> bool:
        """Whether q is the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1


def step_values(
    logits: Tensor,
    tokens: Tensor,
    policy: SamplingPolicy,
    *,
    eos_token_ids: Sequence[int] = (),
    diagnostics: bool = True,
    entropy: bool = True,
) -> StepValues[Tensor]:
    """What a model's logits say about the tokens drawn from them, in nats.

    All values have gradients in `logits`; which tokens the nucleus holds counts as constant. Where
    several equal tokens at its boundary do not all fit in, sums take the number that does, and each
    of them has the same finite log q.

    Args:
        logits: [N, V], float32 or float64, which is also the precision of the arithmetic.
        tokens: int64 [N].
        policy: what the tokens were drawn by.
        eos_token_ids: of `StepValues.eos_prob`; without any it is None.
        diagnostics: without, only the log-probabilities and the entropy are computed.
        entropy: without (and without diagnostics), only the log-probabilities.

    Returns:
        Tensors [N].
    """
    a = logits if policy.temperature == 1 else logits / policy.temperature
    row = _Row(a, tokens)
    kept = _Kept(row, policy.top_p)
    values: dict[str, Tensor] = {
        "logprob": row.logprob() if a is logits else _Row(logits, tokens).logprob(),
        "logq": torch.where(kept.inside(row.token), row.token - kept.total.log(), -torch.inf),
    }
    if diagnostics or entropy:
        # 0 log 0 = 0
        b = torch.where(kept.weights > 0, row.b, 0.0)
        mean = (kept.weights * b).sum(1) / kept.total
        # Rounding may leave less than 0, which no entropy is.
        values["rb_entropy"] = (kept.total.log() - mean).clamp_min(0.0)
    if diagnostics:
        # Rounding may lift the part above the whole.
        values["head_mass"] = (kept.total / row.total).clamp_max(1.0)
        values["top1_prob"] = row.e.amax(1) / kept.total
        values["margin"] = _margin(a)
        values["collision"] = (kept.weights * row.e).sum(1) / kept.total.square()
        values["logit_mean"] = row.top + mean
        squares = (b - mean[:, None]).square()
        values["logit_var"] = (kept.weights * squares).sum(1) / kept.total
        if eos_token_ids:
            ends = row.b[:, list(dict.fromkeys(eos_token_ids))]
            held = torch.where(kept.inside(ends), ends.exp(), 0.0).sum(1)
            values["eos_prob"] = (held / kept.total).clamp_max(1.0)
    return StepValues(**values)


class _Row:
    """Logits less their maximum, b [N, V], e = exp(b), its sum, and b of the tokens, both [N].

    The maximum is a constant: every value depends on differences only, or adds it again.
    """

    def __init__(self, a: Tensor, tokens: Tensor) -> None:
        self.top = a.detach().amax(1)
        self.b = a - self.top[:, None]
        self.e = self.b.exp()
        self.total = self.e.sum(1)
        self.token = self.b.gather(1, tokens[:, None]).squeeze(1)

    def logprob(self) -> Tensor:
        return self.token - self.total.log()


class _Kept:
    """What top-p keeps of a row: weights [N, V], e of the kept tokens and else 0; their sum [N]."""

    def __init__(self, row: _Row, top_p: float) -> None:
        self.floor: Tensor | None = None
        self.weights, self.total = row.e, row.total
        if top_p == 1:
            return
        b = row.b.detach()
        self.floor, surplus, _ = nucleus(b, top_p)
        floor = self.floor[:, None]
        # Of equal tokens at the boundary none is preferred: each is kept in part.
        equal = b == floor
        number = equal.sum(1).clamp_min(1).to(b.dtype)
        share = (1 - surplus / number)[:, None]
        self.weights = torch.where(b > floor, row.e, torch.where(equal, row.e * share, 0.0))
        self.total = self.weights.sum(1)

    def inside(self, b: Tensor) -> Tensor:
        """Whether values of the row, [N] or [N, k], are kept."""
        if self.floor is None:
            return torch.ones_like(b, dtype=torch.bool)
        floor = self.floor if b.dim() == 1 else self.floor[:, None]
        return b.detach() >= floor


def _margin(a: Tensor) -> Tensor:
    if a.shape[1] == 1:
        return torch.zeros_like(a[:, 0])
    first, second = a.topk(2, dim=1).values.unbind(1)
    return first - second


def check_logits(logits: Tensor, tokens: Tensor) -> None:
    """Whether `step_values` can take them.

    Raises:
        ScoreModeError: wrong shapes or dtypes, tokens beyond the vocabulary, NaN.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ScoreModeError(
            f"gen_logits must be floating-point [T, V] with V above 0, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )
    if tokens.shape != logits.shape[:1] or tokens.is_floating_point():
        raise ScoreModeError(
            f"realized_tokens must be {logits.shape[0]} token ids, one a row of gen_logits, got "
            f"{tokens.dtype} {tuple(tokens.shape)}."
        )
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[1]:
        raise ScoreModeError(
            f"realized_tokens has ids from {int(tokens.min())} to {int(tokens.max())}; gen_logits "
            f"has columns for 0 to {logits.shape[1] - 1}."
        )
    if logits.isnan().any():
        step = int(logits.isnan().any(1).nonzero()[0])
        raise ScoreModeError(f"gen_logits[{step}] has NaN: the model's output is broken there.")
