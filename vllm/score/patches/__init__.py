"""What a fork would change in vLLM: the register of patches, and the entry points that apply them.

A patch stands in the module of the process that needs it: `sampling_params` in all, `front_end` and
`endpoints` in the one that a user's program or the server runs in, `engine_core` and `worker` in
those behind it. The doctor, the documents and the tests read the register.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import get_args

from vllm.score.armed import (
    APPLICATIONS,
    Role,
    problem,
    untested_warning,
    upstream_version,
)
from vllm.score.patches import endpoints, engine_core, front_end, sampling_params, worker
from vllm.score.patches.patch import Application, Patch, when_imported

MODULES = (sampling_params, front_end, engine_core, worker, endpoints)
REGISTER: tuple[Patch, ...] = tuple(
    value for module in MODULES for value in vars(module).values() if isinstance(value, Patch)
)


def arm() -> None:
    """Entry point of the group `vllm.platform_plugins`: amend vLLM as it is imported.

    vLLM calls it in every process, the first time anything asks for the platform; every patch is
    applied when its module is imported, and a second call does nothing. Returns None, which says
    "not a platform".
    """
    if APPLICATIONS:
        return
    version = upstream_version()
    APPLICATIONS.extend(map(Application, REGISTER))
    for application in APPLICATIONS:
        when_imported(application.patch.target, partial(application.run, version=version))


def verify() -> None:
    """Entry point of the group `vllm.general_plugins`: say so, once, if arming went wrong.

    It does not arm: what modules of vLLM have taken from each other by now would stay stock.
    """
    logger = logging.getLogger(__name__)
    found = next(filter(None, map(problem, get_args(Role))), None)
    if found is not None:
        logger.warning("Ordinary generation is not affected, but %s", found)
    elif (warning := untested_warning()) is not None:
        logger.warning(warning)
