"""Scores on quantised weights as stored, against Hugging Face on the weights they stand for.

What a quantised layer computes is exact arithmetic on rounded numbers: weights are rounded in the
file, and some formats round each token's input to 8 bits as well. The reference is a float64
forward over stored number × stored scale; `rounded_inputs` rounds the inputs as the format says.

Where it does, the engine's own float32 error decides now and then to which side an input near a
tie is rounded, and a step of 8 bits is large. An independent float32 run of the same arithmetic
falls off float64 for as many tokens; that, measured here, is the format's own error: most tokens
must agree to float32 accuracy, and all in the mean to within what this run shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts, token_logprobs
from tests.support.dequantised import activation_format, rounded_inputs
from vllm.score import score
from vllm.score.engine.configuration import cpu_int8_error, int8_warning
from vllm.score.perplexity import perplexity

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="formats of vLLM's CPU build"),
]

VOCABULARY = 1000  # no multiple of 64: a quantised head is padded
LENGTHS = [50] * 16 + [300]
# The smallest layer of each kind in the model, [out, in].
DENSE_SHAPES = {
    "QKVParallelLinear": (256, 128),
    "RowParallelLinear": (128, 128),
    "MergedColumnParallelLinear": (768, 128),
    "VocabParallelEmbedding": (VOCABULARY, 128),
    "ParallelLMHead": (VOCABULARY, 128),
}
CLOSE = 1e-4  # nats: float32 arithmetic through two layers


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what of this machine decides whether it runs."""

    scheme: str
    quantise_head: bool

    def skip_reason(self) -> str | None:
        # AVX-512 builds of vLLM have the product with int4 weights.
        import_module("vllm._custom_ops")  # loads the build
        runs_int4 = hasattr(torch.ops._C, "cpu_gemm_wna16")
        if self.scheme.startswith("W4A16") and not runs_int4:
            return "vLLM's build for this CPU has no product with int4 weights"
        if self.scheme == "W8A8" and (error := cpu_int8_error()):
            return f"vLLM's int8 product is off by {error:.0%} on this CPU (16-bit sums overflow)"
        return None

    def dtype(self) -> str:
        if self.scheme.startswith("W4A16"):
            return "float16"  # the kernel takes 16-bit inputs; float16 has three bits more
        if self.scheme.startswith("W8A8") and torch.cpu._is_amx_tile_supported():
            return "bfloat16"  # what vLLM's AMX kernel takes
        return "float32"

    def model(self, dtype: str) -> dict[str, Any]:
        options = {"scheme": self.scheme, "quantise_head": self.quantise_head}
        return {"vocab_size": VOCABULARY, "dtype": dtype, **options}


CASES = [
    Case("W8A8_7BIT", quantise_head=True),
    Case("W8A8", quantise_head=False),
    Case("FP8", quantise_head=False),
    Case("W4A16_G32", quantise_head=True),
]


@dataclass(frozen=True)
class Served:
    """A running engine and the folders of its checkpoint and of the float models beside it."""

    llm: Any
    dtype: torch.dtype
    quantised: Path
    dequantised: Path
    original: Path
    quantise_head: bool


@pytest.fixture(params=CASES, ids=lambda case: case.scheme)
def served(
    request: pytest.FixtureRequest, engine: Callable[..., Any], model_dir: Callable[..., Path]
) -> Served:
    case: Case = request.param
    if reason := case.skip_reason():
        pytest.skip(reason)
    dtype = case.dtype()
    options = case.model(dtype)
    return Served(
        engine("llama", options, dtype=dtype),
        getattr(torch, dtype),
        model_dir("llama", **options),
        model_dir("llama", **options, dequantised=True),
        model_dir("llama", vocab_size=VOCABULARY, dtype=dtype),
        case.quantise_head,
    )


def hugging_face(
    folder: Path,
    prompts: list[list[int]],
    to: str | None,
    *,
    head: bool,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    """Log-probabilities of all prompts' tokens, one after the other; inputs rounded `to`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    with torch.no_grad(), rounded_inputs(model, to, head=head):
        for _, group in groupby(prompts, key=len):
            ids = list(group)
            rows = model(torch.tensor(ids)).logits.double().log_softmax(-1).numpy()
            found += [token_logprobs(r, i) for r, i in zip(rows, ids, strict=True)]
    return np.concatenate(found)


def test_scores_are_those_of_the_dequantised_model(served: Served) -> None:
    prompts = random_prompts(LENGTHS, VOCABULARY, seed=0)
    scores = np.concatenate([s.logprobs for s in score(served.llm, prompts, use_tqdm=False)])
    to, head = activation_format(served.quantised), served.quantise_head
    simulated = hugging_face(served.dequantised, prompts, to, head=head)
    own = hugging_face(served.dequantised, prompts, to, head=head, dtype=served.dtype)
    original = hugging_face(served.original, prompts, to, head=head)

    error = np.abs(scores - simulated)
    of_dtype = np.abs(own - simulated).mean()
    if served.dtype != torch.float32:
        assert error.mean() <= 1.5 * of_dtype
        # A score of the weights before they were quantised would be noticed.
        assert np.abs(scores - original).mean() > 1.2 * error.mean()
        return
    # Few ties make up the mean: it varies more than the sum of many roundings.
    assert error.mean() <= 3 * of_dtype
    assert np.mean(error < CLOSE) > 0.75
    assert np.abs(scores - original).mean() > 4 * error.mean()
    if to is not None:
        exact = hugging_face(served.dequantised, prompts, None, head=head)
        of_format = np.abs(simulated - exact).mean()
        assert error.mean() < of_format / 5
        assert np.abs(scores - exact).mean() == pytest.approx(of_format, rel=0.2)


def test_perplexity_on_quantised_weights(served: Served) -> None:
    ids = random_prompts([700], VOCABULARY, seed=1)[0]
    found = perplexity(served.llm, ids, context_length=256, stride=256, use_tqdm=False)
    windows = [ids[i : i + 256] for i in range(0, len(ids), 256)]
    to, head = activation_format(served.quantised), served.quantise_head
    simulated = hugging_face(served.dequantised, windows, to, head=head)
    assert found.provenance.scored_tokens == len(simulated)
    tolerance = 1e-3 if served.dtype == torch.float32 else 5e-2
    assert found.perplexity == pytest.approx(math.exp(-simulated.mean()), rel=tolerance)


def test_int8_products_of_small_weights_are_exact() -> None:
    assert cpu_int8_error(64) == 0.0
    if any("vnni" in line for line in Path("/proc/cpuinfo").read_text().splitlines()):
        assert cpu_int8_error() == 0.0


def test_a_warning_says_that_int8_products_are_wrong(served: Served) -> None:
    (text,) = served.llm.apply_model(int8_warning)
    if cpu_int8_error() and activation_format(served.quantised) == "int":
        assert text is not None and "VNNI" in text
    else:
        assert text is None


def dense_tensors(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Float tensors of 16 bits and more with as many entries as the layer's plain weight."""
    size = math.prod(DENSE_SHAPES[type(layer).__name__])
    held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    held += [*layer.parameters(), *layer.buffers()]
    return [t for t in held if t.numel() >= size and t.is_floating_point() and t.itemsize > 1]


def test_no_weight_is_decompressed(served: Served) -> None:
    score(served.llm, [list(range(2, 40))], use_tqdm=False)
    (layers,) = served.llm.apply_model(
        lambda model: [m for m in model.modules() if type(m).__name__ in DENSE_SHAPES]
    )
    plain = [type(layer).__name__ for layer in layers if dense_tensors(layer)]
    expected = ["VocabParallelEmbedding", *([] if served.quantise_head else ["ParallelLMHead"])]
    assert len(layers) == 2 * 4 + 2
    assert plain == expected
