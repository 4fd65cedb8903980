"""How an answer is asked for and where it ends, in text and in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable


@dataclass(frozen=True)
class AnswerFormat:
    """The text before an answer and the text that ends it.

    Answers that are scored to their end exclude each other, so their probabilities add up to at
    most 1. Without an end, "1" has the probability of everything that begins with "1".

    Attributes:
        cue: asks for the answer; not blank.
        end: the text behind an answer. None: the end-of-sequence token. "": nothing, then answers
            may begin one another.

    Raises:
        ScoreModeError: a blank cue, or a cue or an end that is no text.
    """

    cue: str = "\n\nThe answer is: "
    end: str | None = "\n"

    def __post_init__(self) -> None:
        if not isinstance(self.cue, str) or not self.cue.strip():
            raise ScoreModeError(
                f"cue is {self.cue!r}; give a text that asks for the answer, such as 'Answer: '."
            )
        if not isinstance(self.end, str | None):
            raise ScoreModeError(
                f"end is {self.end!r}; give the text that ends an answer, None for the "
                "end-of-sequence token, or '' for no end."
            )
        check_encodable(self.cue, "cue")
        check_encodable(self.end or "", "end")

    def cue_tokens(self, tokenizer: Any) -> list[int]:
        """Tokens after which an answer can be generated: those of the cue without the blanks at
        its end, which most tokenizers put into the first token of what follows.

        Raises:
            ScoreModeError: there are none.
        """
        tokens = _tokens(tokenizer, self.cue.rstrip(" "))
        if not tokens:
            raise ScoreModeError(
                f"cue is {self.cue!r}, of which the tokenizer makes no token; give another cue."
            )
        return tokens

    def fits(self, answer: str) -> bool:
        """Whether `answer` is not blank, and `end` is met behind it and not before."""
        ends = not self.end or (answer + self.end).find(self.end) == len(answer)
        return bool(answer.strip()) and ends

    def encodes(self, tokenizer: Any, answer: str) -> bool:
        """Whether `answer` fits, and the tokenizer makes tokens of all of it and its end."""
        if not self.fits(answer):
            return False
        try:
            self.encode(tokenizer, [answer])
        except ScoreModeError:
            return False
        return True

    def encode(self, tokenizer: Any, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of the cue, and of each answer with its end.

        Cue, answer and end are tokenised as one text, without special tokens, as the model would
        have read them. They are cut at one place for all answers: where the tokens of one of them
        first differ from `cue_tokens`.

        Args:
            tokenizer: of Hugging Face or vLLM.
            answers: [A] texts, A >= 1.

        Returns:
            The tokens that all have in common, and [A] lists of at least one token each.

        Raises:
            ScoreModeError: no answers; one that is no text, blank, given twice, holds `end`, or
                has no tokens of its own; tokens that the tokenizer does not know; an `end` that
                it drops; end=None without an end-of-sequence token.
        """
        self._check(answers)
        cue = self.cue_tokens(tokenizer)
        wholes = [self._encode_one(tokenizer, answer, cue) for answer in answers]
        cut = min(_common(cue, whole) for whole in wholes)
        # A tokenizer that reads on may need fewer tokens for cue and answer than for the cue.
        cut = min(cut, *(len(whole) - 1 for whole in wholes))
        targets = [whole[cut:] for whole in wholes]
        self._check_targets(tokenizer, answers, targets)
        if self.end is None:
            end = _end_of_sequence(tokenizer)
            targets = [[*target, end] for target in targets]
        return wholes[0][:cut], targets

    def _encode_one(self, tokenizer: Any, answer: str, cue: list[int]) -> list[int]:
        bare = _tokens(tokenizer, self.cue + answer)
        if not bare or bare in (cue, _tokens(tokenizer, self.cue)):
            raise ScoreModeError(
                f"answers: the tokenizer drops {answer!r} behind the cue; give an answer that it "
                "does not drop."
            )
        if not self.end:
            return bare
        whole = _tokens(tokenizer, self.cue + answer + self.end)
        if whole == bare:
            raise ScoreModeError(
                f"end is {self.end!r}, which the tokenizer drops behind {answer!r}; use another "
                "text, None for the end-of-sequence token, or '' for no end."
            )
        return whole

    def _check(self, answers: Sequence[str]) -> None:
        check_answers(answers)
        for answer in answers:
            if not self.fits(answer):
                raise ScoreModeError(
                    f"answers: {answer!r} holds the end {self.end!r}, or does with it behind, and "
                    "could never be complete; shorten it, or use another end."
                )
            check_encodable(answer, f"answers: {answer!r}")

    def _check_targets(
        self, tokenizer: Any, answers: Sequence[str], targets: list[list[int]]
    ) -> None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        seen: dict[tuple[int, ...], str] = {}
        for answer, target in zip(answers, targets, strict=True):
            if unknown is not None and unknown in target:
                raise ScoreModeError(
                    f"answers: the tokenizer does not know all of {answer + (self.end or '')!r} "
                    "(answer and end), so its probability is unknown, too; use other texts."
                )
            other = seen.setdefault(tuple(target), answer)
            if other != answer:
                raise ScoreModeError(
                    f"answers: the tokenizer makes the same tokens of {other!r} and {answer!r}; "
                    "give one of them."
                )


def check_answers(answers: Sequence[str]) -> None:
    """Refuse what is no list of distinct texts that are not blank, at least one."""
    if isinstance(answers, str) or not answers:
        raise ScoreModeError(f"answers is {answers!r}; give a list of at least one answer.")
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ScoreModeError(
                f"answers: {answer!r} is no answer; give texts that are not blank."
            )
        if answer in answers[:i]:
            raise ScoreModeError(f"answers: {answer!r} is given twice; give each once.")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _end_of_sequence(tokenizer: Any) -> int:
    token = getattr(tokenizer, "eos_token_id", None)
    if token is None:
        raise ScoreModeError(
            "end is None, but the tokenizer has no end-of-sequence token; give a text, such as "
            "'\\n'."
        )
    return int(token)
