"""The sampling policy and its measures, row by row in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np


def policy_row(
    logits: np.ndarray, token: int, temperature: float, top_p: float, eos: tuple[int, ...] = ()
) -> dict[str, float]:
    """Every measure of one row of logits [V], in nats."""
    z = np.asarray(logits, dtype=np.float64)
    a = z / temperature
    p = np.exp(a - a.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    total, kept = 0.0, 0
    while kept < len(p) and (kept == 0 or total < top_p * (1 - 1e-12)):
        total += p[order[kept]]
        kept += 1
    if top_p == 1:
        total, kept = 1.0, len(p)
    inside = order[:kept]
    q = p[inside] / p[inside].sum()
    mean = float((q * a[inside]).sum())
    floor = a[inside].min()
    partition = float(a[inside].max() + np.log(np.exp(a[inside] - a[inside].max()).sum()))
    first, second = np.sort(a)[::-1][:2] if len(a) > 1 else (a[0], a[0])
    logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
    return {
        "logprob": float(logp[token]),
        "logq": a[token] - partition if a[token] >= floor else -math.inf,
        "rb_entropy": float(-(q * np.log(q)).sum()),
        "head_mass": min(total, 1.0),
        "top1_prob": float(q.max()),
        "margin": float(first - second),
        "collision": float((q * q).sum()),
        "logit_mean": mean,
        "logit_var": float((q * (a[inside] - mean) ** 2).sum()),
        "eos_prob": float(sum(q[inside == e].sum() for e in eos)),
        "logsumexp": partition,
    }
