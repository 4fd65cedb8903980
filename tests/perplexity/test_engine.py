"""Perplexity on the real engine, against independent loops over Hugging Face's model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import PerplexityResult, perplexity

pytestmark = pytest.mark.engine

CONTEXT, STRIDE = 512, 128
# At least 2048 tokens of ordinary text, and every kind of character.
TEXT = (Path(math.__file__ or __file__).exists() and "") or ""
