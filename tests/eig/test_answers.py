from __future__ import annotations

import re
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import ODD, PROSE, byte_level_with_bos
from tests.sequence.tokenizers import WithoutOffsets, bert_like, lossless
from vllm.score.eig.answers import (
    AnswerFormat,
    find_boxed,
    find_numbers,
    find_pattern,
    normalise,
)
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


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("no digits", []),
        ("It is 3.", ["3"]),
        ("3.5.", ["3.5"]),
        ("3. Then 4", ["3", "4"]),
        (".5 of it", ["0.5"]),
        ("1,000 and 12,345,678.90", ["1000", "12345678.9"]),
        ("1,2,3 and 1,0000", ["1", "2", "3", "1", "0"]),
        ("$1,250.00, or -$5", ["1250", "-5"]),
        (r"\$3 and $-7$", ["3", "-7"]),
        ("-4 − 5 but −6", ["-4", "5", "-6"]),
        ("7-5=2, (3)-1", ["7", "5", "2", "3", "1"]),
        ("1/2 and -3/4", ["1/2", "-3/4"]),
        ("on 12/25/2026", ["12", "25", "2026"]),
        ("50% of 12kg", ["50", "12"]),
        ("1e5 and 2.5E-3", ["1e5", "2.5E-3"]),
        ("x2 = 4", ["4"]),
        ("007", ["7"]),
        ("-0.0", ["0"]),
    ],
)
def test_numbers(text, numbers):
    assert [found.answer for found in find_numbers(text)] == numbers


@given(st.decimals(-(10**9), 10**9, places=3), st.booleans(), st.sampled_from(["", ".", "%", "!"]))
def test_a_number_is_found_however_it_is_written(value, commas, behind):
    written = f"{value:,}" if commas else str(value)
    (found,) = find_numbers(f"so it is {written}{behind}")
    assert Decimal(found.answer) == value
    assert found.answer == normalise(written)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{42}.", ["42"]),
        (r"\boxed{\frac{1}{2}} or \fbox {x}", [r"\frac{1}{2}", "x"]),
        (r"\boxed{1,000} and \boxed{5.0}", ["1000", "5"]),
        (r"\boxed{\boxed{3}}", ["3"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{} \boxed{ } \boxed{7", []),
        (r"\boxed{7 \boxed{8}", ["8"]),
        (r"\boxed{ a  b }", ["a b"]),
    ],
)
def test_boxes(text, boxes):
    assert [found.answer for found in find_boxed(text)] == boxes


@st.composite
def _balanced(draw, depth=3):
    parts = st.sampled_from(["a", "+", r"\{", r"\}", "x"])
    if depth:
        parts = parts | _balanced(depth - 1).map(lambda inner: "{" + inner + "}")
    return "".join(draw(st.lists(parts, min_size=1, max_size=4)))


@given(_balanced())
def test_balanced_braces(inner):
    (found,) = find_boxed(rf"{{ \boxed{{{inner}}} }}")
    assert found.answer == inner


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1,000", "1000"),
        ("5.0", "5"),
        (" $12 ", "12"),
        (r"\$12", "12"),
        ("$x + 1$", "x + 1"),
        ("12 %", "12"),
        (r"12\%", "12"),
        ("-3.10", "-3.1"),
        ("−3", "-3"),
        ("12.", "12"),
        ("yes.", "yes."),
        ("  New \n York ", "New York"),
        ("1,00", "1,00"),
        ("1/2", "1/2"),
        (".", "."),
        ("-", "-"),
        ("", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@given(st.text(st.sampled_from("0123456789.,-$%\\ ab/"), max_size=8))
def test_what_is_normal_stays(text):
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize("text", ["12 and 3.", "12 and 3,0", "12 and 34", "12 and 3/", "12 and 3e"])
def test_numbers_that_may_go_on(text):
    found = find_numbers(text)
    assert not found[0].open and all(f.open for f in found[1:])
    closed = find_numbers(text + " ")
    assert len(closed) == len(found) and not any(f.open for f in closed)


def test_places():
    assert [f.end for f in find_numbers("a 12, 3")] == [4, 7]
    (box,) = find_boxed(r"\boxed{1}")
    assert (box.end, box.open) == (9, False)


def test_patterns():
    whole = find_pattern("A or B", re.compile("[AB]"))
    assert [(f.answer, f.end, f.open) for f in whole] == [("A", 1, False), ("B", 6, True)]
    group = find_pattern("key: 5.0; key: ;", re.compile(r"key: (\S*);"))
    assert [f.answer for f in group] == ["5"]
