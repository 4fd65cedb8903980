"""The command `vllm-score`, behind `vllm_score_command`: what needs vLLM."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from vllm.score.cli.common import one_line_errors, results_stream
from vllm.score.launch.engine import DEBUG, quieten
from vllm_score_command import COMMANDS, DECLARED, main, show_help

__all__ = ["completion", "main", "run"]


def run(command: str, words: list[str], program: str, defaults: Mapping[str, Any]) -> None:
    """Run a command; see `vllm_score_command.run`."""
    with one_line_errors(program):
        DEBUG.set("--debug" in words)
        parser, function, declare = _loaded(command)
        name = f"{program} {command}" if program == "vllm-score" else program
        if {"-h", "--help"} & set(words):
            show_help(declare, name, defaults)
        options = parser.parse(declare, name, words, defaults, engine=command != "doctor")
        with results_stream() as results:
            function(options, results)


def completion(shell: str) -> str:
    """A script that completes commands and options, vLLM's among them, in bash, zsh or tcsh."""
    import shtab

    whole = ArgumentParser(prog="vllm-score")
    whole.add_argument("--version", action="store_true", help="show the versions")
    whole.add_argument("--print-completion", choices=shtab.SUPPORTED_SHELLS, help="print this")
    commands = whole.add_subparsers()
    for name, summary in COMMANDS.items():
        parser, _, declare = _loaded(name)
        made = parser.make_parser(declare, f"vllm-score {name}", engine=name != "doctor")
        commands.add_parser(name, help=summary, parents=[made], add_help=False)
    return str(shtab.complete(whole, shell))


def _loaded(command: str) -> tuple[Any, Callable[..., None], Callable[[ArgumentParser], None]]:
    """The module that parses, what runs a command, and what declares its options.

    vLLM logs what it finds on this machine while its modules are imported.
    """
    with results_stream():
        quieten()
        parser = import_module(f"{__name__}.parser")
        module = import_module(f"{__name__}.{command}")
    return parser, getattr(module, command), getattr(module, "declare", None) or DECLARED[command]
