"""The options of a command, the engine's among them, and the model that they name."""

from __future__ import annotations

import difflib
import json
import sys
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

from vllm.engine.arg_utils import EngineArgs
from vllm.score.checks import Count, Fraction, check
from vllm.score.data.tables import offline_if_unreachable
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import flag, open_llm, read_model
from vllm.score.launch.reasons import one_line
from vllm.utils.argparse_utils import FlexibleArgumentParser

if TYPE_CHECKING:
    from vllm import LLM

ENGINE_NAMES = tuple(field.name for field in fields(EngineArgs))
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


class Parser(FlexibleArgumentParser):
    """vLLM's parser; an error is one line."""

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            word = words.split("=")[0].split(" ")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        line = " ".join(message.split())
        print(f"{self.prog}: {line}; -h shows the options", file=sys.stderr)
        sys.exit(2)

    def _get_value(self, action: Action, arg_string: str) -> Any:
        """As vLLM converts it; what is no JSON is refused here, not only as the engine starts."""
        reason = "it is JSON of another kind"
        try:
            value = super()._get_value(action, arg_string)
            if not isinstance(value, str | list | int | float) or not _takes_json(action):
                return value
            is_text = isinstance(getattr(EngineArgs, action.dest, None), str)
            if is_text and not arg_string.startswith("{"):  # a text is right, too
                return value
            json.loads(arg_string)
        except ArgumentError as error:
            if not _takes_json(action):
                raise
            converter = error.__context__  # argparse leaves out why vLLM's failed
            reason = one_line((converter and converter.__cause__) or error)
        except ValueError as error:
            reason = one_line(error)
        name = action.option_strings[0]
        raise ArgumentError(
            action,
            f"{arg_string!r:.200} is not the JSON object that it takes ({reason}); give one, e.g. "
            f"{name} '{{\"key\": 1}}', or its keys, e.g. {name}.key 1",
        )


def _takes_json(action: Action) -> bool:
    """Whether vLLM makes a dict, or an object of a class of its settings, of the value."""
    if not callable(action.type):
        return False
    try:
        made = action.type("{}")
    except (ArgumentTypeError, TypeError, ValueError) as error:
        return isinstance(error.__cause__, ValidationError)  # of a class with required fields
    return isinstance(made, dict) or is_dataclass(made)


def make_parser(
    declare: Callable[[ArgumentParser], None], program: str, *, engine: bool = True
) -> Parser:
    """A parser of a command's own options, and of vLLM's where it starts an engine."""
    parser = Parser(prog=program, usage="%(prog)s [options]", allow_abbrev=False)
    declare(parser)
    if engine:
        EngineArgs.add_cli_args(parser)
    return parser


def parse(
    declare: Callable[[ArgumentParser], None],
    program: str,
    words: Sequence[str],
    defaults: Mapping[str, Any],
    *,
    engine: bool = True,
) -> Namespace:
    """The options of a command; of the engine's `engine` holds those that are given.

    Args:
        declare: adds the command's own options.
        program: its name in errors.
        words: of the command line.
        defaults: of own options, where they differ from those declared.
        engine: whether it starts an engine.
    """
    parser = make_parser(declare, program, engine=engine)
    parser.set_defaults(**defaults)
    if not any(word.startswith("--help=") for word in words):  # which shows vLLM's defaults
        for action in parser._actions:
            action.default = SUPPRESS if action.dest in ENGINE_NAMES else action.default
    words = ["--help" if word == "--help=listgroup" else word for word in words]
    own = {
        option
        for action in parser._actions
        if action.nargs != 0 and action.dest not in ENGINE_NAMES
        for option in action.option_strings
    }
    try:
        found: Namespace = parser.parse_args(list(_joined(words, own)))
    except Exception as error:  # of a file named by --config, or a value in it
        parser.error(one_line(error))
    given = {name: value for name, value in vars(found).items() if name in ENGINE_NAMES}
    return Namespace(engine=given, **{k: v for k, v in vars(found).items() if k not in given})


def _joined(words: Sequence[str], own: Collection[str]) -> Iterator[str]:
    """`--text VALUE` as `--text=VALUE`, in which vLLM's parser changes nothing.

    A value may then begin with a dash, and hold dots and underscores. `--file a b` names two files,
    for a shell's pattern: the words behind it are files as long as they exist, so that MODEL may
    stand there, too.
    """
    rest = iter(words)
    after_file = False
    for word in rest:
        option = word.replace("_", "-") if word.startswith("--") else word
        if word == "--":
            yield from (word, *rest)
        elif option in own:
            value = next(rest, None)
            if value == "--":  # which argparse would leave out without a word
                raise ValueError(f"{option} is '--', which no option can be; give it by --file")
            yield option if value is None else f"{option}={value}"
            after_file = option == "--file"
        elif after_file and _is_file(word):
            yield f"--file={word}"
        else:
            yield word
            after_file = word.startswith("--file=")


def _is_file(word: str) -> bool:
    # A model can be a single file, too.
    return not word.startswith("-") and Path(word).is_file() and not word.endswith(".gguf")


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
        asked = self.engine.get("max_model_len") or 0
        self._asked_length: int | None = asked if asked > 0 else None
        named, by_option = options.named_model, self.engine.pop("model", None)
        if named is not None and by_option not in (None, named):
            raise ScoreModeError(
                f"two models are named, {named!r} and --model {by_option!r}; name one"
            )
        self.name: str | None = by_option if named is None else named
        if self.name == "-":
            raise ScoreModeError("model is '-'; standard input is named by --file -")
        for field in _RANGES.keys() & self.engine.keys():
            check(flag(field), self.engine[field], _RANGES[field])
        if self.engine.get("skip_tokenizer_init"):
            raise ScoreModeError("--skip-tokenizer-init is given, but commands read texts")
        for field in _OF_A_MODEL:
            if self.name is None and field in self.engine:
                raise ScoreModeError(
                    f"{flag(field)} is {self.engine[field]!r}, but no model is named; add "
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
            said = f"the tokenizer of {name!r} cannot be loaded: {one_line(error)}; fetch it again"
            if folder.is_dir() and not any(next(folder.glob(p), None) for p in _TOKENIZER_FILES):
                said = (
                    f"model {name!r} has no tokenizer in its folder (e.g. tokenizer.json or "
                    "tokenizer.model); add its files"
                )
            raise ScoreModeError(f"{said}, or name another with --tokenizer") from error

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
        engine.pop("max_model_len", None)
        asked = self._asked_length
        if asked is not None and asked < context_length:
            raise ScoreModeError(
                f"--max-model-len is {asked}, and the longest text or window has "
                f"{context_length} tokens; raise it, or leave it out"
            )
        if asked is not None:
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
        path, wrong = Path(model), ""
        if path.is_file():
            wrong = (
                "is a single file, and this vLLM reads none (no GGUF); name the folder of the "
                "model in the format of Hugging Face that it was made from"
            )
        elif path.is_dir():
            configured = any((path / name).is_file() for name in ("config.json", "params.json"))
            if not configured and "hf_config_path" not in self.engine:
                wrong = (
                    "is a folder without a config.json; name the folder of a model in the format "
                    "of Hugging Face"
                )
            elif any(mark in model for mark in "*?["):
                # It would load the weights of "model1" for "model[1]".
                wrong = (
                    "is a folder whose name vLLM takes for a pattern as it looks for the weights; "
                    "rename it, or name a link to it (ln -s)"
                )
        elif "://" not in model:  # no object store
            if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
                wrong = "does not exist; name a folder, or a model of the hub"
            else:  # as long as this object lives: the engine looks again
                self._offline = ExitStack()
                self._offline.enter_context(offline_if_unreachable(model))
        if wrong:
            raise ScoreModeError(f"model {model!r} {wrong}")
