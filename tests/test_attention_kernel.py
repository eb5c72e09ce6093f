"""The Triton kernels of attention and KV writes: interpreted on the CPU, compiled on a GPU.

The interpreter computes ``tl.dot`` of bf16 wrongly, so that dtype is for the GPU alone.
"""

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.attention import Batch, make_batch, naive

from pagetier.kernels import AttentionMetadata, attention, attention_items, kv_write, reference
from pagetier.offload.tiers import KVLayout, LayerKV

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("run by test_all_of_this_under_the_interpreter")
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is the run that it starts")
def test_all_of_this_under_the_interpreter():
    """Triton reads the variable when it is imported, so it takes a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # Inside a run of pytest-xdist these would make the new one a worker of it.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    result = subprocess.run(
        [*command, "-k", "not cuda"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"\b[4-9]\d passed", result.stdout), result.stdout[-500:]


def check(batch: Batch, dtype: torch.dtype = torch.float32, **features) -> None:
    expected = naive(batch, 0.3, **features)
    if isinstance(features.get("sinks"), torch.Tensor):
        features["sinks"] = features["sinks"].to(batch.q.device)
    shape = (*batch.q.shape[:2], batch.v_cache.shape[3])
    out = torch.full(shape, float("nan"), dtype=dtype, device=batch.q.device)
    actual = attention.paged_attention(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.metadata,
        scale=0.3,
        out=out,
        **batch.caches,
        **features,
    )
    assert actual is out
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected, atol=tolerance, rtol=tolerance, check_device=False
    )


# Decodes between prompts of different lengths, with and without cached prefixes.
MIXED = [(1, 9), (5, 5), (1, 1), (3, 12), (1, 17), (2, 4), (1, 4), (5, 21)]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1), (16, 1), (5, 1)])
def test_mixed_batches_match_naive(block_size, heads, kv_heads, device):
    check(make_batch(MIXED, block_size=block_size, heads=heads, kv_heads=kv_heads, device=device))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65])
def test_decode_lengths_around_block_and_round_boundaries_match_naive(length, device):
    check(make_batch([(1, length), (1, 3)], block_size=16, device=device))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(32, 32), (80, 80), (96, 96), (24, 16)])
def test_head_sizes_match_naive(key_dim, value_dim, device):
    batch = make_batch([(1, 20), (4, 7)], head_dim=key_dim, value_dim=value_dim, device=device)
    check(batch)


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_window_reads_its_last_positions_only(window, device):
    check(make_batch(MIXED, window=window, device=device), window=window)


def test_softcap_and_sinks_match_naive(device):
    batch = make_batch(MIXED, device=device)
    check(batch, softcap=0.7)
    check(batch, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    check(batch, softcap=0.7, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))


@pytest.fixture
def small_items(monkeypatch):
    """Divide contexts into items of 16 positions, so that short ones are combined too."""
    chosen = attention._tile

    def tile(*args):
        return dataclasses.replace(chosen(*args), keys=16, min_keys=16, programs=4)

    monkeypatch.setattr(attention, "_tile", tile)


@pytest.mark.parametrize("heads", [4, 6, 2])
def test_divided_contexts_are_combined_by_the_last_program(small_items, heads, device):
    # Shorter than an item, about one, and several; later calls find the counters reset.
    lens = [(1, 3), (1, 70), (2, 5), (10, 50), (1, 17)]
    batch = make_batch(lens, heads=heads, block_size=16, device=device)
    check(batch)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])[:heads]
    check(batch, window=40, softcap=0.7, sinks=sinks)


def test_long_prompt_goes_in_several_tiles(device):
    check(make_batch([(70, 80), (1, 5)], heads=2, kv_heads=2, block_size=16, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_match_naive(dtype, device):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes tl.dot of bf16 wrongly")
    check(make_batch(MIXED, dtype=dtype, head_dim=16, value_dim=16, device=device), dtype)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_caches_match_naive(kv_dtype, dtype, device):
    if device == "cpu" and (dtype is torch.bfloat16 or kv_dtype is torch.float8_e4m3fn):
        pytest.skip("Triton's interpreter computes bf16 wrongly and knows no fp8 from torch")
    if kv_dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no fp8")
    options = {"block_size": 16, "head_dim": 32, "value_dim": 32, "device": device}
    check(make_batch(MIXED, dtype=dtype, kv_dtype=kv_dtype, **options), dtype)
    windowed = make_batch(MIXED, dtype=dtype, kv_dtype=kv_dtype, window=5, **options)
    check(windowed, dtype, window=5)


def test_scales_must_come_with_a_quantised_cache_and_with_no_other(device):
    batch = make_batch([(1, 4)], device=device)
    scales = torch.ones(batch.k_cache.shape[:3], device=device)
    args = (batch.q, batch.k_cache, batch.v_cache, batch.metadata)
    with pytest.raises(ValueError, match="takes no k_scale"):
        attention.paged_attention(*args, scale=1.0, k_scale=scales, v_scale=scales)
    batch = make_batch([(1, 4)], kv_dtype=torch.int8, device=device)
    args = (batch.q, batch.k_cache, batch.v_cache, batch.metadata)
    with pytest.raises(ValueError, match="needs k_scale"):
        attention.paged_attention(*args, scale=1.0)
    with pytest.raises(ValueError, match="must be \\(blocks"):
        attention.paged_attention(*args, scale=1.0, k_scale=scales[:1], v_scale=scales[:1])


def test_padding_rows_and_padding_tokens_come_out_zero(device):
    batch = make_batch([(1, 6), (1, 3)], num_padding_tokens=2, device=device)
    batch.metadata.seq_lens[1] = 0
    batch.metadata.host_seq_lens[1] = 0
    out = attention.paged_attention(
        batch.q, batch.k_cache, batch.v_cache, batch.metadata, scale=0.3
    )
    assert torch.isfinite(out[0]).all()
    assert not out[1:].any()


def test_tensors_that_do_not_belong_together_are_refused(device):
    batch = make_batch([(1, 4)], device=device)
    with pytest.raises(ValueError, match="do not belong together"):
        attention.paged_attention(
            batch.q[:, :3], batch.k_cache, batch.v_cache, batch.metadata, scale=1.0
        )
    cache = batch.k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="must be dense"):
        attention.paged_attention(batch.q, cache, batch.v_cache, batch.metadata, scale=1.0)


def test_queries_with_gaps_in_their_last_dimension_are_taken_too(device):
    batch = make_batch(MIXED, device=device)
    batch.q = batch.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert batch.q.stride(2) != 1
    check(batch)


@pytest.mark.parametrize("window", [0, 40])
def test_decodes_planned_on_the_device_follow_their_lengths(window, small_items, device):
    lens = [70, 3, 0, 130, 0]
    batch = make_batch([(1, max(n, 1)) for n in lens], block_size=16, window=window, device=device)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    metadata = AttentionMetadata.for_decodes(batch.metadata.block_tables, seq_lens)
    expected = naive(batch, 0.3, window=window).float()
    for row, length in enumerate(lens):
        if length == 0:
            expected[row] = 0
    for _ in range(2):
        metadata.plan()
        out = attention.paged_attention(
            batch.q, batch.k_cache, batch.v_cache, metadata, scale=0.3, window=window
        )
        torch.testing.assert_close(out.cpu(), expected, atol=2e-5, rtol=2e-5)
        # A step later in the same buffers, one row has become padding.
        seq_lens[1] = 0
        expected[1] = 0


def items_of(lens, *, is_decode, **cut):
    starts = torch.tensor([0, *np.cumsum([q for q, _ in lens])], dtype=torch.int32)
    seq_lens = torch.tensor([n for _, n in lens], dtype=torch.int32)
    metadata = AttentionMetadata.build(torch.zeros(len(lens), 1), seq_lens, starts)
    make = attention_items.decode_items if is_decode else attention_items.prefill_items
    items = make(metadata, **cut)
    rows = items.rows.tolist()
    count = sum(row[7] > 0 for row in rows)
    assert all(row[7] == 0 for row in rows[count:])
    return rows[:count]


@pytest.mark.skipif(not INTERPRETED, reason="the items of decodes are a kernel's work")
def test_decode_items_divide_long_contexts_evenly():
    cut = {"is_decode": True, "window": 0, "keys": 16, "min_keys": 32}
    lens = [(1, 100), (2, 50), (1, 0), (1, 30)]
    # 130 positions would be 4 items of 33, and 100 are 3 of these: 34 each, in rounds of 16.
    # Fields: sequence, token, first, last, position of the query, queries, first item, items.
    assert items_of(lens, target_items=4, **cut) == [
        [0, 0, 0, 48, 99, 1, 0, 3],
        [0, 0, 48, 96, 99, 1, 0, 3],
        [0, 0, 96, 100, 99, 1, 0, 3],
        [2, 3, 0, 0, -1, 1, 3, 1],
        [3, 4, 0, 30, 29, 1, 4, 1],
    ]
    assert len(items_of(lens, target_items=1000, **cut)) == 3 + 1 + 1
    assert len(items_of(lens, target_items=1, **cut)) == 3
    # Just above what is wanted is no reason for a second item.
    assert len(items_of([(1, 100)] * 9 + [(1, 103)], target_items=10, **cut)) == 10
    windowed = items_of([(1, 100)], target_items=4, **{**cut, "window": 20})
    assert windowed == [[0, 0, 80, 100, 99, 1, 0, 1]]


def test_prefill_items_come_longest_first_and_stop_at_their_last_query():
    cut = {"is_decode": False, "queries": 4, "keys": 16, "min_keys": 16}
    lens = [(1, 9), (6, 6), (5, 45)]
    assert items_of(lens, target_items=1000, window=0, **cut) == [
        [2, 11, 0, 16, 44, 1, 0, 3],
        [2, 11, 16, 32, 44, 1, 0, 3],
        [2, 11, 32, 45, 44, 1, 0, 3],
        [2, 7, 0, 16, 40, 4, 3, 3],
        [2, 7, 16, 32, 40, 4, 3, 3],
        [2, 7, 32, 44, 40, 4, 3, 3],
        [1, 5, 0, 6, 4, 2, 6, 1],
        [1, 1, 0, 4, 0, 4, 7, 1],
    ]
    windowed = items_of(lens, target_items=1, window=3, **cut)
    assert [row[2:4] for row in windowed] == [[38, 44], [0, 4], [2, 6], [42, 45]]


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_write_kv_equals_the_reference_and_touches_nothing_else(block_size, dtype, device):
    layout = KVLayout((LayerKV(1, 4, 4), LayerKV(3, 24, 10)), block_size, dtype)
    pages = layout.allocate(70 // block_size, device)
    pages.random_(0, 120)
    expected = pages.clone()
    generator = torch.Generator().manual_seed(0)
    slots = torch.tensor([5, -1, 60, 0, 17, -1], device=device)
    # Slices with strides of their own, as a fused projection leaves them.
    key = torch.randn(6, 3, 60, generator=generator).to(device, dtype)[..., 3:27]
    value = torch.randn(6, 3, 60, generator=generator).to(device, dtype)[..., 30:40]
    reference.write_kv(key, value, *layout.views(expected)[1][:2], slots)
    kv_write.write_kv(key, value, *layout.views(pages)[1][:2], slots)
    assert torch.equal(pages, expected)
