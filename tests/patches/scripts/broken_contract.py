"""A release whose engine core changed under two patches, and a plug-in that undoes some more."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import wrapt
from engines import greedy_tokens, scores_by_function, scores_by_generate, start


def rename_a_parameter(module: ModuleType) -> None:
    manager: Any = module.KVCacheManager
    stock = manager.get_computed_blocks

    def get_computed_blocks(self: Any, queried: Any, *args: Any) -> Any:
        return stock(self, queried, *args)

    manager.get_computed_blocks = get_computed_blocks


def rename_a_method(module: ModuleType) -> None:
    scheduler: Any = module.Scheduler
    scheduler._append_tokens = scheduler._update_request_with_output
    del scheduler._update_request_with_output

    # So that the rest of the release, which calls the old name, still runs.
    def old_name(self: Any, name: str) -> Any:
        if name == "_update_request_with_output":
            return self._append_tokens
        raise AttributeError(name)

    scheduler.__getattr__ = old_name


def undo(module: str, owner: str, name: str) -> None:
    amended: Any = getattr(sys.modules[module], owner)
    setattr(amended, name, vars(amended)[name].__wrapped__)


def main() -> None:
    # Hooks run in the order in which they were registered: these before ours.
    wrapt.register_post_import_hook(rename_a_parameter, "vllm.v1.core.kv_cache_manager")
    wrapt.register_post_import_hook(rename_a_method, "vllm.v1.core.sched.scheduler")
    llm = start(sys.argv[1])

    from vllm.score import armed

    def states() -> dict[str, list[str]]:
        return {a.patch.target: [a.state, a.reason] for a in armed.applications()}

    def problems() -> dict[str, str | None]:
        return {r: armed.problem(r) for r in ("front end", "engine core", "worker")}

    found: dict[str, Any] = {
        "states": states(),
        "problems": problems(),
        "generated": [greedy_tokens(llm)],
        "attempts": [scores_by_function(llm), scores_by_generate(llm), scores_by_function(llm)],
    }
    found["generated"].append(greedy_tokens(llm))
    found["unfinished"] = llm.llm_engine.has_unfinished_requests()

    # Another plug-in: puts back what it had taken before.
    undo("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "sample_tokens")
    undo("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs")
    found["undone"] = {
        "states": states(),
        "problems": problems(),
        "attempt": scores_by_function(llm),
        "generated": greedy_tokens(llm),
    }
    params: Any = sys.modules["vllm.sampling_params"]
    params.SamplingParams = params.SamplingParams.__base__
    found["undone"]["class"] = states()["vllm.sampling_params"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
