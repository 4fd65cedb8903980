"""Perplexities as other tools compute them, by name.

Published perplexities of one model and one text differ by the joining of documents, the BOS, the
windows and the weights. Each entry below reproduces one tool, its faults included, and names them.
`name:context_length` asks for windows of another size than the tool's default.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.plans import ScoringPlan
from vllm.score.perplexity.windows import RollingWindows, RowWindows, SlidingWindows
from vllm.score.tokens import automatic_prefix

HF_STRIDE = "hf-stride"


@dataclass(frozen=True)
class Setting:
    """What a convention's prompts depend on.

    automatic: the tokens that the tokenizer puts in front of a text by itself.
    front: those that are put in front here; none of token ids given as such.
    """

    tokenizer: Any
    automatic: tuple[int, ...]
    front: tuple[int, ...]
    context_length: int
    stride: int


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
    """

    name: str
    source: str
    documents: str
    windows: str
    weighting: str
    faults: str
    context_length: int | None
    plan: Callable[[Setting], ScoringPlan]


@dataclass(frozen=True)
class ConventionRequest:
    """A convention with the size of its windows settled."""

    convention: Convention
    context_length: int
    plan: ScoringPlan

    @property
    def label(self) -> str:
        """The name, with the window size where it is not the tool's own."""
        convention = self.convention
        usual = convention.context_length in (None, self.context_length)
        return convention.name if usual else f"{convention.name}:{self.context_length}"


def _hf_stride(setting: Setting) -> ScoringPlan:
    size = setting.context_length
    return ScoringPlan(SlidingWindows(size, min(setting.stride, size)), prefix=setting.front)


def _gptq(setting: Setting) -> ScoringPlan:
    return ScoringPlan(RowWindows(setting.context_length), prefix=setting.front)


def _llama_cpp(setting: Setting) -> ScoringPlan:
    size = setting.context_length
    return ScoringPlan(
        RowWindows(size, first_scored=size // 2 + 1, min_rows=2),
        prefix=setting.front,
        replace_first=setting.automatic[0] if setting.automatic else None,
    )


def _exllamav3(setting: Setting) -> ScoringPlan:
    return ScoringPlan(RowWindows(setting.context_length, drop_last_if_exact=True, max_rows=100))


def _lm_eval_rolling(setting: Setting) -> ScoringPlan:
    prefix = getattr(setting.tokenizer, "bos_token_id", None)
    if prefix is None:
        prefix = getattr(setting.tokenizer, "eos_token_id", None)
    if prefix is None:
        raise ScoreModeError(
            "convention 'lm-eval-rolling' puts a BOS, or else an EOS, in front of each document, "
            "and the model's tokenizer has neither; leave this convention out"
        )
    windows = RollingWindows(setting.context_length)
    return ScoringPlan(windows, separator=None, prefix=(int(prefix),))


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
            "tool's own error bar takes neighbouring tokens as independent",
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
            "text is dropped",
            context_length=2048,
            plan=_exllamav3,
        ),
        Convention(
            name="lm-eval-rolling",
            source="github.com/EleutherAI/lm-evaluation-harness, loglikelihood_rolling with its "
            "vLLM model (max_length = context_length)",
            documents="each alone, after one prefix token (BOS, or EOS if there is none)",
            windows="one token of context, then context_length - 1 targets; the last window "
            "reaches back to be as long as the others",
            weighting="sum over all tokens, divided by words or bytes of the documents",
            faults="one token of context at the start of each window; a task's own preparation "
            "of the text (as wikitext's detokenizer) has to be applied to the documents before",
            context_length=None,
            plan=_lm_eval_rolling,
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
        names: "gptq", or with a window size "gptq:4096"; one or several; "all" for every one.
        tokenizer: the model's; None if there is none.
        context_length, stride: the run's, for conventions without a window size of their own.
        ids_given: the source is token ids: nothing is put in front of the whole.

    Raises:
        ScoreModeError: for an unknown name or a bad window size.
    """
    asked = [_parse(text) for text in _names(names)]
    if not asked:
        return []
    automatic = () if tokenizer is None else tuple(automatic_prefix(tokenizer))
    requests: dict[tuple[str, int], ConventionRequest] = {}
    for convention, size in asked:
        size = size or convention.context_length or context_length
        setting = Setting(tokenizer, automatic, () if ids_given else automatic, size, stride)
        request = ConventionRequest(convention, size, convention.plan(setting))
        requests[convention.name, size] = request
    return list(requests.values())


def longest_prompt(names: str | Iterable[str], context_length: int) -> int:
    """The max_model_len that a run with these conventions needs."""
    sizes = [context_length]
    for text in _names(names):
        convention, size = _parse(text)
        sizes.append(size or convention.context_length or context_length)
    return max(sizes)


def _names(names: str | Iterable[str]) -> list[str]:
    given = [names] if isinstance(names, str) else names
    listed = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in listed):
        raise ScoreModeError(f"conventions is {names!r}; give a name or a list of names")
    return [name for text in listed for name in (CONVENTIONS if text == "all" else (text,))]


def _parse(text: str) -> tuple[Convention, int | None]:
    name, colon, size = text.partition(":")
    convention = CONVENTIONS.get(name)
    if convention is None:
        near = difflib.get_close_matches(name, CONVENTIONS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ScoreModeError(
            f"convention {name!r} is unknown; {hint}There are: {', '.join(CONVENTIONS)}"
        )
    if not colon:
        return convention, None
    if not size.isdecimal() or int(size) < 3:
        raise ScoreModeError(
            f"convention {text!r}: the window size {size!r} after the colon must be a number of "
            "tokens of at least 3"
        )
    return convention, int(size)
