"""Score mode behind `/v1/completions`; what is amended for it stands in `vllm.score.patches`."""
