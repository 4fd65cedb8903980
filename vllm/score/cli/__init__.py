"""The work of the command `vllm-score`, which begins in `vllm_score_command`."""

from __future__ import annotations

from vllm_score_command import completion, main, run

__all__ = ["completion", "main", "run"]
