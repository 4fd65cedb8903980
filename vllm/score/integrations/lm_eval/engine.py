"""The engine behind the model: the options that are its own, its start and its tokenizer.

It has vLLM's own defaults, but for what a CPU needs.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.score.checks import Count, check
from vllm.score.engine.configuration import with_room_for_one_more
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import for_cpu, starting

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# lm-eval's own, so that a change of the model's name alone changes no sampled text.
SEED = 1234
# lm-eval's `vllm` model ignores these, too.
IGNORED = {
    "device": "choose GPUs by CUDA_VISIBLE_DEVICES",
    "swap_space": "vLLM has no swap space any more",
}
# vLLM's blocks of 128 tokens on a CPU leave up to 127 tokens of a common context unshared.
CPU_BLOCK_SIZE = 32


def engine_options(
    ours: Mapping[str, Any], options: Mapping[str, Any], *, runs: bool = False
) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that the model's options name; none where the engine runs.

    Args:
        ours: `model`, and the arguments that come from options of the model by another name; None
            means vLLM's default.
        options: the other arguments, by their own names; None means vLLM's default.
        runs: there is an engine already, which takes no options any more.

    Raises:
        ScoreModeError: no model is named, or options are given to an engine that runs.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, reason in IGNORED.items():
        if given.pop(name, None) is not None:
            logger.warning("%s is ignored: %s.", name, reason)
    model = ours["model"]
    if runs:
        if named := [*([] if model is None else ["pretrained"]), *given]:
            raise ScoreModeError(
                f"{', '.join(named)}: these are options of the engine, which runs already; give "
                "them to LLM(...)."
            )
        return {}
    if model is None:
        raise ScoreModeError("no model is named: --model_args pretrained=NAME_OR_FOLDER.")
    return {"seed": SEED, **{n: v for n, v in ours.items() if v is not None}, **given}


def length_asked_for(max_model_len: int | None, max_length: int | None) -> int | None:
    """Tokens that the model is to read at most, by one of the option's two names."""
    if max_model_len is not None and max_length is not None:
        raise ScoreModeError(
            f"max_model_len={max_model_len} and max_length={max_length} are the same thing: give "
            "one of them."
        )
    found: int | None = whole_number("max_length", max_length, Count | None)
    return found or whole_number("max_model_len", max_model_len, Count | None)


def whole_number(name: str, value: Any, kind: Any) -> Any:
    """`value`, checked to be of this kind; digits in a text are the number, as lm-eval's command
    line and its files of options may give it."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return check(name, value, kind)


def start_engine(options: dict[str, Any]) -> LLM:
    """A running `vllm.LLM` that reads as many tokens as `max_model_len` says.

    Args:
        options: of `vllm.LLM`. `max_model_len` has the meaning of
            `max_length` of lm-eval's `hf` model, which predicts a token after as many: the engine
            is started with one more, where the model allows it.

    Raises:
        ScoreModeError: it cannot be started; see `vllm.score.launch.engine`.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if int(options.get("data_parallel_size", 1)) > 1:
        raise ScoreModeError(
            f"data_parallel_size is {options['data_parallel_size']}: one LLM drives one replica. "
            "Start `vllm serve MODEL --data-parallel-size N` and evaluate it with "
            "--model local-completions, or use tensor_parallel_size."
        )
    if current_platform.is_cpu():
        options = {"block_size": CPU_BLOCK_SIZE, **options}
    with starting(options["model"]):
        return LLM(**with_room_for_one_more({**for_cpu(options), **options}))


def longest_input(llm: LLM, asked: int | None, *, given: bool) -> int:
    """Tokens that the model reads at most: `asked`, or all that the engine allows.

    vLLM never takes a prompt of max_model_len tokens, as one more is to be generated.

    Args:
        asked: by `max_length`.
        given: whether the engine was running before.

    Raises:
        ScoreModeError: a given engine cannot read as many tokens as are asked for.
    """
    engine = int(llm.llm_engine.model_config.max_model_len)
    if asked is None or asked < engine:
        return engine - 1 if asked is None else asked
    if given:
        raise ScoreModeError(
            f"max_length is {asked}, but the engine with max_model_len={engine} reads "
            f"{engine - 1} tokens at most: start it with LLM(max_model_len={asked + 1}), or give "
            f"max_length={engine - 1}."
        )
    logger.warning(
        "max_model_len is %d, and vLLM reads %d tokens of this model at most: longer texts are cut "
        "as lm-eval's hf model cuts them with max_length=%d.",
        asked,
        engine - 1,
        engine - 1,
    )
    return engine - 1


def load_tokenizer(llm: LLM, add_bos_token: bool | None) -> Any:
    """The engine's tokenizer by name, with another setting of BOS where one is asked for.

    Not the engine's own object: that one answers from a pool of copies, so that nothing that is
    set on it (a chat template) takes effect.
    """
    from vllm.tokenizers import get_tokenizer

    config = llm.llm_engine.model_config
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    return get_tokenizer(
        config.tokenizer,
        tokenizer_mode=config.tokenizer_mode,
        trust_remote_code=config.trust_remote_code,
        revision=config.tokenizer_revision,
        **options,
    )


def lora_request(folder: str | None) -> LoRARequest | None:
    """The adapter for all requests."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    # The engine knows adapters by number: one that runs already may have others.
    number = 1 + zlib.crc32(str(folder).encode()) % (1 << 30)
    return LoRARequest(f"adapter-{number}", number, folder)
