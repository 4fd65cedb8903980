"""The sampling policy, temperature and top-p, and what logits say about the tokens drawn by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vllm.score.ops.nucleus import nucleus
from vllm.score.processor.config import GenerationConfig


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


@dataclass(frozen=True)
class StepValues:
    """Tensors [T] of one response, one entry per generated token, in nats.

    Every backend computes them, and all results are made of them. The names are those of
    `TokenStepDiagnostics`, which defines them; None: not computed.

    Attributes:
        logprob: log p of the token under the model itself.
        logq: log q of the token under the sampling policy.
    """

    logprob: Tensor
    logq: Tensor
    rb_entropy: Tensor | None = None
    head_mass: Tensor | None = None
    top1_prob: Tensor | None = None
    margin: Tensor | None = None
    collision: Tensor | None = None
    logit_mean: Tensor | None = None
    logit_var: Tensor | None = None
    eos_prob: Tensor | None = None

    def computed(self) -> dict[str, Tensor]:
        """Those that were computed, by name."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in given.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> StepValues:
        """The same with `change` applied to every value that was computed."""
        return replace(self, **{name: change(value) for name, value in self.computed().items()})


def step_values(
    logits: Tensor,
    tokens: Tensor,
    wanted: Wanted,
    eos_token_ids: Sequence[int] = (),
) -> StepValues:
    """What a model's logits say about the tokens drawn from them, in nats.

    All values have gradients in `logits`; which tokens the nucleus holds counts as constant. Where
    several equal tokens at its boundary do not all fit in, sums take the number that does, and each
    of them has the same finite log q.

    Args:
        logits: [N, V], float32 or float64, which is also the precision of the arithmetic.
        tokens: int64 [N].
        wanted: which values are computed.
        eos_token_ids: of `StepValues.eos_prob`; without any it is None.

    Returns:
        Tensors [N].
    """
    temperature = wanted.config.temperature
    a = logits if temperature == 1 else logits / temperature
    row = _Row(a, tokens)
    kept = _Kept(row, wanted.config.top_p)
    values: dict[str, Tensor] = {
        "logprob": row.logprob() if a is logits else _Row(logits, tokens).logprob(),
        "logq": torch.where(kept.inside(row.token), row.token - kept.total.log(), -torch.inf),
    }
    if wanted.diagnostics or wanted.entropy:
        # 0 log 0 = 0
        b = torch.where(kept.weights > 0, row.b, 0.0)
        mean = (kept.weights * b).sum(1) / kept.total
        # Rounding may leave less than 0, which no entropy is.
        values["rb_entropy"] = (kept.total.log() - mean).clamp_min(0.0)
    if wanted.diagnostics:
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
