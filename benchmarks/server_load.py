"""A completion server under a mixed load: scores beside generations, hang-ups, bad requests.

    python benchmarks/server_load.py                       # 500 requests at once, a tiny model
    python benchmarks/server_load.py --requests 60

Every answer is checked against Hugging Face in float64. At the end the server must be healthy,
idle, and right once more.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import httpx
import numpy as np
from load_requests import LOST, MIX, Answer, Reference, Request, make_requests, problem, send

ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64")
CPU_ENGINE = ("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(256 << 20))
IDLE_SECONDS = 30
# What is left running when the clients are gone.
BUSY = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)


def main() -> None:
    options = arguments()
    import torch
    from harness import report_values
    from server_process import running_server

    from vllm.score.tiny.random_models import make_random_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_random_model(Path(folder) / "model", "llama", vocab_size=options.vocab_size)
        requests = make_requests(options.requests, options.vocab_size, options.longest)
        flags = [*ENGINE, *(() if torch.cuda.is_available() else CPU_ENGINE)]
        flags += ["--max-model-len", "2048"]
        log = Path(folder) / "server.log"
        with running_server(model, *flags, log=log, TORCH_COMPILE_DISABLE="1") as address:
            warm = make_requests(len(MIX), options.vocab_size, options.longest, seed=1)
            asyncio.run(load(address, warm))
            begin = time.perf_counter()
            answers = asyncio.run(load(address, requests))
            seconds = time.perf_counter() - begin
            last = make_requests(len(MIX), options.vocab_size, options.longest, seed=2)
            after = asyncio.run(finish(address, last))
        reference = hugging_face(model)
        failures = problems([*requests, *last], [*answers, *after], reference)
    lost = sum(a.status == LOST for a in answers)
    sizes = {**vars(options), "seconds": round(seconds, 2), "wrong": len(failures), "lost": lost}
    report_values("server_load", rows(requests, answers, seconds), sizes)
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} wrong answers:", *failures[:20]]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500, help="all sent at once")
    parser.add_argument("--longest", type=int, default=1000, help="tokens of the longest prompt")
    parser.add_argument("--vocab-size", type=int, default=1024)
    return parser.parse_args()


async def load(address: str, requests: Sequence[Request]) -> list[Answer]:
    """Send all requests at once; an answer for each, or an exception."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        return list(await asyncio.gather(*(send(client, request) for request in requests)))


async def finish(address: str, requests: Sequence[Request]) -> list[Answer]:
    """Wait until the server is idle, ask for its health, and send a few requests more.

    Raises:
        RuntimeError: requests of clients that are gone still run.
    """
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        deadline = time.monotonic() + IDLE_SECONDS
        while sum(map(float, BUSY.findall((await client.get("/metrics")).text))):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server still works {IDLE_SECONDS} s after its clients.")
            await asyncio.sleep(0.1)
        (await client.get("/health")).raise_for_status()
    return await load(address, requests)


def hugging_face(model: Path) -> Reference:
    """Float64 log-softmax [n, V] of a prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    torch.set_num_threads(1)  # as quick for a tiny model, and much quicker on a busy machine

    @functools.lru_cache
    def cached(ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            return exact(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    return lambda ids: cached(tuple(ids))


def problems(
    requests: Sequence[Request], answers: Sequence[Answer], reference: Reference
) -> list[str]:
    """What is wrong, a line for each wrong answer."""
    found = []
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        wrong = problem(request, answer, reference)
        if wrong is not None:
            found.append(f"request {number} ({request.kind}): {wrong}")
    return found


def rows(requests: list[Request], answers: list[Answer], seconds: float) -> list[dict[str, Any]]:
    """Figures of each kind, and of all."""
    pairs = list(zip(requests, answers, strict=True))
    table = []
    for kind in ("all", *MIX):
        mine = [(r, a) for r, a in pairs if kind in ("all", r.kind)]
        answered = [a for _, a in mine if a.status > 0]
        waits = [a.seconds for a in answered]
        table.append(
            {
                "kind": kind,
                "sent": len(mine),
                "answered 200": sum(a.status == 200 for a in answered),
                "refused 400": sum(a.status == 400 for a in answered),
                "hung up": sum(a.status == 0 for _, a in mine),
                "requests/s": round(len(mine) / seconds, 2),
                "median s": round(float(np.median(waits)), 3) if waits else "",
                "p95 s": round(float(np.percentile(waits, 95)), 3) if waits else "",
            }
        )
    return table


if __name__ == "__main__":
    main()
