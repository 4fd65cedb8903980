"""Top-p in the reduction: every statistic against float64 NumPy, on one rank and on three."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers_policy import policy_row
from tests.ops.test_score_rows import SPLIT, VOCAB, Ranks, head, inputs
from vllm.score.ops.score_rows import Head, score_rows
from vllm.score.ops.statistics import FULL_VOCABULARY, STATISTICS, RowLayout

NAMES = {
    "entropy": "rb_entropy",
    "varentropy": "logit_var",
    "collision_probability": "collision",
    "logsumexp": "logsumexp",
    "head_mass": "head_mass",
    "model_logprob": "logprob",
    "margin": "margin",
}


def check(out: torch.Tensor, logits: np.ndarray, targets: torch.Tensor, layout: RowLayout) -> None:
    """Compare results [c, width] with float64 rows of the logits [c, V]."""
    k = layout.num_targets
    for row, z, ids in zip(out.double().numpy(), logits, targets.tolist(), strict=True):
        for column, token in enumerate(ids[:k]):
            want = policy_row(z, token, layout.temperature, layout.top_p)["logq"]
            np.testing.assert_allclose(row[column], want, atol=2e-5, rtol=1e-5)
        want = policy_row(z, ids[0], layout.temperature, layout.top_p)
        values = dict(zip(layout.statistics, row[k:], strict=False))
        for name, ours in NAMES.items():
            np.testing.assert_allclose(values[name], want[ours], atol=3e-5, rtol=3e-5, err_msg=name)
        assert values["argmax"] == z.argmax()
        assert values["rank"] == 1 + (z > z[ids[0]]).sum()
        np.testing.assert_allclose(
            np.exp(values["argmax_logprob"]), want["top1_prob"], atol=1e-6, rtol=1e-5
        )
        np.testing.assert_allclose(
            values["logit_variance"], (z / layout.temperature).var(), rtol=1e-4
        )


GPU = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("plain", [True, False])
def test_every_statistic_under_the_policy(top_p, temperature, plain, device):
    hidden, targets = inputs()
    weight = head().weight
    logits = (hidden.double() @ weight.double().T).numpy()
    hidden, targets, weight = hidden.to(device), targets.to(device), weight.to(device)
    one = Head(weight if plain else None, None, lambda h: h @ weight.T, 0, VOCAB)
    layout = RowLayout(2, tuple(STATISTICS), 0, temperature, top_p)
    out = score_rows(one, hidden, targets, layout, VOCAB)
    check(out.cpu(), logits, targets.cpu(), layout)


@pytest.mark.parametrize("top", [0, 4, FULL_VOCABULARY])
@pytest.mark.parametrize("plain", [True, False])
def test_shards_on_three_ranks_truncate_as_one(plain, top):
    hidden, targets = inputs()
    layout = RowLayout(0 if top < 0 else 2, tuple(STATISTICS), top, 1.3, 0.7)
    want = score_rows(head(), hidden, targets, layout, VOCAB)
    ranks = Ranks(3)

    def work(rank):
        part = head(SPLIT[rank], SPLIT[rank + 1], ranks.gather(rank), plain)
        return score_rows(part, hidden, targets, layout, VOCAB)

    for got in ranks.run(work):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    logits = (hidden.double() @ head().weight.double().T).numpy()
    rows = [[policy_row(z, t, 1.3, 0.7)["logq"] for t in range(VOCAB)] for z in logits]
    exact = torch.tensor(np.array(rows))
    first = layout.top_start
    if top < 0:
        torch.testing.assert_close(want[:, first:].double(), exact, atol=2e-5, rtol=1e-5)
    elif top:
        values = exact.topk(top).values
        torch.testing.assert_close(want[:, first + top :].double(), values, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_tied_logits_are_counted_not_chosen(device):
    """Of five equal tokens the nucleus keeps so many that top-p is reached, whichever they are."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, -3.0], [0.0] * 7])
    layout = RowLayout(1, tuple(STATISTICS), 0, 1.0, 0.6)
    plain = Head(None, None, lambda h: logits.to(device, copy=True), 0, 7)
    for token in (0, 3):
        targets = torch.full((2, 1), token)
        out = score_rows(plain, logits.to(device), targets.to(device), layout, 7)
        check(out.cpu(), logits.double().numpy(), targets, layout)


def test_a_row_of_nan_gives_nan():
    logits = torch.tensor([[float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0]])
    layout = RowLayout(1, ("entropy", "head_mass"), 0, 1.0, 0.5)
    out = score_rows(
        Head(None, None, lambda h: logits, 0, 3), logits, torch.zeros(2, 1).long(), layout, 3
    )
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
