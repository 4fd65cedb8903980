"""The register of patches, which arming, the doctor, the documents and the tests read.

A patch stands in the module of the process that needs it: `sampling_params` in all, `front_end`,
`engines` and `endpoints` in the one that a user's program or the server runs in, `engine_core` and
`worker` in those behind it.
"""

from __future__ import annotations

from functools import partial

from vllm.score.armed import APPLICATIONS, upstream_version
from vllm.score.patches import (
    endpoints,
    engine_core,
    engines,
    front_end,
    sampling_params,
    worker,
)
from vllm.score.patches.patch import Application, Patch, when_imported

MODULES = (sampling_params, front_end, engines, engine_core, worker, endpoints)
REGISTER: tuple[Patch, ...] = tuple(
    value for module in MODULES for value in vars(module).values() if isinstance(value, Patch)
)


def arm() -> None:
    """Have every patch applied when its module is imported; a second call does nothing."""
    if APPLICATIONS:
        return
    version = upstream_version()
    APPLICATIONS.extend(map(Application, REGISTER))
    for application in APPLICATIONS:
        when_imported(application.patch.target, partial(application.run, version=version))
