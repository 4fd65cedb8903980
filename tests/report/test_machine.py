"""JSON and Parquet of a real run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.report.conftest import CONTEXT, STRIDE, TEXT
from vllm.score.report.table import Baseline, to_json

pytestmark = pytest.mark.engine


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
