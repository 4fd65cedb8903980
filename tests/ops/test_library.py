"""Loading the compiled operators, what torch may assume of them, and the choice of a kernel."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from vllm.score.errors import ScoreModeError
from vllm.score.ops import kernels, reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction

built = pytest.mark.skipif(
    kernels.not_built("cpu") is not None,
    reason="the CPU library was not built (VLLM_SCORE_BUILD=none)",
)


def operands(rows: int = 4, columns: int = 50, size: int = 16, k: int = 2):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, size), torch.randn(columns, size)
    targets = torch.randint(columns, (rows, k))
    statistics = rs.ENTROPY_BIT | rs.TOP_BIT | rs.MOMENTS_BIT
    return hidden, weight, Reduction(targets, statistics=statistics)


@built
def test_torch_may_trace_the_operators():
    assert kernels.load("cpu") is None
    hidden, weight, out = operands()
    ops = torch.ops.vllm_score
    calls = [
        (ops.reduce_logits.default, (hidden @ weight.T, *out.arguments)),
        (ops.score_head.default, (hidden, weight, None, *out.arguments)),
        (ops.target_logits.default, (hidden, weight, None, *out.arguments)),
    ]
    for operator, arguments in calls:
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


@built
def test_the_operators_work_on_views_and_equal_float64():
    assert kernels.load("cpu") is None
    hidden, weight, out = operands()
    wide = torch.randn(4, 21)
    wide[:, 2:18] = hidden
    kernels.score_head(wide[:, 2:18], weight, None, out)
    state, targets = out.state, out.targets
    z = hidden.double().numpy() @ weight.double().numpy().T
    e = np.exp(z - z.max(1, keepdims=True))
    np.testing.assert_allclose(state[:, rs.MAX], z.max(1), rtol=1e-5)
    np.testing.assert_allclose(state[:, rs.SUM_EXP], e.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(state[:, rs.ARGMAX], z.argmax(1))
    want = np.take_along_axis(z, targets.numpy(), 1)
    np.testing.assert_allclose(out.target_logits, want, rtol=1e-5)


WITHOUT_KERNELS = """
import torch
from vllm.score.ops import kernels
from vllm.score.ops import row_state as rs

hidden, weight = torch.randn(4, 16), torch.randn(50, 16)
out = rs.Reduction(torch.tensor([[3, 49]] * 4))
assert kernels.choose_kernel("cpu").name == "pytorch" and not kernels.registered("cpu")
kernels.score_head(hidden, weight, None, out)
found = out.target_logits - rs.log_sum_exp(out.state)[:, None]
want = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, out.targets)
torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)
"""


def test_a_device_without_kernels_is_served_by_the_reference():
    environment = {**os.environ, kernels.KERNEL_VARIABLE: "pytorch"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(4, 10)}, r"state must be \[4, 11\], not \[4, 10\]"),
        ({"state": torch.zeros(4, 11, dtype=torch.float64)}, "state must be float32"),
        ({"state": torch.zeros(11, 4).T}, "state must be contiguous"),
        ({"found": torch.zeros(4, 3)}, r"target_logits must have the shape of targets, \[4, 2\]"),
        ({"targets": torch.zeros(4, 2, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.zeros(3, 2, dtype=torch.int64)}, r"targets must be \[4, k\]"),
        ({"weight": torch.randn(50, 15)}, "must have rows of one length"),
        ({"weight": torch.randn(50, 16).double()}, "weight must be float32, bfloat16 or float16"),
        ({"weight": torch.randn(50, 16).bfloat16()}, "hidden and weight must be of one dtype"),
        ({"weight": torch.randn(16, 50).T}, "weight must have contiguous rows"),
        ({"bias": torch.randn(49)}, r"bias must be \[50\], not \[49\]"),
        ({"first_id": -1}, "first_id must be at least 0, not -1"),
        ({"statistics": 64}, r"statistics must be a mask of 0\.\.63, not 64"),
        ({"statistics": rs.VARENTROPY_BIT}, "the varentropy needs the entropy's bit as well"),
        ({"statistics": rs.RANK_BIT}, "the rank needs a threshold a row"),
        ({"hidden": torch.randn(4)}, r"hidden must have two dimensions, not the shape \[4\]"),
    ],
)
def test_errors_name_the_argument_and_what_is_wrong(change, message):
    assert kernels.load("cpu") is None
    hidden, weight, out = operands()
    named = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "targets": out.targets,
        "first_id": 0,
        "threshold": None,
        "scale": 1.0,
        "soft_cap": 0.0,
        "statistics": 0,
        "state": out.state,
        "found": out.target_logits,
    }
    named.update(change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vllm_score.score_head(*named.values())


@built
def test_no_rows_and_no_columns_change_nothing():
    assert kernels.load("cpu") is None
    hidden, weight, out = operands()
    before = out.state.clone()
    kernels.score_head(hidden, weight[:0], None, out)
    assert torch.equal(out.state, before)
    kernels.score_head(hidden[:0], weight, None, out.rows(slice(0, 0)))


@pytest.fixture
def fresh(monkeypatch):
    """Choices as a new process would make them; yields the warnings said meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    cached = (kernels._choose, kernels.native_problem, kernels.load)
    monkeypatch.delenv(kernels.KERNEL_VARIABLE, raising=False)
    # vLLM's own configuration of logging keeps records from reaching the root, and may let through
    # errors only.
    kernels.logger.addHandler(handler)
    monkeypatch.setattr(kernels.logger, "level", logging.WARNING)
    kernels.logger.manager._clear_cache()
    for function in cached:
        function.cache_clear()
    yield said
    kernels.logger.removeHandler(handler)
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()
    kernels.choose_kernel("cpu")  # the kernels that serve elsewhere serve again


def asked(monkeypatch, name):
    monkeypatch.setenv(kernels.KERNEL_VARIABLE, name)


def test_names_that_do_not_exist_are_refused(monkeypatch):
    asked(monkeypatch, "fast")
    for call in (kernels.choose_kernel, kernels.expected_kernel):
        with pytest.raises(ScoreModeError, match=r"'fast' names a kernel .* auto, native, pytorch"):
            call("cpu")


def reduced_by_the_reference(monkeypatch) -> bool:
    """Whether a call of the operator reaches the reference's product of the head."""
    called = []
    original = reference.product
    monkeypatch.setattr(reference, "product", lambda *a: called.append(a) or original(*a))
    hidden, weight, out = operands()
    kernels.score_head(hidden, weight, None, out)
    monkeypatch.setattr(reference, "product", original)
    return bool(called)


@built
def test_the_choice_holds_for_the_next_calls(fresh, monkeypatch):
    for name in ("native", "pytorch", "auto", "pytorch", "pytorch"):
        asked(monkeypatch, name)
        assert kernels.choose_kernel("cpu").name == ("pytorch" if name == "pytorch" else "native")
        assert reduced_by_the_reference(monkeypatch) == (name == "pytorch")
    assert fresh == []


@built
def test_the_compiled_kernels_are_the_automatic_choice(fresh, monkeypatch):
    found = kernels.choose_kernel("cpu")
    assert found.name == "native"
    assert found.reason == f"compiled, using {kernels.cpu_isa()}"
    asked(monkeypatch, "native")
    assert kernels.choose_kernel("cpu") == found


def test_other_devices_have_no_compiled_kernels(fresh, monkeypatch):
    for _ in range(2):
        assert kernels.choose_kernel("xpu").name == "pytorch"
    (line,) = fresh
    assert line.endswith("PyTorch reference: there are no compiled kernels for the device 'xpu'.")
    asked(monkeypatch, "native")
    with pytest.raises(ScoreModeError, match="no compiled kernels for the device 'xpu'"):
        kernels.choose_kernel("xpu")


def test_what_is_not_built_is_refused_by_name_and_said_once_otherwise(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    for _ in range(2):
        assert kernels.choose_kernel("cpu").name == kernels.expected_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "_score_cpu.so was not built (VLLM_SCORE_BUILD=cpu says why not)" in line
    asked(monkeypatch, "native")
    for call in (kernels.choose_kernel, kernels.expected_kernel):
        with pytest.raises(ScoreModeError, match=r"=native, but _score_cpu\.so was not built"):
            call("cpu")


def test_a_file_that_is_no_library_is_not_used(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    (tmp_path / "_score_cpu.so").write_bytes(b"no library, but " + kernels.STAMP)
    assert kernels.choose_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "_score_cpu.so cannot be loaded" in line


def test_a_library_of_another_version_is_not_loaded_and_the_remedy_is_said(
    fresh, monkeypatch, tmp_path
):
    """Libraries that define the operators themselves would end the process."""
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", None)
    (tmp_path / "_score_cpu.so").write_bytes(b"reduce_logits(Tensor logits, ...)")
    assert kernels.choose_kernel("cpu").name == kernels.expected_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "_score_cpu.so was built from another version's sources; build it again" in line
    asked(monkeypatch, "native")
    for call in (kernels.choose_kernel, kernels.expected_kernel):
        with pytest.raises(ScoreModeError, match="another version's sources; build it again"):
            call("cpu")


@built
def test_kernels_registered_by_others_are_checked_and_used(fresh, monkeypatch):
    """The CPU's as a stranger's would be: no file is known, torch has kernels."""
    assert kernels.load("cpu") is None
    monkeypatch.setattr(kernels, "FILES", {})
    kernels.load.cache_clear()
    monkeypatch.setattr(kernels, "_describe", lambda device: "of a stranger")
    assert kernels.expected_kernel("cpu").name == "native"
    assert kernels.choose_kernel("cpu") == kernels.KernelChoice("native", "of a stranger")


@built
def test_a_reference_that_disagrees_fails_the_check(monkeypatch):
    """The check compares: with another number on one side, it must name the operator."""
    assert kernels.load("cpu") is None
    assert kernels.self_check("cpu") is None
    original = reference.target_logits

    def twice(*arguments):
        original(*arguments)
        arguments[-1].target_logits.mul_(2)

    monkeypatch.setattr(reference, "target_logits", twice)
    problem = kernels.self_check("cpu")
    assert problem is not None and problem.startswith("target_logits in float32 differs")


@built
def test_kernels_that_fail_their_check_are_not_used(fresh, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(reference, "reduce_logits", lambda logits, out: out.state.fill_(torch.nan))
        assert kernels.choose_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "the kernels failed their check: reduce_logits in float32 differs" in line
    assert reduced_by_the_reference(monkeypatch)
    asked(monkeypatch, "native")
    with pytest.raises(ScoreModeError, match="=native, but the kernels failed"):
        kernels.choose_kernel("cpu")


@built
def test_the_libraries_need_nothing_but_torch_and_the_system():
    """No CUDA runtime, no driver, no Python: one build for every Python and machine."""
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("readelf is not installed")
    for name in kernels.FILES.values():
        path = kernels.FOLDER / name
        if not path.exists():
            continue
        text = subprocess.run([tool, "-d", path], capture_output=True, text=True).stdout
        lines = [line for line in text.splitlines() if "(NEEDED)" in line]
        needed = {line.rpartition("[")[2].rstrip("]") for line in lines}
        assert "libtorch_cpu.so" in needed
        allowed = ("libtorch_cpu", "libstdc++", "libgcc_s", "libc.", "libm.", "ld-linux", "libc10")
        extra = {n for n in needed if not n.startswith(allowed)}
        assert not extra - {"libpthread.so.0", "libdl.so.2", "librt.so.1"}, extra
        assert "RPATH" not in text and "RUNPATH" not in text


@pytest.mark.skipif(kernels.not_built("cuda") is not None, reason="the CUDA library was not built")
def test_the_cuda_library_loads_where_there_is_no_gpu():
    """CI compiles it on machines without a GPU; its kernels are registered all the same."""
    torch.ops.load_library(str(kernels.FOLDER / kernels.FILES["cuda"]))
    for name in reference.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_score::{name}", "CUDA")
    if not torch.cuda.is_available():
        assert kernels.load("cuda") == "no CUDA device is available"


@pytest.mark.cuda
def test_the_cuda_kernels_pass_their_check():
    found = kernels.choose_kernel("cuda")
    assert found.name == "native" and kernels.cuda_targets() in found.reason
