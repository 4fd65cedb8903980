"""Results as users read them: numbers, tables, and texts of ids that a tokenizer lacks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from vllm.score.engine.output import ANY_ID, EveryId, decoder
from vllm.score.results import PromptLogprobsView, TokenScores
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
    from vllm.score.tiny.tokenizer import train_tokenizer

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
    view = PromptLogprobsView(scores, ids, decoder(tokenizer), scores.statistics["rank"])
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

    own = convert_ids_list_to_tokens(tokenizer, ids)
    stock = stock_prompt_logprobs(scores, tokenizer)
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
    assert decoder(None) is None


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
