"""A language model that is a table, asked through the interface that engines have."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm.score.eig.records import Batch, Continuation, Next, Sample, Score

END_OF_SEQUENCE = "<eos>"


def character_tokenizer(characters: str) -> Any:
    """One token a character, and an end-of-sequence token, id 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate([END_OF_SEQUENCE, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_SEQUENCE))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_SEQUENCE)


class ExactModel:
    """Every context has its own distribution over some of the tokens, in float64.

    Args:
        tokenizer: its end-of-sequence token is never out of the question.
        tokens: that have a probability above 0.
        seed: of the distributions.
        sharpness: standard deviation of the logits, in nats.
    """

    def __init__(
        self, tokenizer: Any, tokens: list[int], seed: int, sharpness: float = 2.0
    ) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        self._seed, self._sharpness = seed, sharpness
        self.batches: list[Batch] = []

    def log_softmax(self, context: tuple[int, ...]) -> np.ndarray:
        """float64 [V], in nats."""
        rng = np.random.default_rng([self._seed, *context])
        logits = rng.normal(0, self._sharpness, len(self.tokens))
        row = np.full(len(self.tokenizer), -np.inf)
        row[self.tokens] = logits - np.log(np.exp(logits).sum())
        return row

    async def run(self, batch: Batch) -> list[Any]:
        self.batches.append(batch)
        answers = {Next: self._next, Sample: self._sample, Score: self._score}
        return [answers[type(work)](work) for work in batch.work]

    def _next(self, work: Next) -> tuple[np.ndarray, np.ndarray]:
        row = self.log_softmax(tuple(work.context))
        order = np.argsort(-row, kind="stable")[: work.top]
        return order, row[order].astype(np.float32)

    def _score(self, work: Score) -> list[np.ndarray]:
        scored = []
        for target in work.targets:
            whole = [*work.context, *target]
            places = range(len(work.context), len(whole))
            rows = [self.log_softmax(tuple(whole[:i]))[whole[i]] for i in places]
            scored.append(np.array(rows, np.float32))
        return scored

    def _sample(self, work: Sample) -> list[Continuation]:
        if work.temperature != 1 or work.top_p != 1 or work.ignore_eos:
            raise NotImplementedError("this model samples from its own distribution only")
        rng = np.random.default_rng([self._seed, 1, *work.context])
        return [self._draw(work, rng) for _ in range(work.count)]

    def _draw(self, work: Sample, rng: np.random.Generator) -> Continuation:
        ids: list[int] = []
        text, finished = "", False
        while len(ids) < work.max_tokens and not finished:
            row = np.exp(self.log_softmax((*work.context, *ids)))
            token = int(rng.choice(len(row), p=row / row.sum()))
            finished = token == self.tokenizer.eos_token_id
            if not finished:
                ids.append(token)
                text = self.tokenizer.decode(ids)
                finished = any(stop in text for stop in work.stop)
        return Continuation(ids, text, finished)
