"""The rates that decide between swapping and recomputing, measured at start.

Owns how they are measured: through the same link and the same forward pass that serve. Knows
nothing of the decision (``cost_model``) or of what is copied and computed.
"""

import time
from collections.abc import Callable

from pagetier.offload.transfer import Link

_LINK_TEST_BYTES = 64 << 20
_LINK_TIMEOUT_SECONDS = 5.0
_ENOUGH_SECONDS = 0.05
_LEAST_SHARE = 0.05


def measure_link(link: Link, block_bytes: int, num_gpu_blocks: int, num_cpu_blocks: int) -> float:
    """Bytes per second between the tiers, one way: the slower direction, second repetition.

    The first blocks of both tiers are overwritten: measure before anything is served.

    Raises:
        RuntimeError: a copy failed, or took longer than five seconds.
    """
    num_blocks = min(num_gpu_blocks, num_cpu_blocks, max(_LINK_TEST_BYTES // block_bytes, 1))
    pairs = [(block_id, block_id) for block_id in range(num_blocks)]
    slowest = 0.0
    for to_cpu in (True, False):
        for _ in range(2):
            seconds = _time_transfer(link, pairs, to_cpu=to_cpu)
        slowest = max(slowest, seconds)
    return num_blocks * block_bytes / max(slowest, 1e-9)


def _time_transfer(link: Link, pairs: list[tuple[int, int]], *, to_cpu: bool) -> float:
    link.submit(-1, pairs, to_cpu=to_cpu, after=None)
    deadline = time.monotonic() + _LINK_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        for completion in link.poll():
            if completion.error is not None:
                raise RuntimeError(f"A copy between the tiers failed: {completion.error}")
            return completion.seconds
        link.wait(0.001)
    raise RuntimeError(f"A copy between the tiers took over {_LINK_TIMEOUT_SECONDS:.0f} s.")


def measure_prefill(run: Callable[[int], None], max_tokens: int) -> tuple[int, float]:
    """How long computing a prompt takes.

    Args:
        run: computes that many tokens of a fresh sequence, and returns when they are done.
        max_tokens: most tokens that ``run`` takes.

    Returns:
        A number of tokens, and the seconds they took; the number grows until the time is long
        enough to be told from overheads, or is ``max_tokens``.
    """
    num_tokens = min(16, max_tokens)
    run(num_tokens)  # the first pass pays for allocations and for choosing kernels
    while True:
        start = time.perf_counter()
        run(num_tokens)
        seconds = time.perf_counter() - start
        if num_tokens == max_tokens or seconds >= _ENOUGH_SECONDS:
            return num_tokens, seconds
        num_tokens = min(num_tokens * 4, max_tokens)


def measure_beside_copies(run: Callable[[int], None], num_tokens: int) -> float:
    """The seconds that a prompt adds to a step which waits for streamed weights.

    Such a step takes no less for one token. What is hidden behind its copies is not free, so it
    counts at least ``_LEAST_SHARE`` of the step.

    Args:
        run: see ``measure_prefill``.
        num_tokens: of the prompt.
    """
    run(num_tokens)
    seconds = []
    for count in (1, num_tokens):
        start = time.perf_counter()
        run(count)
        seconds.append(time.perf_counter() - start)
    return max(seconds[1] - seconds[0], _LEAST_SHARE * seconds[1])
