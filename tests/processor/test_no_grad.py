"""Scores without gradients against plain forward passes of a float64 model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.processor.teacher_forced import (
    EOS,
    LENGTHS,
    SMALL,
    VOCAB,
    Backend,
    assert_values,
    expected_values,
    load,
    random_responses,
    score_no_grad,
)
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.head import head_of
from vllm.score.processor.results import StepValues, Wanted

pytestmark = pytest.mark.usefixtures("one_thread")
# Three rows of float32 logits: all responses of more tokens are cut.
FEW = 3 * VOCAB * 4
POLICIES = [(1.0, 1.0), (1.4, 1.0), (1.0, 0.8), (0.7, 0.35)]


def score(
    model: Any,
    responses: Any,
    dtype: torch.dtype,
    temperature: float = 1.0,
    top_p: float = 1.0,
    *,
    batch_size: int = 2,
    logits_bytes: int = FEW,
    eos: tuple[int, ...] = EOS,
    entropy_fp64: bool = False,
    cast_logits_fp32: bool = True,
    **wanted: bool,
) -> list[StepValues]:
    backend = Backend(model, entropy_fp64=entropy_fp64)
    backend.logits_bytes, backend.eos_token_ids = logits_bytes, eos
    config = GenerationConfig(temperature, top_p, tf_batch_size=batch_size)
    profile = {"dtype": dtype, "cast_logits_fp32": cast_logits_fp32}
    return backend.score(responses, Wanted(config, **wanted), profile)


@pytest.fixture(scope="module")
def gpt2(model_dir: Callable[..., Path]) -> Any:
    return load(model_dir("gpt2", **SMALL))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_every_value_of_a_float64_model(architecture: str, model_dir: Callable[..., Path]) -> None:
    model = load(model_dir(architecture, **SMALL))
    responses = random_responses()
    for temperature, top_p in POLICIES:
        expected = expected_values(model, responses, temperature, top_p)
        scores = score(model, responses, torch.float64, temperature, top_p)
        for values, reference in zip(scores, expected, strict=True):
            assert values["logprob"].dtype == torch.float64
            # Llama's and Gemma's norms are float32 whatever the model is.
            assert_values(values, reference, 1e-9 if architecture == "gpt2" else 1e-5)


@pytest.mark.parametrize(
    ("weights", "profile", "fp64", "tolerance"),
    [
        ("float32", "float32", False, 2e-5),
        ("float32", "float32", True, 2e-5),
        ("float32", "float64", False, 1e-9),
        ("bfloat16", "float32", False, 2e-5),
        ("bfloat16", "float64", False, 1e-9),
        ("bfloat16", "bfloat16", False, 0.2),
        ("bfloat16", "bfloat16", True, 0.2),
    ],
)
def test_dtypes(
    weights: str, profile: str, fp64: bool, tolerance: float, model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir("gpt2", **SMALL), getattr(torch, weights))
    wide = load(model_dir("gpt2", **SMALL), getattr(torch, weights)).double()
    responses = random_responses()
    # Entropies and log-probabilities alone where bfloat16 may move a token across the boundary.
    names = ["logprob", "rb_entropy", "logq", "top1_prob"] if tolerance > 0.01 else []
    for temperature, top_p in [(1.0, 1.0)] if names else [(1.0, 1.0), (1.3, 0.8)]:
        expected = expected_values(wide, responses, temperature, top_p)
        scores = score(
            model, responses, getattr(torch, profile), temperature, top_p, entropy_fp64=fp64
        )
        for values, reference in zip(scores, expected, strict=True):
            assert values["logprob"].dtype == (
                torch.float64 if fp64 or profile == "float64" else torch.float32
            )
            assert_values(values, reference, tolerance, names)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, weights)}


def test_float64_arithmetic_on_float32_logits_is_exact(model_dir: Callable[..., Path]) -> None:
    """With `entropy_fp64` only the forward pass is rounded."""
    model = load(model_dir("gpt2", **SMALL), torch.float32)
    (response,) = responses = random_responses([(4, 9)])
    errors = {}
    for fp64 in (True, False):
        logits: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_hook(lambda *call: logits.append(call[2][0]))  # noqa: B023
        head_of(model)
        logits.clear()
        (values,) = score(model, responses, torch.float32, entropy_fp64=fp64)
        handle.remove()
        rows = torch.cat(logits[1:])  # the first goes by while the decoder runs
        assert rows.dtype == torch.float32
        p = rows.double().log_softmax(-1)
        entropy = (values["rb_entropy"] + (p.exp() * p).sum(-1)).abs().max().item()
        token = p.gather(1, response.generated[:, None]).squeeze(1)
        errors[fp64] = max(entropy, (values["logprob"] - token).abs().max().item())
    assert errors[True] < 1e-13
    assert 1e-8 < errors[False] < 1e-5


def test_half_precision_logits_may_not_stay_so(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL), torch.bfloat16)
    with pytest.raises(ScoreModeError, match="cast_logits_fp32 is False"):
        score(model, random_responses(), torch.bfloat16, cast_logits_fp32=False)
    score(model, random_responses(), torch.float32, cast_logits_fp32=False)


def test_what_is_not_asked_for_is_not_there(gpt2: Any) -> None:
    for diagnostics, entropy, names in [
        (False, False, {"logprob", "logq"}),
        (False, True, {"logprob", "logq", "rb_entropy"}),
    ]:
        for lengths in (LENGTHS, [(3, 0)]):
            options = {"diagnostics": diagnostics, "entropy": entropy}
            for values in score(gpt2, random_responses(lengths), torch.float64, **options):
                assert values.keys() == names
    for values in score(gpt2, random_responses(), torch.float64, eos=()):
        assert len(values) == 9 and "eos_prob" not in values


def test_only_empty_responses(gpt2: Any) -> None:
    for values in score(gpt2, random_responses([(3, 0), (1, 0)]), torch.float64):
        for array in values.values():
            assert array.shape == (0,)
            assert array.dtype == torch.float64


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    rows=st.integers(1, 12),
    top_p=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_batches(
    gpt2: Any,
    lengths: list[tuple[int, int]],
    batch_size: int,
    rows: int,
    top_p: float,
    seed: int,
) -> None:
    responses = random_responses(lengths, seed=seed)
    expected = expected_values(gpt2, responses, 1.0, top_p)
    options = {"batch_size": batch_size, "logits_bytes": rows * VOCAB * 8}
    scores = score(gpt2, responses, torch.float64, 1.0, top_p, **options)
    for values, reference in zip(scores, expected, strict=True):
        assert_values(values, reference, 1e-9)


def test_no_dropout_and_no_autocast(gpt2: Any, model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL), torch.float32).train()
    model.transformer.drop.p = 0.5
    responses = random_responses()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, responses, torch.float32)
    assert model.training and model.transformer.drop.training
    for values, reference in zip(scores, expected_values(gpt2, responses), strict=True):
        assert_values(values, reference, 2e-5)


def test_logits_with_nan_name_the_response(gpt2: Any) -> None:
    # Position 14 is one of response 4 alone, whose prompt has 12 tokens.
    places = gpt2.transformer.wpe.weight.detach().clone()
    places[14] = math.nan
    bad = {"transformer.wpe.weight": places}
    options = {"batch_size": 1}
    with pytest.raises(ScoreModeError, match=r"response \[4\]\[0\] at step \d have NaN"):
        score_no_grad(gpt2, bad, random_responses(), **options)
    score_no_grad(gpt2, bad, random_responses()[:4], **options)
    # A NaN in the (tied) head reaches every row, and the first is named.
    weight = gpt2.transformer.wte.weight.detach().clone()
    weight[300] = math.nan
    with pytest.raises(ScoreModeError, match=r"response \[3\]\[0\] at step 0 have NaN"):
        score_no_grad(gpt2, {"transformer.wte.weight": weight}, random_responses()[2:4], **options)


def test_errors_before_any_forward_pass(gpt2: Any) -> None:
    responses = random_responses()
    with pytest.raises(ScoreModeError, match="params_override names 'w'"):
        score_no_grad(gpt2, {"w": torch.ones(1)}, responses)
    responses[1].ids[0] = 5000
    with pytest.raises(ScoreModeError, match=r"response \[1\]\[0\]\[0\] is 5000, outside the voc"):
        score_no_grad(gpt2, {}, responses)
