"""The command `vllm-score`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
import typer.core

# Command name -> module of this package that defines a function of the same name.
COMMANDS = {
    "perplexity": "perplexity",
    "sequence": "sequence",
    "eig": "eig",
    "doctor": "doctor",
}


class LazyGroup(typer.core.TyperGroup):
    """Imports a command's module when it is used, so that `vllm-score -h` is quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        from vllm.score.cli.options import ManyFilesCommand

        module = import_module(f"{__name__}.{COMMANDS[name]}")
        single = typer.Typer(add_completion=False)
        single.command(name=name, cls=ManyFilesCommand)(getattr(module, name))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=False)
def vllm_score() -> None:
    """Exact log-probabilities of given tokens, computed by vLLM on the weights that you serve.

    Start with:  vllm-score perplexity

    on your model and text:  vllm-score perplexity MODEL --file TEXT.txt
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend become one line and exit code 1."""
    from vllm.score.cli.streams import one_line_errors

    with one_line_errors("vllm-score"):
        app(args=arguments, prog_name="vllm-score")
