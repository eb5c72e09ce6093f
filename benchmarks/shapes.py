"""Models that exist as a configuration only: their weights are random and made on the spot.

Owns the shapes' names and the folders they are written to. Speed and memory do not depend on what
the weights are, so nothing has to be downloaded.
"""

import json
import pathlib
from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "tiny-deep": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "word_embed_proj_dim": 768,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
    },
    "llama-134m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


def write_config(shape: str, folder: pathlib.Path) -> pathlib.Path:
    """Make ``folder`` a model of that shape, without weights and special tokens, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps({**SHAPES[shape], **special}))
    return folder
