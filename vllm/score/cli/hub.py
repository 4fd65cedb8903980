"""The model's configuration and tokenizer, from this machine or the hub, without an engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.score.data.tables import hub_reachable
from vllm.score.errors import ScoreModeError
from vllm.score.launch.reasons import one_line
from vllm.score.launch.start import DEBUG

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "tekken*", "*.tiktoken", "spiece*")


def gooffline_if_unreachable() -> bool:
    """Switch the Hugging Face libraries to what is on this machine where the hub does not answer.

    They would otherwise retry for minutes before they look. Returns whether they are offline, by
    this or by the user's HF_HUB_OFFLINE.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if hub_reachable(endpoint):
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes yet to come
    if "huggingface_hub" in sys.modules:  # has read the environment already
        sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True
    return True


def model_config(model: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of the part of a model that reads text, as vLLM reads it.

    Raises:
        ScoreModeError: there is no such model, it cannot be had, or it is a single file (GGUF).
    """
    path = Path(model)
    if path.is_file():
        raise ScoreModeError(
            f"model {model!r} is a single file, and this vLLM reads none (no GGUF); name the "
            "folder of the model in the format of Hugging Face that it was made from"
        )
    offline = False
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "params.json")):
            raise ScoreModeError(
                f"model {model!r} is a folder without a config.json; name the folder of a model in "
                "the format of Hugging Face"
            )
        if any(mark in model for mark in "*?["):
            # It would load the weights of "model1" for "model[1]".
            raise ScoreModeError(
                f"model {model!r} is a folder whose name vLLM takes for a pattern as it looks for "
                "the weights; rename it, or name a link to it (ln -s)"
            )
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ScoreModeError(
            f"model {model!r} does not exist; name a folder, or a model of the hub"
        )
    else:
        offline = gooffline_if_unreachable()
    from vllm.transformers_utils.config import get_config

    try:
        with _unlogged():
            config = get_config(model, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # of transformers, the hub and vLLM, and of the model's own code
        if offline:
            raise ScoreModeError(
                f"model {model!r} is not on this machine and the Hugging Face Hub cannot be "
                "reached (or HF_HUB_OFFLINE is set); fetch it elsewhere and name its folder, or "
                "set HF_ENDPOINT to a mirror"
            ) from error
        raise ScoreModeError(
            f"model {model!r} cannot be loaded: {one_line(error)}; {_mend(path)}"
        ) from error
    return config.get_text_config()


def longest_context(config: Any) -> int | None:
    """Tokens that the model takes at most; None where its configuration does not say.

    A RoPE scaled beyond the trained positions (linear, dynamic) counts as scaled.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    factors = [1.0]
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("linear", "dynamic"):
            factors.append(float(part.get("factor") or 1.0))
    return int(positions * max(factors))


def load_tokenizer(name: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer that the engine will use; None for a single file, which only it opens.

    Raises:
        ScoreModeError: it cannot be loaded.
    """
    if Path(name).is_file():
        return None
    from vllm.tokenizers import get_tokenizer

    try:
        return get_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        folder = Path(name)
        if folder.is_dir() and not any(next(folder.glob(p), None) for p in _TOKENIZER_FILES):
            raise ScoreModeError(
                f"model {name!r} has no tokenizer in its folder (as tokenizer.json or "
                "tokenizer.model); add its files, or name another with --tokenizer"
            ) from error
        raise ScoreModeError(
            f"the tokenizer of {name!r} cannot be loaded: {one_line(error)}; fetch its files "
            "again, or name another with --tokenizer"
        ) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    """Within, vLLM does not log the errors that it raises, and how often it tried."""
    logger = logging.getLogger("vllm.transformers_utils")
    level = logger.level
    if not DEBUG.get():
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mend(folder: Path) -> str:
    """What to do with a configuration that cannot be read."""
    if folder.is_dir():
        return "mend its config.json, or fetch it again"
    return "give a folder with a config.json, or the name of a model of the hub"
