"""The model's configuration, from this machine or the hub, before the engine needs it."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from vllm.score.errors import ScoreModeError

_PROBE_SECONDS = 5.0


def go_offline_if_unreachable() -> bool:
    """Switch the Hugging Face libraries to what is on this machine where the hub does not answer.

    They would otherwise retry for minutes before they look. Works only before they are imported;
    returns whether they are offline, by this or by the user's HF_HUB_OFFLINE.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO", "OFF"):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return False
    except urllib.error.HTTPError:
        return False  # somebody answered
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        return True


def model_config(model: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration (`transformers`) of the part of a model that reads text.

    None where the model is a single file, whose configuration only the engine reads.

    Raises:
        ScoreModeError: there is no such model, or it cannot be had.
    """
    path = Path(model)
    if path.is_file():
        return None
    offline = False
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "params.json").is_file():
            raise ScoreModeError(
                f"model {model!r} is a folder without a config.json; name the folder of a model in "
                "the format of Hugging Face"
            )
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ScoreModeError(f"model {model!r} does not exist; name a folder, or a model of the hub")
    else:
        offline = go_offline_if_unreachable()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        if offline:
            raise ScoreModeError(
                f"model {model!r} is not on this machine and the Hugging Face Hub cannot be reached "
                "(or HF_HUB_OFFLINE is set); fetch it elsewhere and name its folder, or set "
                "HF_ENDPOINT to a mirror"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScoreModeError(
            f"model {model!r} cannot be loaded: {reason.rstrip('.')}; give a folder with a "
            "config.json, or the name of a model of the hub"
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
