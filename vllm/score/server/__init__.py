"""Score mode behind `/v1/completions`; `vllm.score.patches.endpoints` calls it."""
