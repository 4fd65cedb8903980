"""What is checked of a score request before its answer begins."""

from __future__ import annotations

from typing import Any

from vllm.score.patches.renderers_base import KEY
from vllm.score.server.body import ScoreFields, check_request, targets_by_prompt


def prepare(request: Any, fields: ScoreFields) -> None:
    """Check the body, and give it the `max_tokens` of a request that generates nothing.

    Raises:
        InvalidScoreRequest: answered with status 400; also where score mode is off.
    """
    from vllm.score.armed import front_end_problem
    from vllm.score.engine.invalid import InvalidScoreRequest

    problem = front_end_problem()
    if problem is not None:
        raise InvalidScoreRequest(problem, parameter="score_mode")
    check_request(request, fields)
    request.max_tokens = 0


def add_targets(serving: Any, request: Any, fields: ScoreFields, engine_inputs: list[Any]) -> None:
    """Give each prompt its targets.

    Checked as the engine will check them: once a stream has begun, its status is 200.

    Raises:
        InvalidScoreRequest: naming the field.
    """
    from vllm.score.engine.request import ModelFacts, plan_tokenised
    from vllm.score.engine.support import check_configuration, check_prompt

    check_configuration(serving.engine_client.vllm_config)
    targets = targets_by_prompt(request, fields, len(engine_inputs))
    params = request.to_sampling_params(0, serving.default_sampling_params)
    model = serving.model_config
    facts = ModelFacts(model.get_vocab_size(), model.max_model_len, model.max_logprobs)
    tokenizer = serving.engine_client.renderer.tokenizer
    for engine_input, target in zip(engine_inputs, targets, strict=True):
        check_prompt(engine_input, resumable=False)
        plan_tokenised(engine_input, target, params, facts, tokenizer)
        if target is not None:
            engine_input[KEY] = target
