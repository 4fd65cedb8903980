"""One tiny call of each compiled operator, compared with the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm.score.ops import native, reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.size_rules import PAIR_ROWS

# Enough rows for the fused CUDA kernel in bfloat16; float32 takes the tiled product there.
ROWS, COLUMNS, HIDDEN, TARGETS = PAIR_ROWS - 3, 70, 32, 2
MOST = rs.ENTROPY_BIT | rs.COLLISION_BIT | rs.TOP_BIT | rs.MOMENTS_BIT | rs.RANK_BIT
EVERYTHING = MOST | rs.VARENTROPY_BIT
# Sums of 70 terms in float32, in another order.
TOLERANCE = 1e-4


def self_check(device_type: str) -> str | None:
    """Whether the loaded operators give the reference's numbers on this machine.

    Returns:
        None if so, else what differs, in words.
    """
    dtypes = [torch.float32, torch.bfloat16]
    try:
        for dtype in dtypes:
            for name, difference in _differences(torch.device(device_type), dtype):
                if not difference <= TOLERANCE:
                    return (
                        f"{name} in {str(dtype).removeprefix('torch.')} differs from the PyTorch "
                        f"reference by {difference:.1e}"
                    )
    except RuntimeError as error:
        return f"a call fails: {error}"
    return None


def _differences(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The operator and the largest difference, relative to 1 + the number itself, of each call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden, weight, bias = random(ROWS, HIDDEN), random(COLUMNS, HIDDEN), random(COLUMNS)
    logits = random(ROWS, COLUMNS)
    targets = torch.randint(COLUMNS, (ROWS, TARGETS), generator=generator).to(device)
    threshold = torch.zeros(ROWS, device=device)
    numbers = (1.5, 4.0, 0.75)
    head = (hidden, weight, bias, targets, 0)
    calls = [
        ("reduce_logits", (logits, targets, 0, threshold, *numbers, EVERYTHING)),
        # The fused CUDA kernel leaves the varentropy to the tiled product.
        ("score_head", (*head, threshold, *numbers, MOST)),
        ("score_head", (*head, threshold, *numbers, EVERYTHING)),
        ("target_logits", (*head, *numbers)),
    ]
    for name, arguments in calls:
        results = []
        for module in (native, reference):
            out = [rs.new_target_logits(ROWS, TARGETS, device)]
            if name != "target_logits":
                out.insert(0, rs.new_state(ROWS, device))
            getattr(module, name)(*arguments, *out)
            results.append(torch.cat(out, dim=1).cpu().double())
        ours, expected = results
        # NaN in either is a difference that no tolerance allows.
        yield name, float(((ours - expected).abs() / (1 + expected.abs())).max())
