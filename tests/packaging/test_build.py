"""What is built, what is left out, and what is said about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy2(ROOT / name, copy)
    for name in ("vllm", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def setup(source: Path, *command: object, tools: Path, **environment: str):
    """setup.py where only the programs in `tools` are found."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, command)],
        cwd=source,
        env={**os.environ, "PATH": str(tools), "CUDA_HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines_of_ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("vllm-score:")]


def test_without_a_compiler_one_line_says_so_and_the_wheel_is_pure(source, tmp_path):
    out = tmp_path / "dist"
    done = setup(source, "bdist_wheel", "-d", out, tools=tmp_path, VLLM_SCORE_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert lines_of_ours(done.stderr) == [
        "vllm-score: no native kernels are built: no C++ compiler is found. "
        "The PyTorch reference serves."
    ]
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def test_nothing_is_said_where_nothing_is_asked_for(source, tmp_path):
    done = setup(source, "--name", tools=tmp_path, VLLM_SCORE_BUILD="none")
    assert (done.returncode, done.stdout.strip(), lines_of_ours(done.stderr)) == (
        0,
        "vllm-score",
        [],
    )


@pytest.mark.parametrize(
    ("asked", "with_compiler", "message"),
    [
        ("cpu", False, "VLLM_SCORE_BUILD=cpu: no C++ compiler is found."),
        ("cuda", True, "VLLM_SCORE_BUILD=cuda: nvcc is not found."),
        ("fast", True, "VLLM_SCORE_BUILD='fast': choose from auto, cpu, cuda, none."),
    ],
)
def test_what_is_asked_for_and_cannot_be_built_is_an_error(
    source, tmp_path, asked, with_compiler, message
):
    if with_compiler:
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
    done = setup(source, "--name", tools=tmp_path, VLLM_SCORE_BUILD=asked)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_compiler_that_fails_is_fatal_only_where_asked_for(source, tmp_path):
    for name in ("c++", "ninja"):
        broken = tmp_path / name
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    (tmp_path / "cmake").symlink_to(cmake)
    lib = ("build_ext", "--build-lib", tmp_path / "lib")
    done = setup(source, *lib, tools=tmp_path, VLLM_SCORE_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert lines_of_ours(done.stderr) == [
        "vllm-score: no native kernels for cpu: its build failed."
    ]
    done = setup(source, *lib, tools=tmp_path, VLLM_SCORE_BUILD="cpu")
    assert done.returncode != 0 and "VLLM_SCORE_BUILD=cpu: its build failed." in done.stderr


def test_the_source_distribution_holds_all_that_is_compiled(source, tmp_path):
    done = setup(source, "sdist", "-d", tmp_path, tools=tmp_path, VLLM_SCORE_BUILD="none")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    compiled = {str(p.relative_to(source)) for p in (source / "csrc").rglob("*.*")}
    assert any(name.endswith(".cu") for name in compiled)
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", *compiled} <= names
