"""Projections in plain torch, computed in fp32."""

import torch
from torch.nn import functional


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens by a layer's weights: ``x W^T + b``.

    Args:
        x: ``(..., in)``, any strides.
        weight: ``(out, in)``, of ``x``'s dtype.
        bias: ``(out,)`` or None.
        out: where to write, contiguous ``(..., out)``; None allocates it.

    Returns:
        ``out``, of ``x``'s dtype unless it was given.
    """
    result = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return result.to(x.dtype) if out is None else out.copy_(result)
