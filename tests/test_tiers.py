"""The layout of a block's bytes."""

import pytest
import torch

from pagetier import kernels
from pagetier.offload.tiers import KVLayout, LayerCaches, LayerKV

MIXED = (LayerKV(2, 8, 8), LayerKV(1, 3, 5), LayerKV(4, 16, 2))


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def pieces_of(caches: LayerCaches) -> list[torch.Tensor]:
    return [caches.k_cache, caches.v_cache, *caches.scales.values()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_views_of_layers_cover_disjoint_bytes_of_their_own_block(dtype, block_size):
    layout = KVLayout(MIXED, block_size, dtype)
    pages = layout.allocate(3, "cpu")
    value = 0
    for caches, layer in zip(layout.views(pages), MIXED, strict=True):
        rows = (3, layer.kv_heads, block_size)
        shapes = [(*rows, layer.key_dim), (*rows, layer.value_dim)]
        dtypes = [dtype, dtype]
        if dtype.itemsize == 1:
            shapes, dtypes = [*shapes, rows, rows], [*dtypes, torch.float32, torch.float32]
        assert [tuple(view.shape) for view in pieces_of(caches)] == shapes
        assert [view.dtype for view in pieces_of(caches)] == dtypes
        for view in pieces_of(caches):
            assert view.data_ptr() % 16 == pages.data_ptr() % 16
            assert view.stride(0) * view.itemsize == layout.block_bytes
            value += 1
            view[1] = value
    # Blocks 0 and 2 were not touched, and no later piece overwrote an earlier one.
    assert not pages[0].any()
    assert not pages[2].any()
    value = 0
    for caches in layout.views(pages):
        for view in pieces_of(caches):
            value += 1
            assert (view[1].float() == value).all()


def test_sizes_count_every_layer():
    layout = KVLayout(MIXED, 16, torch.float16)
    numbers = 2 * 16 + 8 + 4 * 18
    assert layout.token_bytes == 2 * numbers
    assert layout.block_bytes >= 16 * layout.token_bytes
    assert layout.block_bytes % 16 == 0
    assert layout.allocate(2, "cpu").shape == (2, layout.block_bytes)
    # A key and a value of each of 7 heads have a scale of 4 bytes.
    assert KVLayout(MIXED, 16, torch.int8).token_bytes == numbers + 7 * 2 * 4
    odd = KVLayout((LayerKV(1, 3, 5),), 3, torch.int8)
    assert odd.token_bytes == 3 + 5 + 2 * 4
    assert odd.block_bytes == 4 * 16  # 9, 15, 12 and 12 bytes


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_page_takes_its_scales_along(dtype):
    """Through the other tier and into another block, by copies that know of bytes alone."""
    layout = KVLayout(MIXED, 4, dtype)
    gpu, cpu = layout.allocate(4, "cpu").fill_(0xFF), layout.allocate(2, "cpu").fill_(0xFF)
    news = []
    for caches, layer in zip(layout.views(gpu), MIXED, strict=True):
        key = torch.randn(4, layer.kv_heads, layer.key_dim)
        value = torch.randn(4, layer.kv_heads, layer.value_dim)
        k_cache, v_cache, scales = caches
        kernels.write_kv(key, value, k_cache, v_cache, torch.arange(8, 12), **scales)
        news.append((key, value))
    cpu[1] = gpu[2]
    gpu[2] = 0xFF
    gpu[0] = cpu[1]
    kernels.copy_blocks(gpu, torch.tensor([[0, 3]]))
    for caches, (key, value) in zip(layout.views(gpu), news, strict=True):
        for cache, name, new in (
            (caches.k_cache, "k_scale", key),
            (caches.v_cache, "v_scale", value),
        ):
            stored = (cache[3].float() * caches.scales[name][3][..., None]).transpose(0, 1)
            torch.testing.assert_close(stored, new, atol=1 / 250 * new.abs().max(), rtol=1 / 15)
