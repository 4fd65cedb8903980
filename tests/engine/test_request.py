"""Admission: every malformed request has its sentence, before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.perplexity.texts import byte_level_with_bos
from vllm.score.engine.request import AS_TOKENISED, ModelFacts, ScoreSpec, admit, admit_tokenised
from vllm.score.engine.worker import RequestScores, ScheduledRows
from vllm.score.ops.statistics import RowLayout

FACTS = ModelFacts(vocab_size=100, max_model_len=32)


def params(**options):
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, **options)


def spec_of(ids, targets=None, facts=FACTS, **options):
    return admit(ids, targets, params(**options), facts).spec


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        ([], None, "the prompt has no token"),
        (list(range(33)), None, "33 tokens, the engine's max_model_len is 32"),
        ([1, 100, 2], None, r"prompt_token_ids\[1\] is 100, outside the vocabulary 0..99"),
        ([1, -1], None, r"prompt_token_ids\[1\] is -1"),
        ([1, 2.5], None, r"prompt_token_ids must be integers, got 2.5 at \[1\]"),
        ([1, 2, 3], [], "target_token_ids is empty"),
        ([1, 2, 3], [1, 2, 3], "has 3 rows, but a prompt of 3 tokens has 2 positions"),
        ([1], [1], "has 1 rows, but a prompt of 1 tokens has 0 positions"),
        ([1, 2, 3], [5, 100], r"target_token_ids\[1\] is 100, outside the vocabulary"),
        ([1, 2, 3], [[5, 6], [7, -2]], r"target_token_ids\[1\]\[1\] is -2, outside"),
        ([1, 2, 3], [5, 1.5], "target_token_ids must be integers"),
        ([1, 2, 3], ["5"], "target_token_ids must be integers"),
        ([1, 2, 3], [True], "target_token_ids must be integers"),
        ([1, 2, 3], [None], "target_token_ids must be integers"),
        ([1, 2, 3], [2**80], r"target_token_ids\[0\] is 1208925819614629174706176, outside"),
        ([1, 2, 3], [[1, 2], [3]], "the same number of candidates at every position"),
        ([1, 2, 3], [[], []], "k of at least 1"),
        ([1, 2, 3], [[1, 2], 3], r"target_token_ids\[1\] must be a list of token ids, got int"),
        ([1, 2, 3], [1, [2]], r"target_token_ids must be integers, got \[2\] at \[1\]"),
        (
            [1, 2, 3],
            [[1, True], [2, 3]],
            r"target_token_ids\[0\] must be integers, got True at \[1\]",
        ),
        ([1, 2, 3], "12", "target_token_ids must be a list of token ids"),
        ([1, 2, 3], 7, "target_token_ids must be a list of token ids, .* got int"),
    ],
)
def test_malformed_prompts_and_targets(ids, targets, message):
    with pytest.raises(ValueError, match=message):
        spec_of(ids, targets)


def test_one_token_has_nothing_to_score_and_says_so():
    made = spec_of([5], prompt_logprobs=0)
    assert made.targets.shape == (0, 1) and "one token" in made.notes[0]
    assert spec_of([5, 6], prompt_logprobs=0).notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2}, "n=2 cannot be combined with score_mode=True"),
        ({"stop": ["x"]}, r"stop=\['x'\] cannot be combined"),
        ({"stop_token_ids": [3]}, "stop_token_ids="),
        ({"min_tokens": 1}, "min_tokens=1 cannot be combined"),
        ({"logprobs": 1}, "logprobs=1 cannot be combined .* prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids=.* target_token_ids"),
        ({"prompt_logprob_token_ids": [[1]]}, "use target_token_ids"),
        ({"logit_bias": {1: 1.0}}, "logit_bias=.* unconstrained"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids="),
        ({"bad_words": ["x"]}, "bad_words="),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids="),
        ({"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}, "kv_transfer_params"),
        ({"score_statistics": ["entropie"]}, r"'entropie' is unknown \(did you mean 'entropy'\?\)"),
        ({"score_statistics": "entropy"}, r"write \['entropy'\]"),
        ({"score_statistics": ["rank", "rank"]}, "twice"),
        ({"score_temperature": 0.0}, "score_temperature must be a number above 0, got 0.0"),
        ({"score_temperature": float("nan")}, "score_temperature must be a number above 0"),
        ({"score_temperature": "hot"}, "score_temperature must be a number above 0"),
        ({"score_top_p": 0.0}, "score_top_p must be a number above 0 and of at most 1, got 0.0"),
        ({"score_top_p": 1.5}, "score_top_p must be a number above 0 and of at most 1, got 1.5"),
        ({"score_top_p": "most"}, "above 0 and of at most 1, got 'most'"),
        ({"score_top_p": float("nan")}, "above 0 and of at most 1, got nan"),
        ({"max_tokens": 0, "score_mode": False}, "^max_tokens=0 is only allowed in score_mode$"),
        ({"score_statistics": ["rank"], "score_mode": False}, "need score_mode=True"),
    ],
)
def test_options_that_cannot_be_honoured(options, message):
    from vllm import SamplingParams

    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"score_mode": True, **options})


def test_negative_max_tokens_are_left_to_vllm():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="max_tokens must be at least 1, got -1"):
        SamplingParams(max_tokens=-1)


def test_structured_outputs_are_refused():
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    with pytest.raises(ValueError, match=r"structured_outputs=.* cannot be combined"):
        SamplingParams(score_mode=True, structured_outputs=StructuredOutputsParams(regex="a"))


def test_score_mode_sets_max_tokens():
    from vllm import SamplingParams

    assert SamplingParams(score_mode=True).max_tokens == 0
    assert SamplingParams(score_mode=True, max_tokens=0).max_tokens == 0
    assert SamplingParams.from_optional(score_mode=True).max_tokens == 0
    assert SamplingParams.from_optional(score_mode=True, max_tokens=0, temperature=0).score_mode
    assert SamplingParams.from_optional(score_mode=None, max_tokens=3).max_tokens == 3
    assert SamplingParams.from_optional(n=2).n == 2
    with pytest.raises(ValueError, match="only allowed in score_mode"):
        SamplingParams.from_optional(max_tokens=0)


def test_parameters_survive_copies_and_wires():
    import copy
    import pickle

    import msgspec

    from vllm import SamplingParams

    given = SamplingParams(score_mode=True, score_statistics=["rank"], score_temperature=0.5)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=SamplingParams)
    for other in (given.clone(), copy.deepcopy(given), pickle.loads(pickle.dumps(given)), wire):
        assert other.score_mode and other.max_tokens == 0
        assert other.score_statistics == ["rank"]
        assert other.score_temperature == 0.5
    assert "score_mode=True" in repr(given)
    assert "score_mode" not in repr(SamplingParams())
    assert msgspec.msgpack.encode(SamplingParams(max_tokens=3)) == msgspec.msgpack.encode(
        SamplingParams(max_tokens=3, score_mode=False)
    )


def test_what_is_scored_survives_copies_and_wires():
    import copy
    import pickle

    from vllm import SamplingParams
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    asked = params(score_statistics=["rank"], score_temperature=0.5)
    admitted = admit([1, 2, 3], [[4, 5], [6, 7]], asked, FACTS, notes=("a note",))
    assert asked._score is None
    given, spec = admitted.params, admitted.spec
    wire = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(given))
    pickled = pickle.loads(pickle.dumps(given))
    for other in (given.clone(), copy.copy(given), copy.deepcopy(given), pickled, wire):
        np.testing.assert_array_equal(other._score.targets, [[4, 5], [6, 7]])
        assert other._score.targets.dtype == np.int32
        for field in ("start", "layout", "vocab_size", "flat", "unread", "notes", "view_ranks"):
            assert getattr(other._score, field) == getattr(spec, field)


def test_sampling_policy_is_accepted_and_ignored():
    assert params(temperature=0.0).max_tokens == 0
    assert (
        params(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=3).max_tokens == 0
    )


def test_prefix_cache_wish_is_kept():
    assert params(prompt_logprobs=3).skip_reading_prefix_cache is None
    assert params(skip_reading_prefix_cache=True).skip_reading_prefix_cache is True
    assert params(skip_reading_prefix_cache=True).clone().skip_reading_prefix_cache is True


@given(n=st.integers(1, 32), data=st.data())
def test_alignment_to_the_end(n, data):
    ids = data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n))
    if n > 1:
        m = data.draw(st.integers(1, n - 1))
        k = data.draw(st.integers(1, 3))
        targets = [
            [int(t) for t in row] for row in np.random.default_rng(n).integers(0, 100, (m, k))
        ]
        got = spec_of(ids, targets)
        assert got.start == n - m - 1
        assert got.unread == (ids[-1],)
        assert got.start + m == n - 1  # the last row that is computed is scored
        assert got.result_shape == (m, k)
        assert not got.flat
    own = spec_of(ids, prompt_logprobs=0)
    assert own.targets[:, 0].tolist() == ids[1:]
    assert own.flat


@given(
    length=st.integers(1, 60),
    chunks=st.lists(st.integers(1, 17), min_size=1, max_size=60),
    data=st.data(),
)
def test_any_split_scores_each_row_once(length, chunks, data):
    m = data.draw(st.integers(0, length))
    start = length - m
    scores = RequestScores(ScoreSpec(np.zeros((m, 1), np.int32), start, RowLayout(1), 100))
    seen, begin = [], 0
    for chunk in [*chunks, length]:
        num_tokens = min(chunk, length - begin)
        if num_tokens == 0:
            break
        low, high = ScheduledRows("", scores, begin, num_tokens, 0).rows
        assert low >= high or (begin <= low and high <= begin + num_tokens)
        seen += range(low, high)
        begin += num_tokens
    assert seen == list(range(start, length))


def test_whole_vocabulary_by_default_and_its_bound(monkeypatch):
    got = spec_of([1, 2, 3])
    assert got.layout.top == -1
    assert got.result_shape == (2, 100)
    monkeypatch.setenv("VLLM_SCORE_FULL_VOCAB_BYTES", "800")
    assert spec_of([1, 2, 3]).result_shape == (2, 100)
    with pytest.raises(ValueError, match=r"takes 1,200 bytes.*800 bytes.*target_token_ids"):
        spec_of([1, 2, 3, 4])
    with pytest.raises(ValueError, match="with 100 in use"):
        admit([1, 2, 3], None, params(), FACTS, bytes_in_use=100)
    monkeypatch.setenv("VLLM_SCORE_FULL_VOCAB_BYTES", "many")
    with pytest.raises(
        ValueError, match="VLLM_SCORE_FULL_VOCAB_BYTES must be a whole number, got 'many'"
    ):
        spec_of([1, 2, 3])


def test_vocabulary_and_targets_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        spec_of([1, 2, 3], [4], prompt_logprobs=-1)


def test_a_server_keeps_its_limit():
    server = ModelFacts(vocab_size=100, max_model_len=32, max_logprobs=5)
    assert spec_of([1, 2, 3], prompt_logprobs=5, facts=server).layout.top == 5
    assert spec_of([1, 2, 3], [[1, 2, 3, 4, 5]], facts=server).layout.num_targets == 5
    with pytest.raises(ValueError, match=r"prompt_logprobs asks for 100 values .* max_logprobs=5"):
        spec_of([1, 2, 3], facts=server)
    with pytest.raises(ValueError, match="target_token_ids asks for 6 values"):
        spec_of([1, 2, 3], [[1, 2, 3, 4, 5, 6]], facts=server)
    with pytest.raises(ValueError, match="prompt_logprobs is 101, the vocabulary has 100"):
        spec_of([1, 2, 3], prompt_logprobs=101)
    unlimited = ModelFacts(vocab_size=100, max_model_len=32, max_logprobs=None)
    assert spec_of([1, 2, 3], facts=unlimited).layout.top == -1


def test_single_token_has_nothing_to_score():
    assert spec_of([7]).result_shape == (0, 100)
    assert spec_of([7], prompt_logprobs=0).result_shape == (0, 1)
    assert spec_of([7]).unread == () and spec_of([7]).start == 0


def test_an_echo_that_reads_no_cache_keeps_the_prompt_as_stock_has_it():
    from vllm.score.patches.front_end import without_cache

    tokenizer = byte_level_with_bos()
    text = "<|bos|>hello there"
    prompt = {"prompt": text, "prompt_token_ids": tokenizer(text)["input_ids"]}
    facts = ModelFacts(len(tokenizer), max_model_len=32)
    echo, own = params(prompt_logprobs=0), params(prompt_logprobs=0)
    setattr(echo, AS_TOKENISED, True)
    admitted = []
    for asked in (echo, own):
        sent = without_cache(asked)
        assert sent.skip_reading_prefix_cache and not asked.skip_reading_prefix_cache
        admitted.append(admit_tokenised(prompt, sent, facts, tokenizer).ids.tolist())
    assert admitted == [prompt["prompt_token_ids"], prompt["prompt_token_ids"][1:]]
