"""Makes the model `vllm-score` known to lm-eval, whose registry has no plugin group for models.

`register` is an entry point of PyTorch's group `torch.backends`, which is called at the end of
every `import torch` (TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the group off). lm-eval imports torch
before it looks a model up. A module of its own, because `import vllm` imports torch.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from types import ModuleType

NAME = "vllm-score"
TARGET = "vllm.score.integrations.lm_eval:VLLMScoreLM"


def register() -> None:
    """Name our model in lm-eval's registry, now or when lm-eval fills it.

    Never raises: an error here would break `import torch`. May be called again.
    """
    try:
        if "lm_eval" in sys.modules or find_spec("lm_eval") is not None:
            from wrapt import register_post_import_hook

            # The registry must not hold a name before lm-eval's own: it is filled when empty.
            register_post_import_hook(_add, "lm_eval.models")
    except Exception as error:
        _warn(error)


def _add(models: ModuleType) -> None:
    try:
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning(
        "lm-eval does not know the model %s (lm-eval 0.4.10 or newer is needed): %s", NAME, error
    )
