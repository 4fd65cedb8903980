"""How likely a model finds given continuations after given contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from vllm.score.checks import check_list, check_name
from vllm.score.continuations import ContinuationScores, score_token_pairs
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import RULES, BoundaryTokenizer, SplitTokens
from vllm.score.sequence.encoding import Pair
from vllm.score.tokens import is_token_ids, read_token_ids, render_messages

if TYPE_CHECKING:
    from tqdm import tqdm

    from vllm import LLM
    from vllm.lora.request import LoRARequest

# Name of the pair, context and its name, sequence and its name; names are for errors.
_Row = tuple[str, Any, str, Any, str]


class SequenceProbability(TypedDict):
    """What `SequenceScorer` says of a sequence after a context; nats.

    Attributes:
        context, sequence: as given.
        log_prob: sum of `token_log_probs`, in float64.
        prob: exp(log_prob).
        perplexity: exp(-log_prob), of the sequence as a whole; inf beyond float64.
        num_tokens: number of scored tokens, m.
        log_prob_per_token: log_prob / m.
        perplexity_per_token: exp(-log_prob / m).
        token_ids: [m], the scored tokens.
        token_log_probs: [m].
        spans_boundary: whether the first of them also holds the end of the context.
        spanned_context: the characters of the context that it holds, or "".
    """

    context: Any
    sequence: Any
    log_prob: float
    prob: float
    perplexity: float
    num_tokens: int
    log_prob_per_token: float
    perplexity_per_token: float
    token_ids: list[int]
    token_log_probs: list[float]
    spans_boundary: bool
    spanned_context: str


def score_continuations(
    llm: LLM,
    pairs: Iterable[tuple[Any, Any]],
    *,
    boundary: str = "spanning",
    tokenizer: Any = None,
    statistics: Sequence[str] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    use_tqdm: bool | Callable[..., tqdm] = True,
    skip_prefix_cache: bool = False,
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    reproducible: bool = False,
) -> list[ContinuationScores]:
    """Log-probability of each continuation after its context, in nats.

    Contexts are computed once however many continuations they have, and continuations that differ
    in their last token together.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        pairs: (context, continuation) each: two texts, two lists of token ids (of at least one
            token, taken as they are), or chat messages and a text.
        boundary: what becomes of a token that holds the end of a context and the beginning of its
            continuation: "spanning" scores from its start and says so, "strict" refuses,
            "separate" tokenises the two apart (`vllm.score.sequence.boundary`).
        tokenizer: for texts and messages; by default the engine's own.
        statistics: more to compute at each position, names from `vllm.score.ops.statistics`.
        temperature, top_p, use_tqdm, skip_prefix_cache, reproducible: as for `vllm.score.score`.
        lora_request: an adapter for all pairs, or one (or None) for each.

    Returns:
        One `ContinuationScores` per pair, in order: `logprobs` of its tokens [m], their `sum()`
        and `mean()`, and whether the continuation `is_greedy`.

    Raises:
        ScoreModeError: a pair cannot be used; it is named, and nothing has run.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    check_llm(llm)
    prepared = _prepare(
        _rows(pairs),
        lambda: llm.get_tokenizer() if tokenizer is None else tokenizer,
        boundary,
        llm.llm_engine.model_config.get_vocab_size(),
    )
    return _score(
        llm,
        prepared,
        statistics=["argmax", *(name for name in statistics if name != "argmax")],
        temperature=temperature,
        top_p=top_p,
        use_tqdm=use_tqdm,
        skip_prefix_cache=skip_prefix_cache,
        lora_request=lora_request,
        reproducible=reproducible,
    )


class SequenceScorer:
    """Probabilities of sequences under the model of an `LLM`.

    Hooks that `LLM.collective_rpc` has registered on a layer, the logits processor or the head in
    the workers take effect, and each such call drops the prefix cache. A hook that changes what it
    does without one needs `skip_prefix_cache=True`, and one on a layer `LLM(enforce_eager=True)`:
    compiled graphs are traced before it is there.

    Args:
        llm: a `vllm.LLM` on which nothing else is running.
        tokenizer: by default the engine's own.
    """

    def __init__(self, llm: LLM, tokenizer: Any = None) -> None:
        check_llm(llm)
        self.llm = llm
        self.tokenizer = llm.get_tokenizer() if tokenizer is None else tokenizer

    def get_log_prob(
        self,
        contexts: Sequence[Any],
        target_sequences: Sequence[str],
        *,
        boundary: str = "spanning",
        use_tqdm: bool | Callable[..., tqdm] = False,
        skip_prefix_cache: bool = False,
        lora_request: LoRARequest | None = None,
    ) -> list[SequenceProbability]:
        """Every sequence after every context.

        Args:
            contexts: texts, or lists of messages ({"role": ..., "content": ...}) for the chat
                template. After an empty one the sequence follows BOS (or EOS, without a BOS),
                which it may also begin with itself.
            target_sequences: texts, exactly as they go on: "Paris" and " Paris" are two.
            boundary: see `score_continuations`.
            use_tqdm: show a progress bar; or a function that makes one.
            skip_prefix_cache: compute every token anew.
            lora_request: an adapter.

        Returns:
            A dict for each context and sequence, all sequences of the first context first.

        Raises:
            ScoreModeError: an argument cannot be used; it is named, and nothing has run.
            ScoreModeUnavailable: score mode is off in this installation.
        """
        rows = (
            (f"{c}, {t}", context, c, sequence, t)
            for c, context in _named("contexts", contexts)
            for t, sequence in _named("target_sequences", target_sequences)
        )
        return score_prepared(
            self.llm,
            _prepare(rows, lambda: self.tokenizer, boundary),
            use_tqdm=use_tqdm,
            skip_prefix_cache=skip_prefix_cache,
            lora_request=lora_request,
        )

    def get_log_prob_of_pairs(
        self,
        pairs: Iterable[tuple[Any, Any]],
        *,
        boundary: str = "spanning",
        use_tqdm: bool | Callable[..., tqdm] = False,
        **options: Any,
    ) -> list[SequenceProbability]:
        """As `get_log_prob`, with the same options, for (context, sequence) pairs."""
        prepared = prepare_pairs(pairs, self.tokenizer, boundary)
        return score_prepared(self.llm, prepared, use_tqdm=use_tqdm, **options)


SequenceProbVLLMHook = SequenceScorer  # the name of a tool that hooked the head of the model


@dataclass(frozen=True)
class Prepared:
    """Pairs ready to be scored: all that can be refused without an engine has been.

    Attributes:
        rows: [n], as given.
        splits: [n].
    """

    rows: Sequence[_Row]
    splits: Sequence[SplitTokens]

    def check_length(self, longest: int, what: str) -> None:
        """Raise ScoreModeError for a pair of more tokens than `longest`, which is `what`'s."""
        for (name, *_), split in zip(self.rows, self.splits, strict=True):
            if len(split.token_ids) > longest:
                raise ScoreModeError(
                    f"{name}: {len(split.token_ids)} tokens together, {what} is {longest}; "
                    "shorten the context."
                )


def prepare_pairs(
    pairs: Iterable[tuple[Any, Any]],
    tokenizer: Any,
    boundary: str = "spanning",
    names: Sequence[str] | None = None,
) -> Prepared:
    """The tokens of (context, sequence) pairs of texts, or messages and a text.

    Args:
        names: of the pairs, for errors; by default pairs[i].

    Raises:
        ScoreModeError: a pair cannot be used; it is named.
    """
    return _prepare(_rows(pairs, names), lambda: tokenizer, boundary)


def _named(field: str, values: Any) -> list[tuple[str, Any]]:
    check_list(field, values)
    return [(f"{field}[{i}]", value) for i, value in enumerate(values)]


def _rows(pairs: Iterable[tuple[Any, Any]], names: Sequence[str] | None = None) -> Iterator[_Row]:
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ScoreModeError(
            f"pairs is {type(pairs).__name__}; give a list of (context, sequence) pairs."
        )
    for i, pair in enumerate(pairs):
        name = f"pairs[{i}]" if names is None else names[i]
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ScoreModeError(f"{name} is {pair!r:.60}; give (context, sequence).")
        yield name, pair[0], f"{name}, context", pair[1], f"{name}, sequence"


def _prepare(
    rows: Iterable[_Row], tokenizer: Callable[[], Any], boundary: str, vocab_size: int | None = None
) -> Prepared:
    """The tokens of all pairs; without `vocab_size` token ids are no context."""
    check_name("boundary", boundary, RULES)
    rows = list(rows)
    splits: dict[int, SplitTokens] = {}
    texts: dict[int, Pair] = {}
    messages, rendered = None, ""
    for i, (name, context, context_name, sequence, sequence_name) in enumerate(rows):
        if vocab_size is not None and is_token_ids(context):
            ids = read_token_ids(context, vocab_size, context_name).tolist()
            more = read_token_ids(sequence, vocab_size, sequence_name).tolist()
            if not more:
                raise ScoreModeError(f"{sequence_name} has no tokens; give at least one.")
            splits[i] = SplitTokens(ids + more, len(ids))
            continue
        templated = not isinstance(context, str)
        if templated:
            if messages is None or messages != context:
                messages, rendered = context, render_messages(context, tokenizer(), context_name)
            context = rendered
        if not isinstance(sequence, str):
            raise ScoreModeError(f"{sequence_name} is {type(sequence).__name__}; give a text.")
        texts[i] = Pair(context, sequence, templated, name)
    if texts:
        found = BoundaryTokenizer(tokenizer(), boundary).split(texts.values())
        splits.update(zip(texts, found, strict=True))
    return Prepared(rows, [splits[i] for i in range(len(rows))])


def score_prepared(llm: LLM, prepared: Prepared, **options: Any) -> list[SequenceProbability]:
    """The dicts of `SequenceScorer.get_log_prob`; options are those of `score()`.

    Raises:
        ScoreModeError: a pair is too long for the engine, or has an id that its model lacks.
    """
    scores = _score(llm, prepared, **options)
    rows = zip(prepared.rows, scores, strict=True)
    return [_probability(context, sequence, one) for (_, context, _, sequence, _), one in rows]


def _score(llm: LLM, prepared: Prepared, **options: Any) -> list[ContinuationScores]:
    model = llm.llm_engine.model_config
    prepared.check_length(model.max_model_len, "the engine's max_model_len")
    size = model.get_vocab_size()
    for (name, *_), split in zip(prepared.rows, prepared.splits, strict=True):
        if (largest := max(split.token_ids)) >= size:
            raise ScoreModeError(
                f"{name}: token id {largest} is outside the model's vocabulary of {size}; "
                "give the tokenizer that belongs to the model."
            )
    found = score_token_pairs(llm, [split.parts for split in prepared.splits], **options)
    return [
        replace(scores, spans_boundary=split.spans_boundary, spanned_context=split.spanned_context)
        for scores, split in zip(found, prepared.splits, strict=True)
    ]


def _probability(context: Any, sequence: Any, scores: ContinuationScores) -> SequenceProbability:
    total, count = scores.sum(), len(scores)
    with np.errstate(over="ignore", under="ignore"):
        prob, perplexity, per_token = np.exp([total, -total, -total / count]).tolist()
    assert scores.token_ids is not None
    return {
        "context": context,
        "sequence": sequence,
        "log_prob": total,
        "prob": prob,
        "perplexity": perplexity,
        "num_tokens": count,
        "log_prob_per_token": total / count,
        "perplexity_per_token": per_token,
        "token_ids": scores.token_ids.tolist(),
        "token_log_probs": scores.logprobs.astype(np.float64).tolist(),
        "spans_boundary": scores.spans_boundary,
        "spanned_context": scores.spanned_context,
    }
