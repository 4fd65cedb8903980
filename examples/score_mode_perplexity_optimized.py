"""Perplexity in little memory: short windows, few of them at a time, a small KV cache.

python score_mode_perplexity_optimized.py
python score_mode_perplexity_optimized.py --model your/large-model \
    --quantization compressed-tensors \
    --dataset wikitext --dataset-config wikitext-2-raw-v1 --context-length 512 --stride 256

A figure from short windows is higher than one from long ones: each token has less context.
"""

from __future__ import annotations

from vllm.score.cli import options
from vllm.score.cli.perplexity import perplexity
from vllm.score.cli.script import run_script


def main(
    model: options.Model = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    context_length: options.ContextLength = 512,
    stride: options.Stride = 256,
    quantization: options.Quantization = None,
    text: options.DirectText = None,
) -> None:
    """Perplexity of a model on a dataset or a text, in short windows and little memory."""
    perplexity(
        model=model,
        dataset=dataset,
        dataset_config=dataset_config,
        context_length=context_length,
        stride=stride,
        quantization=quantization,
        text=text,
        low_memory=True,
    )


if __name__ == "__main__":
    run_script(main)
