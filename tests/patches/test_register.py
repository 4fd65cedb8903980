"""The register does not drift: it names what exists, all of it, once, and with its reasons."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import wrapt

import vllm.score.patches as patches
from tests.support.patch_table import notes
from vllm.score import armed
from vllm.score.patches import REGISTER
from vllm.score.patches.contract import recorded_forms
from vllm.score.patches.patch import Patch

ROLES = {"front end", "engine core", "worker"}


def amended() -> dict[str, Any]:
    """What stands at every name of every contract in this process."""
    return {
        f"{patch.target}:{dotted}": wrapt.resolve_path(import_module(patch.target), dotted)[2]
        for patch in REGISTER
        for dotted in patch.contract
    }


def test_every_patch_is_registered() -> None:
    found = {
        id(value)
        for entry in pkgutil.iter_modules(patches.__path__)
        for value in vars(import_module(f"{patches.__name__}.{entry.name}")).values()
        if isinstance(value, Patch)
    }
    assert found and {id(patch) for patch in REGISTER} == found


def test_no_two_patches_share_a_target() -> None:
    targets = [patch.target for patch in REGISTER]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("patch", REGISTER, ids=lambda patch: patch.target)
def test_a_patch_is_documented(patch: Patch) -> None:
    assert patch.contract
    for dotted in (*patch.contract, *patch.fields):
        name = dotted if ":" in dotted else f"{patch.target}:{dotted}"
        assert recorded_forms(name), name
    assert patch.roles and set(patch.roles) <= ROLES
    written = notes()[patch.target]
    assert [heading for heading, _ in written] == [
        "Why",
        "How",
        "Risk",
        "Upstream",
        "Deleted when",
    ]
    for heading, text in written:
        assert text.endswith("."), heading


@pytest.mark.parametrize("patch", REGISTER, ids=lambda patch: patch.target)
def test_a_patch_is_applied_in_this_process(patch: Patch) -> None:
    module = import_module(patch.target)
    (application,) = (a for a in armed.applications() if a.patch is patch)
    assert (application.state, application.reason) == ("applied", "")
    assert application.module is module


def test_arming_again_changes_nothing() -> None:
    before, applications = amended(), armed.applications()
    assert len(applications) == len(REGISTER)
    patches.arm()
    patches.verify()
    assert [id(a) for a in armed.applications()] == [id(a) for a in applications]
    after = amended()
    assert all(after[name] is before[name] for name in before)


def test_nothing_is_wrapped_twice() -> None:
    wrappers = {n: f for n, f in amended().items() if isinstance(f, wrapt.FunctionWrapper)}
    assert wrappers
    for name, wrapper in wrappers.items():
        assert not isinstance(wrapper.__wrapped__, wrapt.FunctionWrapper), name
