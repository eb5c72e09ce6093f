"""The layout of a block's bytes."""

import pytest
import torch

from pagetier.offload.tiers import KVLayout, LayerKV

MIXED = (LayerKV(2, 8, 8), LayerKV(1, 3, 5), LayerKV(4, 16, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_views_of_layers_cover_disjoint_bytes_of_their_own_block(dtype, block_size):
    layout = KVLayout(MIXED, block_size, dtype)
    pages = layout.allocate(3, "cpu")
    value = 0
    for pair, layer in zip(layout.views(pages), MIXED, strict=True):
        for view, dim in zip(pair, (layer.key_dim, layer.value_dim), strict=True):
            assert view.shape == (3, layer.kv_heads, block_size, dim)
            assert view.data_ptr() % 16 == pages.data_ptr() % 16
            value += 1
            view[1] = value
    # Blocks 0 and 2 were not touched, and no later piece overwrote an earlier one.
    assert not pages[0].any()
    assert not pages[2].any()
    value = 0
    for pair in layout.views(pages):
        for view in pair:
            value += 1
            assert (view[1] == value).all()


def test_sizes_count_every_layer():
    layout = KVLayout(MIXED, 16, torch.float16)
    assert layout.token_bytes == 2 * (2 * 16 + 8 + 4 * 18)
    assert layout.block_bytes >= 16 * layout.token_bytes
    assert layout.block_bytes % 16 == 0
    assert layout.allocate(2, "cpu").shape == (2, layout.block_bytes)
