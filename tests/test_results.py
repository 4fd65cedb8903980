"""Results as users read them: numbers, tables, and texts of ids that a tokenizer lacks."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from vllm.score import ScoreModeError
from vllm.score.results import ANY_ID, EveryId, PromptLogprobsView, TokenScores
from vllm.score.server.answer import stock_prompt_logprobs

WORDS = "the reader opens a file and returns its first line"


@cache
def sentencepiece() -> Any:
    """Spaces are a part of tokens, and `decode` drops the first: vLLM puts it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@cache
def byte_level() -> Any:
    from vllm.score.tiny.corpus import train_tokenizer

    return train_tokenizer([WORDS], 300)


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_alternatives_beyond_the_tokenizer(make: Any) -> None:
    tokenizer = make()
    beyond = len(tokenizer) + 7
    ids = tokenizer.encode(WORDS, add_special_tokens=False)[:3]
    logprobs = np.array([-1.0, -2.0], dtype=np.float32)
    likeliest = np.array([[beyond, ids[1]], [beyond + 1, beyond]])
    scores = TokenScores(
        np.array(ids[1:]),
        logprobs,
        {"rank": np.array([2, 3])},
        top_token_ids=likeliest,
        top_logprobs=np.array([[-0.5, -1.0], [-0.2, -1.5]], dtype=np.float32),
    )
    view = PromptLogprobsView(scores, ids, EveryId(tokenizer).text, scores.statistics["rank"])
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

    own = convert_ids_list_to_tokens(tokenizer, ids)
    stock = stock_prompt_logprobs(view, tokenizer)
    for rows in (view, stock):
        assert rows[0] is None
        texts = [{t: p.decoded_token for t, p in row.items()} for row in rows[1:]]
        assert texts == [
            {ids[1]: own[1], beyond: ""},
            {ids[2]: own[2], beyond + 1: "", beyond: ""},
        ]
        ranks = [{t: p.rank for t, p in row.items()} for row in rows[1:]]
        assert ranks == [{ids[1]: 2, beyond: 1}, {ids[2]: 3, beyond + 1: 1, beyond: 2}]


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_known_ids_are_the_tokenizers(make: Any) -> None:
    tokenizer = make()
    every = EveryId(tokenizer)
    ids = tokenizer.encode(WORDS, add_special_tokens=False)
    assert every.decode(ids) == tokenizer.decode(ids)
    assert every.decode(ids[0]) == tokenizer.decode(ids[0])
    assert every.convert_ids_to_tokens(ids) == tokenizer.convert_ids_to_tokens(ids)
    assert every.decode([*ids, len(tokenizer) + 5]) == tokenizer.decode(ids)


@pytest.mark.engine
def test_alternatives_of_a_token_generated_for_an_echo(engine: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    tokenizer = sentencepiece()
    llm = engine("llama", model_options={"vocab_size": 256, "tokenizer": tokenizer})
    # The token itself is one that the tokenizer has.
    params = SamplingParams(max_tokens=1, logprobs=20, temperature=0.0, allowed_token_ids=[5])
    setattr(params, ANY_ID, True)
    llm.llm_engine.add_request("echo", TokensPrompt(prompt_token_ids=[3, 4, 5]), params)
    (output,) = llm.llm_engine.step()
    alternatives = output.outputs[0].logprobs[0]
    beyond = [found for token, found in alternatives.items() if token >= len(tokenizer)]
    assert len(alternatives) == 21 and beyond
    assert {found.decoded_token for found in beyond} == {""}
    assert alternatives[5].decoded_token == tokenizer.convert_ids_to_tokens(5).replace("▁", " ")


def scored(**more: Any) -> TokenScores:
    return TokenScores(
        np.array([7, 8, 9]), np.array([-1.0, -0.25, -np.inf], dtype=np.float32), start=4, **more
    )


def test_scores_show_their_numbers() -> None:
    assert repr(scored()) == (
        "TokenScores(start=4, shape=(3,), logprobs=[-1.0000, -0.2500, -inf], sum=-inf)"
    )
    entropy = {"entropy": np.zeros(2, dtype=np.float32)}
    whole = TokenScores(None, np.full((2, 50), -3.5, dtype=np.float32), entropy)
    assert repr(whole) == (
        "TokenScores(start=1, shape=(2, 50), logprobs=[-3.5000, -3.5000, -3.5000, -3.5000, ...], "
        "statistics=['entropy'])"
    )
    assert "shape=(0,), logprobs=[]" in repr(TokenScores(np.zeros(0, int), np.zeros(0)))


def test_scores_as_a_table() -> None:
    table = scored(
        statistics={"rank": np.array([1, 2, 3])},
        top_token_ids=np.array([[7, 1], [2, 8], [3, 4]]),
        top_logprobs=np.array([[-1, -2], [-0.1, -0.25], [-3, -4]], dtype=np.float32),
    ).to_pandas()
    assert table.to_dict("list") == {
        "position": [4, 5, 6],
        "token_id": [7, 8, 9],
        "logprob": [-1.0, -0.25, -np.inf],
        "rank": [1, 2, 3],
        "top_token_id_1": [7, 2, 3],
        "top_logprob_1": [-1.0, pytest.approx(-0.1), -3.0],
        "top_token_id_2": [1, 8, 4],
        "top_logprob_2": [-2.0, -0.25, -4.0],
    }
    assert table["logprob"].dtype == np.float32


def test_candidates_and_vocabularies_are_a_row_each() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    entropy = {"entropy": np.array([0.5, 1.5], dtype=np.float32)}
    for ids, expected in (
        (None, [0, 1, 2, 0, 1, 2]),
        (np.array([[5, 6, 7], [8, 9, 5]]), [5, 6, 7, 8, 9, 5]),
    ):
        table = TokenScores(ids, values, entropy, start=2).to_pandas()
        assert table["position"].tolist() == [2, 2, 2, 3, 3, 3]
        assert table["token_id"].tolist() == expected
        assert table["logprob"].tolist() == [0, 1, 2, 3, 4, 5]
        assert table["entropy"].tolist() == [0.5] * 3 + [1.5] * 3
    assert len(TokenScores(np.zeros(0, int), np.zeros(0)).to_pandas()) == 0


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # as where it is not installed
    with pytest.raises(ScoreModeError, match="pip install pandas"):
        scored().to_pandas()
