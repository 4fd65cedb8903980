"""Execute one statement before anything else, then look at all that the patches promise."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import typing

exec(sys.argv[1])

from vllm.score import armed  # noqa: E402
from vllm.score.patches import REGISTER  # noqa: E402

# Before anything of vLLM is read that the statement did not read: what is imported is amended.
after_first = {
    a.patch.target: a.state for a in armed.applications() if a.patch.target in sys.modules
}
for patch in REGISTER:
    importlib.import_module(patch.target)
states = {a.patch.target: [a.state, a.reason] for a in armed.applications()}

import vllm  # noqa: E402
from vllm.v1.engine import EngineCoreRequest  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402

ours = vllm.SamplingParams
annotation = typing.get_type_hints(EngineCoreRequest)["sampling_params"]
params = ours(score_mode=True, score_statistics=["entropy"], score_temperature=0.5)
request = EngineCoreRequest(
    request_id="0",
    prompt_token_ids=[1, 2],
    mm_features=None,
    sampling_params=params,
    pooling_params=None,
    arrival_time=0.0,
    lora_request=None,
    cache_salt=None,
    data_parallel_rank=None,
)
decoded = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))


def facts(candidate: typing.Any) -> dict[str, typing.Any]:
    return {
        "same class": type(candidate) is ours,
        "score_mode": candidate.score_mode,
        "max_tokens": candidate.max_tokens,
        "score_statistics": candidate.score_statistics,
        "score_temperature": candidate.score_temperature,
    }


print(
    json.dumps(
        {
            "vllm": vllm.__file__,
            "score": importlib.import_module("vllm.score").__file__,
            "after first": after_first,
            "states": states,
            "problems": [armed.problem(role) for role in ("front end", "engine core", "worker")],
            "holders": {
                "vllm.sampling_params": sys.modules["vllm.sampling_params"].SamplingParams is ours,
                "vllm.entrypoints.llm": importlib.import_module(
                    "vllm.entrypoints.llm"
                ).SamplingParams
                is ours,
                "EngineCoreRequest": ours in typing.get_args(annotation),
            },
            "modules with the stock class": [
                name
                for name, module in sorted(sys.modules.items())
                if any(value is ours.__base__ for value in vars(module).values())
            ],
            "copies": {
                "constructed": facts(params),
                "cloned": facts(params.clone()),
                "pickled": facts(pickle.loads(pickle.dumps(params))),
                "sent to the engine core": facts(decoded.sampling_params),
                "from_optional": facts(
                    ours.from_optional(
                        score_mode=True, score_statistics=["entropy"], score_temperature=0.5
                    )
                ),
            },
            "ordinary": ours.from_optional(max_tokens=3).score_mode,
        }
    )
)
