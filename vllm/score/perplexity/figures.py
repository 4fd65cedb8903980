"""From sums to figures."""

from __future__ import annotations

import math
from dataclasses import replace

from vllm.score.perplexity import measures
from vllm.score.perplexity.bootstrap import MeanEstimate
from vllm.score.perplexity.result import Figure, Provenance
from vllm.score.perplexity.totals import PlanTotals

EXACT = "exact mean"
GUIDE_UNTIL_2024 = "guide until 2024: mean of window means"
GUIDE_CURRENT = "guide: weights one token short"


def run_figures(totals: PlanTotals, provenance: Provenance) -> list[Figure]:
    """All figures of a plan: of tokens, and of words and bytes where those are known."""
    estimate = totals.losses.estimate()
    provenance = replace(provenance, block_length=estimate.block_length)
    total, tokens = -totals.loss, totals.tokens
    make = _Maker(estimate, provenance)
    figures = [
        make.linear("nll", measures.nll(total, tokens), "nats/token", 1.0),
        make.exponential("token_perplexity", measures.token_perplexity(total, tokens), 1.0),
        make.linear(
            "bits_per_token", measures.bits_per_token(total, tokens), "bits/token", 1 / math.log(2)
        ),
    ]
    text = totals.text
    if text is not None and text.bytes:
        a_word, a_byte = tokens / text.words, tokens / text.bytes
        words, size = text.words, text.bytes
        figures += [
            make.exponential("word_perplexity", measures.word_perplexity(total, words), a_word),
            make.exponential("byte_perplexity", measures.byte_perplexity(total, size), a_byte),
            make.linear(
                "bits_per_byte",
                measures.bits_per_byte(total, size),
                "bits/byte",
                a_byte / math.log(2),
            ),
        ]
    return figures


def token_figures(totals: PlanTotals, provenance: Provenance) -> list[Figure]:
    """The loss and the perplexity a token: all that tools with gaps in the text report."""
    names = ("nll", "token_perplexity")
    return [figure for figure in run_figures(totals, provenance) if figure.name in names]


def guide_figures(totals: PlanTotals, provenance: Provenance) -> list[Figure]:
    """The Hugging Face guide's perplexity: as it stands, as it stood until 2024, and with exact
    weights. Only the last is a mean over tokens, and has a standard error."""
    exact = [
        replace(figure, variant=EXACT)
        for figure in token_figures(totals, provenance)
        if figure.name == "token_perplexity"
    ]
    guide = totals.guide_means()
    if guide is None:
        return exact
    means = ((GUIDE_CURRENT, guide.current), (GUIDE_UNTIL_2024, guide.until_2024))
    return [
        Figure(
            name="token_perplexity",
            value=measures.token_perplexity(-mean, 1),
            unit="",
            standard_error=None,
            interval=None,
            variant=variant,
            provenance=exact[0].provenance,
        )
        for variant, mean in means
    ] + exact


class _Maker:
    """Figures that are functions of the mean loss a token, with the error carried over."""

    def __init__(self, estimate: MeanEstimate, provenance: Provenance) -> None:
        self._estimate = estimate
        self._provenance = provenance

    def linear(self, name: str, value: float, unit: str, slope: float) -> Figure:
        """value = slope x mean loss."""
        error, interval = self._estimate.standard_error, self._estimate.interval
        return self._figure(
            name,
            value,
            unit,
            None if error is None else slope * error,
            None if interval is None else (slope * interval[0], slope * interval[1]),
        )

    def exponential(self, name: str, value: float, slope: float) -> Figure:
        """value = exp(slope x mean loss); the standard error by its derivative."""
        error, interval = self._estimate.standard_error, self._estimate.interval
        return self._figure(
            name,
            value,
            "",
            None if error is None else value * slope * error,
            None
            if interval is None
            else (
                measures.token_perplexity(-slope * interval[0], 1),
                measures.token_perplexity(-slope * interval[1], 1),
            ),
        )

    def _figure(
        self,
        name: str,
        value: float,
        unit: str,
        error: float | None,
        interval: tuple[float, float] | None,
    ) -> Figure:
        return Figure(name, value, unit, error, interval, "", self._provenance)
