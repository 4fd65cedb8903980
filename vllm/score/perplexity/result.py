"""What a perplexity run gives: figures that say where they come from, and a row a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.conventions import canonical
from vllm.score.perplexity.store import Store, part_schema

if TYPE_CHECKING:
    import pyarrow as pa

RUN = "run"  # the convention of the run's own windows


@dataclass(frozen=True)
class Provenance:
    """What a figure was computed from. Two figures compare if these agree.

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
    block_length: tokens a block of the bootstrap; None below 30 tokens.
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
    block_length: int | None


@dataclass(frozen=True)
class Figure:
    """One number.

    name: nll, token_perplexity, bits_per_token, word_perplexity, byte_perplexity, bits_per_byte.
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


@dataclass(frozen=True)
class PerplexityResult:
    """Figures of the run and of the conventions asked for, and the scores of the run's windows.

    figures: those of the run first.
    notes: sentences for whoever reads the figures (what was not computed and why, known faults).
    """

    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    store: Store
    plan: str

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token, of the run."""
        return self.figure("token_perplexity").value

    @property
    def nll(self) -> float:
        """Mean loss of the run, nats a token."""
        return self.figure("nll").value

    @property
    def provenance(self) -> Provenance:
        """Of the run."""
        return self.figures[0].provenance

    def figure(self, name: str, convention: str = RUN, variant: str = "") -> Figure:
        """One figure by name.

        Args:
            convention: as it was asked for, e.g. "gptq:4096" or "lm-eval-hf".

        Raises:
            ScoreModeError: there is none.
        """
        convention = canonical(convention)
        for figure in self.figures:
            if (figure.name, figure.convention, figure.variant) == (name, convention, variant):
                return figure
        there = ", ".join(
            f"{f.name} ({', '.join(filter(None, (f.convention, f.variant)))})" for f in self.figures
        )
        raise ScoreModeError(
            f"figure {name!r} of convention {convention!r} is not in this result; it has: {there}"
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """One row a scored token of the run, in the order of the text: position (among the text's
        tokens), token_id, text (its characters), logprob (float32, nats), window."""
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
            "figures": [asdict(figure) for figure in self.figures],
            "notes": list(self.notes),
        }

    def write_parquet(self, path: str | Path) -> None:
        """One row a token, as `batches`; the figures as JSON in the file's metadata, key
        `vllm_score.figures`. The file is there entirely or not at all."""
        import pyarrow.parquet as pq

        path = Path(path)
        partial = path.with_name(path.name + ".tmp")
        metadata = {"vllm_score.figures": json.dumps(self.to_dict())}
        schema = part_schema().with_metadata(metadata)
        # A file object: of a name such as "run:1" pyarrow makes an address.
        with partial.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)
        partial.replace(path)
