"""The judgement over memory must see a leak, and nothing but a leak."""

import random

import pytest
from support.memory import growth

MIB = 2**20


def series(seconds, value_at):
    return [(100.0 + step / 2, value_at(step / 2)) for step in range(2 * seconds)]


@pytest.mark.parametrize("seconds", [60, 3600])
def test_noise_saws_and_a_warm_up_are_no_growth(seconds):
    rng = random.Random(0)

    def value_at(t):
        warm_up = min(t, 0.3 * seconds) / seconds * 200 * MIB
        return 500 * MIB + warm_up + t % 7 * 4 * MIB + rng.uniform(-1, 1) * MIB

    assert abs(growth(series(seconds, value_at))) < 2 * MIB


@pytest.mark.parametrize("seconds", [60, 3600])
def test_leak_beneath_the_noise_is_growth(seconds):
    rng = random.Random(1)
    leak = 10 * MIB / seconds  # a second

    def value_at(t):
        return 500 * MIB + leak * t + t % 7 * 4 * MIB + rng.uniform(-1, 1) * MIB

    assert 4 * MIB < growth(series(seconds, value_at)) < 8 * MIB
