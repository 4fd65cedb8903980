"""The table, the JSON and the Parquet file of a real run, against Hugging Face's figures for the
same text."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.report.conftest import CONTEXT, STRIDE, TEXT
from vllm.score.report.table import Baseline, print_result, to_json

pytestmark = pytest.mark.engine


def rendered(result: Any, baselines: Any = (), **console: Any) -> str:
    stream = io.StringIO()
    print_result(result, Console(file=stream, highlight=False, **console), baselines)
    return stream.getvalue()


def rows_under(lines: list[str], title: str) -> dict[str, float]:
    """label -> value of the indented rows under a convention."""
    start = next(i for i, line in enumerate(lines) if line.rstrip() == title)
    rows = {}
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        if match := re.match(r"  (\S.*?)\s{2,}([\d.e+]+)\s", line):
            rows[match[1]] = float(match[2])
    return rows


def test_the_headline_is_the_perplexity(result, expected):
    first = rendered(result, width=80).splitlines()[0]
    found = re.fullmatch(r"Perplexity ([\d.]+)   95 % interval ([\d.]+) to ([\d.]+)", first)
    assert found is not None, first
    value, low, high = map(float, found.groups())
    assert value == pytest.approx(expected.perplexity, rel=1e-5)
    assert low < value < high


def test_every_figure_stands_under_its_convention(result, expected):
    lines = rendered(result, width=80).splitlines()
    rows = rows_under(lines, "this run")
    loss = expected.losses.mean()
    # The first token has no context: the text scored begins after it.
    scored_bytes = len("".join(result.tokens()["text"].to_pylist()).encode())
    assert scored_bytes < len(TEXT.encode()) <= scored_bytes + 8
    assert rows["loss"] == pytest.approx(loss, abs=6e-5)
    assert rows["perplexity per token"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert rows["bits per token"] == pytest.approx(loss / math.log(2), abs=6e-5)
    total = expected.losses.sum()
    assert rows["bits per byte"] == pytest.approx(total / math.log(2) / scored_bytes, abs=6e-5)
    assert rows["perplexity per byte"] == pytest.approx(
        math.exp(total / scored_bytes), rel=1e-5, abs=6e-5
    )
    assert rows_under(lines, "hf-stride")["perplexity per token, exact mean"] == pytest.approx(
        math.exp(loss), rel=1e-5
    )
    assert set(rows_under(lines, f"gptq:{CONTEXT}")) == {"loss", "perplexity per token"}


def test_the_side_by_side_rows_are_the_gptq_figure(result, reference):
    from tests.helpers import token_logprobs

    lines = rendered(result, width=80).splitlines()
    ids = first_token(result) + [int(token) for token in result.tokens()["token_id"].to_pylist()]
    rows = [ids[begin : begin + CONTEXT] for begin in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    losses = [-token_logprobs(reference("llama", row), row) for row in rows]
    mean = sum(part.sum() for part in losses) / sum(part.size for part in losses)
    assert rows_under(lines, f"gptq:{CONTEXT}")["loss"] == pytest.approx(mean, abs=6e-5)


def first_token(result: Any) -> list[int]:
    """The one token of the text that is not scored, from the tokenizer."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(result.provenance.model)(TEXT)["input_ids"]
    return [int(ids[0])]


def test_each_figure_says_where_it_comes_from(result, expected):
    text = " ".join(rendered(result, width=80).split())
    tokens = len(expected.losses) + 1
    windows = 1 + math.ceil((tokens - CONTEXT) / STRIDE)
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:12]
    assert f"{windows} windows of {CONTEXT}, stride {STRIDE}" in text
    assert f"{tokens - 1:,} of {tokens:,} tokens scored; BOS: none" in text
    assert f"{tokens // CONTEXT} windows of {CONTEXT}, stride {CONTEXT}" in text
    assert text.count(f"hash {digest}") == 3
    assert "float32, quantisation none" in text
    for fact in ("weights", "tokenizer", "versions", "torch", "transformers"):
        assert fact in text
    assert result.provenance.tokenizer_sha256[:12] in text


def test_baselines_stand_under_the_headline(result):
    lines = rendered(result, [Baseline("uniform", "a guess", 1024.0)], width=80).splitlines()
    assert lines[1] == "Uniform    1024.00   a guess"


def test_eighty_columns_are_enough_and_pipes_get_no_colours(result):
    piped = rendered(result, width=80)
    assert max(map(len, piped.splitlines())) <= 80
    assert "\x1b" not in piped
    assert "\x1b" in rendered(result, width=80, force_terminal=True, color_system="standard")


def strict(text: str) -> Any:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_figures_and_provenance(result, expected):
    content = strict(to_json(result, [Baseline("uniform", "", 1024.0)]))
    assert content["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert content["nll"] == pytest.approx(expected.losses.mean(), rel=1e-6)
    assert content["baselines"] == {"uniform": 1024.0}
    run = content["figures"][0]["provenance"]
    assert (run["context_length"], run["stride"]) == (CONTEXT, STRIDE)
    assert run["scored_tokens"] == len(expected.losses)
    conventions = {figure["provenance"]["convention"] for figure in content["figures"]}
    assert conventions == {"run", "hf-stride", f"gptq:{CONTEXT}"}


def test_infinity_is_still_json(result):
    infinite = replace(result.figures[0], value=math.inf, interval=(1.0, math.inf))
    content = strict(to_json(replace(result, figures=(*result.figures, infinite))))
    assert content["figures"][-1]["value"] == "Infinity"
    assert content["figures"][-1]["interval"] == [1.0, "Infinity"]


def test_a_row_a_token(result, expected, tmp_path: Path):
    path = tmp_path / "tokens.parquet"
    result.write_parquet(path)
    table = pq.read_table(path)
    assert table["position"].to_pylist() == expected.positions.tolist()
    assert table["token_id"].to_pylist() == expected.token_ids
    assert TEXT.endswith("".join(table["text"].to_pylist()))
    logprobs = table["logprob"].to_numpy()
    assert logprobs.dtype == np.float32
    assert logprobs == pytest.approx(-expected.losses, abs=5e-5)
    first_window = table["window"].to_numpy() == 0
    assert first_window.sum() == CONTEXT - 1
