"""Calls of a Hugging Face model of which only a bounded number of logits exists at a time.

A row of logits is hundreds of times a hidden state. So the decoder runs once over whole sequences,
and the head on a few hidden states at a time. The head is more than a matrix (biases, scales, soft
caps, adapters): it is the model's own `forward` that runs, with a decoder that answers with the
given states.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import HALVES
from vllm.score.processor.sequences import Response, RowBatch

LOGITS_BYTES = 64 << 20  # a part of this size keeps any processor busy

Result = TypeVar("Result")
_logger = logging.getLogger(__name__)
# Columns of its logits for every model whose head is seen to work, None for the others.
_checked: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def map_logits(
    target: nn.Module,
    batch: RowBatch,
    compute: Callable[[Tensor, Tensor], Result],
    *,
    autocast: torch.dtype | None = None,
    logits_bytes: int = LOGITS_BYTES,
    itemsize: int = 4,
    checkpointed: bool = False,
) -> list[Result]:
    """`compute(logits, tokens)` on successive rows of a batch.

    Args:
        target: a causal language model.
        batch: the sequences, and which rows are wanted.
        compute: takes logits [n, V] in the model's dtype, and the tokens [n] that they score.
        autocast: dtype that the model's forward pass autocasts to; None: no autocast. `compute`
            runs without.
        logits_bytes: most bytes of logits at a time, in entries of `itemsize`; at least one row.
        checkpointed: with gradients, compute logits again in the backward pass instead of keeping
            them.

    Returns:
        Results in the order of the batch's rows.
    """
    device = batch.input_ids.device
    with autocast_to(autocast, device):
        head = head_of(target)
        hidden = None if head is None else head.hidden_rows(batch)
    tokens = batch.tokens

    def score(logits_of: Callable[[Any], Tensor], rows: Any, tokens: Tensor) -> Result:
        with autocast_to(autocast, device):
            logits = logits_of(rows)
        with autocast_to(None, device):
            return compute(logits, tokens.to(logits.device))

    if head is None or hidden is None:
        whole = partial(_logits_of_response, target, batch)
        return [score(whole, i, part) for i, part in enumerate(tokens.split(batch.lengths))]
    count = max(1, logits_bytes // (head.columns * itemsize))
    parts = zip(hidden.split(count), tokens.to(hidden.device).split(count), strict=True)
    run = partial(checkpoint, score, use_reentrant=False) if checkpointed else score
    return [run(head.logits, *part) for part in parts]


def _logits_of_response(target: nn.Module, batch: RowBatch, i: int) -> Tensor:
    """Logits [T, V] that score response i of a batch, by a forward pass of it alone."""
    end = len(batch.responses[i].ids) - 1
    part = slice(i, i + 1), slice(end)
    logits = model_logits(target, batch.input_ids[part], batch.attention_mask[part])[0]
    if len(logits) != end:
        raise ScoreModeError(
            f"the model gives logits of {len(logits)} positions for {end} tokens: models that "
            "insert tokens, as prompt tuning does, cannot be scored here."
        )
    return logits[batch.responses[i].prompt_length - 1 :]


class Head:
    """What a causal language model does after its decoder; its logits have `columns`."""

    def __init__(self, target: nn.Module, columns: int) -> None:
        base = causal_model(target)
        self.columns = columns
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
            model_logits(self._target, batch.input_ids, batch.attention_mask)
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
            return model_logits(self._target, ids, None)[0]

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


def head_of(target: nn.Module) -> Head | None:
    """The model's head, or None if it does not work on single rows.

    Tried once per model, against an ordinary call.
    """
    if target not in _checked:
        # Two sequences of four rows, all of them wanted.
        ids = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1]])
        probe_responses = [Response(0, i, row, 4) for i, row in enumerate(ids)]
        probe = RowBatch.of(probe_responses, next(target.parameters()).device)
        some = probe.rows[[6, 1, 3]]  # in another order than the sequences'
        with torch.no_grad(), evaluating(target):
            expected = model_logits(target, probe.input_ids, probe.attention_mask)
            expected = expected.flatten(0, 1)[some]
            if expected.isnan().any():
                return None  # shows nothing, and the caller will refuse the logits
            try:
                head = Head(target, expected.shape[1])
                hidden = head.hidden_rows(probe)[some]
                found = torch.cat([head.logits(hidden[:2]), head.logits(hidden[2:])])
                why = "" if _equal(found, expected) else "on single rows it gives other logits"
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                why = f"{type(error).__name__}: {error}"
        if why:
            _logger.warning(
                "The head of %s cannot be run apart from its decoder (%s): the logits of one whole "
                "sequence are held at a time.",
                type(causal_model(target)).__name__,
                why,
            )
        _checked[target] = None if why else expected.shape[1]
    columns = _checked[target]
    return None if columns is None else Head(target, columns)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Up to the roundings of matrix products over other numbers of rows."""
    half = expected.dtype in HALVES or torch.is_autocast_enabled(expected.device.type)
    limit = expected[expected.isfinite()].abs().amax().item() * (2**-6 if half else 1e-4)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=limit)


def autocast_to(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Autocast to `dtype`, or no autocast, whatever surrounds it."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def evaluating(target: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode the model is in; it is in that mode again afterwards."""
    training = [module for module in target.modules() if module.training]
    try:
        target.eval()
        yield
    finally:
        for module in training:
            module.training = True


def causal_model(target: nn.Module) -> nn.Module:
    """The model itself, where `target` is a PEFT wrapper around it."""
    base: nn.Module = target.get_base_model() if hasattr(target, "get_base_model") else target
    return base


def model_logits(target: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """One call of the model: logits [B, L, V]; positions count from the first token of a mask."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    parameters = inspect.signature(causal_model(target).forward).parameters
    # Some models count positions themselves (from the mask), or have none.
    if mask is not None and "position_ids" in parameters:
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    output = target(**given)
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


class _Stand(nn.Module):
    """Answers in place of a decoder, which still has all its attributes and its hooks."""

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.held = (decoder,)  # no submodule: names of parameters must not change
        self.forward = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["held"][0], name)
