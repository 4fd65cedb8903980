"""Perplexity of a (quantised) model in sliding windows, on the weights that vLLM serves.

python score_mode_perplexity.py
python score_mode_perplexity.py --model facebook/opt-125m \
    --dataset wikitext --dataset-config wikitext-2-raw-v1 --context-length 2048 --stride 512
python score_mode_perplexity.py --model neuralmagic/Meta-Llama-3.1-8B-Instruct-W4A16 \
    --quantization compressed-tensors --text "The quick brown fox jumps over the lazy dog"

Without --model: a small model made on this machine. `vllm-score perplexity` has more options.
"""

from __future__ import annotations

from vllm.score.cli import options
from vllm.score.cli.perplexity import perplexity
from vllm.score.cli.script import run_script


def main(
    model: options.Model = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    context_length: options.ContextLength = 2048,
    stride: options.Stride = 512,
    quantization: options.Quantization = None,
    text: options.DirectText = None,
) -> None:
    """Perplexity of a model on a dataset or a text, in sliding windows."""
    perplexity(
        model=model,
        dataset=dataset,
        dataset_config=dataset_config,
        context_length=context_length,
        stride=stride,
        quantization=quantization,
        text=text,
    )


if __name__ == "__main__":
    run_script(main)
