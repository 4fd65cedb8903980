"""Perplexity of a (quantised) model in sliding windows, on the weights that vLLM serves.

python score_mode_perplexity.py
python score_mode_perplexity.py --model facebook/opt-125m \
    --dataset wikitext --dataset-config wikitext-2-raw-v1 --context-length 2048 --stride 512
python score_mode_perplexity.py --model neuralmagic/Meta-Llama-3.1-8B-Instruct-W4A16 \
    --quantization compressed-tensors --text "The quick brown fox jumps over the lazy dog"

Without --model: a small model made on this machine. -h lists the options.
"""

from __future__ import annotations

from vllm_score_command import run

if __name__ == "__main__":
    run("perplexity")
