"""`SequenceProbVLLMHook` on a real engine, against Hugging Face in float64."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest

from tests.sequence.tokenizers import token_bytes
from vllm.score import ScoreModeError
from vllm.score.sequence import SequenceProbVLLMHook

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
KEYS = {
    "context",
    "sequence",
    "log_prob",
    "prob",
    "perplexity",
    "num_tokens",
    "log_prob_per_token",
    "perplexity_per_token",
    "token_ids",
    "token_log_probs",
    "spans_boundary",
    "spanned_context",
}
CONTEXTS = ["The capital of France is", "A message part in ", "", "é 漢字" * 30]
TARGETS = ["Paris", " Paris", " the header of a message", "字😀!", "\n"]


@pytest.fixture(scope="module")
def hook(llm):
    return SequenceProbVLLMHook(llm, llm.get_tokenizer())


@pytest.fixture(scope="module")
def expected(llm, reference):
    """`expected(context, target)`: (token ids, log-probabilities) from the bytes of the tokens."""
    tokenizer = llm.get_tokenizer()

    def compute(context, target):
        ids = tokenizer.encode(context + target)
        start, size = 0, 0
        for piece in token_bytes(tokenizer, ids):
            size += len(piece)
            if size > len(context.encode()):
                break
            start += 1
        if start == 0:
            ids, start = [tokenizer.bos_token_id, *ids], 1
        rows = reference("llama", ids)
        return ids[start:], rows[np.arange(start - 1, len(ids) - 1), ids[start:]]

    return compute


def check(result, ids, logprobs):
    assert set(result) == KEYS
    assert result["token_ids"] == ids
    np.testing.assert_allclose(result["token_log_probs"], logprobs, atol=TOLERANCE)
    total, count = logprobs.sum(), len(ids)
    slack = TOLERANCE * count
    assert result["log_prob"] == pytest.approx(total, abs=slack)
    assert result["log_prob"] == math.fsum(result["token_log_probs"])
    assert result["prob"] == pytest.approx(np.exp(total), rel=slack)
    assert result["perplexity"] == pytest.approx(np.exp(-total), rel=slack)
    assert result["num_tokens"] == count
    assert result["log_prob_per_token"] == pytest.approx(total / count, abs=TOLERANCE)
    assert result["perplexity_per_token"] == pytest.approx(np.exp(-total / count), rel=TOLERANCE)
    json.dumps(result)


def test_every_pair_equals_hugging_face(hook, expected):
    results = hook.get_log_prob(CONTEXTS, TARGETS)
    order = [(c, t) for c in CONTEXTS for t in TARGETS]
    assert [(r["context"], r["sequence"]) for r in results] == order
    for result, (context, target) in zip(results, order, strict=True):
        check(result, *expected(context, target))
    some = order[::-3]
    for result, (context, target) in zip(hook.get_log_prob_of_pairs(some), some, strict=True):
        assert (result["context"], result["sequence"]) == (context, target)
        check(result, *expected(context, target))


def test_a_leading_space_makes_another_sequence(hook, expected):
    context = "The capital of France is"
    bare, spaced = hook.get_log_prob([context], ["Paris", " Paris"])
    for result, target in ((bare, "Paris"), (spaced, " Paris")):
        check(result, *expected(context, target))
    assert bare["token_ids"] != spaced["token_ids"]
    assert abs(bare["log_prob"] - spaced["log_prob"]) > 0.1


def test_a_token_over_the_boundary(hook, expected):
    (apart,) = hook.get_log_prob(["A part in"], [" the"])
    assert (apart["spans_boundary"], apart["spanned_context"]) == (False, "")
    assert apart["num_tokens"] == 1
    # With the space on the other side the tokens are the same, and the result says so.
    (joined,) = hook.get_log_prob(["A part in "], ["the"])
    assert (joined["spans_boundary"], joined["spanned_context"]) == (True, " ")
    check(joined, *expected("A part in", " the"))
    with pytest.raises(ScoreModeError, match=r"^contexts\[0\], target_sequences\[0\]: the token"):
        hook.get_log_prob(["A part in "], ["the"], boundary="strict")
    (separate,) = hook.get_log_prob(["A part in "], ["the"], boundary="separate")
    assert separate["token_ids"] == hook.tokenizer.encode("the")
    assert not separate["spans_boundary"]


def test_unlikely_tokens_are_as_exact_as_likely_ones(hook, reference):
    context = "The header of a message"
    tokenizer = hook.tokenizer
    ids = tokenizer.encode(context)
    row = reference("llama", ids)[-1]
    order = np.argsort(row)
    texts = {}
    for token in order.tolist():  # the least likely first
        text = tokenizer.decode([token])
        if text.startswith(" ") and tokenizer.encode(context + text) == [*ids, token]:
            texts[text] = token
    assert len(texts) > 50
    results = hook.get_log_prob([context], list(texts))
    ranks = np.empty(len(row), dtype=int)
    ranks[order] = np.arange(len(row), 0, -1)
    assert sum(ranks[token] > 20 for token in texts.values()) > 40
    for result, token in zip(results, texts.values(), strict=True):
        check(result, [token], row[[token]])


def test_one_and_many_tokens_together_and_alone(hook):
    targets = [" the", " of", " the header", " the", "x"]
    together = hook.get_log_prob(["in", "part of"], targets)
    for result in together:
        (alone,) = hook.get_log_prob([result["context"]], [result["sequence"]])
        assert alone["token_ids"] == result["token_ids"]
        np.testing.assert_allclose(
            alone["token_log_probs"], result["token_log_probs"], atol=TOLERANCE
        )
    assert together[0] == together[3]
    assert hook.get_log_prob([], targets) == hook.get_log_prob(["in"], []) == []


def test_a_probability_below_float64(hook):
    (result,) = hook.get_log_prob(["a"], [" zxq 漢" * 40])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = hook.get_log_prob(["a"], [" zxq 漢" * 40])
    assert again["log_prob"] == pytest.approx(result["log_prob"], abs=1e-2)
    assert result["log_prob"] < -800
    assert (result["prob"], result["perplexity"]) == (0.0, math.inf)
    assert 1 < result["perplexity_per_token"] < 1e6


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or m['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_messages_go_through_the_chat_template(hook, model_dir, reference):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    tokenizer.chat_template = TEMPLATE
    chat = SequenceProbVLLMHook(hook.llm, tokenizer)
    question = [{"role": "user", "content": "Which part?"}]
    begun = [*question, {"role": "assistant", "content": "The"}]
    results = chat.get_log_prob([question, begun], ["The header", " header"])
    rendered = ["<|bos|><user>Which part?\n<assistant>", "<|bos|><user>Which part?\n<assistant>The"]
    for i, result in enumerate(results):
        ids = tokenizer.encode(rendered[i // 2] + result["sequence"], add_special_tokens=False)
        assert ids.count(tokenizer.bos_token_id) == 1
        m = result["num_tokens"]
        rows = reference("llama", ids)
        check(result, ids[-m:], rows[np.arange(len(ids) - 1 - m, len(ids) - 1), ids[-m:]])
        assert result["context"] == [question, begun][i // 2]
    # The same text, whether the assistant had begun it or not.
    assert results[0]["token_ids"][-1] == results[3]["token_ids"][-1]


def test_bad_arguments_are_named(hook):
    def refused(match, contexts, targets, **options):
        with pytest.raises(ScoreModeError, match=match):
            hook.get_log_prob(contexts, targets, **options)

    refused(r"^contexts must be a list, got one str; write \[contexts\]", "a", ["b"])
    refused("^target_sequences must be a list, got one str", ["a"], "b")
    refused(r"^contexts\[1\] is int; give a text, or a list of messages", ["a", 3], ["b"])
    refused(r"^contexts\[0\] is one message", [{"role": "user", "content": "x"}], ["b"])
    refused(r"^contexts\[0\] has no messages", [[]], ["b"])
    refused(r"^contexts\[0\]\[1\] is 'x'; give a message", [[{"role": "user"}, "x"]], ["b"])
    refused(r"^contexts\[0\]: the chat template does not", [[{"role": "user"}]], ["b"])
    refused(r"^target_sequences\[1\] is NoneType; give a text", ["a"], ["b", None])
    refused(r"^contexts\[0\], target_sequences\[1\]: the continuation is empty", ["a"], ["b", ""])
    refused(r"^contexts\[0\], target_sequences\[1\]: .*lone surrogate", ["a"], ["b", "\ud800"])
    refused("^boundary 'loose' is unknown; there are spanning", ["a"], ["b"], boundary="loose")
    refused(
        r"^contexts\[0\], target_sequences\[1\]: \d+ tokens together, .* is 2048; shorten",
        ["a"],
        ["b", "漢" * 2000],
    )
    with pytest.raises(ScoreModeError, match=r"^pairs\[1\] is 'ab'; give \(context, sequence\)"):
        hook.get_log_prob_of_pairs([("a", "b"), "ab"])
    from transformers import ByT5Tokenizer

    larger = SequenceProbVLLMHook(hook.llm, ByT5Tokenizer(extra_ids=2000))
    with pytest.raises(ScoreModeError, match=r"token id \d+ is outside .* belongs to the model"):
        larger.get_log_prob(["a"], ["b<extra_id_1999>"])


def test_the_engines_tokenizer_is_the_default(llm):
    assert SequenceProbVLLMHook(llm).tokenizer is llm.get_tokenizer()


def test_options_reach_the_engine(hook):
    from tqdm import tqdm

    from vllm.lora.request import LoRARequest

    bars = []

    def bar(*args, **kwargs):
        bars.append(tqdm(*args, **{**kwargs, "disable": True}))
        return bars[-1]

    (plain,) = hook.get_log_prob(["The header of a message" * 20], [" is read"])
    (anew,) = hook.get_log_prob(
        ["The header of a message" * 20], [" is read"], skip_prefix_cache=True, use_tqdm=bar
    )
    assert len(bars) == 1
    assert anew["token_log_probs"] == pytest.approx(plain["token_log_probs"], abs=TOLERANCE)
    with pytest.raises(ScoreModeError, match="the engine has no LoRA"):
        hook.get_log_prob(["a"], ["b"], lora_request=LoRARequest("adapter", 1, "/nowhere"))
