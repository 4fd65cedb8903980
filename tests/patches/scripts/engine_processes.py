"""An engine core and a worker of their own, armed as the front end is, or not at all."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from engines import (
    greedy_tokens,
    scores_by_function,
    scores_by_generate,
    scores_by_reasoning,
    start,
)


def main() -> None:
    model, children = sys.argv[1:]
    from vllm import SamplingParams  # arms this process
    from vllm.score import armed

    front_end = armed.problem("front end")
    if children == "without us":
        os.environ["VLLM_PLUGINS"] = ""  # inherited by what is spawned from now on
    llm = start(model)
    found: dict[str, Any] = {"front end": front_end, "generated": [greedy_tokens(llm)]}
    found["attempts"] = [
        scores_by_function(llm),
        scores_by_generate(llm),
        scores_by_function(llm),
    ]
    found["reasoning"] = scores_by_reasoning(llm)
    found["generated"].append(greedy_tokens(llm))
    found["unfinished"] = llm.llm_engine.has_unfinished_requests()
    if children == "with us":
        from vllm.score.patches.front_end import ask_engine

        found["processes"] = ask_engine(llm.llm_engine)
    found["front end pid"] = os.getpid()
    found["class"] = SamplingParams.__module__
    print(json.dumps(found))


if __name__ == "__main__":
    main()
