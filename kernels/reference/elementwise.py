"""Norms with the residual sum before them, and gated activations, in plain torch."""

import torch
from torch.nn import functional


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Divide rows by their root mean square and scale them, in fp32.

    Args:
        x: ``(tokens, size)``, rows dense.
        weight: ``(size,)``.
        eps: added to the mean square.
        residual: ``(tokens, size)``: ``x`` is added to it in place, and the sum is what is
            normalised; None normalises ``x``.
        weight_offset: added to ``weight``; some models store the difference from 1.

    Returns:
        ``(tokens, size)`` of ``x``'s dtype, rounded once.
    """
    wide = _summed(x, residual)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + weight_offset)).to(x.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring rows to mean 0 and variance 1, scale and shift them, in fp32.

    Args:
        x: ``(tokens, size)``, rows dense.
        weight: ``(size,)``.
        bias: ``(size,)`` or None.
        eps: added to the variance.
        residual: as of ``rms_norm``.

    Returns:
        ``(tokens, size)`` of ``x``'s dtype, rounded once.
    """
    wide = _summed(x, residual)
    shift = None if bias is None else bias.float()
    return functional.layer_norm(wide, (x.shape[1],), weight.float(), shift, eps).to(x.dtype)


def _summed(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    if residual is None:
        return x.float()
    return residual.copy_(x.float() + residual.float()).float()


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Activate a row's first half, in fp32, and multiply it by the second.

    Args:
        x: ``(tokens, 2 * size)``, rows dense.
        activation: ``silu``, ``gelu``, or ``gelu_tanh`` for its approximation.

    Returns:
        ``(tokens, size)`` of ``x``'s dtype, rounded once.
    """
    gate, up = x.float().chunk(2, -1)
    if activation == "silu":
        return (functional.silu(gate) * up).to(x.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return (functional.gelu(gate, approximate=approximate) * up).to(x.dtype)
