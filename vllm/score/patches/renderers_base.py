"""`TokensPrompt(target_token_ids=...)`: the key survives rendering, which drops unknown ones."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.engine.request import TARGETS
from vllm.score.patches.patch import Patch


def _keep(prompt: Any, tok_params: Any, engine_input: Any) -> Any:
    if not isinstance(prompt, dict) or prompt.get(TARGETS) is None:
        return engine_input
    if getattr(tok_params, "truncate_prompt_tokens", None) is not None:
        from vllm.score.engine.request import InvalidScoreRequest

        raise InvalidScoreRequest(
            f"truncate_prompt_tokens={tok_params.truncate_prompt_tokens} would shift {TARGETS}: "
            "truncate the prompt and the targets yourself.",
            parameter="truncate_prompt_tokens",
        )
    engine_input[TARGETS] = prompt[TARGETS]
    return engine_input


def apply(module: ModuleType) -> None:
    """Wrap the one place that every token prompt passes, and its asynchronous twin."""

    def sync(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return _keep(args[0], kwargs.get("tok_params"), wrapped(*args, **kwargs))

    async def asynchronous(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return _keep(args[0], kwargs.get("tok_params"), await wrapped(*args, **kwargs))

    wrapt.wrap_function_wrapper(module, "BaseRenderer._process_singleton", sync)
    wrapt.wrap_function_wrapper(module, "BaseRenderer._process_singleton_async", asynchronous)


PATCH = Patch(
    target="vllm.renderers.base",
    contract={
        "BaseRenderer._process_singleton": ("self", "prompt"),
        "BaseRenderer._process_singleton_async": ("self", "prompt"),
    },
    apply=apply,
    roles=("front end",),
    why="The targets travel with the prompt that they belong to.",
    how="The wrapped functions copy the key onto the engine's input.",
    risk="A renderer that overrides both functions loses the key; the request then scores the "
    "prompt's own tokens over the whole vocabulary, which the shape of the result shows.",
    upstream="Pull request: the key in TokensPrompt and TokensInput.",
    remove_when="vLLM carries the key itself.",
)
