"""Rows to results: memory bounds, shards on several ranks, the most likely tokens."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm.score.engine.model_head import _whole_head
from vllm.score.ops.score_rows import LOGITS_BYTES, Head, block_rows, score_rows
from vllm.score.ops.statistics import FULL_VOCABULARY, STATISTICS, RowLayout

VOCAB, SPLIT = 50, (0, 23, 50, 50)  # the last of three ranks holds padding only


def head(first: int = 0, last: int = VOCAB, gather=None, plain: bool = True) -> Head:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, 8, generator=rng)[first:last]
    return Head(
        weight if plain else None, None, lambda h: h @ weight.T, first, last - first, gather=gather
    )


def inputs():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(30, 8, generator=rng)
    return hidden, torch.randint(0, VOCAB, (30, 2), generator=rng)


class Ranks:
    """An exchange between threads that stand for ranks."""

    def __init__(self, count: int) -> None:
        self.count, self.here = count, threading.Barrier(count)
        self.slots: list = [None] * count

    def gather(self, rank: int):
        def call(values):
            self.slots[rank] = values.clone()
            self.here.wait(timeout=20)
            together = torch.stack(self.slots)
            self.here.wait(timeout=20)
            return together

        return call

    def run(self, work):
        results: list = [None] * self.count

        def one(rank):
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert all(r is not None for r in results), "a rank failed"
        return results


def float64(hidden, plain):
    return (hidden.double() @ plain.weight.double().T).log_softmax(-1)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("top", [0, 4, 30, FULL_VOCABULARY])
def test_shards_on_three_ranks_score_as_one(plain, top):
    hidden, targets = inputs()
    layout = RowLayout(0 if top < 0 else 2, tuple(STATISTICS), top, 1.3)
    want = score_rows(head(), hidden, targets, layout, VOCAB)
    ranks = Ranks(3)

    def work(rank):
        part = head(SPLIT[rank], SPLIT[rank + 1], ranks.gather(rank), plain)
        return score_rows(part, hidden, targets, layout, VOCAB)

    for got in ranks.run(work):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    exact = ((hidden.double() @ head().weight.double().T) / 1.3).log_softmax(-1)
    if top < 0:
        torch.testing.assert_close(want[:, layout.top_start :].double(), exact, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(
            want[:, :2].double(), exact.gather(1, targets), atol=1e-5, rtol=0
        )
        values, ids = exact.topk(top) if top else (exact[:, :0], targets[:, :0])
        first = layout.top_start
        assert torch.equal(want[:, first : first + top].long(), ids)
        torch.testing.assert_close(want[:, first + top :].double(), values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab", [1000, 32_768, 151_936, 262_144, 2**24])
@pytest.mark.parametrize("layout", [RowLayout(1), RowLayout(0, (), FULL_VOCABULARY)])
def test_blocks_keep_the_memory_bound(vocab, layout):
    special = Head(None, None, lambda h: h, 0, vocab)
    rows = block_rows(special.needs_logits, layout, vocab, 0)
    assert rows >= 1
    assert rows * vocab * 4 <= max(LOGITS_BYTES, 4 * vocab)
    assert block_rows(special.needs_logits, layout, vocab, 1 << 30) == 1


@pytest.mark.parametrize("top", [0, 3, FULL_VOCABULARY])
def test_ranks_with_unequal_shares_have_equal_blocks(top):
    shares = [Head(None, None, lambda h: h, 0, n) for n in (75_008, 74_000, 0)]
    assert (
        len({block_rows(head.needs_logits, RowLayout(1, (), top), 149_008, 0) for head in shares})
        == 1
    )


def test_wrong_head_width_gives_nan_not_scores(caplog):
    layout = RowLayout(1)
    wrong = _whole_head(lambda h: h.new_zeros(len(h), 7), 8)
    out = score_rows(wrong, torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), layout, 8)
    assert torch.isnan(out).all()
    assert "7 logits" in caplog.text
