"""Diagnostics of responses against float64 loops over the steps."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers_policy import policy_row
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.policy import StepValues, Wanted, step_values
from vllm.score.processor.results import (
    DiagnosticsPack,
    DistributionDiagnostics,
    baseline_features,
    diagnostics_pack,
)


def response(steps: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(steps, size, generator=generator, dtype=torch.float64) * 2
    return logits, logits.argmax(1)


def per_step(
    logits: np.ndarray, tokens: list[int], policy: GenerationConfig, eos: int
) -> list[dict[str, float]]:
    """The fields of `TokenStepDiagnostics`, and the surprisal, a dict a step."""
    rows = []
    for z, token in zip(logits, tokens, strict=True):
        row = policy_row(z, token, policy.temperature, policy.top_p, (eos,))
        s = row["head_mass"]
        row["tail_mass"] = 1 - s
        row["two_point_entropy"] = -sum(x * math.log(x) for x in (s, 1 - s) if x > 0)
        row["renyi2"] = -math.log(row["collision"])
        row["eff_support"] = math.exp(row["rb_entropy"])
        rows.append(row)
    return rows


def aggregates(rows: list[dict[str, float]]) -> dict[str, float]:
    """The fields of `SequenceDiagnostics`, by plain sums."""

    def sum_(name: str) -> float:
        return math.fsum(row[name] for row in rows)

    def mean(name: str, part: list[dict[str, float]] = rows) -> float:
        return math.fsum(row[name] for row in part) / len(part) if part else math.nan

    return {
        "T": len(rows),
        "rb_entropy_sum": sum_("rb_entropy"),
        "rb_entropy_mean": mean("rb_entropy"),
        "rb_entropy_max": max((row["rb_entropy"] for row in rows), default=math.nan),
        "rb_entropy_min": min((row["rb_entropy"] for row in rows), default=math.nan),
        "early_rb_entropy_mean": mean("rb_entropy", rows[:16]),
        "late_rb_entropy_mean": mean("rb_entropy", rows[16:]),
        "naive_surprisal_sum": -sum_("logprob"),
        "naive_surprisal_mean": -mean("logprob"),
        "margin_mean": mean("margin"),
        "margin_sum": sum_("margin"),
        "top1_prob_mean": mean("top1_prob"),
        "collision_mean": mean("collision"),
        "renyi2_mean": mean("renyi2"),
        "eff_support_mean": mean("eff_support"),
        "eos_prob_mean": mean("eos_prob"),
    }


def check(pack: DiagnosticsPack, rows: list[dict[str, float]], tolerance: float) -> None:
    for field in fields(pack.step):
        found = getattr(pack.step, field.name)
        wanted = np.array([row[field.name] for row in rows])
        assert found.shape == wanted.shape
        assert np.allclose(found, wanted, rtol=tolerance, atol=tolerance), field.name
    found, wanted = asdict(pack.seq), aggregates(rows)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert type(value) is (int if name == "T" else float)
        assert value == pytest.approx(wanted[name], rel=tolerance, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("steps", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.6, 0.4)])
def test_from_logits(steps: int, temperature: float, top_p: float) -> None:
    logits, tokens = response(steps, 23, steps)
    policy = GenerationConfig(temperature, top_p)
    rows = per_step(logits.numpy(), tokens.tolist(), policy, eos=5)
    own = DistributionDiagnostics(top_p=top_p, temperature=temperature, eos_token_id=5)
    check(own.compute_from_logits(logits, tokens), rows, 1e-10)
    single = own.compute_from_logits(logits.float(), tokens.to(torch.int32))
    assert single.step.rb_entropy.dtype == np.float32
    check(single, rows, 1e-4)
    half = own.compute_from_logits(logits.bfloat16(), tokens)
    rounded = per_step(logits.bfloat16().double().numpy(), tokens.tolist(), policy, eos=5)
    assert half.step.rb_entropy.dtype == np.float32
    check(half, rounded, 1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_any_length(steps: int, size: int, seed: int) -> None:
    logits, tokens = response(steps, size, seed)
    pack = DistributionDiagnostics(eos_token_id=[0]).compute_from_logits(logits, tokens)
    check(pack, per_step(logits.numpy(), tokens.tolist(), GenerationConfig(), eos=0), 1e-9)


def test_exact_values() -> None:
    """Of a flat and of a certain distribution, which have them."""
    logits = torch.tensor([[0.0] * 8, [900.0] + [0.0] * 7])
    step = DistributionDiagnostics().compute_from_logits(logits, torch.tensor([1, 0])).step
    assert step.rb_entropy == pytest.approx([math.log(8), 0], abs=1e-6)
    assert step.eff_support == pytest.approx([8, 1], rel=1e-6)
    assert step.renyi2 == pytest.approx([math.log(8), 0], abs=1e-6)
    assert not np.signbit(step.renyi2).any()
    assert step.head_mass.tolist() == [1, 1] and step.tail_mass.tolist() == [0, 0]
    assert step.two_point_entropy.tolist() == [0, 0]
    assert step.margin.tolist() == [0, 900]
    assert step.logit_mean.tolist() == [0, 900] and step.logit_var.tolist() == [0, 0]


def test_moments_of_large_logits_keep_their_digits() -> None:
    """In float32 E[a**2] - E[a]**2 of logits near 3000 would have no digit left."""
    z = np.random.default_rng(0).normal(0, 0.05, (3, 40)) + 3000
    logits = torch.from_numpy(z).float()
    pack = DistributionDiagnostics().compute_from_logits(logits, torch.zeros(3, dtype=torch.long))
    rows = [policy_row(row, 0, 1.0, 1.0) for row in logits.double().numpy()]
    assert pack.step.logit_var == pytest.approx([row["logit_var"] for row in rows], rel=1e-4)


def test_without_eos() -> None:
    logits, tokens = response(3, 5, 0)
    for given_ids in (None, []):
        pack = DistributionDiagnostics(eos_token_id=given_ids).compute_from_logits(logits, tokens)
        assert pack.step.eos_prob is None and pack.seq.eos_prob_mean is None
    both = DistributionDiagnostics(eos_token_id=[1, 2]).compute_from_logits(logits, tokens)
    assert both.step.eos_prob == pytest.approx(logits.softmax(1)[:, 1:3].sum(1).numpy())


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_features(steps: int) -> None:
    logits, tokens = response(steps, 12, 3)
    policy = GenerationConfig(0.8, 0.7)
    values = step_values(logits.requires_grad_(), tokens, Wanted(policy))
    found = baseline_features(values)
    assert found.shape == (steps, 7) and not found.requires_grad
    rows = per_step(logits.detach().numpy(), tokens.tolist(), policy, eos=0)
    names = ("rb_entropy", "top1_prob", "margin", "head_mass", "two_point_entropy", "logit_var")
    for t, row in enumerate(rows):
        wanted = [*(row[name] for name in names), t / steps]
        assert found[t].numpy() == pytest.approx(wanted, abs=1e-9)


def test_incomplete_values() -> None:
    logits, tokens = response(2, 5, 0)
    values = step_values(logits, tokens, Wanted(GenerationConfig(), diagnostics=False))
    some = StepValues(values.logprob, values.logq)
    with pytest.raises(ScoreModeError, match=r"no diagnostics without rb_entropy, head_mass, top1"):
        diagnostics_pack(some)
    with pytest.raises(ScoreModeError, match=r"no diagnostics without head_mass, top1_prob"):
        baseline_features(values)


def ids(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        (torch.zeros(3), ids(0), r"gen_logits must be floating-point \[T, V\]"),
        (torch.zeros(1, 0), ids(0), r"gen_logits must be .* got torch\.float32 \(1, 0\)"),
        (torch.zeros(1, 3).long(), ids(0), "got torch.int64"),
        (torch.zeros(2, 3), ids(0), "realized_tokens must be 2 token ids, .* got 1"),
        (torch.zeros(1, 3), torch.zeros(1), "realized_tokens must be integers, got 0.0"),
        (torch.zeros(2, 3), ids(0, 3), r"realized_tokens\[1\] is 3, outside the vocabulary 0..2"),
        (torch.zeros(2, 3), ids(-1, 2), r"realized_tokens\[0\] is -1, outside"),
        (torch.tensor([[0.0, 1], [0, math.nan]]), ids(0, 0), r"gen_logits\[1\] has NaN"),
        (torch.zeros(2, 9), ids(0, 0), None),
    ],
)
def test_unusable_input(logits: torch.Tensor, tokens: torch.Tensor, message: str | None) -> None:
    own = DistributionDiagnostics(eos_token_id=8 if message is None else None)
    if message is None:
        own.compute_from_logits(logits, tokens)
        logits, message = logits[:, :8], r"eos_token_id\[0\] is 8, outside the vocabulary 0..7"
    with pytest.raises(ScoreModeError, match=message):
        own.compute_from_logits(logits, tokens)


def test_unusable_policies() -> None:
    with pytest.raises(ScoreModeError, match=r"top_p must be a number above 0 .*, got 0"):
        DistributionDiagnostics(top_p=0)
    with pytest.raises(ScoreModeError, match="temperature must be a number above 0, got -1"):
        DistributionDiagnostics(temperature=-1)
