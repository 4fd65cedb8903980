"""A result as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from vllm.score.perplexity.result import PerplexityResult
from vllm.score.report.baseline import Baseline


def to_json(result: PerplexityResult, baselines: Sequence[Baseline] = ()) -> str:
    """Everything but the tokens, as one JSON object.

    Its keys are those of `PerplexityResult.to_dict`, and "baselines": name -> perplexity. JSON has
    no infinity: a perplexity beyond float64 is the string "Infinity".
    """
    content = result.to_dict()
    content["baselines"] = {baseline.name: baseline.perplexity for baseline in baselines}
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
