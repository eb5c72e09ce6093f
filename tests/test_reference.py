"""The plain torch operations of the KV cache against loops that cannot be wrong in the same way."""

import dataclasses

import numpy as np
import pytest
import torch
from support.attention import Batch, make_batch, naive

from pagetier.kernels import AttentionMetadata
from pagetier.kernels.metadata import upload
from pagetier.kernels.reference import (
    attention,
    copy_blocks,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)
from pagetier.offload.tiers import KVLayout, LayerKV

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


def check(batch: Batch, tolerance: float = 1e-5, **features: object) -> None:
    expected = naive(batch, 0.3, **features)
    if isinstance(features.get("sinks"), torch.Tensor):
        features["sinks"] = features["sinks"].to(batch.q.device)
    actual = paged_attention(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.metadata,
        scale=0.3,
        **batch.caches,
        **features,
    )
    assert actual.dtype == batch.q.dtype
    torch.testing.assert_close(
        actual.double().cpu(), expected, atol=tolerance, rtol=tolerance, check_device=False
    )


# Decodes between prefills of different and of equal lengths, with and without cached prefixes.
MIXED = [(1, 9), (5, 5), (1, 1), (3, 12), (1, 17), (5, 8), (2, 4), (1, 4), (5, 21)]


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1), (16, 1)])
def test_attention_matches_naive_for_mixed_batches(
    block_size: int, heads: int, kv_heads: int, device: str
) -> None:
    check(make_batch(MIXED, block_size=block_size, heads=heads, kv_heads=kv_heads, device=device))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 50])
def test_attention_matches_naive_around_block_boundaries(length: int, device: str) -> None:
    check(make_batch([(1, length), (length, length), (1, length + 4)], device=device))


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_window_sees_its_last_positions_only(window: int, device: str) -> None:
    check(make_batch(MIXED, window=window, device=device), window=window)


def test_layers_with_other_windows_and_sizes_share_metadata() -> None:
    # NaN only where no layer looks; what one layer worked out must not serve another's shape.
    wide = make_batch(MIXED)
    for other in (make_batch(MIXED, kv_heads=4), make_batch(MIXED, heads=6, head_dim=4)):
        other.metadata = dataclasses.replace(wide.metadata, shared=wide.metadata.shared)
        for window in (0, 3, 9):
            check(wide, window=window)
            check(other, window=window)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_caches_are_multiplied_by_their_scales(kv_dtype, device):
    check(make_batch(MIXED, kv_dtype=kv_dtype, device=device))
    check(make_batch(MIXED, kv_dtype=kv_dtype, window=3, device=device), window=3)


def test_softcap_bounds_scores(device: str) -> None:
    check(make_batch(MIXED, device=device), softcap=0.7)


def test_sinks_take_weight_without_value(device: str) -> None:
    check(make_batch(MIXED, device=device), sinks=torch.tensor([0.5, -3.0, 4.0, 30.0]))


def test_all_features_together_with_unequal_sizes_of_key_and_value(device: str) -> None:
    batch = make_batch(MIXED, head_dim=12, value_dim=5, window=6, device=device)
    check(batch, window=6, softcap=2.0, sinks=torch.tensor([0.5, -3.0, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_16_bits_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    # Inputs are exact in both; only the output is rounded: half a unit in the last place of
    # numbers below 4.
    batch = make_batch(MIXED, dtype=dtype, device=device)
    check(batch, tolerance=2 * torch.finfo(dtype).eps)


def test_padding_rows_and_padding_tokens_come_out_zero(device: str) -> None:
    batch = make_batch([(1, 0), (1, 5), (0, 0), (3, 7), (1, 0)], num_padding_tokens=2,
                       device=device)  # fmt: skip
    out = torch.full((8, 4, 8), float("nan"), device=device)
    for sinks in (None, torch.zeros(4, device=device)):
        paged_attention(
            batch.q, batch.k_cache, batch.v_cache, batch.metadata, scale=0.3, sinks=sinks, out=out
        )
        assert (out[[0, 5, 6, 7]] == 0).all()
        assert out[1:5].isfinite().all()
        assert (out[1:5] != 0).any(-1).all()


def test_an_empty_batch_is_fine() -> None:
    batch = make_batch([])
    out = paged_attention(batch.q, batch.k_cache, batch.v_cache, batch.metadata, scale=1.0)
    assert out.shape == (0, 4, 8)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attention_in_small_pieces_is_the_same(
    monkeypatch: pytest.MonkeyPatch, softcap: float
) -> None:
    lens = [(1, 30), (1, 9), (1, 22), (9, 30), (9, 12)]
    batch = make_batch(lens)
    arguments = (batch.q, batch.k_cache, batch.v_cache)
    whole = paged_attention(*arguments, batch.metadata, scale=0.3, softcap=softcap)
    monkeypatch.setattr(attention, "_MAX_GATHERED_ELEMENTS", 600)
    monkeypatch.setattr(attention, "_MAX_SCORE_ELEMENTS", 500)
    metadata = make_batch(lens).metadata
    in_pieces = paged_attention(*arguments, metadata, scale=0.3, softcap=softcap)
    torch.testing.assert_close(in_pieces, whole)
    (contexts,) = metadata.shared.values()
    shapes = [piece.shape for context in contexts for piece in context.pieces]
    assert len(shapes) > 4  # it was in pieces, of sequences and of queries
    assert any(num_queries not in (1, 9) for _, num_queries in shapes)


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch(MIXED)
    batch.q *= 1e4
    out = paged_attention(batch.q, batch.k_cache, batch.v_cache, batch.metadata, scale=1.0)
    assert out.isfinite().all()


def test_metadata_counts_what_planning_needs() -> None:
    metadata = make_batch(MIXED).metadata
    assert (metadata.num_decodes, metadata.num_prefills) == (4, 5)
    assert (metadata.max_query_len, metadata.num_tokens) == (5, 24)
    assert [group.query_len for group in metadata.query_groups] == [1, 2, 3, 5]
    assert metadata.query_groups[3].sequences.tolist() == [1, 5, 8]
    assert metadata.query_groups[0].tokens.tolist() == [[0], [6], [10], [18]]


def test_metadata_of_different_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="not of one batch"):
        AttentionMetadata.build(torch.zeros(2, 1), torch.zeros(3), torch.zeros(4))


def test_upload_keeps_values_shapes_and_dtypes(device: str) -> None:
    arrays = [
        np.arange(3, dtype=np.int32),
        np.zeros((0, 2), dtype=np.int64),
        np.arange(6, dtype=np.int64).reshape(3, 2).T,
    ]
    tensors = upload(arrays, torch.device(device))
    assert [t.dtype for t in tensors] == [torch.int32, torch.int64, torch.int64]
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.device.type == device
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)


def make_pages(device: str, num_blocks: int = 6) -> tuple[KVLayout, torch.Tensor]:
    layout = KVLayout((LayerKV(2, 4, 3), LayerKV(1, 8, 8)), 4, torch.float32)
    pages = torch.arange(num_blocks * layout.block_bytes, dtype=torch.int64)
    return layout, (pages % 251).to(torch.uint8).view(num_blocks, -1).to(device)


@pytest.mark.parametrize(
    "slots", [[5, 0, 23, 9], [-1, 7, -1, 12], [3, 2, 1, -1], [-1, -1, -1, -1], []]
)
def test_write_kv_writes_its_slots_and_nothing_else(slots: list[int], device: str) -> None:
    layout, pages = make_pages(device)
    before = pages.clone()
    generator = torch.Generator().manual_seed(0)
    # (heads, tokens, dim) transposed: tokens are not contiguous.
    key = torch.randn(2, len(slots), 4, generator=generator).transpose(0, 1).to(device)
    value = torch.randn(2, len(slots), 3, generator=generator).transpose(0, 1).to(device)
    write_kv(key, value, *layout.views(pages)[0][:2], torch.tensor(slots, device=device).long())
    expected = before.cpu()
    expected_k, expected_v, _ = layout.views(expected)[0]
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected_k[slot // 4, :, slot % 4] = key[token].cpu()
            expected_v[slot // 4, :, slot % 4] = value[token].cpu()
    assert torch.equal(pages.cpu(), expected)


def test_write_kv_converts_to_the_dtype_of_the_cache() -> None:
    cache = torch.zeros(2, 1, 4, 2, dtype=torch.float16)
    new = torch.full((1, 1, 2), 1 / 3)
    write_kv(new, new, cache, cache.clone(), torch.tensor([6]))
    assert torch.equal(cache[1, 0, 2], torch.full((2,), 1 / 3, dtype=torch.float16))
    assert cache.count_nonzero() == 2


def test_copy_blocks_reads_all_sources_first(device: str) -> None:
    _, pages = make_pages(device)
    before = pages.clone()
    copy_blocks(pages, [(0, 3), (3, 5), (1, 2)])
    assert torch.equal(pages, before[[0, 1, 1, 0, 4, 3]])
    copy_blocks(pages, [])
    copy_blocks(pages, torch.tensor([[4, 0]]))
    assert torch.equal(pages, before[[4, 1, 1, 0, 4, 3]])


def test_gather_and_scatter_are_inverse(device: str) -> None:
    _, pages = make_pages(device)
    before = pages.clone()
    staging = torch.zeros_like(pages)
    filled = gather_blocks(pages, [4, 0, 2], staging)
    assert torch.equal(filled, before[[4, 0, 2]])
    assert filled.data_ptr() == staging.data_ptr()
    assert not staging[3:].any()
    scatter_blocks(staging, pages, torch.tensor([1, 3, 5]))
    assert torch.equal(pages, before[[0, 4, 2, 0, 4, 2]])
