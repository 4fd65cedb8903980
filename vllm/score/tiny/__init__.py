"""Small models made on the spot: a trained default, and random ones for tests and benchmarks.

Nothing here imports vLLM's engine; torch and transformers are imported when a model is made.
"""

from __future__ import annotations

from vllm.score.tiny.embedded import EmbeddedModel, embedded_model
from vllm.score.tiny.random_models import make_random_model

__all__ = ["EmbeddedModel", "embedded_model", "make_random_model"]
