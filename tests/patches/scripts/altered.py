"""A release in which every function that a patch amends takes one parameter more than before."""

from __future__ import annotations

import inspect
import json
import sys
from functools import partial
from types import ModuleType
from typing import Any

import wrapt
from engines import greedy_tokens, scores_by_function, scores_by_generate, start


def add_parameters(module: ModuleType, names: list[str]) -> None:
    for dotted in names:
        parent, name, found = wrapt.resolve_path(module, dotted)
        function = getattr(found, "__func__", found)
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        more = inspect.Parameter("more", parameters[0].kind, default=None)
        if parameters[0].default is inspect.Parameter.empty:
            more = more.replace(default=inspect.Parameter.empty)
        # What inspect.signature shows; calls arrive as before, so the release still runs.
        function.__signature__ = signature.replace(parameters=[more, *parameters])
        assert getattr(parent, name) is not None


def main() -> None:
    # Hooks run in the order in which they were registered: these before ours.
    for target, names in json.loads(sys.argv[2]).items():
        wrapt.register_post_import_hook(partial(add_parameters, names=names), target)
    llm = start(sys.argv[1])

    from vllm.score import armed

    found: dict[str, Any] = {
        "states": {a.patch.target: [a.state, a.reason] for a in armed.applications()},
        "problems": {r: armed.problem(r) for r in ("front end", "engine core", "worker")},
        "generated": [greedy_tokens(llm)],
        "attempts": [scores_by_function(llm), scores_by_generate(llm)],
    }
    found["generated"].append(greedy_tokens(llm))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
