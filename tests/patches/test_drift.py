"""The drift report, on a copy of the installed release in which three things were changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest

import vllm
from vllm.score.armed import upstream_version
from vllm.score.patches import drift
from vllm.score.patches.contract import record

MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks"
OUTPUT = "vllm.v1.engine.output_processor:RequestState._new_request_output"
FIELD = "vllm.v1.outputs:ModelRunnerOutput.prompt_token_id_logprobs_dict"
VERSION = upstream_version().partition("+")[0]


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the register relies on of the installed release, as a folder."""
    folder = tmp_path_factory.mktemp("release")
    root = Path(str(vllm.__file__)).parents[1]
    for module in {name.partition(":")[0] for name in drift.names()} | {"vllm"}:
        path = Path(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if (root / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, folder / file)
    (folder / f"vllm-{VERSION}.dist-info").mkdir()
    return folder


@pytest.fixture
def changed(release: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(release, tmp_path / "changed"))
    core = copy / "vllm" / "v1"
    replace(core / "core" / "kv_cache_manager.py", "def get_computed_blocks(", "def look_up(")
    replace(
        core / "engine" / "output_processor.py",
        "def _new_request_output(\n        self,",
        "def _new_request_output(\n        self, first,",
    )
    replace(core / "outputs.py", "    prompt_token_id_logprobs_dict: ", "    renamed_dict: ")
    (copy / f"vllm-{VERSION}.dist-info").rename(copy / "vllm-0.34.0.dist-info")
    return copy


def test_the_release_beside_us_is_the_same_and_on_record(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift.main([str(release)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"vLLM {VERSION} against {VERSION}:"
    assert all(line.startswith("same ") for line in lines[1:-1])
    assert len(lines) - 2 == len(record()[VERSION])
    assert lines[-1] == f"0 of {len(lines) - 2} differ, 0 of them from every release on record."


def test_what_changed_is_named_with_its_lines(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift.main([str(changed)]) == 1
    out = capsys.readouterr().out
    assert f"vLLM 0.34.0 against {VERSION}:" in out
    assert f"gone     {MANAGER}\n" in out
    assert f"gone     {FIELD}\n" in out
    _, _, after = out.partition(f"changed  {OUTPUT}\n")
    contract, removed, added = after.splitlines()[:3]
    assert contract.startswith("    breaks the contract: self, first, external_req_id")
    assert removed.startswith("    -def _new_request_output(self, external_req_id")
    assert added.startswith("    +def _new_request_output(self, first, external_req_id")
    assert out.splitlines()[-1].startswith("3 of ")


def test_a_wheel_is_read_where_it_lies(
    changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "vllm-0.34.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for file in changed.rglob("*.py"):
            archive.write(file, file.relative_to(changed))
        archive.writestr("vllm-0.34.0.dist-info/METADATA", "Name: vllm")
    assert drift.main([str(wheel), "--base", str(changed)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vLLM 0.34.0 against 0.34.0:"
    assert all(line.startswith("same ") for line in lines[1:-1])


def test_a_tested_release_becomes_part_of_the_record(changed: Path, tmp_path: Path) -> None:
    file = tmp_path / "upstream.json"
    with drift.opened(str(changed)) as found:
        drift.save(found, file)
    text = file.read_text(encoding="utf-8")
    assert list(drift.json.loads(text)) == [*record(), "0.34.0"]
    assert MANAGER not in drift.json.loads(text)["0.34.0"]


@pytest.mark.parametrize("release", ["no/such/folder", "pyproject.toml"])
def test_what_cannot_be_read_is_a_sentence(
    release: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift.main([release]) == 2
    assert capsys.readouterr().err.startswith(f"drift: {release} cannot be read")
