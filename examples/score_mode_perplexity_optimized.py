"""Perplexity in little memory: short windows, few of them at a time, a small KV cache.

python score_mode_perplexity_optimized.py
python score_mode_perplexity_optimized.py --model your/large-model \
    --quantization compressed-tensors \
    --dataset wikitext --dataset-config wikitext-2-raw-v1 --context-length 512 --stride 256

A figure from short windows is higher than one from long ones: each token has less context.
"""

from __future__ import annotations

from vllm_score_command import run

if __name__ == "__main__":
    run("perplexity", context_length=512, stride=256, low_memory=True)
