"""What a causal language model does after its decoder, on single hidden states.

That is more than a matrix: biases, scales, soft caps, adapters. So it is the model's own `forward`
that runs, with a decoder that answers with the given states.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vllm.score.processor.batches import Response
from vllm.score.processor.precision import HALVES
from vllm.score.processor.row_batches import RowBatch

_logger = logging.getLogger(__name__)
# Columns of its logits for every model whose head is seen to work, None for the others.
_checked: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


class Head:
    """What a causal language model does after its decoder."""

    def __init__(self, target: nn.Module) -> None:
        base = causal_model(target)
        self._target = target
        self._decoder: nn.Module = base.get_decoder()
        self._places = [
            (module, name)
            for module in base.modules()
            for name, child in module._modules.items()
            if child is self._decoder
        ]
        if not self._places:
            raise AttributeError("get_decoder() is no part of the model")
        self._output: Any = None

    def hidden_rows(self, batch: RowBatch) -> Tensor:
        """The decoder's last hidden states [N, H] of the batch's rows."""
        found: list[Tensor] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            output = self._decoder(*args, **kwargs)
            self._output = type(output)
            found.append(output[0])
            first = output[0][:1, :1]  # one row through the head, whose logits are not used
            if isinstance(output, tuple):
                return (first, *output[1:])
            return type(output)(**{**output, "last_hidden_state": first})

        with self._answering(run):
            model_logits(self._target, batch.input_ids, batch.attention_mask, batch.position_ids)
        (hidden,) = found
        if hidden.shape[:2] != batch.input_ids.shape:
            raise ValueError("the model inserts tokens")
        return hidden.flatten(0, 1)[batch.rows.to(hidden.device)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H]."""

        def give(*args: Any, **kwargs: Any) -> Any:
            if issubclass(self._output, tuple):
                return (hidden[None],)
            return self._output(last_hidden_state=hidden[None])

        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with self._answering(give):
            return model_logits(self._target, ids, None, None)[0]

    @contextmanager
    def _answering(self, answer: Callable[..., Any]) -> Iterator[None]:
        stand = _Stand(self._decoder, answer)
        try:
            for module, name in self._places:
                module._modules[name] = stand
            yield
        finally:
            for module, name in self._places:
                module._modules[name] = self._decoder


def head_of(target: nn.Module) -> tuple[Head, int] | None:
    """The head and the columns of its logits, or None if it does not work on single rows.

    Tried once a model, against an ordinary call.
    """
    if target not in _checked:
        expected, found, why = _try_head(target)
        if expected.isnan().any():
            return None  # shows nothing, and the caller will refuse the logits
        fits = not why and _equal(found, expected)
        if not fits:
            _logger.warning(
                "The head of %s cannot be run apart from its decoder (%s): the logits of one whole "
                "sequence are held at a time.",
                type(causal_model(target)).__name__,
                why or "on single rows it gives other logits",
            )
        _checked[target] = expected.shape[1] if fits else None
    columns = _checked[target]
    return None if columns is None else (Head(target), columns)


@torch.no_grad()
def _try_head(target: nn.Module) -> tuple[Tensor, Tensor, str]:
    """Logits of a few rows as the model gives them, as the head does, and why it cannot."""
    probe = _probe(next(target.parameters()).device)
    some = probe.rows[[6, 1, 3]]  # in another order than the sequences'
    with evaluating(target):
        whole = model_logits(target, probe.input_ids, probe.attention_mask, probe.position_ids)
        expected = whole.flatten(0, 1)[some]
        try:
            head = Head(target)
            hidden = head.hidden_rows(probe)[some]
            found = torch.cat([head.logits(hidden[:2]), head.logits(hidden[2:])])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            return expected, expected, f"{type(error).__name__}: {error}"
    return expected, found, ""


def _probe(device: torch.device) -> RowBatch:
    """Two sequences of four rows, all of them wanted."""
    ids = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]])
    return RowBatch.of([Response(0, i, row, 4) for i, row in enumerate(ids)], [0, 1], device)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Up to the roundings of matrix products over other numbers of rows."""
    if found.shape != expected.shape:
        return False
    half = expected.dtype in HALVES or torch.is_autocast_enabled(expected.device.type)
    scale = expected[expected.isfinite()].abs().amax()
    close = (found - expected).abs() <= scale * (2**-6 if half else 1e-4)
    return bool((close | (found == expected)).all())


@contextmanager
def evaluating(target: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the model is in; it is in that mode again afterwards."""
    training = [module for module in target.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def causal_model(target: nn.Module) -> nn.Module:
    """The model itself, where `target` is a PEFT wrapper around it."""
    base: nn.Module = target.get_base_model() if hasattr(target, "get_base_model") else target
    return base


def model_logits(
    target: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> Tensor:
    """One call of the model: logits [B, L, V]."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    # Some models count positions themselves (from the mask), or have none.
    if (
        positions is not None
        and "position_ids" in inspect.signature(causal_model(target).forward).parameters
    ):
        given["position_ids"] = positions
    output = target(**given)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


class _Stand(nn.Module):
    """Answers in place of a decoder, which still has all its attributes and its hooks."""

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        # Not as a submodule: names of parameters must not change.
        self.__dict__.update(decoder=decoder, answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](*args, **kwargs)
