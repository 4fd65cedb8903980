"""The progress bar of a run: text tokens done, tokens/s, time left, perplexity so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vllm.score.perplexity.stream import TextStream, Window

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """A tqdm bar over the tokens of a text.

    The number of tokens of a streamed text is not known beforehand: it is estimated from the
    tokens a byte so far, where the source knows its size in bytes.

    Args:
        stream: the text.
        description: in front of the bar.
        size: of the text in bytes, if known.
        tokens: of the text, if known; or the most that will be scored.
        use_tqdm: whether to show the bar; or a function that makes one.
    """

    def __init__(
        self,
        stream: TextStream,
        description: str,
        *,
        size: int | None,
        tokens: int | None,
        use_tqdm: bool | Callable[..., tqdm],
    ) -> None:
        from tqdm.auto import tqdm as default

        self._stream, self._size, self._tokens = stream, size, tokens
        make: Callable[..., Any] = use_tqdm if callable(use_tqdm) else default
        self._bar = make(
            total=tokens,
            desc=description,
            unit="tok",
            unit_scale=True,
            disable=not use_tqdm,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._bar.total = self._stream.tokens
            self._advance_to(self._stream.tokens)
        self._bar.close()

    def report(self, group: Sequence[Window], scored: int) -> None:
        """After a group; `scored` of its windows were computed now, not read."""
        last = group[-1]
        done = last.position + last.num_targets
        if not scored:  # read from the store: no part of the rate
            self._bar.initial = done
        if self._size and self._stream.bytes:
            estimate = round(self._stream.tokens * self._size / self._stream.bytes)
            self._bar.total = max(min(estimate, self._tokens or estimate), done)
        self._advance_to(done)

    def _advance_to(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
