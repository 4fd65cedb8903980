"""What a fork would change in vLLM: a module for each amended one, and their register."""

from __future__ import annotations


def arm() -> None:
    """Entry point of the group `vllm.platform_plugins`: amend vLLM as it is imported.

    vLLM calls it in every process, the first time anything asks for the platform. Returns None,
    which says "not a platform".
    """
    from vllm.score.patches.register import arm

    arm()


def verify() -> None:
    """Entry point of the group `vllm.general_plugins`: say so, once, if arming went wrong."""
    import logging

    from vllm.score.patches.register import applications, arm

    arm()
    failed = [a for a in applications() if a.state == "failed"]
    if failed:
        logging.getLogger(__name__).warning(
            "Score mode is off, ordinary generation is not affected: %s. See `vllm-score doctor`.",
            "; ".join(f"{a.patch.target}: {a.reason}" for a in failed),
        )
