"""What the options of the model mean for the engine and the chat template.

The names are those of lm-eval's `vllm` model.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.score.checks import Count, check
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# lm-eval's own, so that a change of the model's name alone changes no sampled text.
SEED = 1234
# lm-eval's `vllm` model ignores these, too.
IGNORED = {
    "device": "choose GPUs by CUDA_VISIBLE_DEVICES",
    "swap_space": "vLLM has no swap space any more",
}


def engine_options(
    pretrained: str | None,
    options: Mapping[str, Any],
    *,
    max_length: int | None = None,
    max_batch_size: int | None = None,
    lora: bool = False,
    runs: bool = False,
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that the model's options name; none where the engine runs.

    Args:
        pretrained: name or folder of the model.
        options: of `vllm.LLM`; None means its default.
        max_length: tokens that the model is to read at most.
        max_batch_size: vLLM's `max_num_seqs`.
        lora: an adapter is to be used.
        runs: there is an engine already, which takes no options any more.

    Raises:
        ScoreModeError: no model is named, or options are given to an engine that runs.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, reason in IGNORED.items():
        if given.pop(name, None) is not None:
            logger.warning("%s is ignored: %s.", name, reason)
    if runs:
        if named := [*([] if pretrained is None else ["pretrained"]), *given]:
            raise ScoreModeError(
                f"{', '.join(named)}: these are options of the engine, which runs already; give "
                "them to LLM(...)."
            )
        return {}
    if pretrained is None:
        raise ScoreModeError("no model is named: --model_args pretrained=NAME_OR_FOLDER.")
    ours = {
        "model": str(pretrained),
        "seed": SEED,
        "max_model_len": max_length,
        "max_num_seqs": max_batch_size,
        "enable_lora": lora or None,
    }
    return {**{name: value for name, value in ours.items() if value is not None}, **given}


def length_asked_for(max_model_len: int | None, max_length: int | None) -> int | None:
    """Tokens that the model is to read at most, by one of the option's two names."""
    if max_model_len is not None and max_length is not None:
        raise ScoreModeError(
            f"max_model_len={max_model_len} and max_length={max_length} are the same thing: give "
            "one of them."
        )
    name, length = "max_model_len", max_model_len
    if max_model_len is None:
        name, length = "max_length", max_length
    found: int | None = check(name, length, Count | None)
    return found


def template_arguments(
    given: Mapping[str, Any] | str | None, enable_thinking: bool | None, think_end: str | None
) -> dict[str, Any]:
    """Further arguments of the chat template.

    Args:
        given: a dict, or one as JSON.
        enable_thinking: one of the arguments.
        think_end: text after which the answer begins, without which nobody may think.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ScoreModeError(f"chat_template_args is {given!r}, no JSON: {error}.") from error
    arguments: Any = {} if given is None else given
    if not isinstance(arguments, Mapping):
        raise ScoreModeError(f"chat_template_args is {given!r}; give a dict.")
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    arguments = {**arguments, **thinking}
    if arguments.get("enable_thinking") and think_end is None:
        raise ScoreModeError(
            "enable_thinking=True without think_end_token: name the token after which the answer "
            "begins, for example think_end_token='</think>'."
        )
    return arguments


def lora_request(folder: str | None) -> LoRARequest | None:
    """The adapter for all requests."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    # The engine knows adapters by number: one that runs already may have others.
    number = 1 + zlib.crc32(str(folder).encode()) % (1 << 30)
    return LoRARequest(f"adapter-{number}", number, folder)
