"""The words of a command line to options: the command's own, and the engine's, which are vLLM's."""

from __future__ import annotations

import difflib
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from vllm.engine.arg_utils import EngineArgs
from vllm.score.launch.reasons import one_line
from vllm.utils.argparse_utils import FlexibleArgumentParser

ENGINE_NAMES = tuple(field.name for field in fields(EngineArgs))
FILE = "--file"


class Parser(FlexibleArgumentParser):
    """vLLM's parser; an error is one line."""

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            word = words.split("=")[0].split(" ")[0]
            close = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message += f" (did you mean {close[0]}?)" if close else ""
        print(f"{self.prog}: {message}; -h shows the options", file=sys.stderr)
        sys.exit(2)


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
            after_file = option == FILE
        elif after_file and _is_file(word):
            yield f"{FILE}={word}"
        else:
            yield word
            after_file = word.startswith(f"{FILE}=")


def _is_file(word: str) -> bool:
    # A model can be a single file, too.
    return not word.startswith("-") and Path(word).is_file() and not word.endswith(".gguf")
