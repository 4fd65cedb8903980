"""`vllm-score doctor`: would this installation score, and with what."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console

from vllm import SamplingParams  # noqa: F401 - the first import of every user
from vllm.score.api import score
from vllm.score.errors import ScoreModeUnavailable
from vllm.score.launch.engine import open_llm
from vllm.score.patches import REGISTER
from vllm.score.patches.engine_core import first_problem, process_status
from vllm.score.patches.front_end import ask_engine
from vllm.score.report.table import plain_table
from vllm.score.tiny.random_models import make_random_model


def doctor(options: Namespace, results: TextIO) -> None:
    """Print what every process reports; exit code 1 if scores would be refused or are wrong."""
    statuses: list[dict[str, Any]] = [front_end_status()]
    check: dict[str, Any] = {}
    if not options.quick and statuses[0]["problem"] is None:
        engine_statuses, check = engine_report(progress=not options.quiet)
        statuses += engine_statuses
    problem = first_problem(statuses)
    if check and check["max_difference_nats"] > check["tolerance_nats"]:
        problem = (
            f"the scores differ from Hugging Face's by {check['max_difference_nats']:.2e} nats, "
            f"more than {check['tolerance_nats']:.0e}."
        )
    if options.json:
        report = {"processes": statuses, "check": check or None, "problem": problem}
        print(json.dumps(report, indent=2), file=results, flush=True)
    else:
        _print(statuses, check, problem, Console(file=results, highlight=False))
    if problem is not None:
        sys.exit(1)


def front_end_status() -> dict[str, Any]:
    """This process, after every module that the front end amends was imported."""
    for patch in REGISTER:
        if "front end" in patch.roles:
            import_module(patch.target)
    return process_status("front end")


def engine_report(progress: bool = True) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Status of the engine core and worker of a tiny engine, and its scores against a reference."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    # A forked engine core would hang on the threads that made the model.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    with TemporaryDirectory(prefix="vllm-score-doctor-") as folder:
        model = make_random_model(Path(folder) / "model", "llama")
        llm = open_llm(
            str(model),
            context_length=256,
            dtype="float32",
            in_process=False,
            enforce_eager=True,
            progress=progress,
        )
        try:
            statuses = ask_engine(llm.llm_engine)
            refused = any(status["problem"] for status in statuses)
            return statuses, {} if refused else _compare(llm, model)
        except ScoreModeUnavailable as error:
            return [{"role": "engine core", "problem": str(error)}], {}
        finally:
            llm.llm_engine.engine_core.shutdown()  # not at exit, where its threads are gone


def _compare(llm: Any, model: Path) -> dict[str, Any]:
    """Largest difference to Hugging Face in float64 over 64 tokens, in nats."""
    from transformers import AutoModelForCausalLM

    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    ids = np.random.default_rng(0).integers(0, vocab_size, 65).tolist()
    (scores,) = score(llm, [ids], use_tqdm=False)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        rows = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()
    difference = float(np.abs(scores.logprobs - rows[np.arange(64), ids[1:]]).max())
    # On a GPU float32 products may run in TF32.
    tolerance = 2e-2 if torch.cuda.is_available() else 1e-4
    return {"tokens": 64, "max_difference_nats": difference, "tolerance_nats": tolerance}


def _print(
    statuses: list[dict[str, Any]], check: dict[str, Any], problem: str | None, console: Console
) -> None:
    versions = statuses[0]["versions"]
    console.print("  ".join(f"{name} {number}" for name, number in versions.items()))
    folded = ("patched module", "state")
    table = plain_table("process", "pid", *folded, fold=folded)
    for status in statuses:
        first = (status["role"], str(status.get("pid", "")))
        for patch in status.get("patches", []):
            state = patch["state"] + (f": {patch['reason']}" if patch["reason"] else "")
            table.add_row(*first, patch["target"], state)
            first = ("", "")
    console.print(table)
    if kernel := statuses[-1].get("kernel"):
        console.print(f"kernel: {kernel['name']} on {kernel['device']} ({kernel['reason']})")
        if "rule" in kernel:
            console.print(f"head: {kernel['rule']}")
    if check:
        console.print(
            f"check: {check['tokens']} tokens of a random model differ from Hugging Face float64 "
            f"by at most {check['max_difference_nats']:.1e} nats"
        )
    console.print(f"[red]scores are refused:[/red] {problem}" if problem else "scores: ready")
