"""Norms with the residual sum before them, and gated activations, as Triton kernels.

Owns the kernels and their launch. Knows nothing of models. The references, which also say what is
rounded where, are those of ``reference.elementwise``.

Grids. ``_norm_kernel``: one program for each token, which holds its whole row. ``_gated_kernel``:
``(tiles, tokens)``; a program makes one tile of a token's row.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024


@triton.jit
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    x_stride, residual_stride, size, eps, weight_offset,
    SIZE_PADDED: tl.constexpr, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE_PADDED)
    exists = at < size
    x = tl.load(x_ptr + token * x_stride + at, mask=exists, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual_ptr + token * residual_stride + at
        x += tl.load(place, mask=exists, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(place, rounded, mask=exists)
        # What is normalised is what later layers see.
        x = rounded.to(tl.float32)
    if CENTRED:
        x = tl.where(exists, x - tl.sum(x, 0) / size, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
    x = x * (weight + weight_offset)
    if HAS_BIAS:
        x += tl.load(bias_ptr + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * size + at, x.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _gated_kernel(
    x_ptr, out_ptr, x_stride, size, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = at < size
    row = x_ptr + token * x_stride
    gate = tl.load(row + at, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(row + size + at, mask=exists, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)
    tl.store(out_ptr + token * size + at, (gate * up).to(out_ptr.dtype.element_ty), mask=exists)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Normalise rows by their root mean square; as ``reference.rms_norm``."""
    return _norm(x, weight, None, eps, residual, weight_offset, centred=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise rows by mean and deviation; as ``reference.layer_norm``."""
    return _norm(x, weight, bias, eps, residual, 0.0, centred=True)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    *,
    centred: bool,
) -> torch.Tensor:
    num_tokens, size = x.shape
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("The rows of x and residual must be dense.")
    if weight.shape != (size,) or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"weight {tuple(weight.shape)} or residual does not fit {tuple(x.shape)}.")
    out = x.new_empty(num_tokens, size)
    if num_tokens:
        padded = triton.next_power_of_2(size)
        _norm_kernel[num_tokens,](
            x, weight, weight if bias is None else bias, x if residual is None else residual, out,
            x.stride(0), 0 if residual is None else residual.stride(0), size, eps, weight_offset,
            SIZE_PADDED=padded, CENTRED=centred, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, num_warps=max(1, min(16, padded // 512)),
        )  # fmt: skip
    return out


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply an activated half by the other; as ``reference.gated``."""
    num_tokens, twice = x.shape
    if x.stride(1) != 1 or twice % 2:
        raise ValueError(f"x {tuple(x.shape)} must have dense rows of even length.")
    out = x.new_empty(num_tokens, twice // 2)
    if num_tokens:
        _gated_kernel[triton.cdiv(twice // 2, _TILE), num_tokens](
            x, out, x.stride(0), twice // 2, TILE=_TILE, ACTIVATION=activation, num_warps=4
        )
    return out
