"""The memory of the KV tiers: pages of bytes, and the layers' views into them.

Owns the layout of a block and the tensors of both tiers. Knows nothing of which block holds what,
nor of copies between tiers.

A tier is one buffer ``[num_blocks, block_bytes]`` of uint8 (block-major). Inside a page come,
layer after layer, its keys ``(kv_heads, block_size, key_dim)`` and values
``(kv_heads, block_size, value_dim)``, so that layers may differ in heads and sizes, a block is one
contiguous piece, and a copy between tiers is one large transfer::

    page │ K0 │ V0 │ K1 │ V1 │ … │ Kn │ Vn │ padding │
"""

import dataclasses
import math

import torch

# Every piece starts at a multiple of this, so that kernels may load 16 bytes at once.
_ALIGNMENT_BYTES = 16


@dataclasses.dataclass(frozen=True)
class LayerKV:
    """What one attention layer keeps per token: heads and the sizes of a key and a value."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class KVLayout:
    """How a block's bytes are divided among layers; the same in every tier."""

    layers: tuple[LayerKV, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers, without padding."""
        per_token = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in self.layers)
        return per_token * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a page."""
        return self._offsets()[-1]

    def _offsets(self) -> list[int]:
        """Byte offset of each piece (K0, V0, K1, ...), and the page's size last."""
        offsets = [0]
        for layer in self.layers:
            for dim in (layer.key_dim, layer.value_dim):
                size = layer.kv_heads * self.block_size * dim * self.dtype.itemsize
                end = offsets[-1] + size
                offsets.append(math.ceil(end / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        return offsets

    def allocate(
        self, num_blocks: int, device: torch.device | str, *, touch: bool = True
    ) -> torch.Tensor:
        """Pages of a tier, uint8 ``[num_blocks, block_bytes]``: zeroed if ``touch``, else as is."""
        make = torch.zeros if touch else torch.empty
        return make((num_blocks, self.block_bytes), dtype=torch.uint8, device=device)

    def views(self, pages: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's ``k_cache`` and ``v_cache`` in ``pages``, sharing their memory.

        Shapes are ``(blocks, kv_heads, block_size, key_dim)`` and
        ``(blocks, kv_heads, block_size, value_dim)``, dtype ``self.dtype``; the first stride is a
        whole page.
        """
        typed = pages.view(self.dtype)
        itemsize = self.dtype.itemsize
        pieces = []
        offsets = self._offsets()
        for index, layer in enumerate(self.layers):
            pair = []
            for which, dim in enumerate((layer.key_dim, layer.value_dim)):
                start = offsets[2 * index + which] // itemsize
                length = layer.kv_heads * self.block_size * dim
                shape = (pages.shape[0], layer.kv_heads, self.block_size, dim)
                pair.append(typed[:, start : start + length].view(shape))
            pieces.append((pair[0], pair[1]))
        return pieces
