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
    """Entry point of the group `vllm.general_plugins`: say so, once, if arming went wrong.

    It does not arm: what modules of vLLM have taken from each other by now would stay stock.
    """
    import logging
    from typing import get_args

    from vllm.score.armed import Role, problem

    found = next(filter(None, map(problem, get_args(Role))), None)
    if found is not None:
        logging.getLogger(__name__).warning("Ordinary generation is not affected, but %s", found)
