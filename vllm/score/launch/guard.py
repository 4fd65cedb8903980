"""Scripts that vLLM's processes cannot import: without `if __name__ == "__main__":`."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def unguarded_script_note(error: BaseException) -> str | None:
    """What to write in the program's script, where an engine process died of importing it.

    A process that is spawned (as on a CPU, or once CUDA is initialised) runs the script again to
    find its functions, and one that starts an engine at once would start another one, and so on.
    """
    if "initialization failed" not in str(error):
        return None
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") != "spawn":
        return None
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return None
    try:
        guarded = "__main__" in Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if guarded:
        return None
    return (
        f"vllm-score: vLLM's engine process imports {script} again, which starts another engine; "
        'put the code that makes the LLM below `if __name__ == "__main__":`'
    )
