"""What the state of a row must be, in float64 NumPy."""

from __future__ import annotations

import numpy as np

from vllm.score.ops.row_state import Transform


def float64_transform(z: np.ndarray, transform: Transform) -> np.ndarray:
    """x = scale * cap(z) / temperature, any shape."""
    if transform.soft_cap > 0:
        z = np.tanh(z / transform.soft_cap) * transform.soft_cap
    return z * transform.scale / transform.temperature


def float64_state(x: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of finite rows x [R, n], each [R], nats."""
    top = x.max(-1)
    e = np.exp(x - top[:, None])
    total = e.sum(-1)
    p = e / total[:, None]
    logp = x - top[:, None] - np.log(total)[:, None]
    mean = x.mean(-1)
    entropy = -(p * logp).sum(-1)
    return {
        "max": top,
        "second": np.sort(x, axis=-1)[:, -2] if x.shape[1] > 1 else np.full(len(x), -np.inf),
        "lse": top + np.log(total),
        "entropy": entropy,
        "varentropy": (p * (logp + entropy[:, None]) ** 2).sum(-1),
        "collision": (p**2).sum(-1),
        "mean": mean,
        "m2": ((x - mean[:, None]) ** 2).sum(-1),
    }


def hard_rows(columns: int) -> np.ndarray:
    """Float32 rows [R, columns] whose probability lies far from the maximum, most in one place."""
    rng = np.random.default_rng(0)
    rows = []
    for height in (5.0, 8.0, 11.0):
        for spread in (0.0, 0.01, 0.3):
            for place in (0, columns // 2, columns - 1):
                row = spread * rng.standard_normal(columns)
                row[place] = height
                rows.append(row)
    low_first = 0.01 * rng.standard_normal(columns)
    low_first[: columns // 3] -= 50
    rising = np.linspace(0, 200, columns)
    return np.stack([*rows, low_first, rising, rising[::-1]]).astype(np.float32)
