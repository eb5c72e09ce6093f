"""The Triton kernels of attention and KV writes: interpreted on the CPU, compiled on a GPU.

The interpreter computes ``tl.dot`` of bf16 wrongly, so that dtype is for the GPU alone.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from support.attention import Batch, make_batch, naive

from pagetier.kernels import attention, kv_write, reference
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
        batch.q, batch.k_cache, batch.v_cache, batch.metadata, scale=0.3, out=out, **features
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


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_split_contexts_are_combined_by_the_last_program(splits, device, monkeypatch):
    monkeypatch.setattr(attention, "_num_splits", lambda *_: splits)
    # Shorter than a split, about one, and several; the second call finds the counters reset.
    batch = make_batch([(1, 3), (1, 70), (1, 300), (2, 5)], block_size=16, device=device)
    check(batch)
    check(batch, window=40)
    check(batch, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))


def test_long_prompt_goes_in_several_tiles(device):
    check(make_batch([(70, 80), (1, 5)], heads=2, kv_heads=2, block_size=16, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_match_naive(dtype, device):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes tl.dot of bf16 wrongly")
    check(make_batch(MIXED, dtype=dtype, head_dim=16, value_dim=16, device=device), dtype)


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


def test_splits_fill_the_device_and_are_powers_of_two():
    lens = torch.zeros(1, dtype=torch.int32)

    def splits(num_tiles: int, longest: int, kv_heads: int = 8, window: int = 0) -> int:
        tiles = attention._Tiles(lens.expand(num_tiles), lens, longest)
        return attention._num_splits(tiles, kv_heads, window, torch.device("cpu"))

    assert splits(256, 900) == 1
    assert splits(1, 200) == 1
    assert splits(1, 4096) == 16
    assert splits(1, 100_000) == 32
    assert splits(16, 4096) == 2
    assert splits(1, 100_000, window=600) == 2


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
    reference.write_kv(key, value, *layout.views(expected)[1], slots)
    kv_write.write_kv(key, value, *layout.views(pages)[1], slots)
    assert torch.equal(pages, expected)
