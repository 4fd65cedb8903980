"""Prefixes that a KV connector brings end before the first scored row; its others are computed.

The local prefix cache is off, so that every hit is the connector's.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import random_prompts, token_logprobs
from tests.support.memory_connector import LOADED
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
BLOCK, VOCAB = 32, 1024
MEMORY = {
    "kv_connector": "MemoryConnector",
    "kv_connector_module_path": "tests.support.memory_connector",
    "kv_role": "kv_both",
}
MULTI = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}


def memory(store, later=False):
    return {**MEMORY, "kv_connector_extra_config": {"store": store, "later": later}}


@pytest.fixture(scope="module")
def connected(engine):
    """`connected(config)`: a new engine with this KV connector.

    vLLM has one connector on the worker's side per process, so the engines before are of no use.
    """
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    def start(kv_transfer_config):
        ensure_kv_transfer_shutdown()
        return engine(
            "llama",
            block_size=BLOCK,
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=256,
            enable_prefix_caching=False,
            kv_transfer_config=kv_transfer_config,
        )

    yield start
    ensure_kv_transfer_shutdown()


def run(llm, requests):
    from vllm import SamplingParams

    return llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)


def request(ids, rows):
    return {"prompt_token_ids": ids, "target_token_ids": ids[-rows:]}


def check(outputs, requests, reference):
    for o, r in zip(outputs, requests, strict=True):
        ids, m = r["prompt_token_ids"], len(r["target_token_ids"])
        want = token_logprobs(reference("llama", ids), ids)[-m:]
        np.testing.assert_allclose(o.scores.logprobs, want, atol=TOLERANCE)


def brought(outputs):
    return [o.num_cached_tokens or 0 for o in outputs]


@pytest.mark.parametrize(
    "config",
    [
        memory("now"),
        memory("later", later=True),
        {**MULTI, "kv_connector_extra_config": {"connectors": [memory("first"), memory("second")]}},
    ],
    ids=["at once", "between steps", "one of several"],
)
def test_what_is_brought_ends_before_the_first_scored_row(config, connected, reference):
    from vllm import SamplingParams

    llm = connected(config)
    context, other = random_prompts([300, 300], VOCAB, seed=1)
    tails = random_prompts([3, 40, 7], VOCAB, seed=2)
    first = [request(context + tails[0], len(tails[0]))]
    outputs = run(llm, first)
    check(outputs, first, reference)
    assert brought(outputs) == [0]

    # Other continuations of the context, in one batch: all of its whole blocks.
    loaded = len(LOADED)
    others = [request(context + t, len(t)) for t in tails[1:]]
    outputs = run(llm, others)
    check(outputs, others, reference)
    assert brought(outputs) == [300 // BLOCK * BLOCK] * 2
    assert len(LOADED) == loaded + 2

    # What is there reaches past the first scored row of these; of the last one it does not.
    whole = [request(context, rows) for rows in (299, 100, 50, 5)]
    outputs = run(llm, whole)
    check(outputs, whole, reference)
    assert brought(outputs) == [0, 0, 0, 298 // BLOCK * BLOCK]
    assert len(LOADED) == loaded + 3

    # Generations beside them read what they always read, also what score requests have left.
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    mixed = [{"prompt_token_ids": context}, request(other, 299), {"prompt_token_ids": other}]
    once = llm.generate(mixed, [greedy, SamplingParams(score_mode=True), greedy], use_tqdm=False)
    again = llm.generate(mixed, [greedy, SamplingParams(score_mode=True), greedy], use_tqdm=False)
    for outputs in (once, again):
        check(outputs[1:2], mixed[1:2], reference)
        assert brought(outputs[1:2]) == [0]
    for i in (0, 2):
        assert once[i].outputs[0].token_ids == again[i].outputs[0].token_ids
    assert brought(again[::2]) == [299 // BLOCK * BLOCK] * 2

    skipping = SamplingParams(score_mode=True, skip_reading_prefix_cache=True)
    outputs = llm.generate(whole, skipping, use_tqdm=False)
    check(outputs, whole, reference)
    assert brought(outputs) == [0] * 4


def test_the_example_connector_of_vllm(connected, reference, tmp_path):
    """It finds a prompt as a whole, on disk."""
    llm = connected(
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        }
    )
    (text,) = random_prompts([150], VOCAB, seed=4)
    for rows, expected in ((1, 0), (1, 128), (100, 0), (149, 0), (1, 128)):
        requests = [request(text, rows)]
        outputs = run(llm, requests)
        check(outputs, requests, reference)
        assert brought(outputs) == [expected]


@pytest.mark.parametrize(
    ("name", "several", "message"),
    [
        ("DecodeBenchConnector", False, "made-up numbers"),
        ("DecodeBenchConnector", True, "made-up numbers"),
        ("MoRIIOConnector", True, "nobody has sent"),
    ],
)
def test_connectors_that_bring_what_is_not_there_are_refused(
    name, several, message, llm, monkeypatch
):
    from vllm.config import KVTransferConfig

    one = {"kv_connector": name, "kv_role": "kv_both"}
    found = {**MULTI, "kv_connector_extra_config": {"connectors": [one]}} if several else one
    monkeypatch.setattr(llm.llm_engine.vllm_config, "kv_transfer_config", KVTransferConfig(**found))
    monkeypatch.setattr(llm.llm_engine, "score_mode_checked", False, raising=False)
    with pytest.raises(ScoreModeError, match=message):
        score(llm, [[5, 6, 7]], use_tqdm=False)
