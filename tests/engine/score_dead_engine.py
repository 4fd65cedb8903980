"""Run as a program by test_dead_engine.py: an engine's process ends while it is waited for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from threading import Timer
from typing import Any

from tqdm import tqdm


def main(model: str, how: str) -> None:
    from vllm import LLM
    from vllm.score import score

    # A shell has what it runs in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=128 << 20,
    )
    (process,) = llm.llm_engine.engine_core.resources.engine_manager.processes
    kill = partial(os.kill, process.pid, signal.SIGKILL)
    prompts = [[i, *range(1, 500)] for i in range(40)]
    ended = 0.0

    class Killing(tqdm):
        """Kills it at the first result."""

        def update(self, n: float | None = 1) -> None:
            nonlocal ended
            kill()
            ended = time.monotonic()

    class Interrupting(tqdm):
        """Ctrl-C while the engine is held, and answers no more; it ends a little later."""

        def __init__(self, **_: Any) -> None:
            nonlocal ended
            super().__init__(disable=True)
            os.kill(process.pid, signal.SIGSTOP)
            Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
            Timer(2, kill).start()
            ended = time.monotonic() + 2

    try:
        score(llm, prompts, use_tqdm=Killing if how == "killed" else Interrupting)
    except BaseException as error:
        found = {"error": type(error).__name__, "said": str(error)}
    print(json.dumps({**found, "seconds": time.monotonic() - ended}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
