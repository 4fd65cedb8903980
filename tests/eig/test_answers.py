from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import ODD, PROSE, byte_level_with_bos
from tests.sequence.tokenizers import WithoutOffsets, bert_like, lossless
from vllm.score.eig.answers import AnswerFormat
from vllm.score.errors import ScoreModeError

PIECES = ["1", "23", "a", "the", " ", "é", "漢", "😀", ".", ",", "-", "\t", "e\u0301", "="]
ANSWERS = st.lists(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)
    .map("".join)
    .filter(lambda text: bool(text.strip())),
    min_size=1,
    max_size=6,
    unique=True,
)
CUES = ["\n\nThe answer is: ", "The answer is:", "=", "so it is  ", "Answer:\n"]


@cache
def metaspace() -> Any:
    """As SentencePiece's for Llama 2: a blank before the text, blanks within the tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([PROSE[:40_000], ODD * 20, "The answer is: 12\n" * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@cache
def words() -> Any:
    """Words between blanks; blanks are no tokens. No end-of-sequence token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "The", "answer", "is:", "yes", "no", "maybe", "not", "END"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("name", lossless())
@given(answers=ANSWERS, cue=st.sampled_from(CUES), end=st.sampled_from(["\n", "", "END", "\n\n"]))
@example(answers=["1", "12", "123", "1 2"], cue="The answer is: ", end="\n")
@settings(max_examples=40, deadline=None)
def test_cue_and_target_are_the_tokens_of_the_whole_text(name, end, answers, cue):
    tokenizer = lossless()[name]
    cue_ids, targets = AnswerFormat(cue, end).encode(tokenizer, answers)
    for answer, target in zip(answers, targets, strict=True):
        assert target
        whole = tokenizer.encode(cue + answer + end, add_special_tokens=False)
        assert cue_ids + target == whole
        assert tokenizer.decode(whole, skip_special_tokens=False) == cue + answer + end
    # No token of an answer is left in what all have in common.
    assert cue.startswith(tokenizer.decode(cue_ids))


@given(answers=ANSWERS)
@settings(max_examples=20, deadline=None)
def test_the_end_of_sequence_token(answers):
    tokenizer = byte_level_with_bos()
    cue_ids, targets = AnswerFormat(end=None).encode(tokenizer, answers)
    for answer, target in zip(answers, targets, strict=True):
        assert target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(cue_ids + target[:-1]) == AnswerFormat().cue + answer
    assert tokenizer.bos_token_id not in cue_ids


def test_the_blank_of_the_cue_belongs_to_the_answer_where_the_tokenizer_merges_it():
    from vllm.score.tiny.corpus import train_tokenizer

    tokenizer = train_tokenizer(["The answer is: yes\nThe answer is: no\n" * 5], 400)
    cue_ids, targets = AnswerFormat("The answer is: ").encode(tokenizer, ["yes", "no"])
    assert tokenizer.decode(cue_ids) == "The answer is:"
    assert [tokenizer.decode(target) for target in targets] == [" yes\n", " no\n"]
    assert [tokenizer.decode(target[:1]) for target in targets] == [" yes", " no"]


def test_one_cut_for_all_where_one_answer_merges_with_the_cue():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["=", "1", "2", "\n", "=1"]
    bpe = models.BPE({name: i for i, name in enumerate(names)}, [("=", "1")])
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert AnswerFormat("2=").encode(tokenizer, ["2", "1", "11"]) == (
        [2],
        [[0, 2, 3], [4, 3], [4, 1, 3]],
    )
    # The whole cue is in the answer's token.
    assert AnswerFormat("=", "").encode(tokenizer, ["1"]) == ([], [[4]])


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, WithoutOffsets])
def test_tokens_with_a_blank_before_them(wrap):
    tokenizer = metaspace()
    for cue in ("The answer is: ", "The answer is:"):
        answers = ["12", "1", "the text", "not 2"]
        cue_ids, targets = AnswerFormat(cue).encode(wrap(tokenizer), answers)
        assert len(cue_ids) > 0
        for answer, target in zip(answers, targets, strict=True):
            assert tokenizer.decode(cue_ids + target) == f"{cue}{answer}\n"


def test_words():
    cue_ids, targets = AnswerFormat("The answer is: ", " END").encode(
        words(), ["yes", "no", "maybe not"]
    )
    assert (cue_ids, targets) == ([1, 2, 3], [[4, 8], [5, 8], [6, 7, 8]])


def test_an_end_that_the_tokenizer_drops():
    with pytest.raises(ScoreModeError, match=r"end is '\\n', which the tokenizer drops"):
        AnswerFormat("The answer is: ").encode(words(), ["yes"])
    with pytest.raises(ScoreModeError, match="end is None, but the tokenizer has no end-of-seq"):
        AnswerFormat("The answer is: ", None).encode(words(), ["yes"])


def test_unknown_words_have_no_probability():
    with pytest.raises(ScoreModeError, match="does not know all of 'perhaps END'"):
        AnswerFormat("The answer is: ", " END").encode(words(), ["yes", "perhaps"])


def test_one_unknown_token_for_cue_and_answer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "=": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("z=x|z|="), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert AnswerFormat("z=").cue_tokens(tokenizer) == [0, 1]
    with pytest.raises(ScoreModeError, match="does not know all of 'x'"):
        AnswerFormat("z=", "").encode(tokenizer, ["x"])


def test_answers_with_the_same_tokens():
    with pytest.raises(ScoreModeError, match="same tokens of 'the' and 'THE'"):
        AnswerFormat("is: ", ".").encode(bert_like(), ["the", "THE"])


def test_an_answer_that_the_tokenizer_drops():
    with pytest.raises(ScoreModeError, match=r"drops '\\x00' behind the cue"):
        AnswerFormat("is: ", ".").encode(bert_like(), ["\x00"])


@pytest.mark.parametrize(
    ("end", "answers", "message"),
    [
        ("\n", [], r"answers is \[\]; give a list"),
        ("\n", "yes", "answers is 'yes'; give a list"),
        ("\n", ["a", "b", "a"], "'a' is given twice"),
        ("\n", ["a", ""], "'' is no answer"),
        ("\n", [" "], "' ' is no answer"),
        ("\n", [12], "12 is no answer"),
        ("\n", ["a", "b\nc"], r"'b\\nc' holds the end '\\n'"),
        ("\n\n", ["b\n"], r"'b\\n' holds the end '\\n\\n', or does with it behind"),
        ("\n", ["\ud800"], "lone surrogate"),
    ],
)
def test_answers_that_cannot_be_used(end, answers, message):
    tokenizer = byte_level_with_bos()
    with pytest.raises(ScoreModeError, match=message):
        AnswerFormat(end=end).encode(tokenizer, answers)


def test_formats_that_cannot_be_used():
    for cue in ("", "  ", "\n", None):
        with pytest.raises(ScoreModeError, match=r"cue is .*; give a text"):
            AnswerFormat(cue)  # type: ignore[arg-type]
    with pytest.raises(ScoreModeError, match="end is 3; give the text"):
        AnswerFormat(end=3)  # type: ignore[arg-type]
    with pytest.raises(ScoreModeError, match="cue is '\\\\x00 ', of which the tokenizer makes no"):
        AnswerFormat("\x00 ").encode(bert_like(), ["a"])
