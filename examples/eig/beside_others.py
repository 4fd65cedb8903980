"""Reasoning on an engine that serves other requests at the same time.

    python examples/eig/beside_others.py MODEL QUESTION ...

prints the answer to each question as soon as its reasoning ends, and the text of another client of
the same `AsyncLLM`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.score.eig import (
    AsyncLLMReasoner,
    ExpectedInformationGain,
    StoppingRule,
    Trace,
    eig_problems,
)

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


async def reason(
    async_llm: AsyncLLM, questions: Sequence[Any], rule: StoppingRule, **options: Any
) -> list[Trace]:
    """A trace for each question, in order; `options` as `vllm.score.eig.Options` has them."""
    reasoner, model = AsyncLLMReasoner(async_llm), async_llm.model_config
    problems = eig_problems(
        reasoner.tokenizer,
        questions,
        rule,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        options=options,
    )
    traces: dict[int, Trace] = {}
    async with aclosing(reasoner.run_all(problems)) as running:
        async for index, trace in running:
            traces[index] = trace
            tokens = len(trace.reasoning_token_ids)
            print(f"{questions[index]!r:.60}: {trace.answer!r} after {tokens} tokens of reasoning")
    return [traces[index] for index in range(len(questions))]


async def generate(async_llm: AsyncLLM, prompt: Any) -> str:
    """The text of another client."""
    text = ""
    async for output in async_llm.generate(prompt, SamplingParams(max_tokens=32), "another client"):
        text = output.outputs[0].text
    return text


async def main(model: str, questions: list[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async_llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model))
    try:
        reasoning = reason(async_llm, questions, ExpectedInformationGain(lambda_cost=0.05))
        _, text = await asyncio.gather(reasoning, generate(async_llm, "Once upon a time"))
        print(f"Another client got {text!r}")
    finally:
        async_llm.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name or folder of the model")
    parser.add_argument("questions", nargs="+", metavar="question")
    asyncio.run(main(**vars(parser.parse_args())))
