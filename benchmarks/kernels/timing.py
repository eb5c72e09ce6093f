"""How long a kernel takes: the median over replays of a CUDA graph.

Owns timing alone. Callers give several launches that together touch more memory than the L2 cache
holds, so that each finds its data in memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Launch = Callable[[], Any]

_MAX_LAUNCHES = 2000


def seconds_each(
    launches: Sequence[Launch],
    device: torch.device,
    *,
    replays: int = 15,
    replay_seconds: float = 2e-3,
    graph: bool = True,
) -> float:
    """Seconds of one launch.

    Args:
        launches: what is measured, one after the other, all of them equally long.
        device: where they run; on a CPU, the first is run once and timed by the clock, which shows
            only that it runs.
        replays: measurements, of which the median counts.
        replay_seconds: launches are repeated in a replay until it is about this long, so that its
            own start, some microseconds, is negligible.
        graph: whether they are captured in a CUDA graph; if not, starting them counts too.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        launches[0]()
        return time.perf_counter() - start
    for launch in launches:
        launch()
    # The first round compiled; this one tells how often to repeat in a replay.
    passed = _elapsed(lambda: [launch() for launch in launches])
    rounds = max(1, math.ceil(replay_seconds / passed)) if passed > 0 else 1
    rounds = max(1, min(rounds, _MAX_LAUNCHES // len(launches)))
    repeated = [launch for _ in range(rounds) for launch in launches]

    def run() -> None:
        for launch in repeated:
            launch()

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    run()
    return statistics.median(_elapsed(run) for _ in range(replays)) / len(repeated)


def _elapsed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
