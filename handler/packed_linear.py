"""Linear layers of a model on a CPU, their weights kept in the layout that the product reads.

Owns which layers are packed, and the proof that each computes the same. Knows nothing of
architectures. A library's product rearranges a weight at each call unless that was done before, and
for the few tokens of a decode this costs more than the product itself. oneDNN, which comes with
torch, takes weights that were rearranged once.

For each number of tokens that it meets oneDNN keeps a program and memory as large as the result, up
to a thousand of them. So tokens are multiplied in a few numbers only, the last of them padded.
"""

import bisect
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pagetier.handler import fusion

logger = logging.getLogger(__name__)

# What the layout is chosen for. Any number but 1 gives about the same times; that one is fastest
# for a single token and slow for all others.
_TOKENS_OF_LAYOUT = 16
_CHECKED_TOKENS = (1, 17)
# Numbers of tokens that are multiplied at once, ascending.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class PackedLinear(nn.Module):
    """In the place of a linear layer, with a packed copy of its weight."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_buffer("weight", _pack(layer.weight), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., out_features)`` for an input ``(..., in_features)``."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [self._multiply(some) for some in torch.split(rows, _SIZES[-1])]
        product = parts[0] if len(parts) == 1 else torch.cat(parts)
        return product.view(*x.shape[:-1], product.shape[-1])

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """The product of ``rows``, as many as the largest size or fewer."""
        num_rows = len(rows)
        size = _SIZES[bisect.bisect_left(_SIZES, num_rows)]
        if num_rows < size:
            padded = rows.new_zeros(size, rows.shape[1])
            padded[:num_rows] = rows
            rows = padded
        return _multiply(rows, self.weight, self.bias)[:num_rows]


@torch.no_grad()
def pack(model: nn.Module, but: Collection[nn.Module] = ()) -> int:
    """Pack a model's float32 linear layers, in place; returns how many.

    ``but`` are modules to be left as they are, with all that is in them: their weights come and go.

    Layer by layer, so that the peak is the model and one layer. A weight that another module has
    too, as that of tied embeddings, stays beside its packed copy.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    num_packed = 0
    left = {inner for module in but for inner in module.modules()}
    for name, module in list(model.named_modules()):
        if module in left:
            continue
        is_fused = isinstance(module, fusion.FusedPart) and module.is_owner
        if not is_fused and type(module) is not nn.Linear:
            continue
        if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
            continue
        packed = PackedLinear(module)
        if not _is_right(module, packed):
            logger.warning("The layer '%s' stays as it is: packed, it differs.", name)
            continue
        if isinstance(module, fusion.FusedPart):
            module.weight = None  # type: ignore[assignment]
            module.use(lambda x, _weight, _bias, packed=packed: packed(x))
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)
        num_packed += 1
    return num_packed


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach(), _TOKENS_OF_LAYOUT
    )
    return packed


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _is_right(layer: Any, packed: PackedLinear) -> bool:
    """Whether both give the same but for rounding, on random input."""
    in_size = layer.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    for num_tokens in _CHECKED_TOKENS:
        x = torch.randn(num_tokens, in_size, generator=generator)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        if not fusion.is_close(in_size, packed(x), expected):
            return False
    return True
