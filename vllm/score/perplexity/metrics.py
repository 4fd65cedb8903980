"""Perplexities and bits, with their errors and where they come from.

Log-probabilities are natural logarithms (nats), float32 as the engine gives them; sums are
float64. Words and bytes are counted as lm-eval's rolling tasks count them: a document has
len(re.split(r"\\s+", document)) words (so an empty one has 1) and len(document.encode("utf-8"))
bytes.

With L the sum of the losses (negative log-probabilities) of N scored tokens, of a text of W words
and B bytes:

    nll               = L / N             nats per token
    token_perplexity  = exp(L / N)
    bits_per_token    = L / (N ln 2)
    word_perplexity   = exp(L / W)
    byte_perplexity   = exp(L / B)
    bits_per_byte     = L / (B ln 2)

Nothing to divide by (no scored token, no byte) is an error, never NaN. A perplexity beyond the
range of float64 is inf.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.data.streams import atomic_write
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.bootstrap import BlockBootstrap, MeanEstimate
from vllm.score.perplexity.conventions import canonical
from vllm.score.perplexity.store import Store, part_schema
from vllm.score.perplexity.windows import ScoringPlan, Window

if TYPE_CHECKING:
    import pyarrow as pa

RUN = "run"  # the convention of the run's own windows

# Variants of the Hugging Face guide's perplexity.
EXACT = "exact mean"
GUIDE_UNTIL_2024 = "guide until 2024: mean of window means"
GUIDE_CURRENT = "guide: weights one token short"

# name -> what it counts, the unit of the value (a perplexity has none), and what it is in words.
METRICS = {
    "nll": ("tokens", "nats/token", "loss"),
    "token_perplexity": ("tokens", "", "perplexity per token"),
    "bits_per_token": ("tokens", "bits/token", "bits per token"),
    "word_perplexity": ("words", "", "perplexity per word"),
    "byte_perplexity": ("bytes", "", "perplexity per byte"),
    "bits_per_byte": ("bytes", "bits/byte", "bits per byte"),
}

# A log-softmax computed in float32 may end a little above 0 where one token has all the mass.
ROUNDING_ABOVE_ZERO = 1e-4
_WHITESPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Provenance:
    """What a metric was computed from. Two metrics compare if these agree.

    convention: `RUN`, or the name of a convention of `conventions`.
    context_length: tokens of the longest prompt, BOS included.
    stride: tokens from one window's begin to the next.
    windows, scored_tokens: how many; text_tokens: tokens of the text (without BOS).
    bos: the rule, in words. documents: how they are joined, in words; num_documents: how many.
    words, bytes: of the scored text; None where it has gaps or is not known.
    text_sha256: of the text in UTF-8, separators included (a zero byte between documents that
        stand alone); for a source of token ids, of these as little-endian int64.
    text_source: its name.
    tokenizer_sha256, model, model_sha256 (of the weights, sampled), dtype, quantization, versions.
    block_length: tokens per block of the bootstrap; None below 30 tokens.
    """

    convention: str
    context_length: int
    stride: int
    windows: int
    scored_tokens: int
    text_tokens: int
    bos: str
    documents: str
    num_documents: int
    words: int | None
    bytes: int | None
    text_sha256: str
    text_source: str
    tokenizer_sha256: str
    model: str
    model_sha256: str
    dtype: str
    quantization: str
    versions: dict[str, str]
    block_length: int | None = None


@dataclass(frozen=True)
class Metric:
    """One number.

    name: of `METRICS`.
    unit: of the value and the errors.
    standard_error: from the block bootstrap (through the derivative where the value is not a
        mean); None where there is none.
    interval: (low, high) of the 95 % percentile interval.
    variant: what is special in the computation; "" for nothing.
    """

    name: str
    value: float
    unit: str
    standard_error: float | None
    interval: tuple[float, float] | None
    variant: str
    provenance: Provenance

    @property
    def convention(self) -> str:
        return self.provenance.convention

    @property
    def label(self) -> str:
        """What it is, in words."""
        return ", ".join(filter(None, (METRICS[self.name][2], self.variant)))

    @classmethod
    def from_loss(
        cls, name: str, loss: float, count: int, estimate: MeanEstimate, provenance: Provenance
    ) -> Metric:
        """A function of the mean loss per token, with the error carried over.

        Args:
            loss: sum of the losses, nats.
            count: of what the metric counts; `provenance.scored_tokens` of them are tokens.
            estimate: of the mean loss per token.
        """
        value, unit = metric_value(name, loss, count), METRICS[name][1]
        tokens = provenance.scored_tokens
        error, interval = estimate.standard_error, estimate.interval
        if error is not None:
            error *= tokens
            error = metric_value(name, error, count) if unit else value * error / count
        if interval is not None:
            low, high = (metric_value(name, bound * tokens, count) for bound in interval)
            interval = (low, high)
        return cls(name, value, unit, error, interval, "", provenance)


def metric_value(name: str, loss: float, count: int) -> float:
    """A metric of `METRICS` by the formula in the module's docstring.

    Args:
        loss: sum of the losses, nats.
        count: tokens, words or bytes.

    Raises:
        ScoreModeError: count is 0.
    """
    counted, unit, _ = METRICS[name]
    if count < 1:
        raise ScoreModeError(
            f"the number of {counted} is {count}: there is nothing to average over"
        )
    mean = loss / count
    if unit.startswith("bits"):
        return mean / math.log(2)
    return mean if unit else _exp(mean)


def check_logprobs(logprobs: np.ndarray, what: str = "logprobs") -> None:
    """Raise ScoreModeError for what can be no log-probability.

    Args:
        logprobs: float [m], nats.
        what: name for the error message.

    Raises:
        ScoreModeError: for a NaN, -inf (the model excludes the token: the perplexity is infinite),
            or a value above 0 by more than rounding (1e-4).
    """
    bad = ~(np.isfinite(logprobs) & (logprobs <= ROUNDING_ABOVE_ZERO))
    if bad.any():
        at = int(bad.argmax())
        raise ScoreModeError(
            f"{what}[{at}] is {float(logprobs[at])}, which is no log-probability of a possible "
            f"token ({int(bad.sum())} of {logprobs.size} values are NaN, infinite or above 0); "
            "check the model's weights and dtype"
        )


class TextCounter:
    """Words and bytes of documents that arrive in pieces.

    The same numbers as on whole documents, whichever way they are cut.
    """

    def __init__(self) -> None:
        self.bytes = self.documents = self._runs_of_whitespace = 0
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


class PlanTotals:
    """Sums over the scored tokens of one plan, in one pass over its groups of windows and in
    bounded memory.

    Attributes:
        tokens, windows: scored so far.
        loss: sum of the losses, nats.
        text: words and bytes of the scored tokens; None where the plan leaves gaps or the
            characters are not known.
        losses: the block bootstrap of the tokens' losses, nats.
    """

    def __init__(self, plan: ScoringPlan) -> None:
        self.tokens = self.windows = 0
        self.text = TextCounter() if plan.windows.covers_everything else None
        self.losses = BlockBootstrap()
        self.loss = 0.0
        self._overlapping = plan.windows.covers_everything
        self._document: int | None = None
        self._guide_loss = self._guide_weight = self._sum_of_means = 0.0

    def add(self, windows: Sequence[Window], logprobs: np.ndarray) -> None:
        """The next group.

        Args:
            windows: of the group.
            logprobs: float32 [sum of the windows' targets], nats, in their order.

        Raises:
            ScoreModeError: for a value that is no log-probability.
        """
        check_logprobs(logprobs, f"logprobs of windows {windows[0].index} to {windows[-1].index}")
        losses = -logprobs.astype(np.float64)
        self.losses.add(losses)
        self.loss += float(losses.sum())
        self.tokens += losses.size
        self.windows += len(windows)
        targets = np.array([window.num_targets for window in windows])
        means = np.add.reduceat(losses, np.cumsum(targets) - targets) / targets
        # The guide takes one off everywhere for the label that the shift loses; one is lost only
        # where the targets begin with the window, and is not in num_targets then.
        weights = targets - [self._overlapping and window.index > 0 for window in windows]
        self._guide_loss += float(means @ weights)
        self._guide_weight += float(weights.sum())
        self._sum_of_means += float(means.sum())
        for window in windows:
            if self.text is None or window.texts is None:
                self.text = None
                continue
            if window.document != self._document:
                self.text.start_document()
                self._document = window.document
            self.text.feed("".join(window.texts))

    def finish(self, documents: int) -> None:
        """After the last group: the text had so many documents, empty ones included."""
        if self.text is not None:
            self.text.documents = documents

    @property
    def perplexity(self) -> float:
        """Per token, of what has been added so far."""
        return metric_value("token_perplexity", self.loss, self.tokens)

    def metrics(self, provenance: Provenance) -> list[Metric]:
        """All of the plan: of tokens, and of words and bytes where those are known."""
        estimate = self.losses.estimate()
        provenance = replace(provenance, block_length=estimate.block_length)
        counts = {"tokens": self.tokens}
        if self.text is not None and self.text.bytes:
            counts |= {"words": self.text.words, "bytes": self.text.bytes}
        return [
            Metric.from_loss(name, self.loss, counts[counted], estimate, provenance)
            for name, (counted, *_) in METRICS.items()
            if counted in counts
        ]

    def token_metrics(self, provenance: Provenance) -> list[Metric]:
        """The loss and the perplexity per token: all that tools with gaps in the text report."""
        wanted = ("nll", "token_perplexity")
        return [metric for metric in self.metrics(provenance) if metric.name in wanted]

    def guide_metrics(self, provenance: Provenance) -> list[Metric]:
        """The Hugging Face guide's perplexity, by variant: as it stands (window means weighted by
        targets - 1, or all targets where the window's first token is unscored), as it stood until
        2024 (the plain mean of the window means), and with exact weights. Only the last is a mean
        over tokens, and has a standard error. It alone is there if every window has weight 0."""
        exact = replace(self.token_metrics(provenance)[-1], variant=EXACT)
        if not self._guide_weight:
            return [exact]
        bare = replace(exact, standard_error=None, interval=None)
        now, then = self._guide_loss / self._guide_weight, self._sum_of_means / self.windows
        return [
            replace(bare, value=_exp(now), variant=GUIDE_CURRENT),
            replace(bare, value=_exp(then), variant=GUIDE_UNTIL_2024),
            exact,
        ]


@dataclass(frozen=True)
class PerplexityResult:
    """Metrics of the run and of the conventions asked for, and the scores of the run's windows.

    figures: the metrics, those of the run first.
    notes: sentences for whoever reads them (what was not computed and why, known faults).
    """

    figures: tuple[Metric, ...]
    notes: tuple[str, ...]
    store: Store
    plan: str

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token, of the run."""
        return self.figure("token_perplexity").value

    @property
    def nll(self) -> float:
        """Mean loss of the run, nats per token."""
        return self.figure("nll").value

    @property
    def provenance(self) -> Provenance:
        """Of the run."""
        return self.figures[0].provenance

    def figure(self, name: str, convention: str = RUN, variant: str = "") -> Metric:
        """One metric by name.

        Args:
            convention: as it was asked for, e.g. "gptq:4096" or "lm-eval-hf".

        Raises:
            ScoreModeError: there is none.
        """
        convention = canonical(convention)
        for metric in self.figures:
            if (metric.name, metric.convention, metric.variant) == (name, convention, variant):
                return metric
        there = ", ".join(
            f"{f.name} ({', '.join(filter(None, (f.convention, f.variant)))})" for f in self.figures
        )
        raise ScoreModeError(
            f"figure {name!r} of convention {convention!r} is not in this result; it has: {there}"
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """One row per scored token of the run, in the order of the text: position (among the
        text's tokens), token_id, text (its characters), logprob (float32, nats), window."""
        for table in self.store.parts(self.plan):
            yield from table.to_batches()

    def tokens(self) -> pa.Table:
        """All of `batches` in memory."""
        import pyarrow as pa

        return pa.Table.from_batches(self.batches(), schema=part_schema())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tokens, as plain values for JSON."""
        return {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "figures": [asdict(metric) for metric in self.figures],
            "notes": list(self.notes),
        }

    def write_parquet(self, path: str | Path) -> None:
        """One row per token, as `batches`; the metrics as JSON in the file's metadata, key
        `vllm_score.figures`. The file is there entirely or not at all."""
        import pyarrow.parquet as pq

        schema = part_schema().with_metadata({"vllm_score.figures": json.dumps(self.to_dict())})
        # A file object: of a name such as "run:1" pyarrow makes an address.
        with atomic_write(Path(path)) as file, pq.ParquetWriter(file, schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
