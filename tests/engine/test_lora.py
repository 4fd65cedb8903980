"""Scores of adapters, with and without weights for the head, against merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.helpers import random_prompts, token_logprobs
from vllm.lora.request import LoRARequest
from vllm.score import ScoreModeError, score, score_continuations

pytestmark = pytest.mark.engine

RANK, ALPHA = 8, 16
# vLLM's adapters on a GPU are 16-bit.
DTYPE, TOLERANCE = ("bfloat16", 0.3) if torch.cuda.is_available() else ("float32", 2e-5)
# A head of its own: vLLM does not adapt one that is tied to the embedding.
MODEL = {"tie_word_embeddings": False, "dtype": DTYPE}


def make_adapter(folder: Path, model: Path, modules: list[str], seed: int) -> None:
    """Random low-rank weights for the modules, in PEFT's format."""
    hf = AutoModelForCausalLM.from_pretrained(model)
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in hf.named_modules():
        if name.split(".")[-1] in modules:
            rows, columns = module.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=rng) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=rng) * 0.05
    assert tensors
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": modules,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merged_log_softmax(model: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """Float64 [n, V] of Hugging Face with ``W + alpha / r * B A`` in place of W."""
    from safetensors.torch import load_file

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tensors = {} if adapter is None else load_file(adapter / "adapter_model.safetensors")
    for name, module in hf.named_modules():
        a = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            b = tensors[f"base_model.model.{name}.lora_B.weight"]
            module.weight.data += ALPHA / RANK * b.double() @ a.double()
    with torch.no_grad():
        return hf(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root, model = tmp_path_factory.mktemp("adapters"), model_dir("llama", **MODEL)
    found: list = [None]
    for i, modules in enumerate((["q_proj", "down_proj"], ["q_proj", "lm_head"], ["lm_head"])):
        make_adapter(root / str(i), model, modules, seed=i)
        found.append(LoRARequest(f"adapter{i}", i + 1, str(root / str(i))))
    return found


@pytest.fixture(scope="module")
def lora_llm(engine):
    return engine(
        "llama",
        MODEL,
        dtype=DTYPE,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=RANK,
        max_model_len=1024,
    )


def test_adapters_side_by_side_score_as_merged_weights(lora_llm, adapters, model_dir):
    prompts = random_prompts([300, 40, 280, 2, 70, 90, 1, 400], 1000, seed=0)
    chosen = [adapters[i % 4] for i in range(len(prompts))]
    for order in (slice(None), slice(None, None, -1)):
        scores = score(
            lora_llm,
            prompts[order],
            statistics=["rank"],
            lora_request=chosen[order],
            use_tqdm=False,
        )
        for p, adapter, s in zip(prompts[order], chosen[order], scores, strict=True):
            folder = None if adapter is None else Path(adapter.lora_path)
            rows = merged_log_softmax(model_dir("llama", **MODEL), folder, p)
            np.testing.assert_allclose(s.logprobs, token_logprobs(rows, p), atol=TOLERANCE)


def test_continuations_of_several_adapters(lora_llm, adapters, model_dir):
    (context,) = random_prompts([40], 1000, seed=5)
    pairs = [(context, [3, 4]), (context, [3, 5])] * 2
    chosen = [adapters[1], adapters[1], None, adapters[2]]
    scores = score_continuations(lora_llm, pairs, lora_request=chosen, use_tqdm=False)
    for (_, continuation), adapter, s in zip(pairs, chosen, scores, strict=True):
        folder = None if adapter is None else Path(adapter.lora_path)
        ids = [*context, *continuation]
        rows = merged_log_softmax(model_dir("llama", **MODEL), folder, ids)
        np.testing.assert_allclose(s.logprobs, token_logprobs(rows, ids)[-2:], atol=TOLERANCE)


def test_adapters_whole_vocabulary(lora_llm, adapters, model_dir):
    (p,) = random_prompts([30], 1000, seed=1)
    (s,) = score(lora_llm, [p], full_vocabulary=True, lora_request=adapters[2], use_tqdm=False)
    rows = merged_log_softmax(model_dir("llama", **MODEL), Path(adapters[2].lora_path), p)
    np.testing.assert_allclose(s.logprobs, rows[:-1], atol=TOLERANCE)


def test_wrong_number_of_adapters_and_engine_without_lora(lora_llm, adapters, llm):
    with pytest.raises(ScoreModeError, match="lora_request has 1 entries for 2 requests"):
        score(lora_llm, [[1, 2], [1, 2]], lora_request=[adapters[1]], use_tqdm=False)
    with pytest.raises(ScoreModeError, match="enable_lora"):
        score(llm, [[1, 2]], lora_request=adapters[1], use_tqdm=False)


def test_logits_changed_behind_the_head_are_refused(lora_llm):
    """Stock vLLM would apply the adapters of other rows to them."""
    (p,) = random_prompts([20], lora_llm.llm_engine.model_config.get_vocab_size(), seed=4)
    handles = []

    def hook(worker):
        layer = worker.model_runner.model.logits_processor
        handles.append(layer.register_forward_hook(lambda module, args, logits: logits + 1))

    lora_llm.collective_rpc(hook)
    try:
        with pytest.raises(ScoreModeError, match="is NaN"):
            score(lora_llm, [p], use_tqdm=False)
    finally:
        handles.pop().remove()
    assert len(score(lora_llm, [p], use_tqdm=False)[0]) == 19


def test_rows_without_an_adapter_beside_others_are_no_silent_wrong_numbers(
    lora_llm, adapters, model_dir
):
    """All slots are taken. `LLM.generate` mixes them in a step, which vLLM cannot do on a CPU."""
    from vllm import SamplingParams

    prompts = random_prompts([150] * 4, 1000, seed=6)
    score(lora_llm, prompts[1:], lora_request=adapters[1:], use_tqdm=False)
    outputs = lora_llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(score_mode=True, prompt_logprobs=0),
        lora_request=adapters,
        use_tqdm=False,
    )
    for p, adapter, o in zip(prompts, adapters, outputs, strict=True):
        if adapter is None and not torch.cuda.is_available():
            with pytest.raises(ScoreModeError, match="is NaN"):
                len(o.scores)
            continue
        folder = None if adapter is None else Path(adapter.lora_path)
        rows = merged_log_softmax(model_dir("llama", **MODEL), folder, p)
        np.testing.assert_allclose(o.scores.logprobs, token_logprobs(rows, p), atol=TOLERANCE)
    # Nor may scores rest on a context that was computed beside an adapter.
    generation = SamplingParams(max_tokens=1, temperature=0)
    lora_llm.reset_prefix_cache()
    lora_llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        generation,
        lora_request=adapters,
        use_tqdm=False,
    )
    request = {"prompt_token_ids": prompts[0], "target_token_ids": prompts[0][-3:]}
    (s,) = score(lora_llm, [request], use_tqdm=False)
    rows = merged_log_softmax(model_dir("llama", **MODEL), None, prompts[0])
    np.testing.assert_allclose(s.logprobs, token_logprobs(rows, prompts[0])[-3:], atol=TOLERANCE)
