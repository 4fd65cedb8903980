"""Builds the native libraries with CMake; everything else about the package is in pyproject.toml.

VLLM_SCORE_BUILD says what is built:
  auto (default)  the CPU library where there is a C++ compiler, the CUDA library where there is
                  nvcc, too; what cannot be built is left out, and one line says why
  cpu, cuda       the CPU library; both. An error if that is not possible
  none            nothing: the PyTorch reference serves
CMAKE_ARGS is passed on to CMake; MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "cpu", "cuda", "none")
ASKED = os.environ.get("VLLM_SCORE_BUILD") or "auto"
LIBRARIES = {"cpu": "vllm.score.ops._score_cpu", "cuda": "vllm.score.ops._score_cuda"}
# This file also runs when only metadata is asked for.
BUILDING = {"bdist_wheel", "build", "build_ext", "editable_wheel"} & set(sys.argv)
OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 24)


class NotBuilt(Exception):
    """Why a library cannot be built, in words."""


def say(text: str) -> None:
    print(f"vllm-score: {text}", file=sys.stderr, flush=True)


def find_torch() -> Path:
    """The installed torch package.

    Under build isolation torch cannot be imported, but it lies where the interpreter installs.
    """
    folders = dict.fromkeys([*sys.path, *(sysconfig.get_path(n) for n in ("purelib", "platlib"))])
    for folder in folders:
        torch = Path(folder or ".") / "torch"
        if (torch / "lib" / "libtorch_cpu.so").exists():
            break
    else:
        raise NotBuilt("torch is not installed beside this Python; install it (or vLLM) first")
    found = re.match(r"__version__ = '(\d+)\.(\d+)", _read(torch / "version.py"))
    version = tuple(int(n) for n in found.groups()) if found else (0, 0)
    if version < OLDEST_TORCH or not (torch / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt(f"torch {version[0]}.{version[1]} is older than 2.11 or has no headers")
    return torch


def _read(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith("__version__")), "")


def find_tool(name: str) -> str | None:
    """A program on the path, or the one that the Python package of that name brought."""
    return shutil.which(name) or shutil.which(str(Path(sysconfig.get_path("scripts")) / name))


def find_cmake() -> str:
    cmake = find_tool("cmake")
    text = ""
    if cmake:
        text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    if cmake and found and tuple(int(n) for n in found.groups()) >= OLDEST_CMAKE:
        return cmake
    raise NotBuilt("CMake 3.24 or newer is not found (pip install cmake)")


def find_compilers(cuda: bool) -> None:
    """Raises NotBuilt without a C++ compiler or, where asked for, without nvcc."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")):
        raise NotBuilt("no C++ compiler is found")
    if cuda and not find_nvcc():
        raise NotBuilt("nvcc is not found")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def wanted() -> list[str]:
    """The libraries to build: those asked for, or those for which there are the tools."""
    if ASKED not in CHOICES:
        raise SystemExit(f"VLLM_SCORE_BUILD={ASKED!r}: choose from {', '.join(CHOICES)}.")
    if ASKED == "none":
        return []
    devices = ["cpu"]
    if ASKED == "cuda" or (ASKED == "auto" and find_nvcc()):
        devices.append("cuda")
    try:
        find_compilers("cuda" in devices)
        find_torch()
        find_cmake()
    except NotBuilt as reason:
        if ASKED != "auto":
            raise SystemExit(f"VLLM_SCORE_BUILD={ASKED}: {reason}.") from None
        if BUILDING:
            say(f"no native kernels are built: {reason}. The PyTorch reference serves.")
        return []
    return devices


class NativeLibrary(Extension):
    """A shared library for one kind of device; it is no Python module."""

    def __init__(self, device: str) -> None:
        super().__init__(LIBRARIES[device], sources=[])
        self.device = device


class BuildNative(build_ext):
    """One CMake project for all libraries, with a build folder that is kept between builds."""

    def build_extensions(self) -> None:
        built = []
        for extension in self.extensions:
            try:
                self.build_extension(extension)
                built.append(extension)
            except (NotBuilt, subprocess.CalledProcessError) as error:
                reason = "its build failed" if not isinstance(error, NotBuilt) else str(error)
                if ASKED != "auto":
                    raise SystemExit(f"VLLM_SCORE_BUILD={ASKED}: {reason}.") from None
                say(f"no native kernels for {extension.device}: {reason}.")
        self.extensions[:] = built

    def build_extension(self, extension: NativeLibrary) -> None:
        cmake, torch = find_cmake(), find_torch()
        cuda = extension.device == "cuda"
        folder = ROOT / "build" / f"native-{extension.device}"
        options = [
            f"-DTORCH_ROOT={torch}",
            f"-DWITH_CUDA={'ON' if cuda else 'OFF'}",
            "-DCMAKE_BUILD_TYPE=Release",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if ninja := find_tool("ninja"):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if cuda:
            options.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
        target = extension.name.rpartition(".")[2]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        configure = [cmake, "-S", ROOT, "-B", folder, *options]
        if subprocess.run(configure).returncode:
            # The folder may stem from tools that are gone. --fresh also drops what is compiled.
            subprocess.run([*configure, "--fresh"], check=True)
        subprocess.run(
            [cmake, "--build", folder, "--target", target, "--parallel", jobs], check=True
        )
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # A new file, never the old one rewritten: a process may have that one open.
        library.unlink(missing_ok=True)
        shutil.copy2(folder / f"{target}.so", library)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class Wheel(bdist_wheel):
    """The libraries use torch's stable ABI and nothing of Python's: any Python, one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[NativeLibrary(device) for device in wanted()],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
