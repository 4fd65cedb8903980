"""Models made once and kept in the user's cache: each is there whole, or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.score.errors import ScoreModeError
from vllm.score.launch.output import long_step, say
from vllm.score.tiny.training import LlamaRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CACHE_VARIABLE = "VLLM_SCORE_CACHE"
MODEL = "model"
_FACTS, _RECIPE = "facts.json", "recipe.json"
# What must be there for a model to be used: all of it comes at once, but a user may have deleted
# some since.
_FILES = (f"{MODEL}/config.json", f"{MODEL}/model.safetensors", f"{MODEL}/tokenizer.json", _FACTS)


class Made(NamedTuple):
    """What a build gives: `facts` tell how it went; versions and seconds are added to them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    facts: dict[str, Any]


def default_cache_dir() -> Path:
    """Where this package keeps what it makes.

    What the environment variable VLLM_SCORE_CACHE names, else the user's cache directory (on
    Linux XDG_CACHE_HOME, or ~/.cache).
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("vllm-score")


def make_once(
    recipe: LlamaRecipe,
    build: Callable[[Path], Made],
    *,
    kind: str,
    name: str,
    begins: str,
    files: Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Make a model unless the cache has it already.

    It is built beside its place and appears there by one rename, when it is complete: a run that is
    killed leaves nothing that a later one would use. Of two processes at once, the second waits
    for the first.

    Args:
        recipe: its key names the folder; it is saved there as `recipe.json`.
        build: makes the model; it may write files to the folder that it is given.
        kind: subfolder of the cache.
        name: what is made, as sentences name it ("the embedded model").
        begins: what is said on standard error before, with how long it takes.
        files: those that `build` writes; without them the model is made anew.
        cache_dir: by default `default_cache_dir()`.
        progress: whether to say what is made, the time that it took, and that another process is
            waited for.

    Returns:
        The folder, with the model and its tokenizer in its subfolder `MODEL`, and the facts.

    Raises:
        ScoreModeError: where the cache cannot be written.
    """
    target = Path(cache_dir or default_cache_dir()) / kind / recipe.key()

    def complete() -> bool:
        return all((target / file).is_file() for file in (*_FILES, *files))

    try:
        if not complete():
            with _locked(target, name, progress):
                if not complete():
                    with long_step(begins, f"Made {name}", progress):
                        _make(target, recipe, build)
        return target, json.loads((target / _FACTS).read_text())
    except OSError as error:
        raise ScoreModeError(
            f"{name} cannot be made in {target.parent} ({error}); set {CACHE_VARIABLE} "
            "to a folder that can be written"
        ) from error


def _locked(target: Path, name: str, progress: bool) -> AbstractContextManager[Any]:
    """The right to make this folder; the system takes it back from a process that dies."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parent / f"{target.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Another process is making {name}; waiting for it", progress)
        return lock.acquire()


def _make(target: Path, recipe: LlamaRecipe, build: Callable[[Path], Made]) -> None:
    """Build beside the target, then rename. Called with the lock held."""
    import torch
    import transformers

    started = time.perf_counter()
    prefix = f".{target.name}."
    for left in target.parent.glob(f"{prefix}*"):  # of runs that were killed: nobody has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        building = Path(folder)
        model, tokenizer, facts = build(building)
        save_model(model, tokenizer, building / MODEL)
        facts = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            **facts,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        for file, content in ((_RECIPE, asdict(recipe)), (_FACTS, facts)):
            (building / file).write_text(json.dumps(content, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both to `folder`, without Hugging Face's progress bar (its setting is put back)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
