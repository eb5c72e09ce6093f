"""The kernels' operations in plain torch: what every kernel is tested against, and the fallback.

Owns one module for each kernel's file. Each operation runs on any device, computes in fp32, and
asks the device for no number, so that it never waits.

Layout. A layer's ``k_cache`` is ``(blocks, kv_heads, block_size, head_dim)`` and its ``v_cache``
``(blocks, kv_heads, block_size, v_dim)``: views with any strides into block-major pages. A slot is
``block_id * block_size + offset``.
"""

from pagetier.kernels.reference.attention import paged_attention
from pagetier.kernels.reference.block_copy import (
    copy_blocks,
    gather_blocks,
    scatter_blocks,
    transfer_blocks,
)
from pagetier.kernels.reference.kv_write import write_kv, write_rotated_kv
from pagetier.kernels.reference.logit_changes import allow_tokens, penalise_rows
from pagetier.kernels.reference.projection import linear
from pagetier.kernels.reference.quantised_projection import dequantise, quantised_linear
from pagetier.kernels.reference.sampling import greedy_tokens, sample_tokens
from pagetier.kernels.reference.step_state import advance_rows, change_rows, read_rows

__all__ = [
    "advance_rows",
    "allow_tokens",
    "change_rows",
    "copy_blocks",
    "dequantise",
    "gather_blocks",
    "greedy_tokens",
    "linear",
    "paged_attention",
    "penalise_rows",
    "quantised_linear",
    "read_rows",
    "sample_tokens",
    "scatter_blocks",
    "transfer_blocks",
    "write_kv",
    "write_rotated_kv",
]
