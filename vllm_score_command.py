"""Where the command `vllm-score` begins.

Beside `vllm`, not in it: `vllm.score` cannot be imported where vLLM is missing or lies elsewhere,
and the command has to say so.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """The command, or one sentence on why there is none."""
    try:
        from vllm.score.cli import main as command
    except ImportError as error:
        sys.exit(f"vllm-score: {_reason(error)}")
    command()


def _reason(error: ImportError) -> str:
    if error.name != "vllm.score":
        return str(error)
    found = find_spec("vllm")
    return (
        f"vLLM is imported from {found.origin if found else None}, where vllm-score is not "
        f"installed; install it with that environment's pip (this command runs {sys.executable})"
    )
