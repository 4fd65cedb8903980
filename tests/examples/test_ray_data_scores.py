"""The functions of examples/ray_data_scores.py around the engine. Ray itself is not run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from examples.ray_data_scores import request, result
from tests.helpers import token_logprobs


def through_the_stage(llm: Any, row: dict[str, Any]) -> dict[str, Any]:
    """What Ray's vLLM stage makes of a row: parameters by name, log-probabilities as dicts."""
    from vllm import SamplingParams

    asked = request(row)
    (output,) = llm.generate(asked["prompt"], SamplingParams(**asked["sampling_params"]))
    assert output.outputs[0].token_ids == []
    plain = [
        None if entries is None else {k: dataclasses.asdict(v) for k, v in entries.items()}
        for entries in output.prompt_logprobs
    ]
    return {**asked, "prompt_logprobs": plain}


def test_a_text(llm: Any, reference: Any) -> None:
    text = "class Reader:\n    pass"
    found = result(through_the_stage(llm, {"text": text}))
    ids = llm.get_tokenizer()(text)["input_ids"]
    want = token_logprobs(reference("llama", ids), ids)
    np.testing.assert_allclose(found["logprobs"], want, atol=2e-5)
    assert found["perplexity"] == pytest.approx(np.exp(-want.mean()), rel=1e-4)
    assert found["text"] == text


def test_a_text_of_one_token_has_no_perplexity(llm: Any) -> None:
    found = result(through_the_stage(llm, {"text": "$"}))
    assert found["logprobs"] == [] and math.isnan(found["perplexity"])
