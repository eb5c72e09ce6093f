"""How the memory of processes goes on while they work, and whether it grows.

Owns the samples and the judgement over them. Knows nothing of what the processes do.
"""

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Self

import psutil

# What comes in before this share of the time is over is warming up: caches, code, heaps.
WARM_UP_SHARE = 0.4
_MAX_POINTS = 300


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """By how much a value rises from the end of the warm-up to the last sample.

    Theil's slope (the median of the slopes between all pairs) times the duration: noise, and what a
    garbage collector leaves and takes, hardly moves it; a leak does, however slow against both.

    Args:
        samples: pairs of a time and a value, in order of time; three at least after the warm-up.
    """
    first, last = samples[0][0], samples[-1][0]
    warm_up_ends = first + WARM_UP_SHARE * (last - first)
    warm = [sample for sample in samples if sample[0] >= warm_up_ends]
    warm = warm[:: -(-len(warm) // _MAX_POINTS)]
    slopes = [
        (value - earlier_value) / (when - earlier)
        for index, (when, value) in enumerate(warm)
        for earlier, earlier_value in warm[:index]
    ]
    return statistics.median(slopes) * (last - warm_up_ends)


class MemoryWatch:
    """Looks at the resident memory of processes twice a second, as a context manager.

    Args:
        processes: by the names under which they are told of.

    Attributes:
        samples: for each name, pairs of a time in seconds and a size in bytes.
    """

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self._processes = processes
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.5):
            for name, process in self._processes.items():
                self.samples[name].append((time.monotonic(), process.memory_info().rss))
