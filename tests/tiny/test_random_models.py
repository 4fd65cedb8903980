"""Random models: real Hugging Face models, the same every time, with scores worth checking."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from vllm.score.errors import ScoreModeError
from vllm.score.tiny import make_random_model
from vllm.score.tiny.corpus import train_tokenizer
from vllm.score.tiny.random_models import ARCHITECTURES

V = 512
CASES = [
    (a, tied) for a in ARCHITECTURES for tied in (False, True) if (a, tied) != ("gemma2", False)
]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some text to learn merges from, and some more text"], 280)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("random_models")
    return {
        (architecture, tied): make_random_model(
            root / f"{architecture}-{tied}",
            architecture,
            vocab_size=V,
            tie_word_embeddings=tied,
            tokenizer=tokenizer,
        )
        for architecture, tied in CASES
    }


def _load(folder: Path) -> Any:
    # Eager attention: the one that computes Gemma-2's soft cap on the attention scores.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


def _ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, V, (n,), generator=torch.Generator().manual_seed(seed))


def _digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_a_real_model_with_scores_worth_checking(
    folders: dict[tuple[str, bool], Path], architecture: str, tied: bool
) -> None:
    model = _load(folders[architecture, tied])
    assert type(model).__name__ == CLASSES[architecture]
    assert model.config.max_position_embeddings >= 2048
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is tied
    with safe_open(folders[architecture, tied] / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (no mapping)

    ids = _ids(300)
    logprobs = _logits(model, ids).log_softmax(-1)
    assert torch.isfinite(logprobs).all()
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert 0.2 * math.log(V) < entropy.mean() < 0.75 * math.log(V)  # neither a spike nor flat
    assert entropy.std() > 0.3
    assert logprobs.std(-1).mean() > 1.5

    other = ids.clone()
    other[:50] = _ids(50, seed=1)
    far = (_logits(model, other).log_softmax(-1) - logprobs)[200:].abs()
    assert far.mean() > 0.05  # what stands 150 tokens back still shows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_position_matters(folders: dict[tuple[str, bool], Path], architecture: str) -> None:
    model = _load(folders[architecture, True])
    a, b = _ids(2).tolist()
    # The same tokens in another order, then the same last token.
    first = _logits(model, torch.tensor([a, b, b, a, a]))[-1].log_softmax(-1)
    second = _logits(model, torch.tensor([b, a, a, b, a]))[-1].log_softmax(-1)
    assert (first - second).abs().max() > 0.05


def test_the_same_arguments_give_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, folders: dict[tuple[str, bool], Path]
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for architecture in ARCHITECTURES:
        again = make_random_model(
            tmp_path / architecture,
            architecture,
            vocab_size=V,
            tie_word_embeddings=True,
            tokenizer=tokenizer,
        )
        assert _digest(again) == _digest(folders[architecture, True])
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers are left alone
    other = make_random_model(tmp_path / "seed", "llama", vocab_size=V, seed=1, tokenizer=tokenizer)
    weights = "model.safetensors"
    assert _digest(other)[weights] != _digest(folders["llama", False])[weights]


def test_gemma2_has_both_soft_caps(folders: dict[tuple[str, bool], Path]) -> None:
    model = _load(folders["gemma2", True])
    assert model.config.final_logit_softcapping == 30.0
    assert model.config.attn_logit_softcapping == 50.0
    ids = _ids(100)
    capped = _logits(model, ids)
    model.config.final_logit_softcapping = None
    bare = _logits(model, ids)
    torch.testing.assert_close(capped, 30.0 * torch.tanh(bare / 30.0), rtol=0, atol=1e-9)
    change = (capped.log_softmax(-1) - bare.log_softmax(-1)).abs()
    assert change.max() > 0.5  # leaving it out would be noticed


def test_defaults_overrides_and_dtype(tmp_path: Path) -> None:
    folder = make_random_model(
        tmp_path,
        "qwen3",
        hidden_size=64,
        num_layers=1,
        dtype=torch.bfloat16,
        config_overrides={"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.config.vocab_size == 1024
    assert model.config.tie_word_embeddings is False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= 1024
    assert tokenizer.decode(tokenizer.encode("Déjà vu\n")) == "Déjà vu\n"
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("std", [1.0, 5.0])
def test_logit_std_is_the_spread_of_the_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, std: float
) -> None:
    folder = make_random_model(tmp_path, "llama", vocab_size=V, logit_std=std, tokenizer=tokenizer)
    assert _logits(_load(folder), _ids(50)).std(-1).mean() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "bert"}, "architecture must be one of llama, qwen3.*got 'bert'"),
        ({"dtype": "int8"}, "dtype must be one of float32.*got 'int8'"),
        ({"hidden_size": 100}, "hidden_size is 100; it must be a multiple of head_dim, 32"),
        ({"head_dim": 16}, "head_dim must be .*at least 32, got 16"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number .*got 64.0"),
        ({"intermediate_size": -1}, "intermediate_size must be .*got -1"),
        ({"vocab_size": 100}, "vocab_size must be .*at least 258, got 100"),
        ({"vocab_size": 270, "tokenizer": True}, "vocab_size is 270, but the tokenizer has 280"),
        ({"logit_std": 0.0}, "logit_std must be .*above 0, got 0.0"),
        ({"hiden_size": 64}, "has no hiden_size .did you mean 'hidden_size'"),
        ({"seed": -1}, "seed must be .*got -1"),
        (
            {"architecture": "gemma2", "tie_word_embeddings": False},
            "tie_word_embeddings=False with architecture='gemma2'",
        ),
        ({"config_overrides": {"rope_beta": 1}}, "'rope_beta', which LlamaConfig does not have"),
        ({"config_overrides": {"rms_norm_eps": "small"}}, "no llama configuration: .*rms_norm_eps"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any], message: str
) -> None:
    given = {"architecture": "llama", **arguments}
    if given.get("tokenizer"):
        given["tokenizer"] = tokenizer
    with pytest.raises(ScoreModeError, match=f"(?s){message}"):
        make_random_model(tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()
