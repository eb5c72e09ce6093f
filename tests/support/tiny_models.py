"""Tiny random models of every architecture that is served, and of those that must be refused.

``EXACT`` are served: their tokens equal those of transformers' own ``generate``. ``REFUSED`` would
come out wrong without anybody noticing; each has a part of the sentence that refuses it.
"""

import pathlib
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 120

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.4,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.4,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_OPT = {**_BASE, "ffn_dim": 48, "init_std": 0.4}
_ROPE: dict[str, Any] = {"rope_theta": 1e4, "factor": 8.0}

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "biogpt": ("biogpt", _BASE),
    "cohere": ("cohere", _GROUPED),
    "cohere2": ("cohere2", {**_GROUPED, "sliding_window": 6, "head_dim": 8}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
            "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
    "exaone4": ("exaone4", {**_GROUPED, "sliding_window": 6, "sliding_window_pattern": 2}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            **_GROUPED, "head_dim": 8, "sliding_window": 6, "vocab_size_per_layer_input": 120,
            "hidden_size_per_layer_input": 8, "global_head_dim": 16, "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 8}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neox": ("gpt_neox", _BASE),
    "gpt_oss": ("gpt_oss", {**_GROUPED, **_MOE, "head_dim": 8, "sliding_window": 6}),
    "granite": ("granite", _GROUPED),
    "llama": ("llama", _GROUPED),
    "llama_tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "llama_rope3": (
        "llama",
        {
            **_GROUPED,
            "rope_parameters": {
                **_ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 6, "head_dim": 8}),
    "mixtral": ("mixtral", {**_GROUPED, **_MOE}),
    "nemotron": ("nemotron", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "opt": ("opt", {**_OPT, "word_embed_proj_dim": 32}),
    "opt_350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", _BASE),
    "phi": ("phi", _GROUPED),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": 6}),
    "qwen2": (
        "qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": 6}),
}  # fmt: skip

_INTERFACE = "attention interface"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {"vocab_size": 120, "hidden_size": 32, "n_layer": 3, "n_head": 4},
              f"3 of its 3 layers do not use transformers' {_INTERFACE}"),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 4}, f"3 of its 3 layers do not use "
                f"transformers' {_INTERFACE}"),
    "falcon": ("falcon", {**_BASE, "alibi": False, "new_decoder_architecture": False}, _INTERFACE),
    "gpt_neo": ("gpt_neo", {"vocab_size": 120, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                            "attention_types": [[["global", "local"], 1]], "window_size": 6,
                            "max_position_embeddings": 128}, _INTERFACE),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}, _INTERFACE),
    "llama_dynamic_rope": ("llama", {**_GROUPED, "rope_parameters": {**_ROPE,
                                                                     "rope_type": "dynamic"}},
                           "longest sequence of the batch"),
    "llama4_text": ("llama4_text", {**_GROUPED, "head_dim": 8, "intermediate_size_mlp": 48,
                                    "num_local_experts": 2, "attention_chunk_size": 8,
                                    "moe_layers": []}, "'chunked_attention'"),
    "mpt": ("mpt", {"vocab_size": 120, "d_model": 32, "n_layers": 3, "n_heads": 4,
                    "max_seq_len": 128}, "a trial run of 3 tokens failed"),
    "qwen3_next": (
        "qwen3_next",
        {
            **_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "'linear_attention'",
    ),
    "t5": ("t5", {"vocab_size": 120, "d_model": 32, "num_layers": 2}, "encoder-decoder"),
    "bert": ("bert", {**_BASE, "is_decoder": False}, "not causal"),
}  # fmt: skip


def configuration(name: str, **changes: Any) -> Any:
    """The transformers configuration of a model of ``EXACT`` or ``REFUSED``."""
    model_type, settings = (EXACT.get(name) or REFUSED[name])[:2]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def build(name: str, **changes: Any) -> Any:
    """A random model, in float32 on the CPU, with transformers' own plain attention.

    Its weights are large enough for its greedy tokens to vary and to depend on what it reads.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            configuration(name, **changes), attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.std() < 0.1:
                    parameter.normal_(std=0.3)
                elif parameter.ndim == 1:
                    parameter += torch.randn_like(parameter) * 0.1
    return model


def save(
    name: str, folder: pathlib.Path | str, *, max_shard_size: str = "1GB", **changes: Any
) -> Any:
    """Write ``build(name)`` to ``folder`` as safetensors and return it."""
    model = build(name, **changes)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model
