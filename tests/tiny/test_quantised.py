"""Quantised checkpoints: what is written, and what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.dequantised import (
    activation_format,
    dequantise_model,
    dequantise_tensors,
    round_tokens,
    rounded_inputs,
)
from tests.support.quantised import SCHEMES, quantise_model
from vllm.score.errors import ScoreModeError
from vllm.score.tiny.random_models import make_random_model

LAYERS = 2
# Bits of a weight as stored, scales included, and the largest relative error (root mean square)
# of rounding a normal distribution to it.
BITS = {
    "W8A8": (8.3, 0.01),
    "W8A8_7BIT": (8.3, 0.02),
    "W4A16": (4.3, 0.13),
    "W4A16_G32": (5.1, 0.11),
    "FP8": (8.3, 0.03),
    "FP8_TENSOR": (8.1, 0.03),
    "NVFP4A16": (4.6, 0.11),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "source"
    return make_random_model(folder, "llama", vocab_size=512, dtype="bfloat16")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoint_is_small_and_close(
    scheme: str, head: bool, source: Path, tmp_path: Path
) -> None:
    quantised = quantise_model(source, tmp_path / "q", scheme, quantise_head=head)
    plain = dequantise_model(quantised, tmp_path / "d")
    original, stored, meant = tensors_of(source), tensors_of(quantised), tensors_of(plain)
    assert {n: t.shape for n, t in original.items()} == {n: t.shape for n, t in meant.items()}
    bits, tolerance = BITS[scheme]
    layers = [
        n.removesuffix(".weight") for n in original if "proj" in n or (head and "lm_head" in n)
    ]
    assert len(layers) == 7 * LAYERS + head
    for name, weight in original.items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(stored[name], weight)
            continue
        error = (meant[name] - weight.float()).norm() / weight.float().norm()
        assert 0 < error < tolerance
        size = sum(t.numel() * t.itemsize for n, t in stored.items() if n.startswith(layer))
        assert 8 * size / weight.numel() < bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantised_as_compressed_tensors_does(scheme: str, source: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = quantise_model(source, tmp_path / "q", scheme)
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    fields.pop("quant_method")
    config = QuantizationConfig.model_validate(fields)
    (arguments,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    stored = tensors_of(folder)
    ours = dequantise_tensors(stored)
    for layer in {n.rpartition(".")[0] for n in stored if n.endswith(".weight_scale")}:
        state = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{layer}.")}
        if config.format != "nvfp4-pack-quantized":  # that one unpacks to bfloat16 itself
            state["weight_scale"] = state["weight_scale"].float()
        theirs = compressor.decompress(state, arguments)["weight"].float()
        torch.testing.assert_close(
            ours[f"{layer}.weight"],
            theirs,
            rtol=2**-7 if "nvfp4" in config.format else 1e-6,
            atol=0,
        )


def test_layers_that_vllm_fuses_share_their_one_scale(source: Path, tmp_path: Path) -> None:
    for scheme, name in (("FP8_TENSOR", "weight_scale"), ("NVFP4A16", "weight_global_scale")):
        stored = tensors_of(quantise_model(source, tmp_path / scheme, scheme))
        for group in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        ):
            found = {stored[f"model.layers.0.{layer}.{name}"].item() for layer in group}
            assert len(found) == 1
        both = {stored[f"model.layers.{i}.mlp.down_proj.{name}"].item() for i in range(LAYERS)}
        assert len(both) == 2


def test_seven_bits_stay_within_64(source: Path, tmp_path: Path) -> None:
    largest = {
        scheme: max(
            t.abs().max().item()
            for t in tensors_of(quantise_model(source, tmp_path / scheme, scheme)).values()
            if t.dtype == torch.int8
        )
        for scheme in ("W8A8", "W8A8_7BIT")
    }
    assert largest["W8A8"] == 127
    assert 60 < largest["W8A8_7BIT"] <= 64


def test_half_bytes_by_hand() -> None:
    # e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; int4: -8..7. Low half first.
    fp4 = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    one = torch.ones(1, 1)
    found = dequantise_tensors({"a.weight_packed": fp4, "a.weight_scale": one})["a.weight"]
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found.tolist() == [positive + [-x for x in positive]]
    halved = {
        "a.weight_packed": fp4,
        "a.weight_scale": one,
        "a.weight_global_scale": torch.tensor([2.0]),
    }
    torch.testing.assert_close(dequantise_tensors(halved)["a.weight"], found / 2)
    int4 = torch.from_numpy(np.array([[0x76543210, 0xFEDCBA98]], dtype=np.uint32).view(np.int32))
    scales = torch.tensor([[1.0, 10.0]])
    found = dequantise_tensors({"a.weight_packed": int4, "a.weight_scale": scales})["a.weight"]
    assert found.tolist() == [[*range(-8, 0), *range(0, 80, 10)]]


def test_rounded_tokens() -> None:
    x = torch.tensor([[127.0, 0.4, -0.6, 100.5, -127.0]], dtype=torch.float64)
    assert round_tokens(3 * x, "int").tolist() == [[381.0, 0.0, -3.0, 300.0, -381.0]]
    y = torch.tensor([[448.0, 17.0, 1.0625, -2.25]], dtype=torch.float64)
    # e4m3 has steps of 2 at 16, and of 1/8 and 1/4 at 1 and 2; ties go to the even one.
    assert round_tokens(y / 4, "float").tolist() == [[112.0, 4.0, 0.25, -0.5625]]
    assert round_tokens(torch.zeros(2, 3), "int").tolist() == [[0.0] * 3] * 2


def test_inputs_are_rounded_only_where_asked(source: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        plain = model(ids).logits
        found = []
        for to, head in ((None, False), ("int", False), ("int", True)):
            with rounded_inputs(model, to, head=head):
                found.append(model(ids).logits)
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(found[0], plain)
    assert 0 < (found[1] - plain).abs().mean() < 0.5
    assert 0 < (found[2] - found[1]).abs().mean() < 0.5


def test_activation_formats(source: Path, tmp_path: Path) -> None:
    expected = {"W8A8": "int", "FP8": "float", "W4A16": None, "NVFP4A16": None}
    for scheme, kind in expected.items():
        assert activation_format(quantise_model(source, tmp_path / scheme, scheme)) == kind


def test_what_cannot_be_quantised(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ScoreModeError, match="scheme is 'INT3'; it must be one of W8A8"):
        quantise_model(source, tmp_path / "q", "INT3")
    odd = make_random_model(
        tmp_path / "odd", "llama", vocab_size=512, hidden_size=96, intermediate_size=100
    )
    with pytest.raises(ScoreModeError, match="no groups of 32"):
        quantise_model(odd, tmp_path / "q", "W4A16_G32")
    tied = make_random_model(tmp_path / "tied", "llama", vocab_size=512, tie_word_embeddings=True)
    with pytest.raises(ScoreModeError, match="tie_word_embeddings=False"):
        quantise_model(tied, tmp_path / "q", "FP8", quantise_head=True)
    convolutions = make_random_model(tmp_path / "gpt2", "gpt2", vocab_size=512)
    with pytest.raises(ScoreModeError, match="no linear layers"):
        quantise_model(convolutions, tmp_path / "q", "FP8")
    assert not (tmp_path / "q").exists()
    with pytest.raises(ScoreModeError, match="in no format known here"):
        dequantise_tensors({"a.weight": torch.ones(2, 2, dtype=torch.int32)})
