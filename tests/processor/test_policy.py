"""The values of the steps against float64 NumPy, their gradients, and sampling from q."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers_policy import policy_row
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.policy import StepValues, Wanted, step_values

NAMES = [field.name for field in fields(StepValues)]
DIAGNOSTICS = NAMES[NAMES.index("head_mass") :]


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


def check(values: StepValues, expected: list[dict[str, float]], tolerance: float) -> None:
    for name in NAMES:
        found = getattr(values, name)
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
    assert all(getattr(values, name).dtype == dtype for name in NAMES)
    check(values, expected, 1e-11 if dtype == torch.float64 else 2e-5 * (1 + 3 / temperature))


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
    check(values, rows, 1e-9)


def test_what_is_left_out() -> None:
    z, tokens = torch.randn(3, 9), torch.tensor([0, 4, 8])
    for policy in (GenerationConfig(), GenerationConfig(0.7, 0.5)):
        full = step_values(z, tokens, Wanted(policy), [2])
        assert step_values(z, tokens, Wanted(policy)).eos_prob is None
        some = step_values(z, tokens, Wanted(policy, diagnostics=False), [2])
        bare = step_values(z, tokens, Wanted(policy, entropy=False, diagnostics=False))
        assert all(getattr(some, name) is None for name in DIAGNOSTICS)
        assert all(getattr(bare, name) is None for name in ["rb_entropy", *DIAGNOSTICS])
        for name in ("logprob", "logq", "rb_entropy"):
            assert torch.equal(getattr(full, name), getattr(some, name))
        assert torch.equal(full.logprob, bare.logprob) and torch.equal(full.logq, bare.logq)


def test_no_steps() -> None:
    for policy in (GenerationConfig(), GenerationConfig(1.0, 0.5)):
        values = step_values(
            torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), Wanted(policy), [1]
        )
        assert all(getattr(values, name).shape == (0,) for name in NAMES)


def test_a_broken_row_is_nan_and_spoils_no_other() -> None:
    z = torch.randn(3, 8)
    z[1, 5] = math.nan
    for policy in (GenerationConfig(), GenerationConfig(1.0, 0.5)):
        values = step_values(z, torch.tensor([1, 1, 1]), Wanted(policy))
        assert values.logprob.isnan().tolist() == [False, True, False]
        assert values.rb_entropy.isnan().tolist() == [False, True, False]


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
            return getattr(step_values(logits, inside, Wanted(policy), [0, 3]), name)

        assert torch.autograd.gradcheck(one, (z,)), name


def test_gradients_where_tokens_are_masked_or_left_out() -> None:
    z = torch.tensor([[1.0, 0.3, -math.inf, -900.0], [0.2, 0.1, 0.0, -math.inf]])
    z = z.double().requires_grad_()
    values = step_values(z, torch.tensor([1, 3]), Wanted(GenerationConfig(1.0, 0.6)), [3])
    assert values.logq[1] == -math.inf
    finite = [getattr(values, n) for n in NAMES if n not in ("logprob", "logq")]
    total = sum(value.sum() for value in finite) + values.logq[0] + values.logprob[0]
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
        weights = (values.logprob - values.logq).exp().numpy()
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        error = weights.std() / math.sqrt(len(weights))
        assert abs(weights.mean() - p[support].sum()) <= 4 * error + 1e-12
        assert (top_p < 1) == (p[support].sum() < 0.99), "the case is what it is meant to be"
        # -log q averages to the entropy.
        surprisal = -values.logq.numpy()
        error = surprisal.std() / math.sqrt(len(surprisal))
        assert abs(surprisal.mean() - values.rb_entropy[0].item()) <= 4 * error


def test_whether_the_policy_is_the_model() -> None:
    assert GenerationConfig(max_new_tokens=3).samples_model
    assert not GenerationConfig(temperature=0.7).samples_model
    assert not GenerationConfig(top_p=0.9).samples_model


def test_only_what_was_computed_is_changed() -> None:
    values = StepValues(torch.zeros(2), torch.ones(2), rb_entropy=torch.full((2,), 3.0))
    doubled = values.map(lambda v: 2 * v)
    assert doubled.logq.tolist() == [2.0, 2.0]
    assert doubled.computed()["rb_entropy"].tolist() == [6.0, 6.0]
    assert doubled.head_mass is None and values.computed().keys() == doubled.computed().keys()


@pytest.mark.cuda
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_a_gpu(top_p: float) -> None:
    z = torch.randn(20, 5000, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    tokens = z.argmax(1)
    policy = GenerationConfig(0.8, top_p)
    values = step_values(z.cuda(), tokens.cuda(), Wanted(policy), [3])
    rows = zip(z.numpy(), tokens.tolist(), strict=True)
    expected = [policy_row(row, token, 0.8, top_p, (3,)) for row, token in rows]
    check(values.map(torch.Tensor.cpu), expected, 1e-10)
