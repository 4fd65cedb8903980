"""Scores on quantised weights as served, against Hugging Face on the numbers they stand for.

    python benchmarks/quantised.py                       # every format that this machine may serve
    python benchmarks/quantised.py --cases FP8 NVFP4A16

Each format has a process of its own; one that fails leaves a row with the reason. References are
float64 forward passes of Hugging Face over stored number × stored scale: `exact` with nothing
else rounded, `simulated` with each quantised layer's input rounded to 8 bits where the format
says so. `hf_same` is Hugging Face in the engine's own dtype over the same weights, inputs rounded
likewise: how far arithmetic of that kind is from float64, whoever does it. That is the scale for
the engine's difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
from harness import judge, report_values

# name: scheme of tests.support.quantised, whether the head is quantised, dtype of the engine.
Case = tuple[str | None, bool, str]
GPU_CASES: dict[str, Case] = {
    "bfloat16": (None, False, "bfloat16"),
    "W4A16": ("W4A16", False, "bfloat16"),
    "FP8": ("FP8", False, "bfloat16"),
    "NVFP4A16": ("NVFP4A16", False, "bfloat16"),
    "W8A8": ("W8A8", False, "bfloat16"),
    "W4A16 + head": ("W4A16", True, "bfloat16"),
    "FP8_TENSOR": ("FP8_TENSOR", False, "bfloat16"),
    # Three bits more in inputs and outputs: what is left of the difference shrinks with them.
    "float16": (None, False, "float16"),
    "W4A16 float16": ("W4A16", False, "float16"),
    "NVFP4A16 float16": ("NVFP4A16", False, "float16"),
}
CPU_CASES: dict[str, Case] = {
    "float32": (None, False, "float32"),
    "W8A8": ("W8A8", False, "float32"),
    "W8A8_7BIT": ("W8A8_7BIT", False, "float32"),
    "W8A8_7BIT + head": ("W8A8_7BIT", True, "float32"),
    "FP8": ("FP8", False, "float32"),
    "W4A16 float16": ("W4A16", False, "float16"),
    "NVFP4A16": ("NVFP4A16", False, "bfloat16"),
}
# The order of additions differs, and with float32 nothing else does: its errors are of that size.
MARGIN = {"bfloat16": 1.25, "float16": 1.25, "float32": 2.0}
SHOWN = (
    ("case", "format"),
    ("kernel", "vLLM's kernel"),
    ("mean_from_exact", "mean from float64"),
    ("max_from_exact", "max"),
    ("mean_hf_same_from_exact", "HF, same dtype"),
    ("mean_from_simulated", "mean from simulated"),
    ("mean_of_rounded_inputs", "rounding of inputs"),
    ("perplexity_served", "perplexity"),
    ("perplexity_exact", "HF float64"),
    ("perplexity_unquantised", "unquantised"),
    ("linear_file_mib", "weights in the file, MiB"),
    ("linear_engine_mib", "in the engine"),
    ("linear_16bit_mib", "at 16 bits"),
)


def main() -> None:
    options = arguments()
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            left = options.seconds - (time.monotonic() - begin)
            rows.append({"case": name, **run(name, folder, options, left)})
            print(f"{name}: {rows[-1]['status']}", flush=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    report_values("quantised", [{c: r.get(c, "") for c in columns} for r in rows], vars(options))
    print(markdown(rows))


def arguments() -> argparse.Namespace:
    gpu = engines.on_gpu()
    cases = GPU_CASES if gpu else CPU_CASES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(cases), choices=cases, metavar="CASE")
    parser.add_argument("--hidden-size", type=int, default=1024 if gpu else 256)
    parser.add_argument("--layers", type=int, default=8 if gpu else 2)
    parser.add_argument("--vocab-size", type=int, default=32_768 if gpu else 4096)
    parser.add_argument("--prompts", type=int, default=32 if gpu else 8)
    parser.add_argument("--length", type=int, default=256 if gpu else 128)
    parser.add_argument("--seconds", type=float, default=175.0, help="for all cases together")
    options = parser.parse_args()
    first = next(iter(cases))  # draws the prompts
    options.cases = [first, *(c for c in options.cases if c != first)]
    return options


def run(name: str, folder: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The row of one case."""
    scheme, head, dtype = (GPU_CASES if engines.on_gpu() else CPU_CASES)[name]
    row: dict[str, Any] = {"scheme": scheme or "", "head": head, "dtype": dtype}
    if seconds < 5:
        return {**row, "status": f"not run: {options.seconds:g} s were over"}
    out = Path(folder, "found.json")
    out.unlink(missing_ok=True)
    model = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_layers": options.layers,
        "head_dim": 64,
        "max_position_embeddings": options.length + 1,
    }
    spec = {
        "scheme": scheme,
        "head": head,
        "dtype": dtype,
        "folder": folder,
        "out": str(out),
        "model": model,
        "prompts": options.prompts,
        "length": options.length,
    }
    Path(folder, "case.json").write_text(json.dumps(spec))
    command = [sys.executable, str(Path(__file__).with_name("quantised_case.py"))]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, f"{folder}/case.json"], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {**row, "status": f"stopped after {seconds:.0f} s"}
    row["seconds"] = round(time.monotonic() - begin, 1)
    if not out.exists():
        return {**row, "status": reason(done.stderr + done.stdout)}
    found = json.loads(out.read_text())
    found["engine"] = json.dumps(found["engine"])
    limit = MARGIN[dtype] * found["mean_hf_same_from_exact"]
    target, reached = judge(("<=", limit), found["mean_from_exact"])
    if not engines.on_gpu() and "W8A8" in name:
        row["cpu_int8_error"] = cpu_int8_error(name)
    figures = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
    return {**row, "status": "ran", **figures, "mean_target": target, "mean_reached": reached}


def cpu_int8_error(name: str) -> str:
    """Error of the int8 product itself on this CPU; see `quantised_products`."""
    from vllm.score.engine.configuration import cpu_int8_error

    return f"{cpu_int8_error(64 if '7BIT' in name else 127):.2g}"


def reason(output: str) -> str:
    """The last line of a traceback."""
    lines = [line.strip() for line in output.splitlines() if "Error" in line]
    return f"failed: {lines[-1][:300] if lines else output[-300:]}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The figures of SCORE_MODE_IMPLEMENTATION.md's table."""
    lines = ["| " + " | ".join(title for _, title in SHOWN) + " |", "|---" * len(SHOWN) + "|"]
    for row in rows:
        if row["status"] == "ran":
            lines.append("| " + " | ".join(str(row.get(key, "")) for key, _ in SHOWN) + " |")
        else:
            lines.append(f"| {row['case']} | {row['status']} |" + " |" * (len(SHOWN) - 2))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
