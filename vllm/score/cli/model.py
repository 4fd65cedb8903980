"""The model that a command runs: named or made here, read before its engine starts, started."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.checks import Count, Fraction, check
from vllm.score.cli.common import option
from vllm.score.data.tables import offline_if_unreachable
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import open_llm, read_model
from vllm.score.launch.reasons import one_line

if TYPE_CHECKING:
    from vllm import LLM

# What vLLM would refuse only as it starts.
_RANGES = {
    "tensor_parallel_size": Count,
    "pipeline_parallel_size": Count,
    "max_num_seqs": Count,
    "max_num_batched_tokens": Count,
    "gpu_memory_utilization": Fraction,
}
_OF_A_MODEL = ("quantization", "tokenizer", "revision", "hf_overrides")
_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "tekken*", "*.tiktoken", "spiece*")


class Model:
    """The model of a command.

    Args:
        options: of the command line; `engine` holds vLLM's.

    Attributes:
        name: name or folder; None for one that is made here, until it is.
        engine: further arguments of `vllm.LLM`, as they are given.
        config: vLLM's `ModelConfig`, once it is read.
        tokenizer: the engine's, once it is read.

    Raises:
        ScoreModeError: on construction, for options that cannot be.
    """

    def __init__(self, options: Namespace) -> None:
        self.engine: dict[str, Any] = dict(options.engine)
        self.config: Any = None
        self.tokenizer: Any = None
        self._low_memory, self._progress = options.low_memory, not options.quiet
        named, by_option = options.named_model, self.engine.pop("model", None)
        if named is not None and by_option not in (None, named):
            raise ScoreModeError(
                f"two models are named, {named!r} and --model {by_option!r}; name one"
            )
        self.name: str | None = by_option if named is None else named
        if self.name == "-":
            raise ScoreModeError("model is '-'; standard input is named by --file -")
        for field in _RANGES.keys() & self.engine.keys():
            check(option(field), self.engine[field], _RANGES[field])
        if self.engine.get("skip_tokenizer_init"):
            raise ScoreModeError("--skip-tokenizer-init is given, but commands read texts")
        for field in _OF_A_MODEL:
            if self.name is None and field in self.engine:
                raise ScoreModeError(
                    f"{option(field)} is {self.engine[field]!r}, but no model is named; add "
                    "--model MODEL"
                )

    def read(self, embedded: Callable[[], Path]) -> None:
        """Read its configuration and its tokenizer.

        Args:
            embedded: makes the model where none is named, and gives its folder.

        Raises:
            ScoreModeError: it is not there, or cannot be used.
        """
        if self.name is None:
            self.name = str(embedded())
            # vLLM's "auto" would round its float32 weights to bfloat16.
            if self.engine.get("dtype", "auto") == "auto":
                self.engine["dtype"] = "float32"
        else:
            self._check_place(self.name)
        self.config = read_model({**self.engine, "model": self.name})
        from vllm.tokenizers import cached_tokenizer_from_config

        try:
            self.tokenizer = cached_tokenizer_from_config(self.config)
        except Exception as error:  # of transformers, the hub, and of the model's own code
            name = self.config.tokenizer
            folder = Path(name)
            if folder.is_dir() and not any(next(folder.glob(p), None) for p in _TOKENIZER_FILES):
                raise ScoreModeError(
                    f"model {name!r} has no tokenizer in its folder (e.g. tokenizer.json or "
                    "tokenizer.model); add its files, or name another with --tokenizer"
                ) from error
            raise ScoreModeError(
                f"the tokenizer of {name!r} cannot be loaded: {one_line(error)}; fetch its files "
                "again, or name another with --tokenizer"
            ) from error

    @property
    def longest(self) -> int | None:
        """Tokens that it takes at most; None where neither its configuration nor a user says."""
        length = int(self.config.max_model_len)
        if self._asked_length is None:
            try:
                self.config.get_and_verify_max_len(1 << 40)
            except ValueError:
                return length
            return None
        return length

    @property
    def _asked_length(self) -> int | None:
        asked = self.engine.get("max_model_len")
        return asked if asked is not None and asked > 0 else None

    def start(self, context_length: int, read: int | None = None, **defaults: Any) -> LLM:
        """Its engine.

        Args:
            context_length: tokens of the longest prompt.
            read: as many of them the model reads; see `open_llm`.
            defaults: arguments of `vllm.LLM`, where the user gives no others.

        Raises:
            ScoreModeError: it does not start, or is to be shorter than the longest prompt.
        """
        assert self.name is not None
        engine = {**defaults, **self.engine}
        asked = self._asked_length
        engine.pop("max_model_len", None)
        if asked is not None:
            if asked < context_length:
                raise ScoreModeError(
                    f"--max-model-len is {asked}, and the longest text or window has "
                    f"{context_length} tokens; raise it, or leave it out"
                )
            context_length, read = asked, None
        return open_llm(
            self.name,
            context_length=context_length,
            read=read,
            low_memory=self._low_memory,
            progress=self._progress,
            **engine,
        )

    def _check_place(self, model: str) -> None:
        """Raise ScoreModeError for what cannot be a model; look at the hub only if it answers."""
        path = Path(model)
        if path.is_file():
            raise ScoreModeError(
                f"model {model!r} is a single file, and this vLLM reads none (no GGUF); name the "
                "folder of the model in the format of Hugging Face that it was made from"
            )
        if path.is_dir():
            configured = any((path / name).is_file() for name in ("config.json", "params.json"))
            if not configured and "hf_config_path" not in self.engine:
                raise ScoreModeError(
                    f"model {model!r} is a folder without a config.json; name the folder of a "
                    "model in the format of Hugging Face"
                )
            if any(mark in model for mark in "*?["):
                # It would load the weights of "model1" for "model[1]".
                raise ScoreModeError(
                    f"model {model!r} is a folder whose name vLLM takes for a pattern as it looks "
                    "for the weights; rename it, or name a link to it (ln -s)"
                )
        elif "://" in model:  # of an object store
            return
        elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ScoreModeError(
                f"model {model!r} does not exist; name a folder, or a model of the hub"
            )
        else:  # as long as this object lives: the engine looks again
            self._offline = ExitStack()
            self._offline.enter_context(offline_if_unreachable(model))
