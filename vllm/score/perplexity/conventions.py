"""Perplexities as other tools compute them, by name.

Published perplexities of one model and one text differ by the joining of documents, the BOS, the
windows and the weights. Each convention below reproduces one tool, its faults included, and names
them; the docstring of its function says where the procedure is written down.
`name:context_length` asks for windows of another size than the tool's default.

What a tool does is reproduced whatever this package does by itself: a text that brings its own
BOS gets a second one from the tools that put one there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.score.checks import check_name
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.windows import (
    AddedTokens,
    RollingWindows,
    RowWindows,
    ScoringPlan,
    SlidingWindows,
)
from vllm.score.tokens import automatic_tokens

HF_STRIDE = "hf-stride"
LM_EVAL_HF = "lm-eval-0.4.13-hf"
LM_EVAL_VLLM = "lm-eval-0.4.13-vllm"

# Shorter names; the version behind one may change with a release of this package.
ALIASES = {"lm-eval-rolling": LM_EVAL_HF, "lm-eval-hf": LM_EVAL_HF, "lm-eval-vllm": LM_EVAL_VLLM}


@dataclass(frozen=True)
class PlanContext:
    """What a convention's prompts depend on.

    bos: the token that the tokenizer puts in front of a text by itself; None if it puts none.
    front, end: the tokens that it adds to this text in front and behind; none to token ids.
    context_length, stride: of the windows.
    """

    tokenizer: Any
    bos: int | None
    front: tuple[int, ...]
    end: tuple[int, ...]
    context_length: int
    stride: int

    @property
    def tokenized(self) -> dict[str, Any]:
        """The text as tokenizer(text) gives it. What stands first has no context, and is none of
        the targets; any other token is one, also of those that the tokenizer adds."""
        return {"prefix": self.front[:1], "added": AddedTokens(self.front[1:], self.end)}


Plan = Callable[[PlanContext], ScoringPlan]


@dataclass(frozen=True)
class Convention:
    """One tool's way to a perplexity.

    name: as asked for.
    faults: known deviations from the mean over all tokens with as much context as there is.
    context_length: the tool's default; None: that of the run.
    plan: the prompts, for the given model and sizes.
    predicted: whether a prompt has one token more than the tool's context_length, which is
        predicted and not read.
    """

    name: str
    faults: str
    context_length: int | None
    plan: Plan
    predicted: bool = False


@dataclass(frozen=True)
class ConventionRequest:
    """A convention with the size of its windows settled.

    context_length: of the tool's windows.
    label: the name, with the window size where it is not the usual one.
    """

    convention: Convention
    context_length: int
    label: str
    plan: ScoringPlan


CONVENTIONS: dict[str, Convention] = {}


def _convention(
    name: str, *, faults: str, context_length: int | None = None, predicted: bool = False
) -> Callable[[Plan], Plan]:
    """Make a function from `PlanContext` to `ScoringPlan` an entry of `CONVENTIONS`."""

    def add(plan: Plan) -> Plan:
        CONVENTIONS[name] = Convention(name, faults, context_length, plan, predicted)
        return plan

    return add


@_convention(
    HF_STRIDE,
    faults="the weights are one token short in every window but the first (whose first token is "
    "unscored), because the guide subtracts the label shift where no label is lost; its earlier "
    "text averaged the window means without weights. Both are given beside the exact mean.",
)
def _hf_stride(context: PlanContext) -> ScoringPlan:
    """huggingface.co/docs/transformers/perplexity, as since PR 34387 (2024).

    Documents joined by two newlines; the tokenizer's own BOS once, at the start. Windows of the
    run, overlapping by context_length - stride. Mean of each window's targets, weighted by the
    number of targets - 1.
    """
    size = context.context_length
    return ScoringPlan(SlidingWindows(size, min(context.stride, size)), **context.tokenized)


@_convention(
    "gptq",
    context_length=2048,
    faults="no context at the start of each window; the end of the text is not scored",
)
def _gptq(context: PlanContext) -> ScoringPlan:
    """github.com/IST-DASLab/gptq, llama.py and opt.py (wikitext2).

    Documents joined by two newlines; the tokenizer's own BOS once, at the start. Windows side by
    side, an incomplete last one dropped. Mean over all tokens but the first of each window.
    """
    return ScoringPlan(RowWindows(context.context_length), **context.tokenized)


@_convention(
    "llama.cpp",
    context_length=512,
    faults="half of the text is not scored, and the BOS overwrites a token of it; the tool's own "
    "error bar takes neighbouring tokens as independent; it reads special tokens spelled out in "
    "the text as plain text, and drops a line break at the end of the file, which is not "
    "reproduced",
)
def _llama_cpp(context: PlanContext) -> ScoringPlan:
    """github.com/ggml-org/llama.cpp, tools/perplexity/perplexity.cpp.

    One text (the tool reads a file); joined by two newlines here. Windows side by side, the first
    token of each replaced by a BOS if the tokenizer adds one; an incomplete last one dropped; at
    least two are needed. Mean over the tokens n/2 + 1 to n - 1 of each window of n.
    """
    if context.end:
        raise ScoreModeError(
            f"convention 'llama.cpp': the model's tokenizer adds {list(context.end)} behind a "
            "text, and llama-perplexity refuses such models; leave this convention out"
        )
    size = context.context_length
    windows = RowWindows(size, first_scored=size // 2 + 1, min_rows=2)
    return ScoringPlan(windows, prefix=context.front, replace_first=context.bos)


@_convention(
    "exllamav3",
    context_length=2048,
    faults="no context at the start of each row; a last row that ends exactly with the text is "
    "dropped; the tool leaves rows of the head without a token of the tokenizer out of the "
    "softmax, which is not reproduced",
)
def _exllamav3(context: PlanContext) -> ScoringPlan:
    """github.com/turboderp-org/exllamav3, eval/ppl.py.

    Documents joined by two newlines; no BOS. The first 100 rows, side by side. Mean over all tokens
    but the first of each row.
    """
    return ScoringPlan(RowWindows(context.context_length, drop_last_if_exact=True, max_rows=100))


_LM_EVAL_FAULTS = (
    "one token of context at the start of each window; {}where the tokenizer adds a BOS, its "
    "probability after another BOS is part of the sum; a task's own preparation of the text (e.g. "
    "wikitext's detokenizer) has to be applied to the documents before"
)


@_convention(
    LM_EVAL_HF,
    predicted=True,
    faults=_LM_EVAL_FAULTS.format(
        "the tool's logits_cache (on by default) mixes up windows of one batch with the same "
        "tokens and another cut, e.g. in repeated text, which is not reproduced; "
    ),
)
def _lm_eval_hf(context: PlanContext) -> ScoringPlan:
    """github.com/EleutherAI/lm-evaluation-harness, release 0.4.13, loglikelihood_rolling of its hf
    model (max_length = context_length).

    Each document alone, after one prefix token (BOS, or EOS if there is none); what the tokenizer
    adds by itself is scored behind it, but for documents that begin with the prefix token. Windows
    of one token of context, then context_length targets, of which the last is not read; the last
    window reaches back to be as long as the others. Sum over all tokens, divided by words or bytes
    of the documents.
    """
    return _lm_eval(LM_EVAL_HF, context, targets=context.context_length, if_empty=True)


@_convention(
    LM_EVAL_VLLM,
    faults=_LM_EVAL_FAULTS.format(
        "two tokens of the context_length are given away; an empty document counts nothing, where "
        "the hf model scores the BOS of one; "
    ),
)
def _lm_eval_vllm(context: PlanContext) -> ScoringPlan:
    """The same of its vllm model: windows with context_length - 2 targets."""
    return _lm_eval(LM_EVAL_VLLM, context, targets=context.context_length - 2, if_empty=False)


def _lm_eval(name: str, context: PlanContext, *, targets: int, if_empty: bool) -> ScoringPlan:
    if targets < 1:
        raise ScoreModeError(
            f"convention {name!r}: context_length is {context.context_length}, and the windows "
            f"have {targets} targets; ask for '{name}:3' or more"
        )
    tokenizer = context.tokenizer
    found = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    prefix = next((token for token in found if token is not None), None)
    if prefix is None:
        raise ScoreModeError(
            f"convention {name!r} puts a BOS, or else an EOS, in front of each document, and the "
            "model's tokenizer has neither; leave this convention out"
        )
    begun = tokenizer.decode([int(prefix)]) if context.front or context.end else None
    return ScoringPlan(
        RollingWindows(targets + 1),
        separator=None,
        prefix=(int(prefix),),
        added=AddedTokens(context.front, context.end, unless_begun=begun, if_empty=if_empty),
    )


def resolve(
    names: str | Iterable[str],
    tokenizer: Any,
    *,
    context_length: int,
    stride: int,
    ids_given: bool = False,
) -> list[ConventionRequest]:
    """The conventions asked for, in order, without repetitions.

    Args:
        names: of `CONVENTIONS` or `ALIASES`, e.g. "gptq", or with a window size "gptq:4096"; one
            or several; "all" for every one.
        tokenizer: the model's; None if there is none.
        context_length, stride: the run's, for conventions without a window size of their own.
        ids_given: the source is token ids: nothing is put in front of the whole.

    Raises:
        ScoreModeError: for an unknown name or a bad window size.
    """
    asked = list(_sizes(names, context_length))
    front, end = ([], []) if tokenizer is None or not asked else automatic_tokens(tokenizer)
    bos = front[0] if front else None
    if ids_given:
        front, end = [], []
    requests: dict[str, ConventionRequest] = {}
    for convention, size in asked:
        label = convention.name
        if size != (convention.context_length or context_length):
            label = f"{label}:{size}"
        context = PlanContext(tokenizer, bos, tuple(front), tuple(end), size, stride)
        requests[label] = ConventionRequest(convention, size, label, convention.plan(context))
    return list(requests.values())


def convention_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, "all" written out.

    Raises:
        ScoreModeError: for what is no name, an unknown name or a bad window size.
    """
    given = [names] if isinstance(names, str) else names
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in listed):
        raise ScoreModeError(f"conventions is {names!r}; give a name or a list of names")
    asked = [name for text in listed for name in (CONVENTIONS if text == "all" else (text,))]
    for name in asked:
        _parse(name)
    return tuple(asked)


def canonical(name: str) -> str:
    """The name behind an alias, with or without a window size; any other name as it is."""
    bare, colon, size = name.partition(":")
    return f"{ALIASES.get(bare, bare)}{colon}{size}"


def longest_window(names: str | Iterable[str], context_length: int) -> int:
    """Tokens that the model reads at most in a run with these conventions."""
    return max([context_length, *(size for _, size in _sizes(names, context_length))])


def longest_prompt(names: str | Iterable[str], context_length: int) -> int:
    """The max_model_len that a run with these conventions needs."""
    sizes = _sizes(names, context_length)
    return max([context_length, *(size + convention.predicted for convention, size in sizes)])


def check_fits(
    names: Iterable[str], context_length: int, most: int, limit: str, *, prompts: bool = False
) -> None:
    """Raise ScoreModeError where a window of the run or of a convention is longer than `most`.

    Args:
        limit: `most` in words.
        prompts: a token that is predicted and not read counts, too.
    """
    if context_length > most:
        raise ScoreModeError(
            f"context_length (--context-length) is {context_length}, more than {limit}; give "
            f"{most} or less, and a stride of at most that"
        )
    for convention, size in _sizes(names, context_length):
        predicted = convention.predicted and prompts
        if size + predicted > most:
            raise ScoreModeError(
                f"convention {convention.name!r} has windows of {size + predicted} tokens, more "
                f"than {limit}; ask for '{convention.name}:{most - predicted}'"
            )


def _sizes(names: str | Iterable[str], context_length: int) -> Iterator[tuple[Convention, int]]:
    for text in convention_names(names):
        convention, size = _parse(text)
        yield convention, size or convention.context_length or context_length


def _parse(text: str) -> tuple[Convention, int | None]:
    name, colon, size = canonical(text).partition(":")
    check_name("convention", name, [*CONVENTIONS, *ALIASES], cutoff=0.4)
    if colon and (not size.isdecimal() or int(size) < 3):
        raise ScoreModeError(
            f"convention {text!r}: the window size {size!r} after the colon must be a number of "
            "tokens of at least 3"
        )
    return CONVENTIONS[name], int(size) if colon else None
