"""What goes into a `SequenceProcessor` and what comes out.

B prompts, G responses a prompt, L tokens of the longest padded sequence, T generated tokens of one
response. All log-probabilities and entropies in nats.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass
class GenerationConfig:
    """How responses are sampled, and in which batches.

    A field is checked whenever it is set.

    Attributes:
        temperature: divides the logits, above 0.
        top_p: only the most likely tokens whose probabilities first add up to it are sampled; in
            (0, 1], 1 for all.
        max_new_tokens: longest response, in tokens.
        do_sample: False takes the most likely token each time.
        num_return_sequences: responses a prompt, G, where a call does not say.
        gen_batch_size: sequences generated at once by Hugging Face.
        tf_batch_size: sequences scored at once by Hugging Face.
        rb_requires_grad: with gradients, return entropies that carry a graph too.

    Raises:
        ScoreModeError: names the field, the value and what is allowed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 200
    do_sample: bool = True
    num_return_sequences: int = 8
    gen_batch_size: int = 32
    tf_batch_size: int = 8
    rb_requires_grad: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        names = [f.name for f in fields(self)]
        if name not in names:
            raise ScoreModeError(f"GenerationConfig has no field {unknown(name, names)}")
        object.__setattr__(self, name, _checked(name, value))


def unknown(name: Any, names: list[str]) -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name!r}{hint}; its fields are {', '.join(names)}."


def _checked(name: str, value: Any) -> Any:
    if name in ("do_sample", "rb_requires_grad"):
        if not isinstance(value, bool):
            raise ScoreModeError(f"{name} must be True or False, got {value!r}.")
        return value
    if name == "temperature":
        if not _is_number(value) or not 0 < value < float("inf"):
            raise ScoreModeError(
                f"temperature must be a number above 0, got {value!r}; for greedy generation set "
                "do_sample=False."
            )
        return float(value)
    if name == "top_p":
        if not _is_number(value) or not 0 < value <= 1:
            raise ScoreModeError(
                f"top_p must be in (0, 1], got {value!r}; 1 samples from the whole vocabulary."
            )
        return float(value)
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ScoreModeError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass
class BatchedSequences:
    """Prompts with their responses.

    The prompts are padded on the left to one length P, so that every response begins at column P:
    the token at column i is scored by the logits at i - 1, for i in [P, P + gen_lens[b][g]).

    Attributes:
        sequences: int64 [B, G, L], padding, prompt, response, padding.
        prompt_lens: [B], P each time.
        gen_lens: [B][G] generated tokens, T, the end-of-sequence token included where it was
            generated.
        attention_masks: int64 [B, G, L]: 1 for prompt and response, 0 for padding.
        responses_text: [B][G], special tokens left out.
    """

    sequences: Tensor
    prompt_lens: list[int]
    gen_lens: list[list[int]]
    attention_masks: Tensor
    responses_text: list[list[str]]


@dataclass
class LogprobResults:
    """Scores of the generated tokens, [B][G] lists of one entry a response.

    Attributes:
        logprobs: tensors [T], log p of each token under the model itself (temperature 1, whole
            vocabulary).
        entropies: arrays [T], the surprisals -log p (one-sample estimates of the entropy).
        sequence_logprobs: sums of log p.
        rb_entropies: arrays [T], the exact (Rao-Blackwellised) entropies of the sampling policy at
            every step; empty where not asked for.
        rewards: [B][G], 0 where no gold answer is known.
        rb_entropies_torch: the same as tensors with a graph.
        baseline_feats_torch: tensors [T, 7], detached: entropy, top-1 probability, margin, head
            mass, two-point entropy, logit variance, t/T.
        token_logqs: tensors [T], log q of each token under the sampling policy; -inf for a token
            that it never samples.
        sequence_logqs: sums of log q.
    """

    logprobs: list[list[Tensor]]
    entropies: list[list[np.ndarray]]
    sequence_logprobs: list[list[float]]
    rb_entropies: list[list[np.ndarray]]
    rewards: list[list[float]]
    rb_entropies_torch: list[list[Tensor]] | None = None
    baseline_feats_torch: list[list[Tensor]] | None = None
    token_logqs: list[list[Tensor]] | None = None
    sequence_logqs: list[list[float]] | None = None


@dataclass
class TokenStepDiagnostics:
    """The distributions that the T tokens were drawn from, arrays [T].

    With a = logits / temperature, p = softmax(a), S the tokens kept by top-p (the fewest most
    likely ones whose p add up to it), and q the sampling policy: p on S, renormalised.

    Attributes:
        rb_entropy: H(q) = -sum q log q.
        head_mass: p(S), 1 at top-p 1.
        tail_mass: 1 - p(S).
        two_point_entropy: -s log s - (1 - s) log (1 - s) of s = p(S).
        top1_prob: max q.
        margin: largest less second largest a.
        collision: sum q**2.
        renyi2: -log collision, the Rényi entropy of order 2.
        eff_support: exp(H(q)), the number of tokens of a uniform distribution as uncertain.
        logit_mean: E_q[a].
        logit_var: Var_q[a].
        eos_prob: q of the end-of-sequence tokens together; None where there is none.
    """

    rb_entropy: np.ndarray
    head_mass: np.ndarray
    tail_mass: np.ndarray
    two_point_entropy: np.ndarray
    top1_prob: np.ndarray
    margin: np.ndarray
    collision: np.ndarray
    renyi2: np.ndarray
    eff_support: np.ndarray
    logit_mean: np.ndarray
    logit_var: np.ndarray
    eos_prob: np.ndarray | None


@dataclass
class SequenceDiagnostics:
    """Aggregates of `TokenStepDiagnostics` over a response.

    A sum over no tokens is 0; a mean, minimum or maximum over none is NaN, as is
    `late_rb_entropy_mean` of a response without late steps. "Early" are the first 16 steps.
    """

    T: int
    rb_entropy_sum: float
    rb_entropy_mean: float
    rb_entropy_max: float
    rb_entropy_min: float
    early_rb_entropy_mean: float
    late_rb_entropy_mean: float
    naive_surprisal_sum: float
    naive_surprisal_mean: float
    margin_mean: float
    margin_sum: float
    top1_prob_mean: float
    collision_mean: float
    renyi2_mean: float
    eff_support_mean: float
    eos_prob_mean: float | None


@dataclass
class DiagnosticsPack:
    """One response's diagnostics, per step and aggregated."""

    step: TokenStepDiagnostics
    seq: SequenceDiagnostics


@dataclass
class DiagnosticsResults:
    """`diagnostics[b][g]` of every response."""

    diagnostics: list[list[DiagnosticsPack]]
