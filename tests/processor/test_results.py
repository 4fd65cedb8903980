"""The values of the steps, their gradients, and diagnostics, against float64 NumPy, row by row."""

from __future__ import annotations

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers_policy import policy_row
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.results import (
    DiagnosticsPack,
    DistributionDiagnostics,
    StepValues,
    Wanted,
    baseline_features,
    step_values,
)

DIAGNOSTICS = [
    "head_mass",
    "top1_prob",
    "margin",
    "collision",
    "logit_mean",
    "logit_var",
    "eos_prob",
]
NAMES = ["logprob", "logq", "rb_entropy", *DIAGNOSTICS]


def shapes_of_rows() -> dict[str, np.ndarray]:
    """Rows of logits [N, V]: flat, peaky, tied, tiny."""
    rng = np.random.default_rng(5)
    return {
        "usual": rng.normal(0, 3, (6, 50)),
        "wide": rng.normal(0, 2, (3, 3000)),
        "flat": np.full((2, 40), 1.5),
        "nearly flat": rng.normal(0, 1e-3, (3, 64)),
        "peaky": rng.normal(0, 1, (4, 30)) + 40 * np.eye(4, 30),
        "far from 0": rng.normal(0, 3, (3, 20)) - 150,
        "tied at the top": np.concatenate([np.full((2, 4), 2.0), rng.normal(-3, 1, (2, 9))], 1),
        "tied everywhere": rng.integers(-2, 2, (6, 25)).astype(float),
        "masked": np.where(rng.random((4, 12)) < 0.5, -np.inf, 1.0) + np.eye(4, 12),
        "one token": rng.normal(0, 3, (3, 1)),
        "two tokens": rng.normal(0, 2, (5, 2)),
        "two equal tokens": np.zeros((2, 2)),
    }


def expected_row(
    row: np.ndarray, token: int, temperature: float, top_p: float, eos: tuple[int, ...] = ()
) -> dict[str, float]:
    """`policy_row` over the tokens that are not masked by -inf."""
    places = np.flatnonzero(np.isfinite(row))

    def at(wanted: int) -> dict[str, float]:
        place = int(np.searchsorted(places, wanted)) if wanted in places else 0
        found = policy_row(row[places], place, temperature, top_p)
        return found if wanted in places else found | {"logprob": -math.inf, "logq": -math.inf}

    # At a boundary of equal tokens it is open which are kept: each counts as a drawn one does.
    ends = sum(math.exp(at(e)["logq"]) for e in eos)
    return at(token) | {"eos_prob": min(1.0, ends)}


def check_values(values: StepValues, expected: list[dict[str, float]], tolerance: float) -> None:
    for name in NAMES:
        found = values[name]
        assert found.shape == (len(expected),), name
        wanted = np.array([row[name] for row in expected])
        close = np.isclose(found.double().numpy(), wanted, rtol=tolerance, atol=tolerance)
        assert close.all(), (name, found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.33, 1e-6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("shape", shapes_of_rows())
def test_every_value(shape: str, temperature: float, top_p: float, dtype: torch.dtype) -> None:
    z = torch.from_numpy(shapes_of_rows()[shape]).to(dtype)
    size = z.shape[1]
    tokens = [n * 7 % size for n in range(len(z))]
    tokens[0] = int(z[0].argmax())
    eos = (size - 1, 0) if size > 1 else (0,)
    values = step_values(z, torch.tensor(tokens), Wanted(GenerationConfig(temperature, top_p)), eos)
    expected = [
        expected_row(row, token, temperature, top_p, eos)
        for row, token in zip(z.double().numpy(), tokens, strict=True)
    ]
    assert all(values[name].dtype == dtype for name in NAMES)
    check_values(
        values, expected, 1e-11 if dtype == torch.float64 else 2e-5 * (1 + 3 / temperature)
    )


@settings(max_examples=60, deadline=None)
@given(
    z=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(1, 12)),
        elements=st.integers(-160, 160).map(lambda n: n / 8),
    ),
    temperature=st.floats(0.2, 3),
    top_p=st.floats(0.01, 1),
    data=st.data(),
)
def test_any_logits(z: np.ndarray, temperature: float, top_p: float, data: st.DataObject) -> None:
    for row in z:
        p = np.exp((row - row.max()) / temperature)
        assume(abs(np.cumsum(np.sort(p / p.sum())[::-1]) - top_p).min() > 1e-9 or top_p == 1)
    ids = st.integers(0, z.shape[1] - 1)
    tokens = data.draw(st.lists(ids, min_size=len(z), max_size=len(z)))
    eos = tuple(data.draw(st.sets(ids, min_size=1, max_size=3)))
    policy = GenerationConfig(temperature, top_p)
    given_ids = [*eos, eos[0]]  # one twice counts once
    values = step_values(torch.from_numpy(z), torch.tensor(tokens), Wanted(policy), given_ids)
    rows = [expected_row(row, t, temperature, top_p, eos) for row, t in zip(z, tokens, strict=True)]
    check_values(values, rows, 1e-9)


def test_what_is_left_out() -> None:
    z, tokens = torch.randn(3, 9), torch.tensor([0, 4, 8])
    for policy in (GenerationConfig(), GenerationConfig(0.7, 0.5)):
        full = step_values(z, tokens, Wanted(policy), [2])
        assert step_values(z, tokens, Wanted(policy)).keys() == full.keys() - {"eos_prob"}
        some = step_values(z, tokens, Wanted(policy, diagnostics=False), [2])
        bare = step_values(z, tokens, Wanted(policy, entropy=False, diagnostics=False))
        assert full.keys() - some.keys() == set(DIAGNOSTICS)
        assert bare.keys() == {"logprob", "logq"}
        for name in ("logprob", "logq", "rb_entropy"):
            assert torch.equal(full[name], some[name])
        assert torch.equal(full["logprob"], bare["logprob"]) and torch.equal(
            full["logq"], bare["logq"]
        )


def test_no_steps() -> None:
    for policy in (GenerationConfig(), GenerationConfig(1.0, 0.5)):
        values = step_values(
            torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), Wanted(policy), [1]
        )
        assert all(values[name].shape == (0,) for name in NAMES)


def test_a_broken_row_is_nan_and_spoils_no_other() -> None:
    z = torch.randn(3, 8)
    z[1, 5] = math.nan
    for policy in (GenerationConfig(), GenerationConfig(1.0, 0.5)):
        values = step_values(z, torch.tensor([1, 1, 1]), Wanted(policy))
        for name in ("logprob", "logq", "rb_entropy"):
            assert values[name].isnan().tolist() == [False, True, False], name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_gradients(temperature: float, top_p: float) -> None:
    """By finite differences in float64; no nucleus changes within them."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 7, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
    inside = z.detach().argmax(1)
    policy = GenerationConfig(temperature, top_p)
    for row in (z.detach() / temperature).softmax(1).numpy():
        assert abs(np.cumsum(np.sort(row)[::-1]) - top_p).min() > 1e-4 or top_p == 1

    for name in NAMES:

        def one(logits: torch.Tensor, name: str = name) -> torch.Tensor:
            return step_values(logits, inside, Wanted(policy), [0, 3])[name]

        assert torch.autograd.gradcheck(one, (z,)), name


def test_gradients_where_tokens_are_masked_or_left_out() -> None:
    z = torch.tensor([[1.0, 0.3, -math.inf, -900.0], [0.2, 0.1, 0.0, -math.inf]])
    z = z.double().requires_grad_()
    values = step_values(z, torch.tensor([1, 3]), Wanted(GenerationConfig(1.0, 0.6)), [3])
    assert values["logq"][1] == -math.inf
    finite = [values[n] for n in NAMES if n not in ("logprob", "logq")]
    total = sum(value.sum() for value in finite) + values["logq"][0] + values["logprob"][0]
    (gradient,) = torch.autograd.grad(total, z)
    assert gradient.isfinite().all()


def test_the_weighted_tokens_of_q_are_as_likely_as_p_says() -> None:
    """E_q[p/q] is p of q's support: draws of tokens, each p/q from the two log-probabilities."""
    rng = np.random.default_rng(11)
    z = rng.normal(0, 1.5, 9)
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.5, 1.0), (1.0, 0.8), (0.6, 0.9)):
        a = z / temperature
        q = np.exp(a - a.max()) / np.exp(a - a.max()).sum()
        order = np.argsort(-q)
        kept = len(z) if top_p == 1 else int((np.cumsum(q[order]) < top_p).sum()) + 1
        support = order[:kept]
        probabilities = q[support] / q[support].sum()
        tokens = rng.choice(support, size=20_000, p=probabilities)
        values = step_values(
            torch.from_numpy(np.tile(z, (len(tokens), 1))),
            torch.from_numpy(tokens),
            Wanted(GenerationConfig(temperature, top_p), diagnostics=False),
        )
        weights = (values["logprob"] - values["logq"]).exp().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        error = weights.std() / math.sqrt(len(weights))
        assert abs(weights.mean() - p[support].sum()) <= 4 * error + 1e-12
        assert (top_p < 1) == (p[support].sum() < 0.99), "the case is what it is meant to be"
        # -log q averages to the entropy.
        surprisal = -values["logq"].numpy()
        error = surprisal.std() / math.sqrt(len(surprisal))
        assert abs(surprisal.mean() - values["rb_entropy"][0].item()) <= 4 * error


@pytest.mark.cuda
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_a_gpu(top_p: float) -> None:
    z = torch.randn(20, 5000, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    tokens = z.argmax(1)
    policy = GenerationConfig(0.8, top_p)
    values = step_values(z.cuda(), tokens.cuda(), Wanted(policy), [3])
    rows = zip(z.numpy(), tokens.tolist(), strict=True)
    expected = [policy_row(row, token, 0.8, top_p, (3,)) for row, token in rows]
    check_values({name: value.cpu() for name, value in values.items()}, expected, 1e-10)


# Diagnostics of a response


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


def check_pack(pack: DiagnosticsPack, rows: list[dict[str, float]], tolerance: float) -> None:
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
    check_pack(own.compute_from_logits(logits, tokens), rows, 1e-10)
    single = own.compute_from_logits(logits.float(), tokens.to(torch.int32))
    assert single.step.rb_entropy.dtype == np.float32
    check_pack(single, rows, 1e-4)
    half = own.compute_from_logits(logits.bfloat16(), tokens)
    rounded = per_step(logits.bfloat16().double().numpy(), tokens.tolist(), policy, eos=5)
    assert half.step.rb_entropy.dtype == np.float32
    check_pack(half, rounded, 1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_any_length(steps: int, size: int, seed: int) -> None:
    logits, tokens = response(steps, size, seed)
    pack = DistributionDiagnostics(eos_token_id=[0]).compute_from_logits(logits, tokens)
    check_pack(pack, per_step(logits.numpy(), tokens.tolist(), GenerationConfig(), eos=0), 1e-9)


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
