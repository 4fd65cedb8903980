"""Where vLLM is missing, or lies elsewhere: one sentence, from the command and from Python."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = "import vllm_score_command; vllm_score_command.main()"


def run(program: str, *folders: Path | str) -> subprocess.CompletedProcess[str]:
    """A program in a Python that looks in `folders` and its standard library only."""
    start = (
        f"import sys; sys.path += {list(map(str, folders))}; sys.argv = ['vllm-score', 'doctor']\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program],
        capture_output=True,
        text=True,
        timeout=120,
    )


def releases() -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*extras["optional-dependencies"]["cuda"], *extras["optional-dependencies"]["cpu"]]


@pytest.mark.parametrize(
    "program",
    [
        COMMAND,
        "import vllm.score",
        "from vllm.score import score",
        "from vllm.score.perplexity import perplexity",
        "import vllm.score.integrations.lm_eval",
    ],
)
def test_without_vllm_the_last_line_says_what_to_install(program: str) -> None:
    done = run(program, ROOT)
    assert done.returncode == 1 and done.stdout == ""
    *before, line = done.stderr.strip().splitlines()
    assert "vllm-score is installed, but vLLM is not; install a release" in line
    for requirement in releases():
        assert f"`pip install '{requirement}'" in line
    if program == COMMAND:
        assert not before and line.startswith("vllm-score: ")
    else:
        assert line.startswith("ModuleNotFoundError: ")


def test_help_needs_no_vllm() -> None:
    helps = [[command, "-h"] for command in ("perplexity", "eig", "doctor")]
    for arguments in (["--version"], ["-h"], *helps, ["sequence", "--help"]):
        done = run(f"import vllm_score_command; vllm_score_command.main({arguments})", ROOT)
        assert done.returncode == 0 and not done.stderr
        assert "vllm-score" in done.stdout


def test_a_vllm_elsewhere_is_named() -> None:
    """Its package has our part neither in it nor, without the hook of an editable install, near."""
    site = Path(sysconfig.get_path("purelib"))
    if (site / "vllm" / "score").exists():
        pytest.skip("vllm-score is installed in vLLM's folder")
    done = run(COMMAND, ROOT, site)
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"vllm-score: vLLM is imported from {site / 'vllm' / '__init__.py'}")
    assert "install it with that environment's pip" in line and sys.executable in line
