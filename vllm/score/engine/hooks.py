"""Forward hooks that somebody has put on the model, and whether they are run."""

from __future__ import annotations

from typing import Any

# Called outside of the compiled part of the model.
OUTSIDE = ("lm_head", "logits_processor")


def dead_hooks_warning(worker: Any, model: Any) -> str | None:
    """Names hooked modules inside a compiled model, whose hooks are not run; else None."""
    from vllm.config import CompilationMode

    if worker.vllm_config.compilation_config.mode in (None, CompilationMode.NONE):
        return None
    hooked = [
        name
        for name, module in model.named_modules()
        if name
        and name.rpartition(".")[2] not in OUTSIDE
        and (module._forward_hooks or module._forward_pre_hooks)
    ]
    if not hooked:
        return None
    shown = ", ".join(hooked[:3]) + (", ..." if len(hooked) > 3 else "")
    return (
        f"hooks on {shown} have no effect: the engine compiles the model, and compiled graphs do "
        "not run them; start it with enforce_eager=True."
    )
