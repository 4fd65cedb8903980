"""Prompts that are not only text: with images, videos or sound, or given as embeddings.

vLLM writes an item of `multi_modal_data` into the prompt as placeholders, often hundreds, and
reports where they stand. All positions here are those of that prompt, as the engine computes it.
What is scored is text: a position behind the placeholders, which the model predicts having seen
the item. A row of embeddings has no token, so that is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vllm.score.errors import ScoreModeError

# Keys of a prompt for which vLLM's renderer has to look at more than token ids.
MEDIA = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids")
EMBEDS = ("prompt_embeds", "prompt_is_token_ids")

# Where configurations have the id of a placeholder, by what it stands for.
_PLACEHOLDER_FIELDS = ("{}_token_id", "{}_token_index")
_MODALITIES = ("image", "video", "audio")


class Span(NamedTuple):
    """Placeholders of one item: positions ``[start, end)`` of the prompt."""

    modality: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"the placeholders of {self.modality!r} data ({self.start}..{self.end - 1})"


class Parts(NamedTuple):
    """What of a prompt is no text.

    Attributes:
        spans: of the items, in order.
        embedded: the prompt is `prompt_embeds`: it has no tokens of its own to score.
    """

    spans: tuple[Span, ...] = ()
    embedded: bool = False

    @classmethod
    def of(cls, engine_input: Mapping[str, Any]) -> Parts:
        """Of an engine's input, rendered."""
        found = [
            Span(modality, place.offset, place.offset + place.length)
            for modality, places in engine_input.get("mm_placeholders", {}).items()
            for place in places
        ]
        spans = tuple(sorted(found, key=lambda span: span.start))
        return cls(spans, "prompt_embeds" in engine_input)

    def shifted(self, count: int) -> Parts:
        """The same behind `count` positions fewer."""
        moved = (Span(s.modality, s.start - count, s.end - count) for s in self.spans)
        return self._replace(spans=tuple(moved))

    def first_own(self, length: int) -> int:
        """The first of the prompt's own tokens that is scored where no targets are given.

        Args:
            length: of the prompt.

        Raises:
            ScoreModeError: there is none.
        """
        if self.embedded:
            raise ScoreModeError(
                "prompt_embeds has no tokens of its own to score: give target_token_ids, m token "
                "ids (or m lists of candidates) for its last m positions."
            )
        end = max((span.end for span in self.spans), default=1)
        if self.spans and end >= length:
            raise ScoreModeError(
                f"the prompt of {length} positions ends with {self.spans[-1]}, which cannot be "
                "scored: put the text that is to be scored behind them."
            )
        return max(end, 1)

    def check_targets(self, first: int, length: int) -> None:
        """Refuse targets on placeholders.

        Args:
            first: position of the first target; the last stands on the last position.
            length: of the prompt.

        Raises:
            ScoreModeError: names the position and how many targets fit behind the items.
        """
        for span in self.spans:
            if span.end > first:
                position = max(first, span.start)
                room = length - self.spans[-1].end
                raise ScoreModeError(
                    f"target_token_ids[{position - first}] is for prompt position {position}, "
                    f"which is one of {span}: {room} text positions follow the last placeholder; "
                    + (
                        f"give at most {room} targets, for the end of the prompt."
                        if room
                        else "put the text that is to be scored behind them."
                    )
                )

    def note(self, first: int) -> tuple[str, ...]:
        """What to say of scores from position `first` on that were not asked for by targets."""
        if not self.spans:
            return ()
        return (
            f"the tokens behind the last placeholder, from position {first} on, are scored; what "
            "stands before them is context",
        )

    def check_ids(self, ids: np.ndarray, placeholders: Mapping[int, str]) -> None:
        """Refuse a placeholder for which no item was given: it would be read as a word.

        Args:
            ids: int64 [n], the prompt.
            placeholders: what the model's placeholders stand for, by token id.

        Raises:
            ScoreModeError: names its position.
        """
        if not placeholders or self.embedded:
            return
        stray = np.isin(ids, list(placeholders))
        for span in self.spans:
            stray[span.start : span.end] = False
        if stray.any():
            position = int(stray.argmax())
            kind = placeholders[int(ids[position])]
            raise ScoreModeError(
                f"prompt_token_ids[{position}] is {ids[position]}, the model's placeholder for "
                f"{kind!r}, and multi_modal_data has no item for it: give the item, or leave the "
                "token out."
            )


TEXT = Parts()


def check_keys(prompt: Mapping[str, Any], name: str) -> None:
    """Refuse keys of a prompt that vLLM would ignore beside each other, and embeddings of no array.

    Raises:
        ScoreModeError: names the keys.
    """
    embeds = prompt.get("prompt_embeds")
    if embeds is None:
        if "prompt_is_token_ids" in prompt:
            raise ScoreModeError(f"{name} has prompt_is_token_ids, but no prompt_embeds.")
        return
    if not hasattr(embeds, "is_floating_point"):
        raise ScoreModeError(
            f"{name}: prompt_embeds is {type(embeds).__name__}; give a torch.Tensor of shape "
            "[n, hidden size]."
        )
    if ignored := sorted({"prompt", *MEDIA} & prompt.keys()):
        raise ScoreModeError(
            f"{name} has prompt_embeds and {', '.join(ignored)}, of which the engine would read "
            "the embeddings only: leave one out."
        )


def placeholder_ids(model_config: Any) -> dict[int, str]:
    """What the placeholders of a multimodal model stand for, by token id, as far as known."""
    if not model_config.is_multimodal_model:
        return {}
    config, found = model_config.hf_config, {}
    for modality in _MODALITIES:
        for field in _PLACEHOLDER_FIELDS:
            token_id = getattr(config, field.format(modality), None)
            if isinstance(token_id, int) and token_id >= 0:
                found[token_id] = modality
    return found


def reads_items_one_way(model_config: Any) -> bool:
    """Whether a model attends both ways within an item (Gemma-3), and the engine only backwards.

    vLLM chooses its attention on a GPU by that. The one on a CPU cannot do it, and is not asked.
    """
    from vllm.platforms import current_platform

    return bool(model_config.is_mm_prefix_lm and current_platform.is_cpu())


def prompt_ids(engine_input: Mapping[str, Any], embedding_size: int | None = None) -> list[int]:
    """The ids of a rendered prompt; of embeddings zeros, as vLLM's own results have them.

    Args:
        embedding_size: H of the model; None: not known.

    Raises:
        ScoreModeError: embeddings that the engine cannot read, or would not.
    """
    if "prompt_embeds" not in engine_input:
        tokens: list[int] = engine_input["prompt_token_ids"]
        return tokens
    embeds = engine_input["prompt_embeds"]
    count, size = embeds.shape
    if embedding_size not in (None, size) or not embeds.dtype.is_floating_point:
        raise ScoreModeError(
            f"prompt_embeds is {embeds.dtype} of shape {tuple(embeds.shape)}: give floats of shape "
            f"[n, {embedding_size}], the model's."
        )
    ids, mask = engine_input.get("prompt_token_ids"), engine_input.get("is_token_ids")
    if ids is None and mask is None:
        return [0] * count
    if ids is None or mask is None:
        # vLLM takes all positions for tokens without the mask, and ignores it without the ids.
        given = "prompt_token_ids" if mask is None else "prompt_is_token_ids"
        raise ScoreModeError(
            f"{given} stands alone beside prompt_embeds: give prompt_token_ids and "
            "prompt_is_token_ids, which says at which positions the ids count, or neither."
        )
    if (len(ids), len(mask)) != (count, count):
        raise ScoreModeError(
            f"prompt_token_ids has {len(ids)} and prompt_is_token_ids {len(mask)} positions, "
            f"prompt_embeds {count}: give as many."
        )
    return [token if is_token else 0 for token, is_token in zip(ids, mask, strict=True)]


def to_engine(engine_input: Mapping[str, Any], ids: list[int], unread: int) -> dict[str, Any]:
    """The engine's input without what it is not to read.

    Args:
        engine_input: as it was rendered.
        ids: [n], the prompt as admitted, perhaps without tokens that stood in front twice.
        unread: how many positions of its end are left out.
    """
    kept = len(ids) - unread
    changed = dict(engine_input)
    if "prompt_embeds" in engine_input:
        names = ("prompt_embeds", "prompt_token_ids", "is_token_ids")
        changed |= {name: engine_input[name][:kept] for name in names if name in engine_input}
        return changed
    shift = len(engine_input["prompt_token_ids"]) - len(ids)
    changed["prompt_token_ids"] = ids[:kept]
    if shift and "mm_placeholders" in engine_input:
        changed["mm_placeholders"] = {
            modality: [dataclasses.replace(place, offset=place.offset - shift) for place in places]
            for modality, places in engine_input["mm_placeholders"].items()
        }
    return changed


def forget_items(renderer: Any, engine_input: Mapping[str, Any]) -> None:
    """Have vLLM send the items of a refused prompt the next time that they are given.

    Its cache in the front end takes an item that was rendered for one that the engine has.
    """
    cache = renderer.mm_processor_cache
    if cache is not None:
        for hashes in engine_input.get("mm_hashes", {}).values():
            for item in hashes:
                cache.invalidate(item)
