"""However it is installed, the distribution adds `vllm/score` beside the release and no more."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("purelib"))
SOURCES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
# Beside `vllm`: one is imported while torch is, the other where vLLM may be missing.
TOP_LEVEL = ("vllm_score_command", "vllm_score_lm_eval.py")
FOLDERS = ("vllm", "csrc", "vllm_score_command")

REPORT = """
import json, vllm, vllm.score
from vllm.score.ops.choice import choose_kernel
from importlib.metadata import distribution
points = distribution("vllm-score").entry_points
print(json.dumps({
    "release": vllm.__file__,
    "score": vllm.score.__file__,
    "kernel": choose_kernel("cpu").name,
    "points": sorted(f"{p.group}:{p.name}={p.value}" for p in points),
}))
"""
ENTRY_POINTS = {
    "console_scripts": {"vllm-score": "vllm_score_command:main"},
    "vllm.platform_plugins": {"vllm_score": "vllm.score.patches:arm"},
    "torch.backends": {"vllm_score_lm_eval": "vllm_score_lm_eval:register"},
    "vllm.general_plugins": {"vllm_score_check": "vllm.score.patches:verify"},
}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A virtual environment with links to everything installed here but ourselves.

    `vllm` is a real folder of links: files of ours land beside the release's, as on a user's
    machine, and can be told from them.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        self.python = folder / "bin" / "python"
        for entry in SITE.iterdir():
            if entry.name not in ("vllm", "__pycache__") and "vllm_score" not in entry.name:
                (self.site / entry.name).symlink_to(entry)
        (self.site / "vllm").mkdir()
        for entry in (SITE / "vllm").iterdir():
            if entry.name not in ("score", "__pycache__"):
                (self.site / "vllm" / entry.name).symlink_to(entry)

    def pip(self, *arguments: object) -> None:
        run(sys.executable, "-m", "pip", "-q", "--python", self.python, *arguments, cwd=self.site)

    def report(self, cwd: Path) -> dict:
        return json.loads(run(self.python, "-c", REPORT, cwd=cwd).splitlines()[-1])

    def entries(self) -> set[str]:
        """Everything below site-packages and bin, links not followed, less the release's caches."""
        ours = self.site / "vllm" / "score"
        return {
            str(path)
            for folder in (self.site, self.python.parent)
            for path in folder.rglob("*")
            if "__pycache__" not in path.parts or path.is_relative_to(ours)
        }


@pytest.fixture(scope="module", autouse=True)
def quick_build() -> Iterator[None]:
    """The CPU library only, not optimised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SCORE_BUILD", "cpu")
        patch.setenv("CMAKE_ARGS", "-DCMAKE_CXX_FLAGS_RELEASE=-O0")
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source: builds leave files beside what they build."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*SOURCES, *TOP_LEVEL):
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, copy)
    for name in FOLDERS:
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def test_the_wheel_holds_every_module_of_ours_and_nothing_else(wheel: Path, source: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    modules = {str(path.relative_to(source)) for path in (source / "vllm").rglob("*.py")}
    assert "vllm/score/__init__.py" in modules
    assert modules <= names
    others = {name for name in names if not name.startswith("vllm/score/")}
    assert {name.split("/")[0] for name in others} == {
        *TOP_LEVEL,
        f"vllm_score-{metadata.version('vllm-score')}.dist-info",
    }


def test_the_wheel_holds_the_library_for_any_python_on_this_platform(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == ["vllm/score/ops/_score_cpu.so"]


def test_the_wheel_overwrites_no_file_of_the_release(wheel: Path) -> None:
    owners = set(metadata.packages_distributions()["vllm"]) - {"vllm-score"}
    assert len(owners) == 1, f"one release of vLLM is expected, found {owners}"
    release = {str(path) for path in metadata.files(owners.pop()) or ()}
    assert "vllm/__init__.py" in release
    assert release.isdisjoint(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_names_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        found = configparser.ConfigParser(delimiters="=")
        found.read_string(archive.read(name).decode())
    assert {group: dict(found[group]) for group in found.sections()} == ENTRY_POINTS


def check_install(
    environment: Environment, requirement: tuple[object, ...], source: Path, package: Path
) -> None:
    """Install, import from the root of a checkout, uninstall, and find everything as before."""
    before = environment.entries()
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *requirement)
    assert environment.entries() > before
    assert (environment.python.parent / "vllm-score").exists()
    # The checkout's own `vllm/` folder must not hide the release.
    report = environment.report(cwd=source)
    assert Path(report["release"]) == environment.site / "vllm" / "__init__.py"
    assert Path(report["score"]) == package / "__init__.py"
    assert report["kernel"] == "native"
    assert report["points"] == sorted(
        f"{group}:{name}={value}"
        for group, points in ENTRY_POINTS.items()
        for name, value in points.items()
    )
    environment.pip("uninstall", "-y", "vllm-score")
    assert environment.entries() == before


def test_a_wheel_is_imported_beside_the_release_and_uninstalls(
    environment: Environment, wheel: Path, source: Path
) -> None:
    check_install(environment, (wheel,), source, environment.site / "vllm" / "score")


def test_an_editable_install_is_imported_from_the_checkout_and_uninstalls(
    environment: Environment, source: Path
) -> None:
    check_install(environment, ("-e", source), source, source / "vllm" / "score")
