"""`SequenceProbVLLMHook`: how likely a model finds given sequences after given contexts.

The name is that of a tool which hooked the head of the model. Here nothing is hooked: the scores
come from `vllm.score.score`, and so include whatever others have hooked into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.engine.configuration import check_llm
from vllm.score.sequence.contexts import ContextLike
from vllm.score.sequence.prepare import Prepared, prepare_pairs, prepare_product
from vllm.score.sequence.requests import plan_requests

if TYPE_CHECKING:
    from tqdm import tqdm

    from vllm import LLM
    from vllm.lora.request import LoRARequest


class SequenceProbVLLMHook:
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
        contexts: Sequence[ContextLike],
        target_sequences: Sequence[str],
        *,
        boundary: str = "spanning",
        use_tqdm: bool | Callable[..., tqdm] = False,
        skip_prefix_cache: bool = False,
        lora_request: LoRARequest | None = None,
    ) -> list[dict[str, Any]]:
        """Every sequence after every context.

        Args:
            contexts: texts, or lists of messages ({"role": ..., "content": ...}) for the chat
                template. After an empty one the sequence follows BOS (or EOS, without a BOS),
                which it may also begin with itself.
            target_sequences: texts, exactly as they go on: "Paris" and " Paris" are two.
            boundary: what becomes of a token that holds the end of the context and the beginning
                of the sequence: "spanning" scores from its start and says so, "strict" refuses,
                "separate" tokenises the two apart (`vllm.score.sequence.boundary`).
            use_tqdm: show a progress bar; or a function that makes one.
            skip_prefix_cache: compute every token anew.
            lora_request: an adapter.

        Returns:
            A dict for each context and sequence, all sequences of the first context first:

            - `context`, `sequence`: as given
            - `log_prob`: sum of `token_log_probs`, in float64, in nats
            - `prob`: exp(log_prob)
            - `perplexity`: exp(-log_prob), of the sequence as a whole; inf beyond float64
            - `num_tokens`: number of scored tokens, m
            - `log_prob_per_token`: log_prob / m
            - `perplexity_per_token`: exp(-log_prob / m)
            - `token_ids`: list [m], the scored tokens
            - `token_log_probs`: list [m], nats
            - `spans_boundary`: whether the first of them also holds the end of the context
            - `spanned_context`: the characters of the context that it holds, or ""

        Raises:
            ScoreModeError: an argument cannot be used; it is named, and nothing has run.
            ScoreModeUnavailable: score mode is off in this installation.
        """
        prepared = prepare_product(contexts, target_sequences, self.tokenizer, boundary)
        return score_prepared(
            self.llm,
            prepared,
            use_tqdm=use_tqdm,
            skip_prefix_cache=skip_prefix_cache,
            lora_request=lora_request,
        )

    def get_log_prob_of_pairs(
        self,
        pairs: Iterable[tuple[ContextLike, str]],
        *,
        boundary: str = "spanning",
        use_tqdm: bool | Callable[..., tqdm] = False,
        skip_prefix_cache: bool = False,
        lora_request: LoRARequest | None = None,
    ) -> list[dict[str, Any]]:
        """As `get_log_prob`, for (context, sequence) pairs."""
        return score_prepared(
            self.llm,
            prepare_pairs(pairs, self.tokenizer, boundary),
            use_tqdm=use_tqdm,
            skip_prefix_cache=skip_prefix_cache,
            lora_request=lora_request,
        )


def score_prepared(llm: LLM, prepared: Prepared, **options: Any) -> list[dict[str, Any]]:
    """The dicts of `SequenceProbVLLMHook.get_log_prob`; options are those of `score()`.

    Raises:
        ScoreModeError: a pair is too long for the engine, or has an id that its model lacks.
    """
    from vllm.score.api import score

    model = llm.llm_engine.model_config
    prepared.check_length(model.max_model_len, "the engine's max_model_len")
    prepared.check_vocabulary(model.get_vocab_size())
    plan = plan_requests(prepared.splits)
    scores = score(llm, plan.requests, **options)
    rows = zip(prepared.contexts, prepared.sequences, prepared.splits, strict=True)
    return [
        {
            "context": context,
            "sequence": sequence,
            **_figures(plan.token_logprobs(scores, index)),
            "token_ids": split.token_ids[split.start :],
            "token_log_probs": plan.token_logprobs(scores, index).astype(np.float64).tolist(),
            "spans_boundary": split.spans_boundary,
            "spanned_context": split.spanned_context,
        }
        for index, (context, sequence, split) in enumerate(rows)
    ]


def _figures(logprobs: np.ndarray) -> dict[str, Any]:
    """What follows from the log-probabilities [m] of a sequence."""
    total, count = float(logprobs.sum(dtype=np.float64)), len(logprobs)
    with np.errstate(over="ignore", under="ignore"):
        prob, perplexity, per_token = np.exp([total, -total, -total / count]).tolist()
    return {
        "log_prob": total,
        "prob": prob,
        "perplexity": perplexity,
        "num_tokens": count,
        "log_prob_per_token": total / count,
        "perplexity_per_token": per_token,
    }
