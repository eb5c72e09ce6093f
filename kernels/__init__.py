"""GPU operations of the paged KV cache, each with a plain torch reference.

Owns the choice of what serves an operation: attention and KV writes have Triton kernels, which
serve tensors on a CUDA device (and all tensors under ``TRITON_INTERPRET=1``); everything else is
served by the reference, which runs on any device. Knows nothing of models or requests: operations
take tensors, slots and pairs of block ids.
"""

import functools
import logging
import os

import torch

from pagetier.kernels import reference
from pagetier.kernels.metadata import AttentionMetadata
from pagetier.kernels.reference import copy_blocks, gather_blocks, scatter_blocks

__all__ = [
    "AttentionMetadata",
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "scatter_blocks",
    "write_kv",
]

logger = logging.getLogger(__name__)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton(device_type: str) -> bool:
    """Whether Triton's kernels serve this kind of device; logged once for each."""
    serves = False
    if device_type == "cuda" or _INTERPRETED:
        try:
            import triton  # noqa: F401

            serves = True
        except ImportError:
            logger.warning("Triton is not installed: attention will be slow.")
    logger.info(
        "Attention on %s is served by %s.",
        device_type,
        "Triton kernels" if serves else "the plain torch reference",
    )
    return serves


@functools.wraps(reference.paged_attention)
def paged_attention(  # noqa: D103 - the reference's
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    operation = reference.paged_attention
    if _has_triton(q.device.type):
        from pagetier.kernels import attention

        operation = attention.paged_attention
    return operation(
        q,
        k_cache,
        v_cache,
        metadata,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out=out,
    )


@functools.wraps(reference.write_kv)
def write_kv(  # noqa: D103 - the reference's
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    operation = reference.write_kv
    if _has_triton(key.device.type):
        from pagetier.kernels import kv_write

        operation = kv_write.write_kv
    operation(key, value, k_cache, v_cache, slots)
