"""Hooks on the running model take effect on the probabilities, as the same ones in Hugging Face."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests.sequence import interventions
from vllm.score.sequence import SequenceProbVLLMHook

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
# Long enough that whole blocks of it stand in the prefix cache.
CONTEXT = "The header of a message is part of what is read first. " * 14
TARGETS = [" the", " message", " The header is read.", "Paris", " Paris"]


@pytest.fixture
def hook(llm):
    yield SequenceProbVLLMHook(llm)
    llm.collective_rpc(interventions.remove_hooks)


@pytest.fixture(scope="module")
def hugging_face(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def vector(hugging_face):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(hugging_face.config.hidden_size, generator=rng)


@pytest.fixture(scope="module")
def bias(hugging_face):
    rng = torch.Generator().manual_seed(2)
    return 3 * torch.randn(hugging_face.config.vocab_size, generator=rng)


def token_log_probs(model, tokenizer, result):
    ids = tokenizer.encode(result["context"] + result["sequence"])
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    m = result["num_tokens"]
    assert ids[-m:] == result["token_ids"]
    return rows[np.arange(len(ids) - 1 - m, len(ids) - 1), ids[-m:]]


@pytest.mark.parametrize("where", ["layer", "head input", "head output", "logits processor"])
def test_a_hook_changes_the_scores_as_in_hugging_face(where, hook, hugging_face, vector, bias):
    before = hook.get_log_prob([CONTEXT], TARGETS)  # and the context is in the prefix cache now
    rpc = hook.llm.collective_rpc
    if where == "layer":
        rpc(interventions.steer_layer, args=(vector.tolist(),))
        handle = hugging_face.model.layers[0].register_forward_hook(
            lambda module, args, output: output + vector
        )
    elif where == "head input":
        rpc(interventions.steer_head, args=(vector.tolist(),))
        handle = hugging_face.lm_head.register_forward_pre_hook(
            lambda module, args: (args[0] + vector,)
        )
    else:
        rpc(
            interventions.bias_head if where == "head output" else interventions.bias_logits,
            args=(bias.tolist(),),
        )
        handle = hugging_face.lm_head.register_forward_hook(
            lambda module, args, output: output + bias
        )
    try:
        steered = hook.get_log_prob([CONTEXT], TARGETS)
        for result in steered:
            expected = token_log_probs(hugging_face, hook.tokenizer, result)
            np.testing.assert_allclose(result["token_log_probs"], expected, atol=TOLERANCE)
    finally:
        handle.remove()
    moved = [abs(a["log_prob"] - b["log_prob"]) for a, b in zip(before, steered, strict=True)]
    assert min(moved) > 1e-3 and max(moved) > 0.5

    assert rpc(interventions.remove_hooks) == [1]
    after = hook.get_log_prob([CONTEXT], TARGETS)
    for result, once in zip(after, before, strict=True):
        np.testing.assert_allclose(
            result["token_log_probs"], once["token_log_probs"], atol=TOLERANCE
        )


def test_a_compiled_engine_says_that_a_hook_on_a_layer_is_dead(hook, vector, monkeypatch):
    """On the real configuration of a running engine, with one field changed."""
    from vllm.config import CompilationMode

    compilation = hook.llm.llm_engine.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "mode", CompilationMode.VLLM_COMPILE)
    hook.llm.collective_rpc(interventions.steer_head, args=(vector.tolist(),))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        hook.get_log_prob(["A context"], TARGETS[:1])
    hook.llm.collective_rpc(interventions.steer_layer, args=(vector.tolist(),))
    with pytest.warns(RuntimeWarning, match=r"hooks on model\.layers\.0 have no effect"):
        hook.get_log_prob(["A context"], TARGETS[:1])
