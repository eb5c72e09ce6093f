"""A linear layer whose weight is whole numbers of 4 or 8 bits with a scale for each group of them.

Owns the module, the rounding that makes one of an ordinary weight, and joining several into one.
Knows nothing of models or files: which layers are quantised, and from what, is between
``quantisation`` and a checkpoint. The layout of the numbers is that of ``kernels.packing``.

To a compiler the product is one opaque operator, ``pagetier::quantised_linear``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pagetier import kernels
from pagetier.kernels import packing

# Of rows that are rounded at once: working memory must not grow with the layer.
_MAX_ELEMENTS = 1 << 24
# Numbers of tokens for which tables may name different kernels.
_WARM_UP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_library: Any = torch.library.Library("pagetier", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "quantised_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int group_size, int bits) -> Tensor"
)
_library.impl("quantised_linear", kernels.quantised_linear, "CompositeExplicitAutograd")


def _shape_only(x: torch.Tensor, packed: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


torch.library.register_fake("pagetier::quantised_linear", _shape_only, lib=_library)


class QuantisedLinear(nn.Module):
    """In the place of an ``nn.Linear``.

    Args:
        in_features: columns of the weight.
        bits: 4 or 8.
        group_size: columns that share a scale, a power of two and at least 32; 0 is all of them.
        packed, scales, zeros: as ``kernels.quantised_linear`` takes them.
        permutation: order of the inputs' columns, int64 ``(in,)``, that the weight's columns are
            stored in; None is as they come.
        bias: of the layer.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    permutation: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        bits: int,
        group_size: int,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        permutation: torch.Tensor | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = packed.shape[0]
        self.bits = bits
        self.group_size = 0 if group_size >= in_features else group_size
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("permutation", permutation)
        self.bias = bias

    @classmethod
    def rounded(
        cls,
        weight: torch.Tensor,
        bits: int,
        group_size: int,
        *,
        symmetric: bool,
        bias: nn.Parameter | None = None,
    ) -> "QuantisedLinear":
        """The layer of a ``weight`` ``(out, in)`` of any floating dtype, whose scales it gets."""
        num_rows = max(_MAX_ELEMENTS // weight.shape[1], 1)
        parts = []
        for rows in torch.split(weight.detach(), num_rows):
            numbers, scales, zeros = round_weight(rows, bits, group_size, symmetric=symmetric)
            parts.append((packing.pack(numbers, bits), scales, zeros))
        packed, scales, zeros = _join(parts)
        return cls(weight.shape[1], bits, group_size, packed, scales, zeros, bias=bias)

    @property
    def num_weights(self) -> int:
        """Weights that the layer stands for, without its bias."""
        return self.in_features * self.out_features

    def dequantised(self) -> torch.Tensor:
        """The weight ``(out, in)`` that the layer computes with, exactly, in fp32."""
        weight = kernels.reference.dequantise(
            self.packed, self.scales, self.zeros, self.group_size, self.bits, self.in_features
        )
        return weight if self.permutation is None else weight[:, self.permutation.argsort()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., out_features)`` for an input ``(..., in_features)``."""
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        product: torch.Tensor = torch.ops.pagetier.quantised_linear(
            x, self.packed, self.scales, self.zeros, self.bias, self.group_size, self.bits
        )
        return product

    def extra_repr(self) -> str:
        """Sizes, and how it is quantised."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, "
            f"symmetric={self.zeros is None}, permuted={self.permutation is not None}"
        )


def round_weight(
    weight: torch.Tensor, bits: int, group_size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round ``weight`` to numbers; each is off by at most half of its group's scale.

    A scale is rounded up to the weight's dtype, so that the ends of the group's range are covered.
    Not symmetric, the range is from the smallest to the largest weight (and 0, which is exact); its
    zero is rounded too, which moves what lies at an end by no more than that half.

    Returns:
        Numbers ``(out, in)``, uint8; scales ``(groups, out)`` of the weight's dtype; zeros
        ``(groups, out)``, uint8, or None if symmetric.
    """
    out_size, in_size = weight.shape
    size = group_size or in_size
    num_groups = -(-in_size // size)
    padded = nn.functional.pad(weight.float(), (0, num_groups * size - in_size))
    groups = padded.view(out_size, num_groups, size)
    middle, most = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        low, span = None, groups.abs().amax(-1)
        scales = _at_least(span / (middle - 1), weight.dtype)
    else:
        low = groups.amin(-1).clamp(max=0)
        scales = _at_least((groups.amax(-1).clamp(min=0) - low) / most, weight.dtype)
    steps = scales.float()
    zeros = None if low is None else (-low / steps).round().clamp(0, most)
    numbers = (groups / steps[..., None]).round_()
    numbers += middle if zeros is None else zeros[..., None]
    numbers = numbers.clamp_(0, most).to(torch.uint8).view(out_size, -1)[:, :in_size]
    stored = None if zeros is None else zeros.to(torch.uint8).t().contiguous()
    return numbers, scales.t().contiguous(), stored


def _at_least(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in ``dtype``, none smaller than in fp32; that of a group of zeros is 1."""
    scales = torch.where(scales == 0, 1.0, scales)
    rounded = scales.to(dtype)
    if dtype == torch.float32:
        return rounded
    # The next larger float of 16 bits is that of the next larger integer.
    return (rounded.view(torch.int16) + (rounded.float() < scales).to(torch.int16)).view(dtype)


@torch.inference_mode()
def warm_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Launch the product by each kind of quantised layer for few and many tokens of ``dtype``.

    A kernel is compiled when it is first launched: seconds that no step should wait for.
    """
    kinds: dict[tuple[Any, ...], QuantisedLinear] = {}
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear):
            kinds.setdefault((layer.out_features, *_kind(layer)), layer)
    for layer in kinds.values():
        for num_tokens in _WARM_UP_TOKENS:
            layer(
                torch.zeros(num_tokens, layer.in_features, dtype=dtype, device=layer.packed.device)
            )


def join(layers: Sequence[QuantisedLinear]) -> QuantisedLinear | None:
    """One layer with the outputs of all, one after the other; None if they do not match.

    Rows are quantised apart from each other, so the joined layer has the same numbers.
    """
    first = layers[0]
    for layer in layers:
        if _kind(layer) != _kind(first):
            return None
        ours, others = layer.permutation, first.permutation
        if ours is not None and others is not None and not torch.equal(ours, others):
            return None
    packed, scales, zeros = _join([(layer.packed, layer.scales, layer.zeros) for layer in layers])
    biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return QuantisedLinear(
        first.in_features,
        first.bits,
        first.group_size,
        packed,
        scales,
        zeros,
        first.permutation,
        bias,
    )


def _kind(layer: QuantisedLinear) -> tuple[Any, ...]:
    """What layers have in common that can be one."""
    return (
        layer.in_features, layer.bits, layer.group_size, layer.scales.dtype, layer.packed.device,
        layer.zeros is None, layer.bias is None, layer.permutation is None,
    )  # fmt: skip


def _join(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed rows, scales and zeros of rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    packed, scales, zeros = zip(*parts, strict=True)
    return (
        torch.cat(packed),
        torch.cat(scales, 1),
        None if zeros[0] is None else torch.cat(zeros, 1),
    )
