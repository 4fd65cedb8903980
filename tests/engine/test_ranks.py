"""`Logprob.rank` in what reads like stock prompt log-probabilities, against stock vLLM's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts
from vllm.score import score

pytestmark = pytest.mark.engine


def read(llm: Any, prompts: list[Any], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(**options), use_tqdm=False)


def ranks(view: Any) -> list[Any]:
    return [None if row is None else {t: p.rank for t, p in row.items()} for row in view]


@pytest.mark.parametrize("top", [0, 1, 5])
def test_ranks_are_stocks(llm: Any, top: int) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts([2, 40, 300], 1024, seed=40)]
    # A token of high rank among those of low rank: the model's own.
    greedy = read(llm, prompts[1:2], max_tokens=20, temperature=0.0, ignore_eos=True)
    text = prompts[1]["prompt_token_ids"] + list(greedy[0].outputs[0].token_ids)
    prompts.append({"prompt_token_ids": text})
    ours = read(llm, prompts, score_mode=True, prompt_logprobs=top)
    stock = read(llm, prompts, max_tokens=1, prompt_logprobs=top)
    for a, b in zip(ours, stock, strict=True):
        assert ranks(a.prompt_logprobs) == ranks(b.prompt_logprobs)
        assert a.scores.statistics == {}
    assert [row[t].rank for row, t in zip(ours[-1].prompt_logprobs, text, strict=True) if row][
        -20:
    ] == [1] * 20


def test_ranks_of_targets(llm: Any) -> None:
    """The first candidate's, and of those among the likeliest their places."""
    (ids,) = random_prompts([30], 1024, seed=41)
    own = read(llm, [{"prompt_token_ids": ids}], score_mode=True, prompt_logprobs=0)[0]
    rows = [[t, (t + 1) % 1024] for t in ids[-5:]]
    given = {"prompt_token_ids": ids, "target_token_ids": rows}
    output = read(llm, [given], score_mode=True)[0]
    for place, row in zip(range(25, 30), rows, strict=True):
        entries = output.prompt_logprobs[place]
        assert entries[row[0]].rank == own.prompt_logprobs[place][row[0]].rank
        assert entries[row[1]].rank is None
    everything = read(llm, [given], score_mode=True, prompt_logprobs=1024)[0].prompt_logprobs
    assert sorted(p.rank for p in everything[29].values()) == list(range(1, 1025))
    asked = read(llm, [given], score_mode=True, score_statistics=["rank", "entropy"])[0].scores
    assert list(asked.statistics) == ["rank", "entropy"]
    found = score(llm, [given], statistics=["rank"], use_tqdm=False)[0]
    np.testing.assert_array_equal(found.statistics["rank"], asked.statistics["rank"])
    assert score(llm, [given], use_tqdm=False)[0].statistics == {}


def test_equal_logits() -> None:
    """Of tokens with the same logit each has the best of their ranks here, the last with stock."""
    from vllm.score.ops import row_state as rs
    from vllm.score.ops.reference import reduce_logits
    from vllm.score.ops.row_state import Reduction
    from vllm.v1.sample.sampler import Sampler

    logits = torch.tensor([[2.0, 3.0, 1.0, 3.0, 0.0]] * 5)
    tokens = torch.arange(5)
    own = logits[0][tokens]
    out = Reduction(tokens[:, None], statistics=rs.RANK_BIT, threshold=own)
    reduce_logits(logits, out)
    assert (out.state[:, rs.RANK] + 1).tolist() == [3, 1, 4, 1, 5]
    stock = Sampler.gather_logprobs(logits, 0, tokens)
    assert stock.selected_token_ranks.tolist() == [3, 2, 4, 2, 5]
