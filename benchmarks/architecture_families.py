"""The models of `architectures.py`: for each family a tiny configuration of its transformers class.

Two to eight layers wide enough for vLLM's CPU kernels; windows and chunks are shorter than the
prompts; every factor, bias and norm that the architecture can have is switched on and is not one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

VOCABULARY = 512
# Within one block, over several, and longer than any window or chunk below and than a step.
LENGTHS = (5, 37, 150)
# Tokens a step: the longest prompt is computed in two pieces, beside others.
STEP_TOKENS = 128


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: of transformers' configuration.
        settings: its fields.
        about: what is unusual, for the table.
        architecture: vLLM's name where it is not that of transformers' class.
        attention: transformers' implementation; "eager" is the one that all models have.
        engine: further arguments of `vllm.LLM`.
        served: fields of config.json that only vLLM sees.
        known: why stock vLLM is off, where that was found out.
    """

    model_type: str
    settings: dict[str, Any]
    about: str = ""
    architecture: str = ""
    attention: str = "eager"
    engine: dict[str, Any] = field(default_factory=dict)
    served: dict[str, Any] = field(default_factory=dict)
    known: str = ""


_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_TIED = {"tie_word_embeddings": True}
_WINDOW = {"sliding_window": 24}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "full_attention"]
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA4_YARN = {
    **_YARN,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.7,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.11,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Sizes of the published models, for which vLLM has kernels of multi-head latent attention.
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_DELTA_NET = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 96}
_INDEXED = {"index_topk": 32, "index_head_dim": 128, "index_n_heads": 4}


def _of(*parts: dict[str, Any], without: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """The common settings with these on top."""
    settings = dict(_BASE)
    for part in (*parts, more):
        settings.update(part)
    return {name: value for name, value in settings.items() if name not in without}


_ROTARY = "vLLM's CPU kernel of rotary positions is wrong for queries of three dimensions"
_LLAMA4 = _of(
    _LOCAL_EXPERTS,
    num_hidden_layers=4,
    intermediate_size_mlp=256,
    intermediate_size=64,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    attention_chunk_size=128,
    floor_scale=32,
    no_rope_layers=[1, 1, 1, 0],
)
_COHERE2_MOE = _of(
    _EXPERTS,
    _TIED,
    _WINDOW,
    logit_scale=0.7,
    layer_types=_TWO_KINDS,
    num_shared_experts=1,
    first_k_dense_replace=0,
)
_ZAMBA2 = _of(
    _TIED,
    without=("head_dim",),
    num_hidden_layers=4,
    num_key_value_heads=4,
    layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    mamba_d_state=32,
    n_mamba_heads=8,
    mamba_ngroups=2,
    chunk_size=32,
    num_mem_blocks=1,
    adapter_rank=8,
    use_mamba_kernels=False,
)

FAMILIES: dict[str, Family] = {
    # Dense.
    "llama": Family("llama", _of(attention_bias=True, mlp_bias=True), "biases everywhere"),
    "llama tied": Family("llama", _of(_TIED), "tied head"),
    "llama llama3-rope": Family(
        "llama",
        _of(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        ),
        "scaled rotary positions",
    ),
    "llama yarn": Family("llama", _of(rope_parameters=_YARN), "YaRN"),
    "mistral": Family("mistral", _of(_WINDOW), "sliding window"),
    "ministral3": Family(
        "ministral3",
        _of(rope_parameters=_LLAMA4_YARN),
        "YaRN, queries scaled by position",
        known="vLLM reads the scale of queries from a field that transformers does not write",
    ),
    "ministral3 told": Family(
        "ministral3",
        _of(rope_parameters=_LLAMA4_YARN),
        "the same with the field that vLLM reads the scale from",
        served={"llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1}},
    ),
    "qwen2": Family("qwen2", _of(without=("head_dim",)), "QKV biases"),
    "qwen3": Family("qwen3", _of(head_dim=64), "QK norms, wide heads"),
    "gpt2": Family(
        "gpt2",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            tie_word_embeddings=True,
        ),
        "learned positions",
    ),
    "gptj": Family(
        "gptj",
        _of(without=("head_dim", "num_key_value_heads", "intermediate_size"), rotary_dim=16),
        "parallel block, partial rotary, bias of the head",
    ),
    "opt": Family(
        "opt",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            ffn_dim=256,
            word_embed_proj_dim=128,
            tie_word_embeddings=True,
        ),
        "learned positions with an offset",
    ),
    "opt post-norm": Family(
        "opt",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            ffn_dim=256,
            word_embed_proj_dim=64,
            do_layer_norm_before=False,
            tie_word_embeddings=True,
        ),
        "post-norm, projected embeddings (opt-350m)",
    ),
    "bloom": Family(
        "bloom",
        _of(
            without=(
                "head_dim",
                "num_key_value_heads",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            ),
            n_layer=2,
            n_head=4,
            tie_word_embeddings=True,
        ),
        "ALiBi",
        known="vLLM computes GELU with erf, transformers with tanh",
    ),
    "falcon": Family(
        "falcon",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            ffn_hidden_size=512,
            bias=True,
            tie_word_embeddings=True,
        ),
        "parallel block, one KV head",
    ),
    "falcon new": Family(
        "falcon",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            ffn_hidden_size=512,
            new_decoder_architecture=True,
            num_kv_heads=2,
            tie_word_embeddings=True,
        ),
        "parallel block with two norms",
    ),
    "falcon alibi": Family(
        "falcon",
        _of(
            without=("head_dim", "num_key_value_heads", "intermediate_size"),
            ffn_hidden_size=512,
            bias=True,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            tie_word_embeddings=True,
        ),
        "ALiBi, sequential block",
        attention="sdpa",  # the eager one of transformers adds ALiBi twice
    ),
    "stablelm": Family(
        "stablelm", _of(without=("head_dim",), use_qkv_bias=True), "partial rotary, layer norms"
    ),
    "stablelm parallel": Family(
        "stablelm", _of(without=("head_dim",), use_parallel_residual=True), "parallel block"
    ),
    "stablelm qk-norm": Family(
        "stablelm", _of(without=("head_dim",), qk_layernorm=True), "a norm per head"
    ),
    "phi3": Family(
        "phi3",
        _of(
            _WINDOW,
            without=("head_dim",),
            original_max_position_embeddings=512,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            },
        ),
        "fused projections, partial rotary, window",
    ),
    "gemma": Family("gemma", _of(_TIED, head_dim=64), "scaled embeddings, norms of 1 + weight"),
    "gemma2": Family(
        "gemma2",
        _of(
            _TIED,
            _WINDOW,
            layer_types=_TWO_KINDS,
            query_pre_attn_scalar=48,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
        ),
        "soft caps of attention and logits, window",
    ),
    "gemma3_text": Family(
        "gemma3_text",
        _of(_TIED, _WINDOW, layer_types=_TWO_KINDS, query_pre_attn_scalar=48),
        "two rotary bases, window",
    ),
    "gemma3n_text": Family(
        "gemma3n_text",
        _of(
            _TIED,
            _WINDOW,
            num_hidden_layers=4,
            layer_types=_TWO_KINDS * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=16,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
            intermediate_size=256,
        ),
        "AltUp, LAuReL, shared KV layers, inputs per layer",
        known="vLLM's text-only class leaves the embeddings per layer out",
    ),
    "gemma4_text": Family(
        "gemma4_text",
        _of(
            _TIED,
            _WINDOW,
            layer_types=_TWO_KINDS,
            global_head_dim=64,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCABULARY,
            final_logit_softcapping=4.0,
        ),
        "inputs per layer, wider heads of full attention",
    ),
    "cohere": Family(
        "cohere", _of(_TIED, without=("head_dim",), logit_scale=0.7), "parallel block, logit scale"
    ),
    "cohere qk-norm": Family(
        "cohere", _of(_TIED, without=("head_dim",), logit_scale=0.7, use_qk_norm=True), "QK norms"
    ),
    "cohere2": Family(
        "cohere2",
        _of(_TIED, _WINDOW, logit_scale=0.7, layer_types=_TWO_KINDS),
        "no rotary in full attention",
        known="vLLM's window is one token longer",
    ),
    "cohere2 one less": Family(
        "cohere2",
        _of(_TIED, _WINDOW, logit_scale=0.7, layer_types=_TWO_KINDS),
        "the same where vLLM is told a window of one token less",
        served={"sliding_window": _WINDOW["sliding_window"] - 1},
    ),
    "glm4": Family(
        "glm4",
        _of(
            attention_bias=True,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            },
        ),
        "norms before and after, partial rotary",
    ),
    "granite": Family("granite", _of(_GRANITE, without=("head_dim",)), "four factors"),
    "granite_swa": Family(
        "granite_swa",
        _of(
            _GRANITE,
            _WINDOW,
            without=("head_dim",),
            layer_types=_TWO_KINDS,
            layer_rope_theta=[10000.0, 5000.0],
        ),
        "window, rotary base per layer",
    ),
    "hyperclovax": Family("hyperclovax", _of(_GRANITE), "four factors, post-norm"),
    "ernie4_5": Family("ernie4_5", _of(), "interleaved rotary"),
    "exaone4": Family(
        "exaone4", _of(_WINDOW, layer_types=_TWO_KINDS), "post-norm, QK norms, window"
    ),
    "apertus": Family(
        "apertus",
        _of(),
        "xIELU with learned parameters",
        known="the parameters of the activation are bfloat16 in vLLM, whatever the dtype",
    ),
    "nemotron": Family(
        "nemotron",
        _of(
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            }
        ),
        "squared ReLU, norms of 1 + weight, partial rotary",
    ),
    "minicpm3": Family(
        "minicpm3",
        _of(
            _LATENT,
            _TIED,
            without=("head_dim",),
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
            scale_emb=3,
            dim_model_base=64,
        ),
        "latent attention, scaled depth",
    ),
    "hrm_text": Family(
        "hrm_text",
        _of(num_layers_per_stack=2, H_cycles=2, L_cycles=2, embedding_scale=5.0, prefix_lm=False),
        "two stacks in cycles",
        # A prompt that is longer than a step is never computed.
        engine={"max_num_batched_tokens": 512},
        known="the tokens of a prompt see those behind them in vLLM: it has no causal scores",
    ),
    # Experts.
    "mixtral": Family("mixtral", _of(_LOCAL_EXPERTS), "experts"),
    "mixtral window": Family("mixtral", _of(_LOCAL_EXPERTS, _WINDOW), "experts, window"),
    "qwen2_moe": Family(
        "qwen2_moe", _of(_EXPERTS, _SHARED_EXPERT, without=("head_dim",)), "gated shared expert"
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        _of(_LOCAL_EXPERTS, moe_intermediate_size=64, norm_topk_prob=True),
        "renormalised weights, QK norms",
    ),
    "olmoe": Family(
        "olmoe",
        _of(_EXPERTS, without=("head_dim",), num_key_value_heads=4, intermediate_size=64),
        "QK norms over all heads",
    ),
    "granitemoe": Family(
        "granitemoe", _of(_GRANITE, _LOCAL_EXPERTS, without=("head_dim",)), "experts, four factors"
    ),
    "granitemoeshared": Family(
        "granitemoeshared",
        _of(_GRANITE, _LOCAL_EXPERTS, without=("head_dim",), shared_intermediate_size=96),
        "shared expert, four factors",
    ),
    "granitemoe_swa": Family(
        "granitemoe_swa",
        _of(
            _GRANITE,
            _LOCAL_EXPERTS,
            _WINDOW,
            without=("head_dim",),
            shared_intermediate_size=96,
            layer_types=_TWO_KINDS,
            layer_rope_theta=[10000.0, 5000.0],
        ),
        "shared expert, window",
    ),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        _of(
            without=("head_dim",),
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=64,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
            num_hidden_layers=2,
            use_bias=False,
        ),
        "router bias, shared experts",
        known="the router of vLLM's CPU backend leaves the bias out",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        _of(
            _LOCAL_EXPERTS,
            _WINDOW,
            head_dim=64,
            intermediate_size=128,
            layer_types=_TWO_KINDS,
            rope_parameters=_YARN,
        ),
        "sinks, window, expert biases, YaRN",
    ),
    "phimoe": Family(
        "phimoe",
        _of(_LOCAL_EXPERTS, without=("head_dim",), attention_bias=True, lm_head_bias=True),
        "sparse mixer, bias of the head",
        architecture="PhiMoEForCausalLM",
        known="vLLM leaves the bias of the head out",
    ),
    "dbrx": Family(
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "tie_word_embeddings": False,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 128,
                "ffn_hidden_size": 64,
                "moe_num_experts": 8,
                "moe_top_k": 2,
            },
        },
        "clipped QKV, fused experts",
    ),
    "glm4_moe": Family(
        "glm4_moe",
        _of(_ROUTED, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True),
        "grouped routing with a bias, partial rotary",
    ),
    "glm4_moe_lite": Family(
        "glm4_moe_lite",
        _of(_ROUTED, _LATENT, _ONE_GROUP, _DENSE_THEN_SPARSE, without=("head_dim",)),
        "latent attention, experts",
        served={"first_k_dense_replace": 1},
        known=_ROTARY,
    ),
    "deepseek_v2": Family(
        "deepseek_v2",
        _of(
            _ROUTED,
            _LATENT,
            without=("head_dim",),
            first_k_dense_replace=1,
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
        ),
        "latent attention, grouped routing",
        known=_ROTARY,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        _of(_ROUTED, _LATENT, without=("head_dim",), first_k_dense_replace=1),
        "latent attention, routing with a bias",
        served={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        known=_ROTARY,
    ),
    "deepseek_v32": Family(
        "deepseek_v32",
        _of(_ROUTED, _LATENT, _INDEXED, _DENSE_THEN_SPARSE, without=("head_dim",)),
        "indexed sparse attention",
    ),
    "deepseek_v4": Family(
        "deepseek_v4",
        _of(_ROUTED, head_dim=512, num_key_value_heads=1, q_lora_rank=96),
        "compressed attention",
    ),
    "glm_moe_dsa": Family(
        "glm_moe_dsa",
        _of(_ROUTED, _LATENT, _INDEXED, _ONE_GROUP, _DENSE_THEN_SPARSE, without=("head_dim",)),
        "indexed sparse attention",
    ),
    "axk1": Family(
        "axk1",
        _of(_ROUTED, _LATENT, without=("head_dim",), first_k_dense_replace=1),
        "latent attention, post-norm",
    ),
    "longcat_flash": Family(
        "longcat_flash",
        _of(
            _LATENT,
            without=("head_dim", "num_hidden_layers", "intermediate_size"),
            num_layers=2,
            ffn_hidden_size=512,
            moe_topk=3,
            n_routed_experts=8,
            zero_expert_num=4,
            expert_ffn_hidden_size=64,
            routed_scaling_factor=1.8,
        ),
        "two attentions a layer, identity experts",
        served={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        },
    ),
    "minimax_m2": Family(
        "minimax_m2",
        _of(_LOCAL_EXPERTS, intermediate_size=64, head_dim=64, rotary_dim=32),
        "sigmoid routing with a bias, partial rotary",
        served={"scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "mimo_v2_flash": Family(
        "mimo_v2_flash",
        _of(
            _ROUTED,
            _ONE_GROUP,
            _WINDOW,
            _DENSE_THEN_SPARSE,
            head_dim=64,
            v_head_dim=32,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "sinks, narrower values, window",
        served={
            "sliding_window_size": 24,
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 64,
            "swa_v_head_dim": 32,
            "layernorm_epsilon": 1e-6,
            "add_swa_attention_sink_bias": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    "afmoe": Family(
        "afmoe",
        _of(
            _EXPERTS,
            _WINDOW,
            num_dense_layers=1,
            num_shared_experts=1,
            route_scale=1.8,
            layer_types=_TWO_KINDS,
            mup_enabled=True,
        ),
        "gated attention, four norms, router bias",
        served={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "cohere2_moe": Family(
        "cohere2_moe",
        _COHERE2_MOE,
        "parallel block with experts",
        known="vLLM's window is one token longer",
    ),
    "cohere2_moe one less": Family(
        "cohere2_moe",
        _COHERE2_MOE,
        "the same where vLLM is told a window of one token less",
        served={"sliding_window": _WINDOW["sliding_window"] - 1},
    ),
    "exaone_moe": Family(
        "exaone_moe",
        _of(
            _EXPERTS,
            _WINDOW,
            _DENSE_THEN_SPARSE,
            num_shared_experts=1,
            routed_scaling_factor=1.8,
            layer_types=_TWO_KINDS,
        ),
        "router bias, shared expert, window",
    ),
    "hy_v3": Family(
        "hy_v3",
        _of(_EXPERTS, _DENSE_THEN_SPARSE, num_shared_experts=1, router_scaling_factor=1.8),
        "router bias, shared expert",
        served={
            "first_k_dense_replace": 1,
            "route_norm": True,
            "qk_norm": True,
            "expert_hidden_dim": 64,
        },
    ),
    "hy_v4": Family(
        "hy_v4",
        _of(
            _ROUTED,
            _LATENT,
            _INDEXED,
            _ONE_GROUP,
            _DENSE_THEN_SPARSE,
            layer_types=["indexed_attention"] * 2,
            indexer_types=["full", "shared"],
            hc_mult=2,
        ),
        "hyper-connections, indexed attention",
    ),
    "laguna": Family(
        "laguna",
        _of(
            _EXPERTS,
            _WINDOW,
            _SHARED_EXPERT,
            _DENSE_THEN_SPARSE,
            layer_types=["full_attention", "sliding_attention"],
            num_attention_heads_per_layer=[4, 4],
            moe_routed_scaling_factor=1.8,
        ),
        "gated attention, shared expert",
    ),
    "llama4_text": Family(
        "llama4_text",
        _LLAMA4,
        "chunked attention, no rotary in every fourth layer, scaled queries",
        known="vLLM does not scale queries unless the generation config says so (or beyond 32k)",
    ),
    "llama4_text told": Family(
        "llama4_text",
        _LLAMA4,
        "the same, told to scale queries",
        engine={"override_generation_config": {"attn_temperature_tuning": True}},
    ),
    "inkling_text": Family(
        "inkling_text",
        _of(
            num_hidden_layers=2,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=32,
            sliding_window_size=24,
            rel_extent=64,
            moe_intermediate_size=64,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            layer_types=["hybrid_sliding", "hybrid"],
            mlp_layer_types=["dense", "sparse"],
            logits_mup_width_multiplier=1.7,
        ),
        "relative positions, short convolutions; needs its own tokenizer",
    ),
    # Recurrent states.
    "mamba": Family(
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "state_size": 16,
            "time_step_rank": 8,
            "use_bias": True,
        },
        "selective state",
    ),
    "falcon_mamba": Family(
        "falcon_mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "state_size": 16,
            "time_step_rank": 8,
        },
        "norms of B, C and dt",
    ),
    "mamba2": Family(
        "mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 32,
            "n_groups": 1,
            "chunk_size": 32,
        },
        "state per head",
    ),
    "jamba": Family(
        "jamba",
        _of(
            _EXPERTS,
            without=("head_dim",),
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_dt_rank=8,
            mamba_d_state=16,
            use_mamba_kernels=False,
        ),
        "Mamba, attention, experts",
    ),
    "zamba2": Family(
        "zamba2",
        _ZAMBA2,
        "shared attention blocks with adapters",
        known="transformers has a floor of the time step, vLLM none",
    ),
    "zamba2 no floor": Family(
        "zamba2", {**_ZAMBA2, "time_step_min": 1e-9}, "the same without a floor of the time step"
    ),
    "falcon_h1": Family(
        "falcon_h1",
        _of(
            mamba_d_ssm=256,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_n_groups=2,
            mamba_d_state=32,
            mamba_chunk_size=32,
            mamba_rms_norm=True,
            mamba_norm_before_gate=False,
            lm_head_multiplier=0.8,
            embedding_multiplier=3.0,
            key_multiplier=0.7,
            attention_out_multiplier=0.6,
            ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 0.5],
            ssm_in_multiplier=1.2,
            ssm_out_multiplier=0.8,
            mlp_multipliers=[0.8, 0.7],
        ),
        "attention beside a state, a dozen factors",
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        _of(
            _GRANITE,
            _LOCAL_EXPERTS,
            without=("head_dim",),
            shared_intermediate_size=96,
            layer_types=_HYBRID,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_n_groups=1,
            mamba_d_state=32,
            mamba_chunk_size=32,
        ),
        "Mamba 2, experts, four factors",
    ),
    "nemotron_h": Family(
        "nemotron_h",
        _of(
            _ROUTED,
            _ONE_GROUP,
            num_hidden_layers=4,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            ssm_state_size=32,
            mamba_num_heads=8,
            mamba_head_dim=32,
            n_groups=2,
            chunk_size=32,
            moe_shared_expert_intermediate_size=96,
            use_mamba_kernels=False,
        ),
        "Mamba 2, attention, experts, one block a layer",
    ),
    "lfm2": Family(
        "lfm2",
        _of(
            _TIED,
            without=("head_dim",),
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        "short convolutions",
        served={"conv_dim": 128, "block_dim": 128},
        known=_ROTARY,
    ),
    "lfm2_moe": Family(
        "lfm2_moe",
        _of(
            _TIED,
            _EXPERTS,
            without=("head_dim",),
            num_dense_layers=1,
            layer_types=["conv", "full_attention"],
            routed_scaling_factor=1.8,
        ),
        "short convolutions, router bias",
        known=_ROTARY,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        _of(_DELTA_NET, _EXPERTS, _SHARED_EXPERT),
        "gated delta net, gated attention, experts",
    ),
    "qwen3_5_text": Family("qwen3_5_text", _of(_DELTA_NET), "gated delta net, dense"),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text", _of(_DELTA_NET, _EXPERTS, _SHARED_EXPERT), "gated delta net, experts"
    ),
    "qwen4_exp_text": Family(
        "qwen4_exp_text",
        _of(
            _DELTA_NET,
            _EXPERTS,
            _SHARED_EXPERT,
            layer_types=["linear_attention"] * 3 + ["indexed_attention"],
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=64,
            indexer_budget=64,
            indexer_compress_ratio=4,
        ),
        "gated delta net, indexed attention",
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid", _of(_DELTA_NET, linear_num_value_heads=2), "gated delta net, post-norm"
    ),
    "kimi_linear": Family(
        "kimi_linear",
        _of(
            _LATENT,
            _EXPERTS,
            _DENSE_THEN_SPARSE,
            without=("head_dim",),
            q_lora_rank=None,
            num_experts_per_token=2,
            layer_types=_HYBRID,
            linear_head_dim=64,
            linear_num_heads=2,
            num_shared_experts=1,
            model_max_length=512,
        ),
        "Kimi delta attention, latent attention",
    ),
}
for _name in [name for name, family in FAMILIES.items() if family.known == _ROTARY]:
    FAMILIES[f"{_name} torch rotary"] = replace(
        FAMILIES[_name],
        about="the same with vLLM's rotary positions in PyTorch",
        engine={"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
        known="",
    )
# Served by vLLM through transformers' own layers.
_THROUGH_TRANSFORMERS = {
    "arcee": ("squared ReLU", {}),
    "glm": ("partial rotary", {"attention_bias": True}),
    "olmo": ("norms without weights", {"clip_qkv": 2.0}),
    "olmo2": ("post-norm, QK norms", {}),
    "olmo3": ("post-norm, window", {**_WINDOW, "layer_types": _TWO_KINDS}),
    "phi": ("parallel block, partial rotary, bias of the head", {}),
    "gpt_neox": ("parallel block, partial rotary", {}),
    "seed_oss": ("QKV biases", {"attention_bias": True}),
    "smollm3": ("no rotary in some layers", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("biases, window", {**_WINDOW, "use_bias": True}),
    "hunyuan_v1_dense": ("QK norms after rotary", {}),
    "cwm": ("window", {**_WINDOW, "layer_types": _TWO_KINDS}),
    "vaultgemma": (
        "soft caps",
        {
            **_TIED,
            **_WINDOW,
            "layer_types": _TWO_KINDS,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "jais2": ("squared ReLU, biases", {}),
    "gpt_bigcode": ("learned positions, one KV head", {"n_inner": 256, **_TIED}),
    "flex_olmo": ("experts, post-norm", {"num_experts": 8, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("experts", {"num_experts": 8, "moe_topk": 2}),
    "mellum": ("experts, window", {**_EXPERTS, **_WINDOW, "layer_types": _TWO_KINDS}),
}
for _name, (_about, _more) in _THROUGH_TRANSFORMERS.items():
    # GPT classes know no number of KV heads; vLLM would read it all the same.
    _left_out = ("num_key_value_heads",) if _name.startswith("gpt") else ()
    FAMILIES[_name] = Family(_name, _of(_more, without=_left_out), _about)
