"""Call a hook once a module is completely imported, also when its import is under way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

Hook = Callable[[ModuleType], None]


def when_imported(name: str, hook: Hook) -> None:
    """Call `hook(module)` once the module `name` is imported: now, or right after its import.

    vLLM calls plugins in the middle of its import of `vllm.config`, when some of its modules are
    partly executed. For those an import hook comes too late: they are amended at the first
    attribute read after their import, before anybody can take a name from them.
    """
    module = sys.modules.get(name)
    if module is None:
        wrapt.register_post_import_hook(hook, name)
    elif _is_initializing(module):
        _when_first_read(module, hook)
    else:
        hook(module)


def settle(name: str) -> None:
    """Run the hook of a module that is complete, but that nobody has read yet."""
    module = sys.modules.get(name)
    if module is not None:
        getattr(module, "score_mode", None)


def is_complete(name: str) -> bool:
    """Whether the module `name` is imported, and its import is over."""
    module = sys.modules.get(name)
    return module is not None and not _is_initializing(module)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _when_first_read(module: ModuleType, hook: Hook) -> None:
    original = type(module)

    class Completing(original):  # type: ignore[misc, valid-type]
        def __getattribute__(self, attribute: str) -> Any:
            spec = ModuleType.__getattribute__(self, "__spec__")
            # Dunder reads are the import machinery's own, some before the module is complete.
            if not attribute.startswith("__") and not getattr(spec, "_initializing", False):
                self.__class__ = original  # type: ignore[assignment]
                hook(self)
            return original.__getattribute__(self, attribute)

    module.__class__ = Completing
