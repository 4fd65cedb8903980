"""The head alone on a GPU: scores from hidden states, against the bare product of the same shape.

The bare product is cuBLAS with bfloat16 output, in one call; nothing is done with the logits. Ours
gives the target's logit, the maximum and the sum of exponentials of each row, from float32 logits.

    python benchmarks/head_kernel.py                 # the two shapes of the targets
    python benchmarks/head_kernel.py --statistics    # with entropy, rank and argmax, too
    python benchmarks/head_kernel.py --sizes         # which path is faster for how many rows
    python benchmarks/head_kernel.py --sweep         # tile shapes of the tiled product
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Contender, interleave, report, report_values

from vllm.score.ops import kernels
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction

# (hidden size, vocabulary), and what share of the bare product's speed is asked of each path.
SHAPES = {
    "8b": (4096, 131072, {"tiled": 0.84, "fused": 0.95}),
    "0.6b": (1024, 151936, {"tiled": 0.71, "fused": 0.90}),
}
BARE = "cuBLAS product, bf16 output"
STATISTICS = rs.ENTROPY_BIT | rs.RANK_BIT | rs.TOP_BIT
CHECKED_ROWS = 64
DEVICE = torch.device("cuda")


@dataclass
class Head:
    """Random operands whose logits have the standard deviation 3."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def random(cls, rows: int, hidden_size: int, vocab_size: int) -> Head:
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        hidden = torch.randn(rows, hidden_size, **options)
        weight = torch.randn(vocab_size, hidden_size, **options) * (3 / hidden_size**0.5)
        return cls(hidden, weight, torch.randint(vocab_size, (rows, 1), device=DEVICE))

    def flops(self) -> float:
        return 2.0 * self.hidden.shape[0] * self.weight.numel()

    def float64_logits(self) -> torch.Tensor:
        """float64 [CHECKED_ROWS, V]."""
        parts = self.weight.split(8192)
        hidden = self.hidden[:CHECKED_ROWS].double()
        return torch.cat([hidden @ part.double().T for part in parts], dim=1)


Scores = tuple[torch.Tensor, torch.Tensor]  # state, target logits


def scorer(head: Head, statistics: int, function: Callable[..., Any]) -> Callable[[], Scores]:
    """A call that scores all rows with `function`, which has the arguments of `score_head`."""
    rows = len(head.hidden)
    threshold = torch.full((rows,), 3.0, device=DEVICE) if statistics & rs.RANK_BIT else None

    def run() -> Scores:
        out = Reduction(head.targets, statistics=statistics, threshold=threshold)
        function(head.hidden, head.weight, None, out)
        return out.state, out.target_logits

    return run


def tiled(shape: tuple[int, int] | None = None) -> Callable[..., Any]:
    return partial(kernels.score_head_tiled, shape=shape)


def fused(hidden: torch.Tensor, weight: torch.Tensor, bias: None, out: Reduction) -> None:
    torch.ops.vllm_score.score_head(hidden, weight, bias, *out.arguments)


def repeated(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    def run() -> Any:
        for _ in range(times):
            result = call()
        torch.cuda.synchronize()
        return result

    return run


def logprobs(scores: Scores) -> torch.Tensor:
    state, found = scores
    return (found[:, 0] - rs.log_sum_exp(state))[:CHECKED_ROWS].double()


def errors(head: Head, results: dict[str, Any]) -> dict[str, str]:
    """How far each contender's log-probabilities are from float64, in words; NaN is refused."""
    targets = head.targets[:CHECKED_ROWS]
    exact = head.float64_logits()
    want = exact.gather(1, targets)[:, 0] - exact.logsumexp(1)
    found = {}
    for name, result in results.items():
        if name == BARE:
            logits = result[:CHECKED_ROWS].double()
            got = logits.gather(1, targets)[:, 0] - logits.logsumexp(1)
        else:
            got = logprobs(result)
        error = (got - want).abs()
        # bf16 logits are off by up to 1/16 at |logit| 8..16.
        if not error.max() < (0.1 if name == BARE else 1e-3):
            raise SystemExit(f"{name} is wrong: {error.max():.1e} nats from float64")
        found[name] = (
            f"log-probabilities of {CHECKED_ROWS} rows from float64: mean {error.mean():.1e}, "
            f"max {error.max():.1e} nats"
        )
    return found


def calls_in(seconds: float, call: Callable[[], Any]) -> int:
    """How often `call` fits into the time. The clock of a GPU follows its power, over tens of
    milliseconds: shorter rounds would be timed at the clock that the contender before left.
    """
    repeated(call, 3)()
    begin = time.perf_counter()
    repeated(call, 10)()
    return max(1, round(10 * seconds / (time.perf_counter() - begin)))


def paths_of(head: Head) -> dict[str, Callable[..., Any]]:
    paths: dict[str, Callable[..., Any]] = {"tiled": tiled()}
    if torch.cuda.get_device_capability() == kernels.FUSED_CAPABILITY:
        paths["fused"] = fused
    return paths


def measure(name: str, rows: int, rounds: int, seconds: float, statistics: bool) -> None:
    hidden_size, vocab_size, shares = SHAPES[name]
    head = Head.random(rows, hidden_size, vocab_size)
    logits = torch.empty(rows, vocab_size, device=DEVICE, dtype=torch.bfloat16)

    def bare() -> torch.Tensor:
        return torch.mm(head.hidden, head.weight.t(), out=logits)

    times = calls_in(seconds, bare)
    work = times * head.flops() / 1e12

    def contender(label: str, call: Callable[[], Any]) -> Contender:
        return Contender(label, repeated(call, times), work, rounds, warm=repeated(call, 2))

    paths = paths_of(head)
    contenders = [contender(BARE, bare)]
    for path, function in paths.items():
        contenders.append(contender(path, scorer(head, 0, function)))
        if statistics:
            label = f"{path}, entropy, rank, argmax"
            contenders.append(contender(label, scorer(head, STATISTICS, function)))
    results = interleave(contenders)
    differences = errors(head, results)
    about = {
        "rows": rows,
        "hidden": hidden_size,
        "vocabulary": vocab_size,
        "dtype": "bfloat16",
        "tile": kernels.tile_shape(rows, vocab_size),
        "calls_a_round": times,
    }
    for path in paths:
        targets = {BARE: (">=", shares[path])}
        if statistics:
            targets[f"{path}, entropy, rank, argmax"] = ("<=", 1.05)
        report("head_kernel", contenders, path, about, differences, "TFLOP/s", targets)


def sizes(name: str, rounds: int, seconds: float) -> None:
    """Microseconds a call of both paths, by rows, host included: calls follow each other."""
    hidden_size, vocab_size, _ = SHAPES[name]
    whole = Head.random(8192, hidden_size, vocab_size)
    found = []
    for rows in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        head = Head(whole.hidden[:rows], whole.weight, whole.targets[:rows])
        contenders = []
        for path, function in paths_of(head).items():
            call = scorer(head, 0, function)
            times = calls_in(seconds, call)
            contenders.append(Contender(path, repeated(call, times), times, rounds))
        interleave(contenders)
        micros = {c.name: round(1e6 / c.rate, 1) for c in contenders}
        found.append({"shape": name, "rows": rows, **{f"{p}_us": t for p, t in micros.items()}})
    report_values("head_kernel_sizes", found, {"hidden": hidden_size, "vocabulary": vocab_size})


def sweep(name: str, rows: int, seconds: float) -> None:
    """The median time of each tile shape, as a share of the bare product's speed."""
    hidden_size, vocab_size, _ = SHAPES[name]
    head = Head.random(rows, hidden_size, vocab_size)
    logits = torch.empty(rows, vocab_size, device=DEVICE, dtype=torch.bfloat16)

    def bare() -> torch.Tensor:
        return torch.mm(head.hidden, head.weight.t(), out=logits)

    times = calls_in(seconds, bare)
    work = times * head.flops() / 1e12
    calls: dict[str, Callable[[], Any]] = {BARE: bare}
    for tile_rows in (1024, 2048, 4096, 8192):
        for columns in (1408, 2816, 4096, 5632, 8448, 11264, 12672):
            if 20 << 20 <= 4 * tile_rows * columns <= 100 << 20:
                shape = (tile_rows, columns)
                calls[str(shape)] = scorer(head, 0, tiled(shape))
    contenders = [
        Contender(label, repeated(call, times), work, warm=repeated(call, 1))
        for label, call in calls.items()
    ]
    interleave(contenders)
    reference = contenders[0].median
    for c in sorted(contenders, key=lambda c: c.median):
        print(f"{name} {c.name:30} {c.rate:8.1f} TFLOP/s {reference / c.median:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a timed round, about")
    parser.add_argument("--statistics", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    if (choice := kernels.choose_kernel("cuda")).name != "native":
        raise SystemExit(choice.reason)
    for name in SHAPES if arguments.shape == "both" else [arguments.shape]:
        if arguments.sweep:
            sweep(name, arguments.rows, arguments.seconds / 2)
        elif arguments.sizes:
            sizes(name, 3, arguments.seconds / 8)
        else:
            measure(name, arguments.rows, arguments.rounds, arguments.seconds, arguments.statistics)


if __name__ == "__main__":
    main()
