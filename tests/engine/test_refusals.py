"""What is not served is refused by a sentence, at the engine's door; the engine lives on."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import random_prompts
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine


def score_params(**options):
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, **options)


def test_target_token_ids_without_score_mode(llm):
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [5, 6, 7], "target_token_ids": [6, 7]}
    with pytest.raises(ScoreModeError, match=r"set SamplingParams\(score_mode=True\)"):
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)


def test_one_bad_request_takes_the_others_back(llm):
    good, bad = {"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [5], "target_token_ids": [1]}
    with pytest.raises(ScoreModeError, match="has 1 rows"):
        llm.generate([good, bad], score_params(), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(score(llm, [[5, 6, 7]], use_tqdm=False)[0]) == 2


@pytest.mark.parametrize(
    ("requests", "options", "message"),
    [
        ([[1, 2], [3, 10**6]], {}, r"requests\[1\]: prompt_token_ids\[1\] is 1000000, outside"),
        ([[1, 2], []], {}, r"requests\[1\]: the prompt has no token"),
        ([None], {}, r"requests\[0\]: prompt_token_ids must be a list of token ids, got NoneType"),
        ([{"promt": "a"}], {}, r"keys \['promt'\], which are not supported"),
        ([{"prompt_token_ids": "ab"}], {}, "must be a list of token ids, got str"),
        ("a text", {}, "requests must be a list, got one str"),
        ([[1] * 2049], {}, "2049 tokens, the engine's max_model_len is 2048"),
        (
            [[1, 2]],
            {"statistics": ["perplexity"]},
            "the statistic 'perplexity' is unknown",
        ),
        ([[1, 2]], {"temperature": -1.0}, "score_temperature must be"),
        ([[1, 2]], {"top": -2}, "top must be a whole number of at least 0, got -2"),
        ([[1, 2]], {"top": 3, "full_vocabulary": True}, "not both"),
        (
            [{"prompt_token_ids": [1, 2], "target_token_ids": [2]}],
            {"full_vocabulary": True},
            "exclude each other",
        ),
    ],
)
def test_malformed_calls_of_score(llm, requests, options, message):
    with pytest.raises(ScoreModeError, match=message):
        score(llm, requests, use_tqdm=False, **options)


def test_no_requests_no_scores(llm):
    assert score(llm, [], use_tqdm=False) == []


def test_truncation_would_shift_the_targets(llm):
    prompt = {"prompt_token_ids": [5, 6, 7, 8], "target_token_ids": [8]}
    with pytest.raises(
        ScoreModeError, match="truncate_prompt_tokens=3 would shift target_token_ids"
    ):
        llm.generate(
            [prompt],
            score_params(),
            use_tqdm=False,
            tokenization_kwargs={"truncate_prompt_tokens": 3},
        )


def test_options_set_after_construction_are_refused_too(llm):
    params = score_params()
    params.n = 2
    with pytest.raises(ScoreModeError, match="n=2 cannot be combined with score_mode=True"):
        llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
    for field, value in (
        ("score_statistics", ["entropie"]),
        ("score_temperature", 0.0),
        ("prompt_logprobs", -5),
    ):
        params = score_params()
        setattr(params, field, value)
        with pytest.raises(ScoreModeError, match=field):
            llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)


def test_the_callers_parameters_are_not_changed(llm):
    params = score_params(prompt_logprobs=0)
    before = repr(params)
    llm.generate([{"prompt_token_ids": [5, 6]}] * 2, params, use_tqdm=False)
    assert repr(params) == before
    assert params.prompt_logprob_token_ids is None


def test_beam_search_has_no_score_mode(llm):
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(TypeError, match="score_mode"):
        BeamSearchParams(beam_width=2, max_tokens=4, score_mode=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("cache_config.kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("model_config.runner_type", "pooling", "pooling models"),
    ],
)
def test_configurations_are_refused(llm, monkeypatch, field, value, message):
    """On the real configuration of a running engine, with one field changed."""
    from vllm.score.engine.configuration import unsupported_configuration

    config = llm.llm_engine.vllm_config
    assert unsupported_configuration(config) is None
    owner, _, name = field.rpartition(".")
    monkeypatch.setattr(getattr(config, owner) if owner else config, name, value)
    assert message in unsupported_configuration(config)
    with pytest.raises(ScoreModeError, match=message):
        score(llm, [[5, 6, 7]], use_tqdm=False)


def test_pipelines_under_an_external_launcher_are_refused(llm, monkeypatch):
    parallel = llm.llm_engine.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "distributed_executor_backend", "external_launcher")
    assert len(score(llm, [[5, 6, 7]], use_tqdm=False)[0]) == 2
    monkeypatch.setattr(parallel, "pipeline_parallel_size", 2)
    with pytest.raises(ScoreModeError, match="external_launcher"):
        score(llm, [[5, 6, 7]], use_tqdm=False)


def test_nan_logits_are_an_error_for_their_request_alone(engine):
    """A poisoned last norm: the scores are NaN, and reading them raises."""
    llm = engine("llama", {"seed": 7}, max_model_len=512)
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    norm = model.model_runner.model.model.norm.weight
    saved = norm.data.clone()
    (prompt,) = random_prompts([40], llm.llm_engine.model_config.get_vocab_size(), seed=0)
    norm.data[3] = float("nan")
    try:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], score_params(), use_tqdm=False)
        assert output.outputs[0].finish_reason == "error"
        for read in (
            lambda: output.scores.logprobs,
            lambda: output.prompt_logprobs[1],
            lambda: len(output.prompt_logprobs),
            lambda: list(output.prompt_logprobs),
        ):
            with pytest.raises(ScoreModeError, match="prompt position 1 is NaN"):
                read()
        with pytest.raises(ScoreModeError, match="is NaN"):
            score(llm, [prompt], use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
    finally:
        norm.data.copy_(saved)
    assert np.isfinite(score(llm, [prompt], use_tqdm=False)[0].logprobs).all()


def test_the_engine_is_idle_while_the_error_is_handled(llm):
    prompts = random_prompts([300] * 8, llm.llm_engine.model_config.get_vocab_size(), seed=2)

    class Failing:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def update(self, _):
            raise ValueError("a progress bar that fails")

    try:
        score(llm, prompts, use_tqdm=Failing)
    except ValueError as error:
        assert error.__traceback__ is not None  # and with it score()'s own variables are alive
        assert len(score(llm, prompts[:1], use_tqdm=False)[0]) == 299
    else:
        pytest.fail("the progress bar was not called")


def test_interrupted_scoring_leaves_an_idle_engine(llm):
    prompts = random_prompts([300] * 8, llm.llm_engine.model_config.get_vocab_size(), seed=1)

    class Interrupting:
        def __init__(self, **_):
            self.updates = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def update(self, _):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(llm, prompts, use_tqdm=Interrupting)
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(score(llm, prompts[:1], use_tqdm=False)[0]) == 299
