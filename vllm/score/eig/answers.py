"""How an answer is asked for, where it ends (in text and in tokens), and answers in a text:
numbers, boxes of LaTeX, and what a pattern finds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable, own_prefix_length

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus between two numbers is a difference, and "1/2/2026" is no fraction.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)\]}}])(?P<sign>[-−]))?\\?\$?"
    rf"(?P<digits>(?<!/)[0-9]+/[0-9]+(?![0-9/])|(?:{_PLAIN})(?:[eE][-+]?[0-9]+)?)"
)
_DECIMAL = re.compile(r"(?P<sign>[-−]?)(?P<whole>[0-9]*)(?:\.(?P<part>[0-9]+))?")
_THOUSANDS = re.compile(r"[-−]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


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
        # A tokenizer that reads on may need fewer tokens for cue and answer than for the cue.
        cut = min(min(own_prefix_length(whole, cue), len(whole) - 1) for whole in wholes)
        targets = [whole[cut:] for whole in wholes]
        self._check_targets(tokenizer, answers, targets)
        if self.end is None:
            end = getattr(tokenizer, "eos_token_id", None)
            if end is None:
                raise ScoreModeError(
                    "end is None, but the tokenizer has no end-of-sequence token; give a text, "
                    "such as '\\n'."
                )
            targets = [[*target, int(end)] for target in targets]
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


class Found(NamedTuple):
    """An answer in a text.

    Attributes:
        answer: normalised.
        end: the position behind it.
        open: it may go on if the text does.
    """

    answer: str
    end: int
    open: bool


def normalise(text: str) -> str:
    """One text for answers that differ in their writing only.

    Blanks at the ends, runs of blanks, and dollar signs around it are dropped. A decimal number
    also loses commas between thousands, zeros that say nothing, a full stop and a percent sign
    behind it: " $1,000.0 " is "1000".
    """
    text = " ".join(text.split())
    bare = text
    while (stripped := bare.removeprefix("\\$").removesuffix("\\$").strip("$ ")) != bare:
        bare = stripped
    number = bare.removesuffix(".").removesuffix("%").removesuffix("\\").rstrip()
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    match = _DECIMAL.fullmatch(number)
    if not match or not (match["whole"] or match["part"]):
        return bare
    whole, part = match["whole"].lstrip("0") or "0", (match["part"] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if match["sign"] and value != "0" else value


def find_numbers(text: str) -> list[Found]:
    """The numbers in a text, in order.

    Integers, decimals ("3.5", ".5", but the full stop of "3." is none), thousands with commas,
    fractions of integers ("1/2", not reduced) and powers of ten ("1e5"), with a minus where it
    does not stand between numbers ("7-5" has 7 and 5). Percent and dollar signs are left out.
    Digits within a word, as in "x2", are none.
    """
    # A number goes on behind digits, and so it may behind a point, a comma or a bar.
    settled = len(text.rstrip("0123456789.,/eE+-"))
    return [
        Found(
            normalise(("-" if match["sign"] else "") + match["digits"]),
            match.end(),
            match.end() >= settled,
        )
        for match in _NUMBER.finditer(text)
    ]


def find_boxed(text: str) -> list[Found]:
    r"""What stands in \boxed{...} (or \fbox{...}), in order.

    Braces within must be balanced (\{ and \} are characters). Of boxes in a box the inner ones
    count. Empty and unclosed boxes are left out.
    """
    found = []
    for box in _BOX.finditer(text):
        end = _closing_brace(text, box.end())
        if end is None or _BOX.search(text, box.end(), end):
            continue
        if answer := normalise(text[box.end() : end]):
            found.append(Found(answer, end + 1, False))
    return found


def find_pattern(text: str, pattern: re.Pattern[str]) -> list[Found]:
    """What a pattern finds, normalised: its first group, or all where it has none."""
    found = []
    for match in pattern.finditer(text):
        answer = normalise(match[1 if pattern.groups else 0] or "")
        if answer:
            found.append(Found(answer, match.end(), match.end() == len(text)))
    return found


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None
