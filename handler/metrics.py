"""Totals an engine keeps while it runs, under the stems of the metrics' names.

Owns the counters, the accounting of KV memory that is allocated but unfilled, and histograms. Knows
nothing of how they are shown. Imports no torch.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass
class EngineTotals:
    """Totals since start; tokens and blocks are counts, times are seconds."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    num_preemptions_swap: int = 0
    num_preemptions_recompute: int = 0
    num_recomputed_tokens: int = 0
    num_resumes_loaded: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    kv_offload_store_bytes: int = 0
    kv_offload_load_bytes: int = 0
    kv_offload_store_time: float = 0.0
    kv_offload_load_time: float = 0.0
    num_failed_transfers: int = 0
    num_scheduled_sequences: int = 0
    slot_steps_allocated: int = 0
    slot_steps_filled: int = 0
    slot_steps_preallocated: int = 0
    request_success: Counter[str] = dataclasses.field(default_factory=Counter)

    def count_slots(self, *, num_allocated: int, num_filled: int, num_preallocated: int) -> None:
        """Add one step's KV slots: in blocks held, with a token in them, and as many as reserving
        the maximum length for each sequence would have taken."""
        self.slot_steps_allocated += num_allocated
        self.slot_steps_filled += num_filled
        self.slot_steps_preallocated += num_preallocated

    @property
    def kv_waste_perc(self) -> float:
        """Share of allocated slots that held no token, over all steps, in [0, 1]."""
        return _unfilled(self.slot_steps_allocated, self.slot_steps_filled)

    @property
    def kv_waste_preallocated_perc(self) -> float:
        """The same, had every sequence reserved the maximum length."""
        return _unfilled(self.slot_steps_preallocated, self.slot_steps_filled)

    @property
    def mean_running_batch(self) -> float:
        """Sequences in a step, on average."""
        return self.num_scheduled_sequences / self.num_steps if self.num_steps else 0.0


def _unfilled(num_slots: int, num_filled: int) -> float:
    return 1.0 - num_filled / num_slots if num_slots else 0.0


class Histogram:
    """Counts of values, by upper bounds.

    Attributes:
        bounds: ascending; the last bucket, without a bound, follows them.
        counts: values in each bucket, not cumulated: ``len(bounds) + 1`` of them.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """Count nothing yet; ``bounds`` must ascend."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def copy(self) -> "Histogram":
        """The same counts, which stay as they are."""
        copied = Histogram(self.bounds)
        copied.counts = list(self.counts)
        copied.sum = self.sum
        return copied

    def quantile(self, share: float) -> float:
        """The value below which ``share`` (0 to 1) of all lie, interpolated within its bucket.

        0 without values; the highest bound where it lies beyond.
        """
        wanted = share * self.count
        below = 0.0
        num_below = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and num_below + count >= wanted:
                return below + (bound - below) * (wanted - num_below) / count
            num_below += count
            below = bound
        return below if num_below < self.count else 0.0

    def summary(self) -> dict[str, float]:
        """Count, sum, and the 50th, 90th and 99th percentile."""
        percentiles = {f"p{percent}": self.quantile(percent / 100) for percent in (50, 90, 99)}
        return {"count": self.count, "sum": self.sum, **percentiles}
