"""Loading the compiled operators, what torch may assume of them, and the choice of a kernel."""

from __future__ import annotations

import logging
import shutil
import subprocess

import numpy as np
import pytest
import torch

from vllm.score.errors import ScoreModeError
from vllm.score.ops import choice, library, native, reference, self_check
from vllm.score.ops import row_state as rs

built = pytest.mark.skipif(
    not library.is_built("cpu"), reason="the CPU library was not built (VLLM_SCORE_BUILD=none)"
)
CPU = torch.device("cpu")


def operands(rows: int = 4, columns: int = 50, size: int = 16, k: int = 2):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, size), torch.randn(columns, size)
    targets = torch.randint(columns, (rows, k))
    tail = (targets, 0, None, 1.0, 0.0, 1.0, rs.ENTROPY_BIT | rs.TOP_BIT | rs.MOMENTS_BIT)
    return hidden, weight, tail, rs.new_state(rows, CPU), rs.new_target_logits(rows, k, CPU)


@built
def test_torch_may_trace_the_operators():
    assert library.load("cpu") is None
    hidden, weight, tail, state, found = operands()
    ops = torch.ops.vllm_score
    calls = [
        (ops.reduce_logits.default, (hidden @ weight.T, *tail, state, found)),
        (ops.score_head.default, (hidden, weight, None, *tail, state, found)),
        (ops.target_logits.default, (hidden, weight, None, tail[0], 0, 1.0, 0.0, 1.0, found)),
    ]
    for operator, arguments in calls:
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


@built
def test_the_operators_work_on_views_and_equal_float64():
    assert library.load("cpu") is None
    hidden, weight, tail, state, found = operands()
    targets = tail[0]
    wide = torch.randn(4, 21)
    wide[:, 2:18] = hidden
    native.score_head(wide[:, 2:18], weight, None, *tail, state, found)
    z = hidden.double().numpy() @ weight.double().numpy().T
    e = np.exp(z - z.max(1, keepdims=True))
    np.testing.assert_allclose(state[:, rs.MAX], z.max(1), rtol=1e-5)
    np.testing.assert_allclose(state[:, rs.SUM_EXP], e.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(state[:, rs.ARGMAX], z.argmax(1))
    np.testing.assert_allclose(found, np.take_along_axis(z, targets.numpy(), 1), rtol=1e-5)


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
        ({"temperature": 0.0}, "temperature must be above 0, not 0"),
        ({"statistics": 64}, r"statistics must be a mask of 0\.\.63, not 64"),
        ({"statistics": rs.VARENTROPY_BIT}, "the varentropy needs the entropy's bit as well"),
        ({"statistics": rs.RANK_BIT}, "the rank needs a threshold a row"),
        ({"hidden": torch.randn(4)}, r"hidden must have two dimensions, not the shape \[4\]"),
    ],
)
def test_errors_name_the_argument_and_what_is_wrong(change, message):
    assert library.load("cpu") is None
    hidden, weight, tail, state, found = operands()
    named = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "targets": tail[0],
        "first_id": 0,
        "threshold": None,
        "scale": 1.0,
        "soft_cap": 0.0,
        "temperature": 1.0,
        "statistics": 0,
        "state": state,
        "found": found,
    }
    named.update(change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vllm_score.score_head(*named.values())


@built
def test_no_rows_and_no_columns_change_nothing():
    assert library.load("cpu") is None
    hidden, weight, tail, state, found = operands()
    before = state.clone()
    native.score_head(hidden, weight[:0], None, *tail, state, found)
    assert torch.equal(state, before)
    nothing = (rs.new_state(0, CPU), rs.new_target_logits(0, 2, CPU))
    native.score_head(hidden[:0], weight, None, tail[0][:0], *tail[1:], *nothing)


@pytest.fixture
def fresh(monkeypatch):
    """Choices as a new process would make them; yields the warnings said meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    cached = (choice._choose, choice.native_problem)
    monkeypatch.setattr(library, "_outcomes", {})
    monkeypatch.delenv(choice.KERNEL_VARIABLE, raising=False)
    # vLLM's own configuration of logging keeps records from reaching the root, and may let through
    # errors only.
    choice.logger.addHandler(handler)
    monkeypatch.setattr(choice.logger, "level", logging.WARNING)
    choice.logger.manager._clear_cache()
    for function in cached:
        function.cache_clear()
    yield said
    choice.logger.removeHandler(handler)
    for function in cached:
        function.cache_clear()


def test_names_that_do_not_exist_are_refused(monkeypatch):
    monkeypatch.setenv(choice.KERNEL_VARIABLE, "fast")
    for call in (choice.choose_kernel, choice.expected_kernel):
        with pytest.raises(ScoreModeError, match=r"'fast' names a kernel .* auto, native, pytorch"):
            call("cpu")


def test_the_reference_can_be_asked_for():
    assert choice.choose_kernel("cpu", "pytorch").name == "pytorch"
    assert choice.choose_kernel("meta", "pytorch").name == "pytorch"


@built
def test_the_compiled_kernels_are_the_automatic_choice():
    found = choice.choose_kernel("cpu", "auto")
    assert found.name == "native"
    assert found.reason == f"compiled, using {library.cpu_isa()}"
    assert choice.choose_kernel("cpu", "native") == found


def test_other_devices_have_no_compiled_kernels(fresh):
    for _ in range(2):
        assert choice.choose_kernel("xpu", "auto").name == "pytorch"
    (line,) = fresh
    assert line.endswith("PyTorch reference: there are no compiled kernels for the device 'xpu'.")
    with pytest.raises(ScoreModeError, match="no compiled kernels for the device 'xpu'"):
        choice.choose_kernel("xpu", "native")


def test_what_is_not_built_is_refused_by_name_and_said_once_otherwise(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    for _ in range(2):
        assert choice.choose_kernel("cpu").name == choice.expected_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "_score_cpu.so was not built (VLLM_SCORE_BUILD=cpu says why not)" in line
    monkeypatch.setenv(choice.KERNEL_VARIABLE, "native")
    for call in (choice.choose_kernel, choice.expected_kernel):
        with pytest.raises(ScoreModeError, match=r"=native, but _score_cpu\.so was not built"):
            call("cpu")


def test_a_file_that_is_no_library_is_not_used(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    (tmp_path / "_score_cpu.so").write_bytes(b"no library")
    assert choice.choose_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "_score_cpu.so cannot be loaded" in line


@built
def test_a_reference_that_disagrees_fails_the_check(monkeypatch):
    """The check compares: with another number on one side, it must name the operator."""
    assert library.load("cpu") is None
    assert self_check.self_check("cpu") is None
    original = reference.target_logits

    def twice(*arguments):
        original(*arguments)
        arguments[-1].mul_(2)

    monkeypatch.setattr(reference, "target_logits", twice)
    problem = self_check.self_check("cpu")
    assert problem is not None and problem.startswith("target_logits in float32 differs")


@built
def test_kernels_that_fail_their_check_are_not_used(fresh, monkeypatch):
    monkeypatch.setattr(library, "_outcomes", {"cpu": None})
    monkeypatch.setattr(reference, "reduce_logits", lambda *a: a[-1].fill_(float("nan")))
    assert choice.choose_kernel("cpu").name == "pytorch"
    (line,) = fresh
    assert "the compiled kernels failed their check: reduce_logits in float32 differs" in line
    with pytest.raises(ScoreModeError, match="=native, but the compiled kernels failed"):
        choice.choose_kernel("cpu", "native")


@built
def test_the_libraries_need_nothing_but_torch_and_the_system():
    """No CUDA runtime, no driver, no Python: one build for every Python and machine."""
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("readelf is not installed")
    for name in library.FILES.values():
        path = library.FOLDER / name
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


@pytest.mark.skipif(not library.is_built("cuda"), reason="the CUDA library was not built")
def test_the_cuda_library_loads_where_there_is_no_gpu():
    """CI compiles it on machines without a GPU; its kernels are registered all the same."""
    assert library.load("cpu") is None
    torch.ops.load_library(str(library.FOLDER / library.FILES["cuda"]))
    for name in library.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_score::{name}", "CUDA")
    if not torch.cuda.is_available():
        assert library.load("cuda") == "no CUDA device is available"


@pytest.mark.cuda
def test_the_cuda_kernels_pass_their_check():
    found = choice.choose_kernel("cuda", "native")
    assert found.name == "native" and library.cuda_targets() in found.reason
