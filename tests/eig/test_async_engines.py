"""Problems on an `AsyncLLM` with other clients, against Hugging Face in float64."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
import time
from contextlib import aclosing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from scipy.stats import chisquare

from tests.eig.problems import ask, by_next, failing
from tests.helpers import random_prompts, token_logprobs
from vllm.score.eig.engines import AsyncLLMReasoner
from vllm.score.eig.records import Batch, DeadlineExceeded, Next, Sample, Score

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "eig" / "beside_others.py"
TOLERANCE = 2e-5
VOCABULARY = 1024
LONG = 1500
# The last token of its greedy continuation ends sequences, says the model's generation config,
# which also asks for a policy that is not ours.
(START,) = random_prompts([12], VOCABULARY, seed=20)
STEPS = 5


@pytest.fixture(scope="module")
def chain(reference):
    """Greedy continuation of START."""
    ids = list(START)
    for _ in range(STEPS):
        ids.append(int(reference("llama", ids)[-1].argmax()))
    return ids[len(START) :]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def async_llm(model_dir, chain, tmp_path_factory):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(model_dir("llama"), folder)
    config = {
        "eos_token_id": [1, chain[-1]],
        "do_sample": True,
        "top_k": 2,
        "temperature": 0.3,
        "repetition_penalty": 3.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(config))
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            max_num_batched_tokens=256,
            max_num_seqs=16,
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=128 << 20,
        )
    )
    assert engine.model_config.get_diff_sampling_param()["top_k"] == 2
    yield engine
    engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def driver(async_llm):
    yield AsyncLLMReasoner(async_llm)
    assert not async_llm.output_processor.request_states, "nothing must be left in the engine"


async def values(run):
    async with aclosing(run):
        return {index: value async for index, value in run}


async def test_scores_and_next_tokens_are_those_of_hugging_face(driver, reference):
    """Thirty one-token targets: a server allows 20 candidates at a position."""
    contexts = random_prompts([1, 270], VOCABULARY, seed=21)
    targets = [[3, 4, 5], *([i] for i in range(30, 60)), [3, 4, 9], [31]]
    found = await driver.run(Batch([*(Score(c, targets) for c in contexts), Next(contexts[1], 20)]))
    for context, arrays in zip(contexts, found, strict=False):
        row = reference("llama", context)[-1]
        for target, logprobs in zip(targets, arrays, strict=True):
            want = [row[target[0]]]
            if len(target) > 1:
                want = token_logprobs(reference("llama", context + target), context + target)
            np.testing.assert_allclose(logprobs, want[-len(target) :], atol=TOLERANCE)
    ids, logprobs = found[2]
    assert ids.tolist() == np.argsort(-row)[:20].tolist()
    np.testing.assert_allclose(logprobs, row[ids], atol=TOLERANCE)


async def test_every_end_of_sequence_id_ends_a_continuation(driver, chain):
    end = chain.index(chain[-1])
    plain = Sample(START, 2, STEPS, temperature=0)
    on = Sample(START, 1, STEPS, temperature=0, ignore_eos=True)
    stopped, (went_on,) = await driver.run(Batch([plain, on]))
    assert [(c.token_ids, c.finished) for c in stopped] == [(chain[:end], True)] * 2
    assert went_on.token_ids == chain and not went_on.finished
    assert went_on.text.startswith(stopped[0].text)


async def test_the_generation_config_does_not_change_the_policy(driver, reference):
    count = 300
    (drawn,) = await driver.run(Batch([Sample(START[:2], count, 1, ignore_eos=True)]))
    p = np.exp(reference("llama", START[:2])[-1])
    counts = np.bincount([c.token_ids[0] for c in drawn], minlength=VOCABULARY)
    common = p * count >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*p[common] * count, p[~common].sum() * count]
    assert common.sum() >= 5 and expected[-1] > 5
    assert chisquare(observed, expected).pvalue > 1e-5


async def test_problems_and_other_clients_side_by_side(async_llm, reference):
    from vllm import SamplingParams

    contexts = random_prompts([3, 9, 5, 7, 11], VOCABULARY, seed=22)
    live, most, taken = set(), [], []

    async def counted(i, reasoner):
        live.add(i)
        most.append(len(live))
        result = await by_next(contexts[i], 1 + i % 3)(reasoner)
        live.remove(i)
        return result

    def problems():
        for i in range(5):
            taken.append(i)
            yield partial(counted, i)

    async def client():
        async for output in async_llm.generate(
            {"prompt_token_ids": START}, SamplingParams(temperature=0, max_tokens=3), "other"
        ):
            last = output
        return last.outputs[0].token_ids

    found, other = await asyncio.gather(
        values(AsyncLLMReasoner(async_llm, concurrency=2).run_all(problems())), client()
    )
    assert max(most) == 2 and not live and taken == list(range(5))
    for i, context in enumerate(contexts):
        ids = list(context)
        for _ in range(1 + i % 3):
            ids.append(int(reference("llama", ids)[-1].argmax()))
        assert found[i] == ids[len(context) :]
    assert len(other) == 3


async def test_a_deadline_ends_its_own_batch_only(driver, chain):
    slow = Sample(START, 3, LONG, ignore_eos=True)
    problems = [
        failing(slow, Next(START, 1), deadline=time.monotonic() + 0.3),
        by_next(START, 4),
        failing(Next(START, 1), deadline=time.monotonic() - 1),
        ask(Next(START, 1), deadline=time.monotonic() + 300),
    ]
    found = await values(driver.run_all(problems))
    assert isinstance(found[0], DeadlineExceeded) and "of 2 requests unfinished" in str(found[0])
    assert found[1] == chain[:4]
    assert isinstance(found[2], DeadlineExceeded) and "before the batch was sent" in str(found[2])
    assert found[3][0][0].tolist() == chain[:1]


async def test_bad_work_fails_its_own_problem_only(driver, chain):
    problems = [failing(Next(START, 1), Sample([], 1, 1)), by_next(START, 2), failing()]
    found = await values(driver.run_all(problems))
    assert "context is empty" in str(found[0]) and "work is empty" in str(found[2])
    assert found[1] == chain[:2]


async def test_a_request_that_fails_aborts_its_batch_and_reaches_the_problem(driver, async_llm):
    """Somebody aborts one of the two requests of a batch."""

    async def meddle():
        while len(async_llm.output_processor.request_states) < 2:
            await asyncio.sleep(0.01)
        first = next(iter(async_llm.output_processor.request_states))
        await async_llm.abort(first, internal=True)

    slow = [Sample([5, i], 1, LONG, ignore_eos=True) for i in (6, 7)]
    error, _ = await asyncio.gather(failing(*slow)(driver), meddle())
    assert "finish_reason 'abort'" in str(error)


async def test_cancelling_or_leaving_aborts_everything(driver, async_llm):
    ended = []

    async def slow(i, reasoner):
        try:
            await reasoner.run(Batch([Sample([5, i + 2], 2, LONG, ignore_eos=True)]))
        finally:
            ended.append(i)

    states = async_llm.output_processor.request_states
    task = asyncio.create_task(values(driver.run_all(partial(slow, i) for i in range(3))))
    while len(states) < 6:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not states and sorted(ended) == [0, 1, 2]

    run = driver.run_all([partial(slow, 3), ask(Next([5], 1))])
    async with aclosing(run):
        assert (await anext(run))[0] == 1
    assert not states and ended[-1] == 3


@pytest.mark.parametrize("turns", range(8))
async def test_a_batch_can_be_cancelled_while_it_is_being_sent(driver, async_llm, turns):
    work = [Sample([5, i + 2], 1, LONG, ignore_eos=True) for i in range(3)] + [Next([5], 1)]
    task = asyncio.create_task(driver.run(Batch(work)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not async_llm.output_processor.request_states


async def test_an_exception_in_a_problem_leaves_the_run(driver):
    async def broken(reasoner):
        await reasoner.run(Batch([Next([5, 6], 1)]))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await values(driver.run_all([ask(Sample([5], 1, LONG, ignore_eos=True)), broken]))


async def test_reasoning_beside_other_clients(driver, async_llm, reference, capsys):
    """The example, with whole problems: their first posteriors are Hugging Face's."""
    from vllm.score.eig import AnswerFormat, EIGMetrics, ExpectedInformationGain

    example = runpy.run_path(str(EXAMPLE))
    answers, metrics = ["one", "two", "seven"], EIGMetrics()
    prompts = random_prompts([20, 30, 25, 18], VOCABULARY, seed=31)
    rule = ExpectedInformationGain(lambda_cost=0.0, mc_samples=2, sample_length=4)
    options = {"candidates": answers, "max_tokens_thinking": 4, "metrics": metrics}
    traces, text = await asyncio.gather(
        example["reason"](async_llm, prompts, rule, **options),
        example["generate"](async_llm, {"prompt_token_ids": START}),
    )
    assert isinstance(text, str) and capsys.readouterr().out.count("tokens of reasoning") == 4
    cue, targets = AnswerFormat().encode(driver.tokenizer, answers)
    for prompt, trace in zip(prompts, traces, strict=True):
        want = []
        for target in targets:
            whole = [*prompt, *cue, *target]
            want.append(token_logprobs(reference("llama", whole), whole)[-len(target) :].sum())
        posterior = trace.steps[0].decision.posterior
        np.testing.assert_allclose(posterior.logprobs, want, atol=2e-4)
    assert metrics.summary()["decisions"] == sum(len(t.steps) for t in traces)
    assert metrics.summary()["success_rate"] == 1.0
