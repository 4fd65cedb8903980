"""Contexts as callers give them: texts, or messages for the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.tokens import encode_texts

Messages = Sequence[Mapping[str, Any]]
ContextLike = str | Messages


@dataclass(frozen=True)
class Context:
    """A context in the form that is tokenised.

    Attributes:
        given: as the caller gave it.
        text: with the chat template applied, where messages were given.
        templated: whether they were.
    """

    given: ContextLike
    text: str
    templated: bool


def read_context(given: Any, tokenizer: Any, name: str) -> Context:
    """A text as it is; messages through the tokenizer's chat template.

    The template ends with what announces the assistant's answer, which the continuation then is;
    where the last message is the assistant's own, with that message, still open.

    Raises:
        ScoreModeError: neither a text nor messages, or a template that does not take them. The
            message begins with `name`.
    """
    if isinstance(given, str):
        return Context(given, given, False)
    if isinstance(given, Mapping):
        raise ScoreModeError(f"{name} is one message; write a list of messages, [message].")
    if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
        raise ScoreModeError(
            f"{name} is {type(given).__name__}; give a text, or a list of messages such as "
            '{"role": "user", "content": "..."}.'
        )
    if not given:
        raise ScoreModeError(f"{name} has no messages; give at least one, or a text.")
    for index, message in enumerate(given):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ScoreModeError(
                f"{name}[{index}] is {message!r:.60}; give a message such as "
                '{"role": "user", "content": "..."}.'
            )
    return Context(given, _render(list(given), tokenizer, name), True)


def context_token_ids(given: Any, tokenizer: Any, name: str) -> list[int]:
    """The tokens of a text, with the tokenizer's special tokens in front once, or of messages.

    Raises:
        ScoreModeError: as `read_context`.
    """
    context = read_context(given, tokenizer, name)
    if context.templated:
        return list(tokenizer.encode(context.text, add_special_tokens=False))
    ((ids, _),) = encode_texts(tokenizer, [context.text], [name])
    return ids


def _render(messages: list[Mapping[str, Any]], tokenizer: Any, name: str) -> str:
    unfinished = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not unfinished, "continue_final_message": unfinished}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            _check_reads_back(text, messages, tokenizer, options)
    except Exception as error:  # Jinja's own kinds, and whatever a tokenizer's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ScoreModeError(
            f"{name}: the chat template does not take these messages: {reason}; give a text, or a "
            "tokenizer with a chat template for them."
        ) from error
    return str(text)


def _check_reads_back(
    text: str, messages: list[Mapping[str, Any]], tokenizer: Any, options: dict[str, bool]
) -> None:
    """Not every tokenizer reads its template's control tokens from text."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    if list(ids) != list(tokenizer.encode(text, add_special_tokens=False)):
        raise ScoreModeError("its text, tokenised, is not the template's tokens")
