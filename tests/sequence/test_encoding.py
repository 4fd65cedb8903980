"""A context tokenised once for all its continuations: the tokens are those of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import PIECES, PROSE, odd_texts, other_tokenizers
from tests.sequence import tokenizers
from vllm.score.sequence import encoding
from vllm.score.sequence.encoding import JointEncoder

CONTINUATIONS = st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), min_size=2)


def all_tokenizers():
    return {**tokenizers.lossless(), **other_tokenizers(), "NFC": tokenizers.composing()}


def check(tokenizer, pairs):
    """How many pairs took over a context's tokens."""
    joints = JointEncoder(tokenizer).encode(pairs)
    assert len(joints) == len(pairs)
    for (context, continuation), got in zip(pairs, joints, strict=True):
        whole = tokenizer(
            context + continuation, add_special_tokens=False, return_offsets_mapping=True
        )
        assert [*got.before, *got.ids] == whole["input_ids"]
        offsets = [(got.begin + start, got.begin + end) for start, end in got.offsets]
        assert offsets == [tuple(row) for row in whole["offset_mapping"]][len(got.before) :]
    return sum(bool(got.before) for got in joints)


@pytest.mark.parametrize("name", all_tokenizers())
@settings(max_examples=40, deadline=None)
@given(contexts=st.lists(odd_texts(400), min_size=1, max_size=3), continuations=CONTINUATIONS)
def test_odd_texts(name, contexts, continuations):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "END", 64)
        patch.setattr(encoding, "_LONG", 65)
        check(all_tokenizers()[name], [(c, t) for c in contexts for t in continuations])


@pytest.mark.parametrize("name", all_tokenizers())
def test_prose(name):
    contexts = [PROSE[:5000], PROSE[3000:9990], PROSE[100:200], PROSE[-2000:]]
    pairs = [(c, t) for c in contexts for t in (" a word", "ing", "\n\n", "  x", "漢字")]
    taken_over = check(all_tokenizers()[name], pairs)
    if name.startswith("unigram"):
        assert taken_over == 0
    else:
        assert taken_over >= 10  # of the 15 with a long context


def test_one_word_without_end_is_tokenised_whole():
    assert check(tokenizers.lossless()["bytes"], [("漢字" * 2000, t) for t in ("a", " b")]) == 0


def test_a_single_continuation_is_tokenised_with_its_context():
    assert check(tokenizers.lossless()["bytes"], [(PROSE[:5000], " a"), (PROSE[:4000], " b")]) == 0
