"""Perplexities as other tools compute them, by name.

Published perplexities of one model and one text differ by the joining of documents, the BOS, the
windows and the weights. Each entry below reproduces one tool, its faults included, and names them.
`name:context_length` asks for windows of another size than the tool's default.

What a tool does is reproduced whatever this package does by itself: a text that brings its own
BOS gets a second one from the tools that put one there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.plans import AddedTokens, ScoringPlan
from vllm.score.perplexity.windows import RollingWindows, RowWindows, SlidingWindows
from vllm.score.tokens import automatic_tokens

HF_STRIDE = "hf-stride"
LM_EVAL_HF = "lm-eval-0.4.13-hf"
LM_EVAL_VLLM = "lm-eval-0.4.13-vllm"

# Shorter names; the version behind one may change with a release of this package.
ALIASES = {
    "lm-eval-rolling": LM_EVAL_HF,
    "lm-eval-hf": LM_EVAL_HF,
    "lm-eval-vllm": LM_EVAL_VLLM,
}


@dataclass(frozen=True)
class Setting:
    """What a convention's prompts depend on.

    bos: the token that the tokenizer puts in front of a text by itself; None if it puts none.
    front, end: the tokens that it adds to this text in front and behind; none to token ids.
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


@dataclass(frozen=True)
class Convention:
    """One tool's way to a perplexity.

    name: as asked for.
    source: where the procedure is written down.
    documents: how documents are joined, and what is in front of the text, in words.
    windows: in words.
    weighting: in words.
    faults: known deviations from the mean over all tokens with as much context as there is.
    context_length: the tool's default; None: that of the run.
    plan: the prompts, for the given model and sizes.
    predicted: whether a prompt has one token more than the tool's context_length, which is
        predicted and not read.
    """

    name: str
    source: str
    documents: str
    windows: str
    weighting: str
    faults: str
    context_length: int | None
    plan: Callable[[Setting], ScoringPlan]
    predicted: bool = False


@dataclass(frozen=True)
class ConventionRequest:
    """A convention with the size of its windows settled.

    context_length: of the tool's windows. usual: what it would be without being asked for.
    """

    convention: Convention
    context_length: int
    usual: int
    plan: ScoringPlan

    @property
    def label(self) -> str:
        """The name, with the window size where it is not the usual one."""
        name = self.convention.name
        return name if self.context_length == self.usual else f"{name}:{self.context_length}"


def _hf_stride(setting: Setting) -> ScoringPlan:
    size = setting.context_length
    return ScoringPlan(SlidingWindows(size, min(setting.stride, size)), **setting.tokenized)


def _gptq(setting: Setting) -> ScoringPlan:
    return ScoringPlan(RowWindows(setting.context_length), **setting.tokenized)


def _llama_cpp(setting: Setting) -> ScoringPlan:
    if setting.end:
        raise ScoreModeError(
            f"convention 'llama.cpp': the model's tokenizer adds {list(setting.end)} behind a "
            "text, and llama-perplexity refuses such models; leave this convention out"
        )
    size = setting.context_length
    return ScoringPlan(
        RowWindows(size, first_scored=size // 2 + 1, min_rows=2),
        prefix=setting.front,
        replace_first=setting.bos,
    )


def _exllamav3(setting: Setting) -> ScoringPlan:
    return ScoringPlan(RowWindows(setting.context_length, drop_last_if_exact=True, max_rows=100))


def _lm_eval_hf(setting: Setting) -> ScoringPlan:
    return _lm_eval(LM_EVAL_HF, setting, targets=setting.context_length, if_empty=True)


def _lm_eval_vllm(setting: Setting) -> ScoringPlan:
    return _lm_eval(LM_EVAL_VLLM, setting, targets=setting.context_length - 2, if_empty=False)


def _lm_eval(name: str, setting: Setting, *, targets: int, if_empty: bool) -> ScoringPlan:
    if targets < 1:
        raise ScoreModeError(
            f"convention {name!r}: context_length is {setting.context_length}, and the windows "
            f"have {targets} targets; ask for '{name}:3' or more"
        )
    tokenizer = setting.tokenizer
    prefix = getattr(tokenizer, "bos_token_id", None)
    if prefix is None:
        prefix = getattr(tokenizer, "eos_token_id", None)
    if prefix is None:
        raise ScoreModeError(
            f"convention {name!r} puts a BOS, or else an EOS, in front of each document, and the "
            "model's tokenizer has neither; leave this convention out"
        )
    begun = tokenizer.decode([int(prefix)]) if setting.front or setting.end else None
    return ScoringPlan(
        RollingWindows(targets + 1),
        separator=None,
        prefix=(int(prefix),),
        added=AddedTokens(setting.front, setting.end, unless_begun=begun, if_empty=if_empty),
    )


def _lm_eval_entry(
    name: str, model: str, windows: str, faults: str, plan: Callable[[Setting], ScoringPlan]
) -> Convention:
    return Convention(
        name=name,
        source="github.com/EleutherAI/lm-evaluation-harness, release 0.4.13, "
        f"loglikelihood_rolling of its {model} model (max_length = context_length)",
        documents="each alone, after one prefix token (BOS, or EOS if there is none); what the "
        "tokenizer adds by itself is scored behind it, but for documents that begin with the "
        "prefix token",
        windows=windows,
        weighting="sum over all tokens, divided by words or bytes of the documents",
        faults=f"one token of context at the start of each window; {faults}where the tokenizer "
        "adds a BOS, its probability after another BOS is part of the sum; a task's own "
        "preparation of the text (as wikitext's detokenizer) has to be applied to the documents "
        "before",
        context_length=None,
        plan=plan,
        predicted=model == "hf",
    )


CONVENTIONS = {
    entry.name: entry
    for entry in (
        Convention(
            name=HF_STRIDE,
            source="huggingface.co/docs/transformers/perplexity, as since PR 34387 (2024)",
            documents="joined by two newlines; the tokenizer's own BOS once, at the start",
            windows="overlapping by context_length - stride (those of the run)",
            weighting="mean of each window's targets, weighted by the number of targets - 1",
            faults="the weights are one token short in every window but the first (whose first "
            "token is unscored), because the guide subtracts the label shift where no label is "
            "lost; its earlier text averaged the window means without weights. Both are given "
            "beside the exact mean.",
            context_length=None,
            plan=_hf_stride,
        ),
        Convention(
            name="gptq",
            source="github.com/IST-DASLab/gptq, llama.py and opt.py (wikitext2)",
            documents="joined by two newlines; the tokenizer's own BOS once, at the start",
            windows="side by side, 2048 tokens, an incomplete last one dropped",
            weighting="mean over all tokens but the first of each window",
            faults="no context at the start of each window; the end of the text is not scored",
            context_length=2048,
            plan=_gptq,
        ),
        Convention(
            name="llama.cpp",
            source="github.com/ggml-org/llama.cpp, tools/perplexity/perplexity.cpp",
            documents="one text (the tool reads a file); joined by two newlines here",
            windows="side by side, 512 tokens, the first token of each replaced by a BOS if the "
            "tokenizer adds one; an incomplete last one dropped; at least two are needed",
            weighting="mean over the tokens n/2 + 1 to n - 1 of each window of n",
            faults="half of the text is not scored, and the BOS overwrites a token of it; the "
            "tool's own error bar takes neighbouring tokens as independent; it reads special "
            "tokens spelled out in the text as plain text, and drops a line break at the end of "
            "the file, which is not reproduced",
            context_length=512,
            plan=_llama_cpp,
        ),
        Convention(
            name="exllamav3",
            source="github.com/turboderp-org/exllamav3, eval/ppl.py",
            documents="joined by two newlines; no BOS",
            windows="the first 100 rows of 2048 tokens, side by side",
            weighting="mean over all tokens but the first of each row",
            faults="no context at the start of each row; a last row that ends exactly with the "
            "text is dropped; the tool leaves rows of the head without a token of the tokenizer "
            "out of the softmax, which is not reproduced",
            context_length=2048,
            plan=_exllamav3,
        ),
        _lm_eval_entry(
            LM_EVAL_HF,
            "hf",
            "one token of context, then context_length targets, of which the last is not read; "
            "the last window reaches back to be as long as the others",
            "the tool's logits_cache (on by default) mixes up windows of one batch with the same "
            "tokens and another cut, as in repeated text, which is not reproduced; ",
            _lm_eval_hf,
        ),
        _lm_eval_entry(
            LM_EVAL_VLLM,
            "vllm",
            "one token of context, then context_length - 2 targets; the last window reaches back "
            "to be as long as the others",
            "two tokens of the context_length are given away; an empty document counts nothing, "
            "where the hf model scores the BOS of one; ",
            _lm_eval_vllm,
        ),
    )
}


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
        names: of `CONVENTIONS` or `ALIASES`, as "gptq", or with a window size "gptq:4096"; one or
            several; "all" for every one.
        tokenizer: the model's; None if there is none.
        context_length, stride: the run's, for conventions without a window size of their own.
        ids_given: the source is token ids: nothing is put in front of the whole.

    Raises:
        ScoreModeError: for an unknown name or a bad window size.
    """
    asked = [_parse(text) for text in _names(names)]
    if not asked:
        return []
    front, end = ([], []) if tokenizer is None else automatic_tokens(tokenizer)
    bos = front[0] if front else None
    if ids_given:
        front, end = [], []
    requests: dict[tuple[str, int], ConventionRequest] = {}
    for convention, size in asked:
        usual = convention.context_length or context_length
        size = size or usual
        setting = Setting(tokenizer, bos, tuple(front), tuple(end), size, stride)
        request = ConventionRequest(convention, size, usual, convention.plan(setting))
        requests[convention.name, size] = request
    return list(requests.values())


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


def _sizes(names: str | Iterable[str], context_length: int) -> Iterator[tuple[Convention, int]]:
    for text in _names(names):
        convention, size = _parse(text)
        yield convention, size or convention.context_length or context_length


def _names(names: str | Iterable[str]) -> list[str]:
    given = [names] if isinstance(names, str) else names
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in listed):
        raise ScoreModeError(f"conventions is {names!r}; give a name or a list of names")
    return [name for text in listed for name in (CONVENTIONS if text == "all" else (text,))]


def _parse(text: str) -> tuple[Convention, int | None]:
    name, colon, size = text.partition(":")
    convention = CONVENTIONS.get(ALIASES.get(name, name))
    if convention is None:
        near = difflib.get_close_matches(name, [*CONVENTIONS, *ALIASES], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ScoreModeError(
            f"convention {name!r} is unknown; {hint}There are: "
            f"{', '.join([*CONVENTIONS, *ALIASES])}"
        )
    if not colon:
        return convention, None
    if not size.isdecimal() or int(size) < 3:
        raise ScoreModeError(
            f"convention {text!r}: the window size {size!r} after the colon must be a number of "
            "tokens of at least 3"
        )
    return convention, int(size)
