"""Where a GPU's memory goes, and the advice when it does not suffice."""

import dataclasses
import re

import pytest

from pagetier.handler.errors import ConfigError
from pagetier.handler.gpu_memory import GpuMemory

GIB = 2**30
MEMORY = GpuMemory(
    total=80 * GIB,
    utilization=0.5,
    weights=16 * GIB,
    used=18 * GIB,
    steps=4 * GIB,
    graphs=GIB,
)


def advice(memory: GpuMemory, needed: int) -> str:
    with pytest.raises(ConfigError) as caught:
        memory.check(needed, 4096, 8192)
    return str(caught.value)


def test_what_is_left_is_told_with_where_the_rest_went() -> None:
    assert MEMORY.for_kv_cache == 17 * GIB
    MEMORY.check(17 * GIB, 4096, 8192)
    text = str(MEMORY)
    for part in ("80.0 GiB", "50%", "weights take 16.0 GiB", "2.0 GiB", "step 4.0 GiB", "1.0 GiB"):
        assert part in text
    assert "17.0 GiB is left" in text


@pytest.mark.parametrize("missing", [1, GIB // 3, GIB, 3 * GIB])
def test_each_advice_suffices(missing: int) -> None:
    needed = 17 * GIB + missing
    text = advice(MEMORY, needed)
    numbers = dict(re.findall(r"(gpu_memory_utilization|max_\w+) to (?:about )?([\d.]+)", text))
    utilization = float(numbers["gpu_memory_utilization"].rstrip("."))
    dataclasses.replace(MEMORY, utilization=utilization).check(needed, 4096, 8192)
    assert utilization <= 0.5 + missing / (80 * GIB) + 0.001
    shorter = int(numbers["max_model_len"].rstrip("."))
    assert 0 < shorter < 4096 or missing == 1
    assert needed * shorter / 4096 <= MEMORY.for_kv_cache
    fewer = int(numbers["max_num_batched_tokens"].rstrip("."))
    assert MEMORY.steps * (1 - fewer / 8192) >= missing - 1


def test_no_setting_helps_where_weights_take_it_all() -> None:
    full = dataclasses.replace(MEMORY, utilization=1.0, used=79 * GIB, weights=78 * GIB)
    text = advice(full, 10 * GIB)
    assert "smaller model" in text
    assert "gpu_memory_utilization to" not in text
