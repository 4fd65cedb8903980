"""The options of the model, as they come from `--model_args`.

The names are those of lm-eval's `vllm` model. What is not listed here goes to `vllm.LLM` as it is:
dtype, revision, trust_remote_code, tokenizer, tensor_parallel_size, quantization, block_size, ...

========================  ==================================================================
``max_model_len``         tokens that the model reads at most, as `max_length` of lm-eval's
                          `hf` model; also ``max_length``. By default as many as it can
``max_batch_size``        vLLM's ``max_num_seqs``
``batch_size``            accepted and not used: vLLM batches by itself
``add_bos_token``         True or False: with or without the tokenizer's special tokens
``prefix_token_id``       what a text without context follows; by default BOS, else EOS
``max_gen_toks``          tokens to generate where a task names no number (256)
``truncation_side``       of contexts too long to generate from: left, right or middle
``lora_local_path``       folder of an adapter for all requests
``chat_template_args``    further arguments of the chat template, a dict or JSON
``enable_thinking``       one of them; needs ``think_end_token``
``think_end_token``       the answer is what follows it
========================  ==================================================================
"""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.truncation import SIDES

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


@dataclass(frozen=True)
class Arguments:
    """Checked options; `engine` holds those of `vllm.LLM`."""

    engine: dict[str, Any]
    max_length: int | None = None
    batch_size: str | int = "auto"
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    max_gen_toks: int = 256
    truncation_side: str = "left"
    lora_local_path: str | None = None
    think_end_token: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)

    @property
    def enable_thinking(self) -> bool:
        return bool(self.chat_template_args.get("enable_thinking"))

    def lora_request(self) -> LoRARequest | None:
        """The adapter for all requests."""
        if self.lora_local_path is None:
            return None
        from vllm.lora.request import LoRARequest

        # The engine knows adapters by number: one that runs already may have others.
        number = 1 + zlib.crc32(str(self.lora_local_path).encode()) % (1 << 30)
        return LoRARequest(f"adapter-{number}", number, self.lora_local_path)


def read_arguments(
    pretrained: str | None, options: dict[str, Any], *, engine_runs: bool = False
) -> Arguments:
    """Sort the options into ours and vLLM's.

    Args:
        pretrained: name or folder of the model.
        options: everything else.
        engine_runs: there is an engine already, which takes no options any more.

    Raises:
        ScoreModeError: for options that contradict each other or are out of range.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for name, reason in IGNORED.items():
        if options.pop(name, None) is not None:
            logger.warning("%s is ignored: %s.", name, reason)
    own: dict[str, Any] = {
        name: options.pop(name)
        for name in (
            "batch_size",
            "add_bos_token",
            "prefix_token_id",
            "max_gen_toks",
            "truncation_side",
            "lora_local_path",
            "think_end_token",
        )
        if name in options
    }
    for name in ("prefix_token_id", "max_gen_toks"):
        if name in own:
            own[name] = _whole(name, own[name])
    length = _max_length(options)
    max_batch_size = options.pop("max_batch_size", None)
    template = _chat_template_args(options)
    if template.get("enable_thinking") and own.get("think_end_token") is None:
        raise ScoreModeError(
            "enable_thinking=True without think_end_token: name the token after which the answer "
            "begins, for example think_end_token='</think>'."
        )
    _check_choice("truncation_side", own.get("truncation_side", "left"), SIDES)
    if engine_runs:
        given = [*([] if pretrained is None else ["pretrained"]), *options]
        if given:
            raise ScoreModeError(
                f"{', '.join(given)}: these are options of the engine, which runs already; give "
                "them to LLM(...)."
            )
        engine: dict[str, Any] = {}
    elif pretrained is None:
        raise ScoreModeError("no model is named: --model_args pretrained=NAME_OR_FOLDER.")
    else:
        engine = {
            "model": str(pretrained),
            "seed": SEED,
            "max_model_len": length,
            "max_num_seqs": max_batch_size,
            **options,
        }
        if own.get("lora_local_path") is not None:
            engine.setdefault("enable_lora", True)
    return Arguments(engine, max_length=length, chat_template_args=template, **own)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ScoreModeError(f"{name} is {value!r}; give a whole number.") from None


def _max_length(options: dict[str, Any]) -> int | None:
    names = [name for name in ("max_model_len", "max_length") if name in options]
    if len(names) == 2:
        raise ScoreModeError(
            f"max_model_len={options['max_model_len']} and max_length={options['max_length']} are "
            "the same thing: give one of them."
        )
    if not names:
        return None
    length = _whole(names[0], options.pop(names[0]))
    if length < 1:
        raise ScoreModeError(f"{names[0]} is {length}; the model must read at least 1 token.")
    return length


def _chat_template_args(options: dict[str, Any]) -> dict[str, Any]:
    given = options.pop("chat_template_args", {})
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ScoreModeError(f"chat_template_args is {given!r}, no JSON: {error}.") from error
    if not isinstance(given, dict):
        raise ScoreModeError(f"chat_template_args is {given!r}; give a dict.")
    thinking = options.pop("enable_thinking", None)
    return dict(given) if thinking is None else {**given, "enable_thinking": thinking}


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ScoreModeError(f"{name} is {value!r}; choose from {', '.join(choices)}.")
