"""Log-probability of every text of a corpus, spread over a Ray cluster by Ray Data's vLLM stage.

python ray_data_scores.py --model MODEL --texts corpus.parquet --output scores --replicas 8

Needs `pip install "ray[data,llm]"`, and vllm-score beside vLLM on every node. The tests do not run
it, for want of Ray: it follows the documentation of `ray.data.llm` (Ray 2.49 and later).
"""

from __future__ import annotations

import argparse
import math
from typing import Any


def request(row: dict[str, Any]) -> dict[str, Any]:
    """What the vLLM stage gets: the text, and parameters that ask for scores only."""
    return {
        "prompt": row["text"],
        "text": row["text"],
        "sampling_params": {"score_mode": True, "prompt_logprobs": 0},
    }


def result(row: dict[str, Any]) -> dict[str, Any]:
    """The row to be written: the text, its tokens' log-probabilities and its perplexity."""
    logprobs = [
        entry["logprob"]
        for position in row["prompt_logprobs"]
        if position is not None  # the first token has no context
        for entry in position.values()
        if entry is not None
    ]
    perplexity = math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else math.nan
    return {"text": row["text"], "logprobs": logprobs, "perplexity": perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True, help="Parquet with a column `text`")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--replicas", type=int, default=1, help="engines, one GPU each")
    options = parser.parse_args()

    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # The engine tokenizes; there is no chat, and no generated token to decode.
    stages = dict.fromkeys(("chat_template_stage", "tokenize_stage", "detokenize_stage"), False)
    config = vLLMEngineProcessorConfig(
        model_source=options.model, concurrency=options.replicas, batch_size=256, **stages
    )
    scores = build_processor(config, preprocess=request, postprocess=result)
    scores(ray.data.read_parquet(options.texts)).write_parquet(options.output)


if __name__ == "__main__":
    main()
