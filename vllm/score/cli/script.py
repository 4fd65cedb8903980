"""Run one function as a program, as `vllm-score` runs its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from vllm.score.cli.options import ManyFilesCommand
from vllm.score.cli.streams import one_line_errors


def run_script(function: Callable[..., Any]) -> None:
    """Options from the function's annotations; errors in one line."""
    app = typer.Typer(add_completion=False)
    settings = {"help_option_names": ["-h", "--help"]}
    app.command(context_settings=settings, cls=ManyFilesCommand)(function)
    name = Path(sys.argv[0]).name
    with one_line_errors(name):
        app(prog_name=name)
