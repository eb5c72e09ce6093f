"""The prices of swapping and recomputing, against the formulas written out."""

import pytest

from pagetier.offload.cost_model import CostModel

MODEL = CostModel(
    token_bytes=1000,
    block_bytes=16_000,
    link_bytes_per_second=1e9,
    flops_per_second=1e12,
    num_parameters=10**9,
    attention_dim=32 * 2048,
)


def test_swapping_costs_dirty_blocks_out_and_all_tokens_in():
    assert MODEL.swap_seconds(2000, 0) == pytest.approx(2e-3)
    assert MODEL.swap_seconds(2000, 125) == pytest.approx(4e-3)
    assert MODEL.load_seconds(500) == pytest.approx(5e-4)


def test_recomputing_costs_linear_and_quadratic_work():
    expected = (2 * 1e9 * 2000 + 2 * 32 * 2048 * 2000**2) / 1e12
    assert MODEL.recompute_seconds(2000) == pytest.approx(expected)


def test_recomputing_after_a_cached_prefix_costs_the_difference():
    whole, half = MODEL.recompute_seconds(2000), MODEL.recompute_seconds(1000)
    assert MODEL.recompute_seconds(2000, 1000) == pytest.approx(whole - half)
    assert MODEL.recompute_seconds(2000, 1000) > half  # attention grows with the context
