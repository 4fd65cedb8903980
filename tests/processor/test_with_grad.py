"""Scores that keep their graph, and the gradients that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processor.teacher_forced import (
    SMALL,
    VOCAB,
    assert_values,
    expected_values,
    gradients,
    load,
    plain_logits,
    random_direction,
    random_responses,
    score_with_grad,
    token_logprobs,
    weighted,
    weights_of,
)
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.results import StepValues
from vllm.score.processor.sequences import Response

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = 3 * VOCAB * 4
POLICIES = [(1.0, 1.0), (0.7, 0.8)]


def score(
    model: Any,
    responses: list[Response],
    temperature: float = 1.0,
    top_p: float = 1.0,
    **options: Any,
) -> list[StepValues]:
    config = GenerationConfig(temperature, top_p)
    return score_with_grad(model, responses, config, **{"logits_bytes": FEW, **options})


def moved(model: Any, direction: dict[str, Tensor], eta: float) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += eta * direction[name]
    return other


@pytest.fixture(scope="module")
def gpt2(model_dir: Callable[..., Path]) -> Any:
    """Float64 throughout, which Llama's norms are not."""
    return load(model_dir("gpt2", **SMALL))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_every_value(architecture: str, model_dir: Callable[..., Path]) -> None:
    model = load(model_dir(architecture, **SMALL))
    responses = random_responses()
    for temperature, top_p in POLICIES:
        expected = expected_values(model, responses, temperature, top_p)
        scores = score(model, responses, temperature, top_p, features=True)
        for values, reference in zip(scores, expected, strict=True):
            assert_values(values, reference, 1e-9 if architecture == "gpt2" else 1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), POLICIES)
def test_gradients_by_finite_differences(gpt2: Any, temperature: float, top_p: float) -> None:
    """Of log p, log q and the entropy of the policy, along a direction of all parameters.

    Of nuclei, only where none gains or loses a token between the two ends.
    """
    # Responses that the policy can sample, so that log q is finite: the most likely tokens.
    responses = likely_responses(gpt2)
    direction = random_direction(gpt2)
    eta = 1e-5
    ends = [
        expected_values(moved(gpt2, direction, sign * eta), responses, temperature, top_p)
        for sign in (1, -1)
    ]
    scores = score(gpt2, responses, temperature, top_p)
    for name in ("logprob", "logq", "rb_entropy"):
        factors = weights_of(responses)
        if top_p < 1:
            # A token more or less moves the kept mass by its whole probability.
            for factor, up, down in zip(factors, *ends, strict=True):
                jumps = np.abs(up["head_mass"] - down["head_mass"]) > 1e-4
                factor[torch.from_numpy(jumps)] = 0.0
            assert sum(int((factor != 0).sum()) for factor in factors) > 15
        grads = gradients(weighted([s[name] for s in scores], factors), gpt2)
        slope = sum((grads[n] * v).sum().item() for n, v in direction.items())
        up, down = (
            sum(float((v[name] * f.numpy()).sum()) for v, f in zip(end, factors, strict=True))
            for end in ends
        )
        assert abs(slope) > 0.1
        assert (up - down) / (2 * eta) == pytest.approx(slope, rel=1e-6)


def likely_responses(model: Any) -> list[Response]:
    responses = random_responses()
    for response in responses:
        for at in range(response.prompt_length, len(response.ids)):
            with torch.no_grad():
                last = model(response.ids[None, :at]).logits[0, -1]
            response.ids[at] = last.argmax()
    return responses


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("rows", [1, 4, 999])
def test_gradients_are_those_of_plain_autograd(
    architecture: str, rows: int, model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir(architecture, **SMALL))
    responses = random_responses()
    factors = weights_of(responses)

    def plain_entropy(response: Response) -> Tensor:
        p = (plain_logits(model, response) / 1.3).log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    scores = score(model, responses, 1.3, logits_bytes=rows * VOCAB * 8)
    for got, expected in [
        ([s["logprob"] for s in scores], [token_logprobs(model, r, grad=True) for r in responses]),
        ([s["rb_entropy"] for s in scores], [plain_entropy(r) for r in responses]),
    ]:
        ours = gradients(weighted(got, factors), model)  # type: ignore[arg-type]
        theirs = gradients(weighted(expected, factors), model)
        for name, gradient in theirs.items():
            size = gradient.abs().max().item()
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * size, msg=name)


def test_second_derivatives(model_dir: Callable[..., Path]) -> None:
    """A Hessian times a vector, which Hugging Face's plain attention has."""
    model = load(model_dir("gpt2", **SMALL), attn_implementation="eager")
    responses = random_responses()
    factors = weights_of(responses)
    direction = random_direction(model)

    def product(values: list[Tensor]) -> dict[str, Tensor]:
        parameters = list(model.parameters())
        first = torch.autograd.grad(weighted(values, factors), parameters, create_graph=True)
        along = torch.stack(
            [(g * v).sum() for g, v in zip(first, direction.values(), strict=True)]
        ).sum()
        return gradients(along, model)

    ours = product([s["logprob"] for s in score(model, responses)])
    theirs = product([token_logprobs(model, r, grad=True) for r in responses])
    for name, gradient in theirs.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9 * size, msg=name)


def test_a_graph_can_be_used_more_than_once(gpt2: Any) -> None:
    """Each response's gradient for itself, then that of all."""
    scores = score(gpt2, random_responses())
    parts = []
    for values in scores:
        if len(values["logprob"]):
            loss = values["logprob"].sum()
            parts.append(torch.autograd.grad(loss, gpt2.lm_head.weight, retain_graph=True)[0])
    total = torch.stack([v["logprob"].sum() for v in scores]).sum()
    (whole,) = torch.autograd.grad(total, gpt2.lm_head.weight)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)


def test_which_values_carry_a_graph(gpt2: Any) -> None:
    responses = random_responses()
    for entropy, features in [(True, True), (True, False), (False, True), (False, False)]:
        first = score(gpt2, responses, entropy=entropy, features=features)[0]
        expected = {"logprob", "logq"} | ({"rb_entropy"} if entropy else set())
        assert {n for n in first if first[n].requires_grad} == expected
        assert len(first) == 10 if features else first.keys() == expected
    with torch.no_grad():
        assert not score(gpt2, responses)[0]["logprob"].requires_grad


def test_only_empty_responses(gpt2: Any) -> None:
    for values in score(gpt2, random_responses([(2, 0)]), features=True):
        assert {v.shape for v in values.values()} == {(0,)}
        assert {v.dtype for v in values.values()} == {torch.float64}


def test_the_module_runs_in_its_own_mode(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL))
    model.transformer.drop.p = 0.5
    responses = random_responses()
    still = [v["logprob"] for v in score(model, responses)]
    model.train()
    torch.manual_seed(0)
    shaken = score(model, responses)
    assert model.training and model.transformer.drop.training
    assert (
        max((a - b["logprob"]).abs().max() for a, b in zip(still, shaken, strict=True) if len(a))
        > 0.01
    )
    # The backward pass goes through the same dropout as the values did.
    total = torch.stack([v["logprob"].sum() for v in shaken]).sum()
    (first,) = torch.autograd.grad(total, model.transformer.ln_f.bias)
    torch.manual_seed(0)
    whole = score(model, responses, logits_bytes=1 << 30)
    total = torch.stack([v["logprob"].sum() for v in whole]).sum()
    (second,) = torch.autograd.grad(total, model.transformer.ln_f.bias)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("weights", "profile", "tolerance"),
    [
        ("float32", {}, 2e-5),
        ("float32", {"autocast": True, "dtype": "bfloat16"}, 0.3),
        ("bfloat16", {}, 0.3),
    ],
)
def test_dtypes(
    weights: str, profile: dict[str, Any], tolerance: float, model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir("gpt2", **SMALL), getattr(torch, weights))
    wide = load(model_dir("gpt2", **SMALL), getattr(torch, weights)).double()
    responses = random_responses()
    factors = weights_of(responses)
    with torch.autocast("cpu", torch.bfloat16):  # whatever surrounds it
        scores = score(model, responses, profile=profile)
    expected = expected_values(wide, responses)
    for values, reference in zip(scores, expected, strict=True):
        assert values["logprob"].dtype == torch.float32
        assert_values(values, reference, tolerance, ["logprob", "logq", "rb_entropy"])
    errors = [
        abs(v["logprob"].detach().numpy() - e["logprob"])
        for v, e in zip(scores, expected, strict=True)
    ]
    assert (max(e.max(initial=0) for e in errors) > 1e-3) == (tolerance > 0.1)
    ours = gradients(weighted([s["logprob"] for s in scores], factors), model)
    theirs = gradients(
        weighted([token_logprobs(wide, r, grad=True) for r in responses], factors), wide
    )
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < (1e-4 if tolerance < 0.1 else 0.1), name


def test_half_precision_logits_may_not_stay_so(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL), torch.bfloat16)
    with pytest.raises(ScoreModeError, match="cast_logits_fp32 is False"):
        score(model, random_responses(), profile={"cast_logits_fp32": False})


def test_errors(gpt2: Any) -> None:
    with pytest.raises(ScoreModeError, match="tf_withgrad: field 'cast_params' is unknown"):
        score(gpt2, random_responses(), profile={"cast_params": True})
    responses = random_responses()
    responses[0].ids[0] = -3
    with pytest.raises(ScoreModeError, match=r"response \[0\]\[0\]\[0\] is -3, outside the voc"):
        score(gpt2, responses)
    broken = copy.deepcopy(gpt2)
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ScoreModeError, match=r"response \[4\]\[0\] at step 0 have NaN"):
        score(broken, random_responses())
