"""Unusual texts, equal requests and generation, against lm-eval's `hf` and float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import token_logprobs, with_bos
from vllm.score.errors import ScoreModeError

pytestmark = pytest.mark.engine

PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox"),
    ("The quick brown", " fox jumps over the lazy dog"),
    ("", "The value of"),
    ("", "<|bos|>The value of"),
    ("<|bos|>The value", " of the list"),
    ("Привет, ", "мир"),
    ("日本", "語です"),
    ("caf", "é au lait"),
    ("cafe", "\u0301 au lait"),
    ("smile 🙂", "🙃🙂"),
    ("lines\n\n", "more\n"),
    ("The quick brown", " fox"),
]


def requests(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def test_pairs_equal_hugging_face_in_order(ours: Any, hf: Any) -> None:
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = hf.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def merging_pairs(hf: Any) -> Iterator[tuple[str, str]]:
    """Words of one token, cut where lm-eval's own encoding leaves nothing of the second part."""
    for token in range(300, 1000, 7):
        word = hf.tok_decode([token])
        for cut in range(1, len(word)):
            context, continuation = f"Text: value{word[:cut]}", word[cut:]
            if word.isascii() and not hf._encode_pair(context, continuation)[1]:
                yield context, continuation
                break


def test_continuations_that_lm_eval_leaves_empty(
    ours: Any, hf: Any, reference: Callable[..., np.ndarray]
) -> None:
    """They have merged with the end of the context: scored from the merged token on."""
    pairs = [*itertools.islice(merging_pairs(hf), 8), ("retur", "n"), ("th", "e")]
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        encoded = hf.tokenizer(context + continuation, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        scored = sum(end > len(context) for _, end in offsets)
        ids = [hf.prefix_token_id, *ids] if scored == len(ids) else ids
        exact = token_logprobs(reference("llama", ids), ids)[-scored:].sum()
        assert logprob == pytest.approx(exact, abs=1e-4), (context, continuation)


def test_the_probability_of_nothing(ours: Any, caplog: Any) -> None:
    pairs = [("A context", ""), ("A context", " and more"), ("", "")]
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert found[0] == found[2] == (0.0, True)
    assert found[1][0] < 0
    assert "2 of 3 continuations have no tokens" in caplog.text


texts = st.text(
    st.one_of(
        st.sampled_from(list("abcdefghijklmnopqrstuvwxyz .,\n")),
        st.sampled_from(list("é日🙂\u0301Ж ")),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(context=texts, continuation=texts)
def test_encoding_is_lm_eval_s_and_never_empty(
    context: str, continuation: str, ours: Any, hf: Any
) -> None:
    ((head, tail),) = ours._encoder.encode_pairs([(context, continuation)], disable_tqdm=True)
    if context.strip():
        expected = hf._encode_pair(context, continuation)
        if expected[1]:
            assert (head, tail) == expected
            return
    assert head
    assert bool(tail) == bool(context[len(context.rstrip()) :] + continuation)
    whole = ours.tok_encode(context + continuation)
    assert head + tail in (whole, [ours.prefix_token_id, *whole])


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_tokenizers_that_write_bos_themselves(
    make_hf: Callable[..., Any], add_bos_token: bool | None
) -> None:
    from vllm.score.integrations.lm_eval.requests import Encoder

    hf = make_hf(add_bos_token=add_bos_token)
    number = with_bos(hf.tokenizer).bos_token_id
    encoder = Encoder(hf.tokenizer, add_bos_token, None)
    pairs = [(context, text) for context, text in PAIRS if context]
    expected = [hf._encode_pair(*pair) for pair in pairs]
    assert encoder.encode_pairs(pairs, disable_tqdm=True) == expected
    assert (expected[0][0][0] == number) is (add_bos_token is not False)
    assert [head.count(number) for head, _ in expected if head[0] == number].count(2) == 0
    # "return" is one token, which lm-eval leaves to the context.
    ((head, tail),) = encoder.encode_pairs([("retur", "n")], disable_tqdm=True)
    assert head.count(number) == (add_bos_token is not False)
    assert tail and hf.tok_decode(head + tail, skip_special_tokens=True) == "return"


def test_an_adapter_for_all_requests(
    engine: Callable[..., Any], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from tests.engine.test_lora import DTYPE, MODEL, RANK, make_adapter, merged_log_softmax
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}
    running = engine("llama", MODEL, dtype=DTYPE, max_model_len=1024, **options)
    folder = model_dir("llama", **MODEL)
    make_adapter(tmp_path / "adapter", folder, ["q_proj", "lm_head"], seed=5)
    adapted = VLLMScoreLM.from_llm(running, lora_local_path=str(tmp_path / "adapter"))
    ((logprob, _),) = adapted.loglikelihood(requests("loglikelihood", PAIRS[2:3]))
    head, tail = adapted._encode_pair(*PAIRS[2])
    for adapter, same in ((tmp_path / "adapter", True), (None, False)):
        rows = merged_log_softmax(folder, adapter, head + tail)
        exact = token_logprobs(rows, head + tail)[-len(tail) :].sum()
        assert bool(abs(logprob - exact) < 1e-3 * len(tail)) is same


def test_equal_and_neighbouring_requests_are_computed_once(llm: Any, ours: Any) -> None:
    pairs = [("One two", " the"), ("One two", " of the"), ("One two", " to"), ("One two", " the")]
    before = llm.request_counter.counter
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    # " the" and " to" follow the same tokens; " of the" follows others.
    assert llm.request_counter.counter - before == 2
    assert found[0] == found[3]
    alone = [ours.loglikelihood(requests("x", [p]), disable_tqdm=True)[0][0] for p in pairs]
    np.testing.assert_allclose([a for a, _ in found], alone, atol=1e-5)


def test_no_requests_and_empty_texts(ours: Any) -> None:
    assert ours.loglikelihood([]) == ours.generate_until([]) == []
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


def test_a_continuation_longer_than_the_model_is_refused(llm: Any) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    small = VLLMScoreLM.from_llm(llm, max_length=16)
    with pytest.raises(ScoreModeError, match=r"\d+ tokens, more than .* max_model_len=16: raise"):
        small.loglikelihood(requests("loglikelihood", [("a", " of" * 40)]))


GENERATIONS: list[dict[str, Any]] = [
    {"until": ["e"], "max_gen_toks": 8},
    {"until": "n", "max_gen_toks": 8, "do_sample": False, "temperature": 0.9},
    {"until": [], "max_new_tokens": 3},
    {"until": ["zz"], "max_gen_toks": 5, "temperature": 0},
]


def test_generation_is_hugging_face_s(ours: Any, hf: Any) -> None:
    for options in GENERATIONS:
        arguments = [(text, dict(options)) for text in ("The value of", "If the", "Return the")]
        found = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        expected = hf.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        for text, other in zip(found, expected, strict=True):
            # vLLM holds back the bytes of a character that is not finished.
            assert other == text or other.rstrip("\ufffd") == text.rstrip("\ufffd")
        assert arguments[0][1] == options


def test_long_contexts_leave_room_to_generate(llm: Any, make_hf: Callable[..., Any]) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    arguments = [("of the list " * 40, {"until": ["\n\n"], "max_gen_toks": 6})]
    found = VLLMScoreLM.from_llm(llm, max_length=40).generate_until(requests("g", arguments))
    expected = make_hf(max_length=40).generate_until(requests("g", arguments))
    assert [t.rstrip("\ufffd") for t in found] == [t.rstrip("\ufffd") for t in expected]
    with pytest.raises(ScoreModeError, match="max_gen_toks is 40, which leaves no room"):
        VLLMScoreLM.from_llm(llm, max_length=40).generate_until(
            requests("g", [("a", {"until": [], "max_gen_toks": 40})])
        )


def test_sampling_uses_the_given_parameters(ours: Any) -> None:
    options = {"do_sample": True, "temperature": 1.5, "seed": 3, "max_gen_toks": 12, "until": []}
    arguments = [("The value of", options)] * 2 + [("The value of", {**options, "seed": 4})]
    first, same, other = ours.generate_until(requests("g", arguments), disable_tqdm=True)
    assert first == same != other


def test_an_empty_context_generates_from_the_prefix_token(ours: Any) -> None:
    (text,) = ours.generate_until(requests("g", [("", {"until": [], "max_gen_toks": 4})]))
    (same,) = ours.generate_until(requests("g", [("<|bos|>", {"until": [], "max_gen_toks": 4})]))
    assert text and text == same


def test_thinking_is_for_generation(llm: Any) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    thinking = VLLMScoreLM.from_llm(llm, enable_thinking=True, think_end_token="e")
    with pytest.raises(ScoreModeError, match="enable_thinking=True is for generation"):
        thinking.loglikelihood(requests("loglikelihood", PAIRS))
    arguments = [("The value of", {"until": ["r"], "max_gen_toks": 30})]
    (plain,) = VLLMScoreLM.from_llm(llm).generate_until(
        requests("g", [("The value of", {"until": [], "max_gen_toks": 30})])
    )
    (answer,) = thinking.generate_until(requests("g", arguments))
    assert answer == plain.split("e")[-1].lstrip().split("r")[0]
