"""Copies between host and device."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 tensors of a device as views of one pinned array, in one copy.

    They are valid once the device's current stream has caught up.
    """
    flat = torch.cat([t.flatten() for t in tensors])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    parts = host.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


class HostWriter:
    """Writes blocks of a device's results into pageable memory, one behind the computation.

    A block is copied to one of two pinned buffers while the device computes the next one, and from
    there by the host.
    """

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor | None] = [None, None]
        self._waiting: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        self._turn = 0

    def __enter__(self) -> HostWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()

    def write(self, out: torch.Tensor, block: torch.Tensor) -> None:
        """Copy `block` to `out`, of the same shape; `out` is complete when the writer is left."""
        if block.device.type != "cuda":
            out.copy_(block)
            return
        pinned = self._pinned[self._turn]
        if pinned is None or len(pinned) < len(block):
            pinned = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
            self._pinned[self._turn] = pinned
        staged = pinned[: len(block)].copy_(block, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._finish()
        self._waiting = (out, staged, copied)
        self._turn = 1 - self._turn

    def _finish(self) -> None:
        if self._waiting is not None:
            out, staged, copied = self._waiting
            copied.synchronize()
            out.copy_(staged)
            self._waiting = None
