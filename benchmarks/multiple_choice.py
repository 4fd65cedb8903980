"""Multiple choice: many short continuations of shared contexts, scored cold.

    python benchmarks/multiple_choice.py --shape qwen3-0.6b --eager
    python benchmarks/multiple_choice.py --shape llama-3.1-8b --eager
    python benchmarks/multiple_choice.py --shape llama-60m --questions 8        # on a CPU
    python benchmarks/multiple_choice.py ... --option-tokens 1                  # one-token options

Every question has the same few-shot tokens in front, then its own, then four options. The rate is
in options per second. The prefix cache is emptied before every round. With one-token options score
mode sends one request a question, with four candidates; stock vLLM needs one an option, as
lm-eval's backend sends them.

With the cache a step may compute few tokens, for which a GPU has other kernels. How far that alone
moves scores is measured on the requests' last tokens, together and one by one, without the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
import shapes
from engines import SCORE, STOCK_IDS, STOCK_TOP
from harness import Contender, agreement, interleave, report

ONE_BY_ONE = "score mode, an option a request"
WITHOUT = "score mode, cache off"
TARGETS = {"qwen3-0.6b": 20.0, "llama-3.1-8b": 11.0, "llama-60m": 5.0}


def main() -> None:
    options = arguments()
    engines.prepare(options)
    gpu = engines.on_gpu()
    config = shapes.configuration(options)
    folder = shapes.folder_of(config)
    length = options.few_shot + options.question + options.option_tokens
    more: dict[str, Any] = {} if gpu else {"block_size": options.cpu_block}
    llm = engines.open_engine(folder, length, options, **more)
    questions = make_questions(options, config["vocab_size"])
    contenders = ways(llm, questions, options)
    results = interleave(contenders)
    differences = agreement(results, SCORE, mean_limit=0.3)
    moved = composition(llm, questions)
    differences["few tokens a step"] = (
        f"from many: mean {moved.mean():.1e}, max {moved.max():.1e} nats"
    )
    wanted = TARGETS.get(options.shape)
    targets = {STOCK_TOP: (">=", wanted)} if wanted and shapes.is_whole(options) else {}
    if options.profile:
        from gpu_bulk import profile, profile_device

        profile(SCORE, contenders[0].run)
        if gpu and not options.multiprocess:
            profile_device(SCORE, contenders[0].run)
    report(
        "multiple_choice",
        contenders,
        SCORE,
        {**vars(options), **engines.describe(llm), **more},
        differences,
        "options/s",
        targets,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "llama-60m")
    engines.add_arguments(parser)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--few-shot", type=int, default=500)
    parser.add_argument("--question", type=int, default=100)
    parser.add_argument("--options", type=int, default=4)
    parser.add_argument("--option-tokens", type=int, default=4)
    parser.add_argument("--cpu-block", type=int, default=32, help="tokens a cache block, on a CPU")
    parser.add_argument("--slow-rounds", type=int, default=2, help="of stock prompt_logprobs=1")
    parser.add_argument("--multiprocess", action="store_true", help="the engine in its own process")
    parser.add_argument("--profile", action="store_true", help="where the host's time goes")
    return parser.parse_args()


def make_questions(options: argparse.Namespace, vocab_size: int) -> list[tuple[Any, Any]]:
    """(context [n], options [k, m]) of uniformly random tokens; a question's options differ."""
    generator = np.random.default_rng(0)
    few_shot = generator.integers(2, vocab_size, options.few_shot)
    questions = []
    for _ in range(options.questions):
        question = generator.integers(2, vocab_size, options.question)
        answers = generator.integers(2, vocab_size, (options.options, options.option_tokens))
        questions.append((np.concatenate([few_shot, question]).tolist(), answers.tolist()))
    return questions


def ways(llm: Any, questions: list[tuple[Any, Any]], options: argparse.Namespace) -> Any:
    """The contenders."""
    requests = [
        {"prompt_token_ids": context + answer, "target_token_ids": answer}
        for context, answers in questions
        for answer in answers
    ]
    work, few = len(requests), requests[: 4 * options.options]

    def contender(name: str, run: Any, read: Any, rounds: int = options.rounds) -> Contender:
        # Warmed up with all of the work where that is cheap: kernels are compiled for its shapes.
        warm = None if name in (SCORE, ONE_BY_ONE) else lambda: run(few)
        return Contender(name, lambda: run(requests), work, rounds, warm=warm, condense=read)

    found = [
        contender(ONE_BY_ONE, lambda r: scores(llm, r), own),
        contender(STOCK_TOP, lambda r: stock(llm, r, 1), own_tails, options.slow_rounds),
        contender(WITHOUT, lambda r: scores(llm, r, skip_prefix_cache=True), own, 1),
    ]
    if options.option_tokens == 1:
        merged = [
            {
                "prompt_token_ids": context + answers[0],
                "target_token_ids": [[a for (a,) in answers]],
            }
            for context, answers in questions
        ]
        found.insert(0, contender(SCORE, lambda _: scores(llm, merged), flat))
    else:
        found[0].name = SCORE
    if engines.serves_token_ids(llm):
        found.append(contender(STOCK_IDS, lambda r: stock_ids(llm, r), ids_read))
    for c in found:
        read = c.condense
        c.condense = lambda outputs, read=read: np.array(read(outputs)).reshape(work, -1)
    return found


def scores(llm: Any, requests: list[Any], **options: Any) -> Any:
    from vllm.score import score

    llm.reset_prefix_cache()
    return score(llm, requests, use_tqdm=False, **options)


def composition(llm: Any, questions: list[tuple[Any, Any]]) -> np.ndarray:
    """Differences in nats of the same short prompts' scores, scored together and one by one."""
    prompts = [context[-12:] + answers[0] for context, answers in questions[:64]]
    together = scores(llm, prompts, skip_prefix_cache=True)
    alone = [scores(llm, [p], skip_prefix_cache=True)[0] for p in prompts]
    pairs = zip(together, alone, strict=True)
    return np.array([np.abs(a.logprobs - b.logprobs) for a, b in pairs])


def own(results: Any) -> list[Any]:
    return [r.logprobs for r in results]


def flat(results: Any) -> list[float]:
    return [value for r in results for value in r.logprobs.ravel()]


def stock(llm: Any, requests: list[Any], count: int) -> list[tuple[Any, int]]:
    """What lm-eval's vLLM backend sends; and how many of each prompt's last tokens are wanted."""
    outputs = engines.generate(
        llm, [r["prompt_token_ids"] for r in requests], prompt_logprobs=count
    )
    return [(o, len(r["target_token_ids"])) for o, r in zip(outputs, requests, strict=True)]


def own_tails(found: list[tuple[Any, int]]) -> list[list[float]]:
    return [
        [
            o.prompt_logprobs[i][o.prompt_token_ids[i]].logprob
            for i in range(len(o.prompt_token_ids) - m, len(o.prompt_token_ids))
        ]
        for o, m in found
    ]


def stock_ids(llm: Any, requests: list[Any]) -> Any:
    """Stock vLLM asked for the options' own tokens only; it leaves the cache aside for that."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprob_token_ids=np.array(r["target_token_ids"], dtype=np.int32)[:, None],
            prompt_logprob_start=len(r["prompt_token_ids"]) - len(r["target_token_ids"]) - 1,
        )
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests]
    return llm.generate(prompts, params, use_tqdm=False)


def ids_read(outputs: Any) -> list[Any]:
    return [o.prompt_token_id_logprobs[:, 0] for o in outputs]


if __name__ == "__main__":
    main()
