"""From lm-eval's requests to what vLLM takes: token ids that fit the model, sampling parameters.

(context, continuation) texts are cut as lm-eval's own models cut them, and what is too long is left
out as they leave it out. A task's `generation_kwargs` become vLLM's sampling parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm.score.checks import check, did_you_mean
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import BoundaryTokenizer
from vllm.score.sequence.encoding import Pair
from vllm.score.tokens import check_encodable, start_token

if TYPE_CHECKING:
    from vllm import SamplingParams

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# Token ids of a context and its continuation.
TokenPair = tuple[list[int], list[int]]

# Texts that the tokenizer is given at a time; between them the progress bar moves.
BATCH = 512
SIDES = ("left", "right", "middle")
# Set from the task's own names, or no business of a generation task.
RESERVED = {"max_tokens", "stop", "output_kind", "n", "detokenize"}


class Encoder:
    """A tokenizer with lm-eval's rules about special tokens.

    Args:
        tokenizer: Hugging Face's, or vLLM's in its form.
        add_bos_token: True or False: with or without the special tokens; None leaves it to the
            tokenizer. A text that already starts with the prefix token gets none, unless the call
            itself asks for them.
        prefix_token_id: the context of texts without one; by default BOS, else EOS.
    """

    def __init__(
        self, tokenizer: Any, add_bos_token: bool | None, prefix_token_id: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._add_bos_token = add_bos_token
        self._prefix = start_token(tokenizer) if prefix_token_id is None else prefix_token_id
        self._boundary = BoundaryTokenizer(tokenizer, "spanning")
        self._prefix_text = None if self._prefix is None else tokenizer.decode([self._prefix])

    @property
    def prefix_token_id(self) -> int:
        """Raises ScoreModeError where the tokenizer has neither BOS nor EOS."""
        if self._prefix is None:
            raise ScoreModeError(
                "the tokenizer has neither a BOS nor an EOS token, and a text without context "
                "needs one before it: name a token by prefix_token_id=N."
            )
        return self._prefix

    def encode(
        self, texts: Iterable[str], add_special_tokens: bool | None = None, bar: Any = None
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            bar: of tqdm, moved by the number of different texts.

        Raises:
            ScoreModeError: something is no text.
        """
        texts = list(texts)
        for text in texts:
            _check_text(text)
        asked = self._add_bos_token if add_special_tokens is None else add_special_tokens
        special: dict[str, bool] = {} if asked is None else {"add_special_tokens": asked}
        prefix = self._prefix_text if add_special_tokens is None else None
        groups: tuple[list[str], list[str]] = ([], [])
        for text in dict.fromkeys(texts):
            groups[prefix is not None and text.startswith(prefix)].append(text)
        found: dict[str, list[int]] = {}
        for group, options in zip(groups, (special, {"add_special_tokens": False}), strict=True):
            for first in range(0, len(group), BATCH):
                batch = group[first : first + BATCH]
                encoded = self._tokenizer(batch, **options)["input_ids"]
                found.update(zip(batch, encoded, strict=True))
                if bar is not None:
                    bar.update(len(batch))
        return [found[text] for text in texts]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], disable_tqdm: bool = False
    ) -> list[TokenPair]:
        """Token ids of contexts and continuations, the same that lm-eval's own models score.

        lm-eval gives the white space at the end of a context to the continuation, encodes both
        together, and cuts where the context by itself would end. Where that leaves nothing of the
        continuation (it has merged with the end of the context), it is scored from the token that
        spans the boundary on. A continuation without any token (an empty text) stays empty.
        """
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ScoreModeError(f"{pair!r:.60} is no (context, continuation).")
            _check_text(pair[0])
            _check_text(pair[1])
        with tqdm(desc="Tokenizing inputs", unit=" texts", disable=disable_tqdm) as bar:
            alone = iter(self.encode((t for c, t in pairs if not c), False, bar))
            wholes = iter(self.encode((c + t for c, t in pairs if c), None, bar))
            heads = iter(self.encode((c.rstrip() for c, _ in pairs if c), None, bar))
        return [
            self._cut(next(heads), next(wholes), c, t) if c else self._after_prefix(next(alone))
            for c, t in pairs
        ]

    def _cut(self, head: list[int], whole: list[int], context: str, text: str) -> TokenPair:
        if not head:
            return self._after_prefix(whole)
        if len(whole) > len(head):
            return head, whole[len(head) :]
        kept = context.rstrip()
        pair = Pair(kept, context[len(kept) :] + text, templated=self._add_bos_token is False)
        try:
            (split,) = self._boundary.split([pair])
        except ScoreModeError:  # nothing of the continuation has a token
            return head, []
        return split.parts

    def _after_prefix(self, ids: list[int]) -> TokenPair:
        """A text without context follows the prefix token, which may be its own first one."""
        if len(ids) > 1 and ids[0] == self._prefix:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids


def fit_pairs(pairs: Sequence[TokenPair], max_length: int) -> list[TokenPair]:
    """Drop the first tokens of contexts that are too long, and say of how many.

    Args:
        pairs: (context, continuation) token ids.
        max_length: tokens that the model reads at most. The last token of a continuation is
            predicted, not read: both may have max_length + 1 tokens together.

    Raises:
        ScoreModeError: a continuation has more than max_length tokens.
    """
    if (longest := max((len(t) for _, t in pairs), default=0)) > max_length:
        raise ScoreModeError(
            f"a continuation has {longest} tokens, more than can be predicted with "
            f"max_model_len={max_length}: raise max_model_len, or make the task a "
            "loglikelihood_rolling one."
        )
    over = [len(context) + len(t) - 1 - max_length for context, t in pairs]
    if shortened := sum(tokens > 0 for tokens in over):
        logger.warning(
            "%d of %d requests are longer than max_model_len=%d (the longest reads %d tokens): the "
            "first tokens of their contexts are left out.",
            shortened,
            len(pairs),
            max_length,
            max_length + max(over),
        )
    return [(c[max(0, tokens) :], t) for (c, t), tokens in zip(pairs, over, strict=True)]


def fit_context(ids: list[int], room: int, side: str) -> list[int]:
    """At most `room` tokens of a context, without its left, right or middle part."""
    from lm_eval.models.utils import truncate_tokens

    if len(ids) <= room:
        return ids
    logger.warning(
        "A context of %d tokens is cut to the %d that leave room for max_gen_toks (truncation_side="
        "%s).",
        len(ids),
        room,
        side,
    )
    return truncate_tokens(ids, room, side)


@dataclass(frozen=True)
class Generation:
    """How one request is generated.

    Attributes:
        options: of `vllm.SamplingParams`, all but `max_tokens` and `stop`.
        stops: texts that end it.
        until: the task's stop sequences and the end-of-text token.
        max_gen_toks: room to leave in the context.
    """

    options: dict[str, Any]
    stops: list[str]
    until: list[str]
    max_gen_toks: int

    @property
    def params(self) -> SamplingParams:
        """For vLLM."""
        return self.limited(self.max_gen_toks)

    def limited(self, max_tokens: int, *more_stops: str) -> SamplingParams:
        """The same with another number of tokens, and further texts that end it."""
        from vllm import SamplingParams

        options = dict(self.options)
        if options.get("min_tokens"):
            options["min_tokens"] = min(options["min_tokens"], max_tokens)
        return SamplingParams(
            max_tokens=max_tokens, stop=list(dict.fromkeys([*self.stops, *more_stops])), **options
        )


def read_generation_kwargs(
    given: Mapping[str, Any],
    *,
    eos: str | None,
    max_gen_toks: int,
    stop_at_eos_only: bool = False,
    task: str | None = None,
) -> Generation:
    """Read what lm-eval hands to `generate_until`.

    Without `do_sample` and `temperature` the generation is greedy, as with lm-eval's `hf`.

    Args:
        given: `until`, `max_gen_toks` (or an alias that lm-eval knows), `do_sample`, and any
            parameter of `vllm.SamplingParams`.
        eos: text that ends every generation.
        max_gen_toks: where the task names none.
        stop_at_eos_only: a reasoning model may write the task's stop sequences while it thinks.
        task: for the message.

    Raises:
        ScoreModeError: a key means nothing to vLLM.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    stop = options.pop("stop", None) or []
    until = [*_texts("until", options.pop("until")), *_texts("stop", stop)]
    until = [text for text in handle_stop_sequences(until, eos) if text]
    length = int(options.pop("max_gen_toks"))
    if not options.pop("do_sample"):
        options["temperature"] = 0.0
    _refuse_unknown(options, task)
    # Stop sequences may be special tokens; as with lm-eval's `vllm`.
    options = {"skip_special_tokens": False, "spaces_between_special_tokens": False, **options}
    stops = [text for text in until if text == eos] if stop_at_eos_only else until
    found = Generation(options, stops, until, length)
    _ = found.params  # vLLM refuses values out of range, before anything runs
    return found


def _texts(name: str, given: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else given
    texts: list[str] = check(name, listed, list[str], "give a text or a list of texts")
    return texts


def _refuse_unknown(options: Mapping[str, Any], task: str | None) -> None:
    from vllm import SamplingParams

    known = {
        name
        for name in SamplingParams.__struct_fields__
        if not name.startswith(("_", "score_")) and name not in RESERVED
    }
    for key, value in options.items():
        if key not in known:
            where = f" of the task {task!r}" if task else ""
            raise ScoreModeError(
                f"gen_kwargs{where} has {key}={value!r}, which vLLM's SamplingParams does not take"
                f"{did_you_mean(key, sorted(known))}. Remove it from --gen_kwargs or the task's "
                "generation_kwargs."
            )


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ScoreModeError(f"a text is {text!r:.60}, a {type(text).__name__}; give a str.")
    check_encodable(text, "a text")
