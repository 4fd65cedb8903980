"""Figures from sums of log-probabilities: perplexities and bits.

Log-probabilities are natural logarithms (nats), float32 as the engine gives them; sums are
float64. Words and bytes are counted as lm-eval's rolling tasks count them: a document has
len(re.split(r"\\s+", document)) words (so an empty one has 1) and len(document.encode("utf-8"))
bytes.

With S the sum of the log-probabilities of N scored tokens, of a text of W words and B bytes:

    nll               = -S / N             nats a token
    token_perplexity  = exp(-S / N)
    bits_per_token    = -S / (N ln 2)
    word_perplexity   = exp(-S / W)
    byte_perplexity   = exp(-S / B)
    bits_per_byte     = -S / (B ln 2)

Nothing to divide by (no scored token, no byte) is an error, never NaN. A perplexity beyond the
range of float64 is inf.
"""

from __future__ import annotations

import math
import re

import numpy as np

from vllm.score.errors import ScoreModeError

# A log-softmax computed in float32 may end a little above 0 where one token has all the mass.
ROUNDING_ABOVE_ZERO = 1e-4
_WHITESPACE = re.compile(r"\s+")


def check_logprobs(logprobs: np.ndarray, what: str = "logprobs") -> np.ndarray:
    """The log-probabilities as given, if they can be ones.

    Args:
        logprobs: float [m], nats.
        what: name for the error message.

    Raises:
        ScoreModeError: for another shape or dtype, a NaN, -inf (the model excludes the token: the
            perplexity is infinite), or a value above 0 by more than rounding (1e-4).
    """
    array = np.asarray(logprobs)
    if array.ndim != 1 or array.dtype.kind != "f":
        raise ScoreModeError(
            f"{what} has shape {array.shape} and dtype {array.dtype}; one floating-point "
            "log-probability a token is needed"
        )
    bad = ~(np.isfinite(array) & (array <= ROUNDING_ABOVE_ZERO))
    if bad.any():
        at = int(bad.argmax())
        raise ScoreModeError(
            f"{what}[{at}] is {float(array[at])}, which is no log-probability of a possible token "
            f"({int(bad.sum())} of {array.size} values are NaN, infinite or above 0); check the "
            "model's weights and dtype"
        )
    return array


def logprob_sum(logprobs: np.ndarray) -> float:
    """Sum in float64. logprobs: float [m], nats."""
    return float(np.sum(check_logprobs(logprobs), dtype=np.float64))


def nll(total: float, tokens: int) -> float:
    """Mean negative log-likelihood, nats a token. total: sum of log-probabilities, nats."""
    return -total / _count("scored tokens", tokens)


def token_perplexity(total: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood a token."""
    return _exp(nll(total, tokens))


def bits_per_token(total: float, tokens: int) -> float:
    """Mean negative log2-likelihood a token."""
    return nll(total, tokens) / math.log(2)


def word_perplexity(total: float, words: int) -> float:
    """exp of the negative log-likelihood a word (lm-eval's `word_perplexity`)."""
    return _exp(-total / _count("words", words))


def byte_perplexity(total: float, num_bytes: int) -> float:
    """exp of the negative log-likelihood a UTF-8 byte (lm-eval's `byte_perplexity`)."""
    return _exp(-total / _count("bytes", num_bytes))


def bits_per_byte(total: float, num_bytes: int) -> float:
    """Negative log2-likelihood a UTF-8 byte (lm-eval's `bits_per_byte`)."""
    return -total / _count("bytes", num_bytes) / math.log(2)


class TextCounter:
    """Words and bytes of documents that arrive in pieces.

    The same numbers as on whole documents, whichever way they are cut.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.documents = 0
        self._runs_of_whitespace = 0
        self._ends_in_whitespace = False

    @property
    def words(self) -> int:
        """Runs of whitespace + 1, summed over the documents: what re.split gives."""
        return self._runs_of_whitespace + self.documents

    def start_document(self) -> None:
        self.documents += 1
        self._ends_in_whitespace = False

    def feed(self, piece: str) -> None:
        """The next piece of the document begun last."""
        if not piece:
            return
        self.bytes += len(piece.encode("utf-8"))
        continued = self._ends_in_whitespace and piece[0].isspace()
        self._runs_of_whitespace += len(_WHITESPACE.findall(piece)) - continued
        self._ends_in_whitespace = piece[-1].isspace()


def _count(name: str, value: int) -> int:
    if value < 1:
        raise ScoreModeError(f"the number of {name} is {value}: there is nothing to average over")
    return value


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
