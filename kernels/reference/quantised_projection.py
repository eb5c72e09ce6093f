"""Projections by quantised weights in plain torch, computed in fp32."""

import torch
from torch.nn import functional

from pagetier.kernels import packing

# Of rows that are made numbers of 32 bits at once: what that takes must not grow with the layer.
_MAX_ELEMENTS = 1 << 22


def quantised_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int,
) -> torch.Tensor:
    """Multiply tokens by a layer's quantised weights: ``x W^T + b``.

    Args:
        x: ``(..., in)``, any strides.
        packed: ``(out, words)``, int32; see ``packing``.
        scales: ``(groups, out)``, of any floating dtype.
        zeros: ``(groups, out)``, uint8; None means ``2 ** (bits - 1)``, the middle, everywhere.
        bias: ``(out,)`` or None.
        group_size: columns that share a scale, a power of two and at least 32; 0 is all of them.
        bits: 4 or 8.

    Returns:
        ``(..., out)``, of ``x``'s dtype.
    """
    out_size, in_size = packed.shape[0], x.shape[-1]
    tokens = x.float()
    num_rows = max(_MAX_ELEMENTS // in_size, 1)
    parts = []
    for start in range(0, out_size, num_rows):
        rows = slice(start, start + num_rows)
        some_zeros = None if zeros is None else zeros[:, rows]
        weight = dequantise(packed[rows], scales[:, rows], some_zeros, group_size, bits, in_size)
        parts.append(functional.linear(tokens, weight))
    result = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    bits: int,
    in_size: int,
) -> torch.Tensor:
    """The weight ``(out, in)`` in fp32, exactly; arguments as of ``quantised_linear``."""
    weight = packing.unpack(packed, bits, in_size).float()
    size = group_size or in_size
    middle = torch.tensor(2.0 ** (bits - 1), device=packed.device)
    by_row = scales.t().float(), middle if zeros is None else zeros.t().float()
    if in_size % size == 0:
        groups = weight.view(len(weight), -1, size)
        scale, zero = (part[..., None] for part in by_row)
    else:
        groups = weight
        group = torch.arange(in_size, device=packed.device) // size
        scale, zero = (part[..., group] if part.ndim else part for part in by_row)
    return groups.sub_(zero).mul_(scale).view(len(weight), in_size)
