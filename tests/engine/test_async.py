"""`AsyncLLM`, whose engine core is another process: many clients, aborts, and its client limit."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import pytest_asyncio

from tests.helpers import random_prompts, token_logprobs
from vllm.score.errors import ScoreModeError

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def async_llm(model_dir):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model_dir("llama")),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            max_num_batched_tokens=256,
            max_num_seqs=16,
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=256 << 20,
        )
    )
    yield engine
    engine.shutdown()


def params(**options):
    from vllm import SamplingParams

    return SamplingParams(**{"score_mode": True, "prompt_logprobs": 0, **options})


async def last_output(engine, prompt, sampling_params, request_id):
    final = None
    async for output in engine.generate(prompt, sampling_params, request_id):
        final = output
    return final


async def test_clients_side_by_side_with_aborts(async_llm, reference):
    from vllm import SamplingParams

    vocab = async_llm.model_config.get_vocab_size()
    lengths = np.random.default_rng(0).integers(1, 700, 24).tolist()
    prompts = random_prompts(lengths, vocab, seed=1)

    async def client(i):
        await asyncio.sleep(0.01 * (i % 7))  # data arrives while others run
        prompt = {"prompt_token_ids": prompts[i]}
        if i % 6 == 5:
            sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
            return await last_output(async_llm, prompt, sampling, f"g{i}")
        task = asyncio.create_task(last_output(async_llm, prompt, params(), f"s{i}"))
        if i % 6 == 4:
            await asyncio.sleep(0.03)
            task.cancel()  # as a client that hangs up
            return await asyncio.gather(task, return_exceptions=True)
        return await task

    outputs = await asyncio.gather(*(client(i) for i in range(24)))
    for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)):
        if i % 6 == 5:
            assert len(o.outputs[0].token_ids) == 12
        elif i % 6 != 4:
            assert o.outputs[0].token_ids == [] and o.prompt_token_ids == p
            want = token_logprobs(reference("llama", p), p)
            np.testing.assert_allclose(o.scores.logprobs, want, atol=2e-5)
    assert not async_llm.output_processor.request_states


async def test_abort_by_id_gives_an_output_without_scores(async_llm):
    vocab = async_llm.model_config.get_vocab_size()
    prompts = random_prompts([2000] * 6, vocab, seed=2)
    tasks = [
        asyncio.create_task(last_output(async_llm, {"prompt_token_ids": p}, params(), f"abort{i}"))
        for i, p in enumerate(prompts)
    ]
    await asyncio.sleep(0.05)
    await async_llm.abort([f"abort{i}" for i in range(6)])
    for output in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(output, BaseException) and output.outputs[0].finish_reason == "abort":
            assert output.scores is None
    (survivor,) = random_prompts([50], vocab, seed=3)
    after = await last_output(async_llm, {"prompt_token_ids": survivor}, params(), "after")
    assert len(after.scores) == 49


async def test_text_prompts_are_rendered_before_they_are_planned(async_llm, reference):
    text = "class Reader: pass"
    ids = async_llm.get_tokenizer()(text)["input_ids"]
    output = await last_output(async_llm, text, params(), "text")
    assert output.prompt_token_ids == ids
    np.testing.assert_allclose(
        output.scores.logprobs, token_logprobs(reference("llama", ids), ids), atol=2e-5
    )


async def test_a_server_keeps_its_own_limit(async_llm):
    ids = [5, 6, 7]
    with pytest.raises(ScoreModeError, match="max_logprobs=20"):
        await last_output(
            async_llm, {"prompt_token_ids": ids}, params(prompt_logprobs=None), "full"
        )
    with pytest.raises(ScoreModeError, match="max_logprobs=20"):
        await last_output(async_llm, {"prompt_token_ids": ids}, params(prompt_logprobs=21), "top")
    wide = {"prompt_token_ids": ids, "target_token_ids": [list(range(21))] * 2}
    with pytest.raises(ScoreModeError, match="target_token_ids asks for 21 values"):
        await last_output(async_llm, wide, params(prompt_logprobs=None), "wide")


async def test_bad_requests_leave_the_engine_alive(async_llm):
    vocab = async_llm.model_config.get_vocab_size()
    for i, (prompt, message) in enumerate(
        [
            ({"prompt_token_ids": [1, 2], "target_token_ids": []}, "target_token_ids is empty"),
            ({"prompt_token_ids": [1, 2], "target_token_ids": [vocab]}, "outside the vocabulary"),
            ({"prompt_token_ids": [1, 2], "target_token_ids": [1, 2, 3]}, "has 3 rows"),
        ]
    ):
        with pytest.raises(ScoreModeError, match=message):
            await last_output(async_llm, prompt, params(prompt_logprobs=None), f"bad{i}")
    good = await last_output(async_llm, {"prompt_token_ids": [1, 2, 3]}, params(), "good")
    assert len(good.scores) == 2
