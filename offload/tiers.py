"""The memory of the KV tiers: pages of bytes, and the layers' views into them.

Owns the layout of a block and the tensors of both tiers. Knows nothing of which block holds what,
nor of copies between tiers.

A tier is one buffer ``[num_blocks, block_bytes]`` of uint8 (block-major). Inside a page come,
layer after layer, its keys ``(kv_heads, block_size, key_dim)`` and values
``(kv_heads, block_size, value_dim)``, so that layers may differ in heads and sizes, a block is one
contiguous piece, and a copy between tiers is one large transfer. Keys and values of 8 bits have a
float32 scale for each token and head, ``(kv_heads, block_size)``, behind them in the same page, so
that whoever copies a block need not know of scales::

    page │ K0 │ V0 │ K1 │ V1 │ … │ Kn │ Vn │
    page │ K0 │ V0 │ scales of K0 │ of V0 │ K1 │ V1 │ scales of K1 │ … │
"""

import dataclasses
import math
from typing import NamedTuple

import torch

# Every piece starts at a multiple of this, so that kernels may load 16 bytes at once.
_ALIGNMENT_BYTES = 16


@dataclasses.dataclass(frozen=True)
class LayerKV:
    """What one attention layer keeps per token: heads and the sizes of a key and a value."""

    kv_heads: int
    key_dim: int
    value_dim: int


class LayerCaches(NamedTuple):
    """One layer's part of all pages of a tier, as ``pagetier.kernels`` takes it.

    Attributes:
        k_cache: ``(blocks, kv_heads, block_size, key_dim)``.
        v_cache: ``(blocks, kv_heads, block_size, value_dim)``, of the same dtype.
        scales: ``k_scale`` and ``v_scale`` of caches of 8 bits, float32
            ``(blocks, kv_heads, block_size)``, as keywords; of others none.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    scales: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """How a block's bytes are divided among layers; the same in every tier.

    ``dtype`` is that of keys and values: a floating-point type, or int8 or float8_e4m3fn with
    scales.
    """

    layers: tuple[LayerKV, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of keys, values and scales of one token over all layers, without padding."""
        pieces = [piece for layer in self.layers for piece in self._pieces(layer)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in pieces) // self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of a page."""
        pieces = [piece for layer in self.layers for piece in self._pieces(layer)]
        return sum(_aligned_bytes(shape, dtype) for shape, dtype in pieces)

    def _pieces(self, layer: LayerKV) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each piece of a layer: keys, values, and the scales of both if any."""
        rows = (layer.kv_heads, self.block_size)
        pieces: list[tuple[tuple[int, ...], torch.dtype]]
        pieces = [((*rows, dim), self.dtype) for dim in (layer.key_dim, layer.value_dim)]
        return pieces + [(rows, torch.float32)] * 2 if self.dtype.itemsize == 1 else pieces

    def allocate(
        self, num_blocks: int, device: torch.device | str, *, touch: bool = True
    ) -> torch.Tensor:
        """Pages of a tier, uint8 ``[num_blocks, block_bytes]``: zeroed if ``touch``, else as is."""
        make = torch.zeros if touch else torch.empty
        return make((num_blocks, self.block_bytes), dtype=torch.uint8, device=device)

    def views(self, pages: torch.Tensor) -> list[LayerCaches]:
        """Each layer's part of ``pages``, sharing their memory; the first stride is a page."""
        layers, start = [], 0
        for layer in self.layers:
            views = []
            for shape, dtype in self._pieces(layer):
                first, length = start // dtype.itemsize, math.prod(shape)
                piece = pages.view(dtype)[:, first : first + length]
                views.append(piece.view(pages.shape[0], *shape))
                start += _aligned_bytes(shape, dtype)
            k_cache, v_cache, *scales = views
            # Without scales there are none to name.
            named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
            layers.append(LayerCaches(k_cache, v_cache, named))
        return layers


def _aligned_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes from the beginning of a piece to that of the next."""
    return math.ceil(math.prod(shape) * dtype.itemsize / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
