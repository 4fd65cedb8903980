"""Problems on a real engine, against Hugging Face in float64."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.eig.problems import ask, by_next, failing
from tests.helpers import random_prompts, token_logprobs
from vllm.score.eig.engines import BatchRequests, LLMReasoner
from vllm.score.eig.records import Batch, DeadlineExceeded, Next, Sample, Score
from vllm.score.errors import ScoreModeError

pytestmark = pytest.mark.engine

# Nats; on a GPU float32 products may run in TF32.
TOLERANCE = 1e-2 if torch.cuda.is_available() else 2e-5
VOCABULARY = 1024
LONG = 1500


def prompts(*lengths, seed=0):
    return random_prompts(list(lengths), VOCABULARY, seed)


def unfinished(llm):
    return llm.llm_engine.get_num_unfinished_requests()


def greedy_chain(reference, context, steps):
    chain = list(context)
    for _ in range(steps):
        chain.append(int(reference("llama", chain)[-1].argmax()))
    return chain[len(context) :]


def run(reasoner, batch):
    """Outside of `run_all` the reasoner runs the engine itself."""
    return asyncio.run(reasoner.run(batch))


@pytest.fixture
def driver(llm):
    yield LLMReasoner(llm)
    assert not unfinished(llm), "the engine must be left idle"


def test_scores_are_those_of_hugging_face(driver, reference):
    contexts = prompts(1, 40, 300)
    targets = [[5], [7], [3, 4, 5], [5], [3, 4, 9], prompts(30, seed=1)[0], [3, 4, 5]]
    results = run(driver, Batch([Score(c, targets) for c in contexts]))
    for context, found in zip(contexts, results, strict=True):
        for target, logprobs in zip(targets, found, strict=True):
            want = token_logprobs(reference("llama", context + target), context + target)
            assert logprobs.dtype == np.float32
            np.testing.assert_allclose(logprobs, want[-len(target) :], atol=TOLERANCE)


def test_equal_and_similar_targets_cost_one_request(llm):
    context = [8, 9]
    facts = LLMReasoner(llm).facts
    score = Score(context, [[5], [7], [3, 4, 5], [5], [3, 4, 9], [3, 4, 5], [4, 4, 5]])
    sent = [r.prompt["prompt_token_ids"] for r in BatchRequests(Batch([score]), facts).requests]
    assert sent == [[8, 9, 5], [8, 9, 3, 4, 5], [8, 9, 4, 4, 5]]


def test_requests_with_a_common_context_follow_each_other(llm):
    a, b = prompts(50, 60, seed=2)
    work = [Score(a, [[1]]), Next(b, 3), Sample(a, 2, 4), Score(b, [[1, 2], [2, 1]])]
    batch = BatchRequests(Batch(work), LLMReasoner(llm).facts)
    contexts = [batch.requests[i].ids[:50].tolist() for i in batch.order]
    assert contexts == [a, a, b[:50], b[:50], b[:50]]


def test_next_tokens_are_those_of_hugging_face(driver, reference):
    contexts = prompts(1, 33, 280, seed=3)
    results = run(
        driver, Batch([Next(c, top) for c, top in zip(contexts, (1, 7, 20), strict=True)])
    )
    for context, top, (ids, logprobs) in zip(contexts, (1, 7, 20), results, strict=True):
        row = reference("llama", context)[-1]
        want = np.argsort(-row)[:top]
        assert ids.dtype == np.int64 and logprobs.dtype == np.float32
        assert ids.tolist() == want.tolist()
        np.testing.assert_allclose(logprobs, row[want], atol=TOLERANCE)


def test_greedy_continuations_and_stop_texts(driver, reference):
    (context,) = prompts(20, seed=4)
    want = greedy_chain(reference, context, 12)
    (drawn,) = run(driver, Batch([Sample(context, 3, 12, temperature=0)]))
    assert [c.token_ids for c in drawn] == [want] * 3
    assert not any(c.finished for c in drawn)

    text = driver.tokenizer.decode
    readable = [i for i, t in enumerate(want) if text([t]).isascii() and text([t])]
    assert readable, "this test needs a token that is text by itself"
    stop = text([want[readable[-1]]])
    end = next(i for i, t in enumerate(want) if stop in text([t])) + 1
    (drawn,) = run(driver, Batch([Sample(context, 1, 12, temperature=0, stop=(stop,))]))
    assert drawn[0].token_ids == want[:end] and drawn[0].finished
    assert drawn[0].text.endswith(stop) and drawn[0].text.count(stop) == 1


def test_the_end_of_sequence_is_no_part_of_a_continuation(driver, reference):
    eos = driver.tokenizer.eos_token_id
    for ids in prompts(*[300] * 24, seed=5):
        ends = np.flatnonzero(reference("llama", ids).argmax(-1) == eos)
        if len(ends):
            break
    else:
        pytest.fail("no context found that ends the sequence")
    context = ids[: ends[0] + 1]
    plain = Sample(context, 2, 3, temperature=0)
    on = Sample(context, 1, 3, temperature=0, ignore_eos=True)
    stopped, (went_on,) = run(driver, Batch([plain, on]))
    assert [(c.token_ids, c.text, c.finished) for c in stopped] == [([], "", True)] * 2
    assert went_on.token_ids == greedy_chain(reference, context, 3)
    assert went_on.token_ids[0] == eos and not went_on.finished


def test_draws_follow_the_policy(driver, reference):
    (context,) = prompts(2, seed=6)
    count, top_p = 1000, 0.9
    (drawn,) = run(driver, Batch([Sample(context, count, 1, top_p=top_p, ignore_eos=True)]))
    p = np.exp(reference("llama", context)[-1])
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    policy = np.zeros_like(p)
    policy[kept] = p[kept] / p[kept].sum()
    tokens = [t for c in drawn for t in c.token_ids]
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert len(tokens) == count and not counts[policy == 0].any()
    common = policy * count >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*policy[common] * count, policy[~common].sum() * count]
    assert common.sum() > 10 and expected[-1] > 5
    assert chisquare(observed, expected).pvalue > 1e-5


def test_side_by_side_each_gets_what_it_gets_alone(llm, reference):
    contexts = prompts(*range(3, 19, 2), seed=7)
    steps = [1 + i % 4 for i in range(8)]
    problems = [by_next(c, n) for c, n in zip(contexts, steps, strict=True)]
    found = dict(LLMReasoner(llm, concurrency=3).run_all(problems))
    assert sorted(found) == list(range(8))
    for i, (context, n) in enumerate(zip(contexts, steps, strict=True)):
        assert found[i] == greedy_chain(reference, context, n)
    alone = asyncio.run(by_next(contexts[4], steps[4])(LLMReasoner(llm)))
    assert alone == found[4]
    assert not unfinished(llm)


def test_no_more_problems_are_live_than_asked_for(llm):
    live, most = set(), []

    async def problem(i, reasoner):
        live.add(i)
        most.append(len(live))
        for _ in range(1 + i % 3):
            await reasoner.run(Batch([Next([5, 6, i + 2], 1)]))
        live.remove(i)
        return i

    taken = []

    def problems():
        for i in range(10):
            taken.append(i)
            assert len(taken) - (i - len(live)) <= 4, "taken before its turn"
            yield partial(problem, i)

    values = list(LLMReasoner(llm, concurrency=3).run_all(problems()))
    assert max(most) == 3 and not live
    assert sorted(values) == [(i, i) for i in range(10)]


def test_problems_that_ask_for_nothing(driver):
    async def immediate(i, reasoner):
        return i

    assert sorted(driver.run_all(partial(immediate, i) for i in range(70))) == [
        (i, i) for i in range(70)
    ]
    assert list(driver.run_all([])) == []


def test_a_deadline_ends_its_own_batch_only(driver, reference):
    (context,) = prompts(8, seed=8)
    slow = Sample(context, 4, LONG, ignore_eos=True)
    fast = Next(context, 2)
    problems = [
        failing(slow, fast, deadline=time.monotonic() + 0.2),
        by_next(context, 6),
        ask(Sample(context, 1, 5, temperature=0), deadline=time.monotonic() + 300),
    ]
    found = dict(driver.run_all(problems))
    assert isinstance(found[0], DeadlineExceeded) and "1 of 2 requests" in str(found[0])
    want = greedy_chain(reference, context, 6)
    assert found[1] == want and found[2][0][0].token_ids == want[:5]


def test_what_is_late_already_is_not_sent(driver, llm):
    before = llm.request_counter.counter
    with pytest.raises(DeadlineExceeded, match="before the batch was sent"):
        run(driver, Batch([Next([1, 2], 1)], deadline=time.monotonic() - 1))
    assert llm.request_counter.counter == before


BAD = [
    (Score([], [[1]]), "context is empty"),
    (Score([1], []), "targets is empty"),
    (Score([1], [[1], []]), r"targets\[1\] is empty"),
    (Score([1], [[1], [VOCABULARY]]), r"targets\[1\]\[0\] is 1024, outside the vocabulary"),
    (Score([1] * 2040, [[1], [1] * 9]), r"9 of targets\[1\] 2049.*max_model_len is 2048"),
    (Score("text", [[1]]), "context must be a list of token ids, got str"),
    (Score([1.5], [[1]]), "context must be integers"),
    (Next([], 1), "context is empty"),
    (Next([1], 0), "top must be a whole number from 1 to 20, got 0"),
    (Next([1], 21), "top must be a whole number from 1 to 20, got 21"),
    (Next([1] * 2048, 1), "max_model_len"),
    (Sample([], 1, 1), "context is empty"),
    (Sample([-1], 1, 1), r"context\[0\] is -1, outside the vocabulary"),
    (Sample([1], 0, 1), "count must be a whole number of at least 1, got 0"),
    (Sample([1], 1, 0), "max_tokens must be a whole number of at least 1, got 0"),
    (Sample([1], 1, True), "max_tokens must be a whole number"),
    (Sample([1] * 2000, 1, 49), "context has 2000 tokens, with 49 of max_tokens 2049"),
    (Sample([1], 1, 1, temperature=float("nan")), "temperature must be a number"),
    (Sample([1], 1, 1, temperature=-1.0), "temperature"),
    (Sample([1], 1, 1, top_p=0.0), "top_p"),
    (Sample([1], 1, 1, stop="text"), "stop must be a tuple of texts"),
    ([1, 2], "is a list; give a Sample, a Score or a Next"),
]


@pytest.mark.parametrize(("work", "message"), BAD)
def test_bad_work_is_refused_before_anything_is_sent(driver, llm, work, message):
    before = llm.request_counter.counter
    with pytest.raises(ScoreModeError, match=message) as caught:
        run(driver, Batch([Next([1], 1), work]))
    assert "work[1]" in str(caught.value)
    assert llm.request_counter.counter == before


def test_what_just_fits_runs(driver):
    ids = prompts(2047, seed=9)[0]
    scores, top, drawn = run(
        driver, Batch([Score(ids, [[5], [6]]), Next(ids, 2), Sample(ids, 1, 1, ignore_eos=True)])
    )
    assert len(scores) == 2 and len(top[0]) == 2 and len(drawn[0].token_ids) == 1


def test_bad_work_fails_its_own_problem_only(driver, reference):
    (context,) = prompts(9, seed=10)
    problems = [failing(Next(context, 1), Next([], 1)), by_next(context, 3), failing()]
    found = dict(driver.run_all(problems))
    assert "context is empty" in str(found[0]) and "work is empty" in str(found[2])
    assert found[1] == greedy_chain(reference, context, 3)


def test_a_request_that_somebody_aborts_fails_its_problem_and_its_batch(driver, llm):
    """The engine gives an aborted request no output of its own: the driver must not wait."""

    async def problem(reasoner):
        await reasoner.run(Batch([Next([3], 1)]))
        llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), True)
        return "aborted"

    run = driver.run_all([problem, ask(Sample([5], 1, LONG, ignore_eos=True))])
    assert next(run) == (0, "aborted")
    with pytest.raises(ScoreModeError, match="lost the reasoning's requests"):
        next(run)


def test_leaving_early_aborts_what_is_running(llm):
    ended = []

    async def slow(i, reasoner):
        try:
            await reasoner.run(Batch([Sample([5, i + 2], 2, LONG, ignore_eos=True)]))
        finally:
            ended.append(i)

    run = LLMReasoner(llm).run_all([*(partial(slow, i) for i in range(4)), ask(Next([5], 1))])
    assert next(run)[0] == 4
    assert unfinished(llm) == 8 and not ended
    run.close()
    assert unfinished(llm) == 0 and sorted(ended) == [0, 1, 2, 3]


def test_an_exception_in_a_problem_leaves_the_run(llm):
    async def broken(reasoner):
        await reasoner.run(Batch([Next([5, 6], 1)]))
        raise KeyError("mine")

    problems = [ask(Sample([5], 1, LONG, ignore_eos=True)), broken, ask(Next([5, 6], 1))]
    values = []
    with pytest.raises(KeyError, match="mine"):
        for value in LLMReasoner(llm).run_all(problems):
            values.append(value)
    assert unfinished(llm) == 0


def test_a_busy_engine_is_refused(driver, llm):
    from vllm import SamplingParams

    prompt = {"type": "token", "prompt_token_ids": [5]}
    engine_id = llm.llm_engine.add_request("busy", prompt, SamplingParams())
    with pytest.raises(ScoreModeError, match="llm has unfinished requests"):
        run(driver, Batch([Next([1], 1)]))
    assert unfinished(llm) == 1
    llm.llm_engine.abort_request([engine_id], internal=True)


def test_an_engine_that_is_used_meanwhile_is_noticed(llm):
    from vllm import SamplingParams

    run = LLMReasoner(llm).run_all([ask(Next([5], 1)), ask(Sample([5], 1, 12, ignore_eos=True))])
    assert next(run)[0] == 0
    llm.generate([{"prompt_token_ids": [5]}], SamplingParams(max_tokens=1), use_tqdm=False)
    with pytest.raises(ScoreModeError, match="llm was used while run_all was running"):
        next(run)


async def test_where_an_event_loop_runs(driver, reference):
    """As in a notebook or a server: nothing is asked of the loop."""
    (context,) = prompts(9, seed=11)
    found = dict(driver.run_all([by_next(context, 2)] * 2))
    assert found == dict.fromkeys(range(2), greedy_chain(reference, context, 2))
    assert await by_next(context, 2)(driver) == found[0]


def test_what_is_not_the_engine_s_is_not_waited_for(driver):
    async def sleeping(reasoner):
        await asyncio.sleep(0)

    with pytest.raises(ScoreModeError, match=r"may await reasoner.run\(batch\) only"):
        list(driver.run_all([ask(Sample([5], 1, LONG, ignore_eos=True)), sleeping]))


def test_arguments(llm):
    from vllm.lora.request import LoRARequest

    with pytest.raises(ScoreModeError, match=r"concurrency must be .* of at least 1, got 0"):
        LLMReasoner(llm, concurrency=0)
    with pytest.raises(ScoreModeError, match="enable_lora=True"):
        LLMReasoner(llm, lora_request=LoRARequest("a", 1, "/nowhere"))
