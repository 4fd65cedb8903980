"""A hybrid model (linear attention with a recurrent state, full attention, experts) in bfloat16.

vLLM keeps the recurrent state of such a model at the boundaries of large blocks, and cuts cached
prefixes there; the first scored row limits them as it does everywhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts
from vllm.score import score

pytestmark = pytest.mark.engine

VOCABULARY = 512
# The parts of a mean over 24 tokens that bfloat16 and its choices of experts move, in nats.
BFLOAT16_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def qwen3_next(tmp_path_factory):
    """Folder and float32 reference of a random model with the layers of Qwen3-Next."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    from vllm.score.tiny.random_models import _default_tokenizer

    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,  # the fourth has full attention
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=2048,
    )
    folder = tmp_path_factory.mktemp("qwen3-next")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(4)  # the initial weights make every distribution flat
    model.save_pretrained(folder)
    _default_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture(scope="module")
def hybrid(qwen3_next):
    from vllm import LLM

    if torch.cuda.is_available():
        pytest.importorskip("flashinfer", reason="vLLM runs this model with it on a GPU")
    return LLM(
        str(qwen3_next[0]),
        dtype="bfloat16",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=128 << 20,
        distributed_executor_backend="uni",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        enable_prefix_caching=True,
    )


def reference(model, ids, targets):
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, -len(targets) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(targets)[:, None])[:, 0].numpy()


def test_cached_states_give_the_same_scores(hybrid, qwen3_next):
    from vllm import SamplingParams

    (context,) = random_prompts([700], VOCABULARY, seed=1)
    tails = random_prompts([24, 5, 9, 300], VOCABULARY, seed=2)
    requests = [{"prompt_token_ids": context[:690] + t, "target_token_ids": t} for t in tails]
    hybrid.reset_prefix_cache()
    together = hybrid.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    again = hybrid.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    block = hybrid.llm_engine.vllm_config.cache_config.mamba_block_size
    for i, outputs in enumerate((together, again)):
        for j, o in enumerate(outputs):
            expected = 689 // block * block if i or j else 0
            assert o.num_cached_tokens == expected
            (alone,) = score(hybrid, [requests[j]], skip_prefix_cache=True, use_tqdm=False)
            np.testing.assert_allclose(o.scores.logprobs, alone.logprobs, atol=1e-5)
    assert block < 689, "this test needs hits to mean anything"
    for o, r, t in zip(again, requests, tails, strict=True):
        want = reference(qwen3_next[1], r["prompt_token_ids"], t)
        assert np.abs(o.scores.logprobs - want).mean() < BFLOAT16_TOLERANCE
