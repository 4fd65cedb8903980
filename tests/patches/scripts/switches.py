"""Ordinary sampling parameters and attempts to score, under VLLM_PLUGINS and a claimed version."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import wrapt

if len(sys.argv) > 1:  # before our plugin asks, which may be while vLLM is imported
    wrapt.register_post_import_hook(
        lambda module: setattr(module, "__version__", sys.argv[1]), "vllm.version"
    )

from vllm import SamplingParams
from vllm.score import armed, score
from vllm.score.patches import REGISTER, verify
from vllm.v1.serial_utils import MsgpackEncoder


def attempt(call: Callable[[], Any]) -> list[str]:
    """Type and message of the error, or the type of the result."""
    try:
        return [type(call()).__name__]
    except Exception as error:
        return [type(error).__name__, str(error)]


ORDINARY = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3, max_tokens=5, stop=["x"], logprobs=2, top_k=4),
    SamplingParams(max_tokens=1, prompt_logprobs=0, stop_token_ids=[7], min_p=0.1),
    SamplingParams.from_optional(n=2, temperature=0.5, max_tokens=None, logit_bias={3: 1.0}),
)


class Messages(logging.Handler):
    """What `vllm.score.patches` says when vLLM loads its general plugins."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


messages = Messages()
logging.getLogger("vllm.score.patches").addHandler(messages)
if armed.APPLICATIONS:
    verify()
encoder = MsgpackEncoder()
version = armed.upstream_version()
modules = {patch.target: importlib.import_module(patch.target) for patch in REGISTER}

print(
    json.dumps(
        {
            "armed": bool(armed.APPLICATIONS),
            "states": {a.patch.target: [a.state, a.reason] for a in armed.applications()},
            "problem": armed.problem("front end"),
            "warnings": messages.texts,
            # The contracts read in modules that nobody amended.
            "contracts": None
            if armed.APPLICATIONS
            else {
                patch.target: patch.contract_problem(modules[patch.target], version)
                for patch in REGISTER
            },
            "ordinary": [
                [bytes(part).hex() for part in encoder.encode(params)] + [repr(params)]
                for params in ORDINARY
            ],
            "constructor": attempt(lambda: SamplingParams(score_mode=True)),
            "from_optional": attempt(lambda: SamplingParams.from_optional(score_mode=True)),
            # No engine is needed to be refused; a running one is asked in test_generation.py.
            "score": attempt(lambda: score(None, [[1, 2, 3]])),
        }
    )
)
