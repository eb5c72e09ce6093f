"""GPU operations of the paged KV cache, each with a plain torch reference.

Owns the choice of what serves an operation. For now that is the reference everywhere, which runs
on any device; it is logged once, when this package is first imported. Knows nothing of models or
requests: operations take tensors, slots and pairs of block ids.
"""

import logging

from pagetier.kernels.metadata import AttentionMetadata
from pagetier.kernels.reference import (
    copy_blocks,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)

__all__ = [
    "AttentionMetadata",
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "scatter_blocks",
    "write_kv",
]

logging.getLogger(__name__).info("KV cache operations are served by the plain torch reference.")
