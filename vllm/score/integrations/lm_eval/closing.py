"""What comes between the reasoning of a model and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.reasoning import ANSWER_ROOM
from vllm.score.errors import ScoreModeError
from vllm.score.escapes import unescape

# Options of scalers that make an `AnswerFormat`, and its names for them.
_FORMAT = {"answer_cue": "cue", "answer_end": "end"}


@dataclass(frozen=True)
class Closing:
    """What comes between reasoning and answer.

    Attributes:
        text: of it.
        token_ids: at least one.
        always: also where the model ended its reasoning by itself.
        stops: texts that end the answer behind it.
    """

    text: str
    token_ids: list[int]
    always: bool
    stops: tuple[str, ...] = ()

    def reasoning_room(self, length: int) -> int:
        """Tokens of reasoning in a text of `length` tokens, with room for an answer behind it.

        Raises:
            ScoreModeError: the closing alone is as long.
        """
        left = length - len(self.token_ids)
        if left < 1:
            raise ScoreModeError(
                f"max_gen_toks is {length}, and {self.text!r} before the answer has "
                f"{len(self.token_ids)} tokens: raise max_gen_toks."
            )
        return left - min(ANSWER_ROOM, max(left // 2, 1))


def make_closing(tokenizer: Any, think_end: str | None, options: Mapping[str, Any]) -> Closing:
    """The text that ends a model's reasoning; where it has none, the cue of the answer.

    Args:
        tokenizer: of Hugging Face or vLLM.
        think_end: such as "</think>".
        options: of a scaler.

    Raises:
        ScoreModeError: the text has no tokens.
    """
    if think_end is not None:
        ids = list(tokenizer.encode(think_end, add_special_tokens=False))
        if not ids:
            raise ScoreModeError(
                f"think_end_token is {think_end!r}, of which the tokenizer makes no token; name "
                "the text that ends this model's reasoning."
            )
        return Closing(think_end, ids, always=True)
    answer = AnswerFormat(**{_FORMAT[key]: options[key] for key in _FORMAT if key in options})
    stops = (answer.end,) if answer.end else ()
    return Closing(answer.cue.rstrip(" "), answer.cue_tokens(tokenizer), False, stops)


def with_line_breaks(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with line breaks where a command line had to write `\\n` in cue or end."""
    return {
        key: unescape(value) if key in _FORMAT and isinstance(value, str) else value
        for key, value in options.items()
    }
