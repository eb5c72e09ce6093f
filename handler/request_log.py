"""What operators learn of each request: one log line at its end, and the latency histograms.

Owns the clock of every request between its arrival and its end, the histograms, and the counts of
how requests ended. Knows nothing of texts, and never writes any. Imports no torch. Times are those
of the engine's outputs at their arrival in the handler's process: what detokenising and the
frontend add is not in them.

Arrivals and ends are told by the pump, outputs by the thread that reads them, and the figures are
read by a third; each call is short and takes one lock.
"""

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from pagetier.handler.messages import AddRequest, RequestOutput
from pagetier.handler.metrics import Histogram

logger = logging.getLogger(__name__)

FINISH_REASONS = ("stop", "length", "abort", "error")

# Upper bounds in seconds: vLLM's, so that panels made for them show the same, and some below.
_FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BOUNDS = (
    0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Record:
    """An open request; times are of the monotonic clock, in seconds."""

    client_id: str
    num_prompt_tokens: int
    arrived_at: float
    num_going: int  # outputs that have not ended
    first_token_at: float | None = None
    last_token_at: dict[int, float] = dataclasses.field(default_factory=dict)  # by output
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_seconds: float = 0.0


class RequestLog:
    """Follows requests from arrival to end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Follow no request yet; ``clock`` counts seconds and never goes back."""
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, _Record] = {}
        self._num_ended = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self._histograms = {
            "time_to_first_token_seconds": Histogram(_FIRST_TOKEN_BOUNDS),
            "inter_token_latency_seconds": Histogram(_TOKEN_BOUNDS),
            "e2e_request_latency_seconds": Histogram(_REQUEST_BOUNDS),
            "request_queue_time_seconds": Histogram(_REQUEST_BOUNDS),
        }

    def started(self, request: AddRequest, client_id: str = "") -> None:
        """``request``, which its client calls ``client_id``, is about to go to the engine."""
        with self._lock:
            self._records[request.request_id] = _Record(
                client_id, len(request.prompt_token_ids), self._clock(), request.params.n
            )

    def take(self, outputs: Iterable[RequestOutput]) -> None:
        """The engine has reported ``outputs``, just now."""
        with self._lock:
            now = self._clock()
            for output in outputs:
                record = self._records.get(output.request_id)
                if record is None:
                    continue
                if output.new_token_ids:
                    self._count_tokens(record, output, now)
                record.num_going -= output.finish_reason is not None
                if output.finish_reason == "error" or record.num_going == 0:
                    assert output.finish_reason is not None
                    self._end(output.request_id, output.finish_reason, now)

    def ended(self, request_ids: Iterable[str], reason: str) -> None:
        """The handler has ended these requests itself; those that have ended before are skipped.

        ``reason`` is ``stop`` (at a stop string), ``abort`` (its client has left) or ``error``.
        """
        with self._lock:
            now = self._clock()
            for request_id in request_ids:
                if request_id in self._records:
                    self._end(request_id, reason, now)

    def stats(self) -> dict[str, Any]:
        """Count, sum and percentiles of each latency in seconds, and how many requests ended how.

        The keys are the stems of the metrics' names.
        """
        with self._lock:
            latencies = {name: h.summary() for name, h in self._histograms.items()}
            return {**latencies, "request_success": dict(self._num_ended)}

    def histograms(self) -> dict[str, Histogram]:
        """Copies of the latency histograms, by the stems of the metrics' names."""
        with self._lock:
            return {name: h.copy() for name, h in self._histograms.items()}

    def _count_tokens(self, record: _Record, output: RequestOutput, now: float) -> None:
        if record.first_token_at is None:
            record.first_token_at = now
            record.queue_seconds = output.queue_seconds
            self._histograms["time_to_first_token_seconds"].observe(now - record.arrived_at)
            self._histograms["request_queue_time_seconds"].observe(output.queue_seconds)
        last_token_at = record.last_token_at.get(output.index)
        if last_token_at is not None:
            self._histograms["inter_token_latency_seconds"].observe(now - last_token_at)
        record.last_token_at[output.index] = now
        record.num_output_tokens += len(output.new_token_ids)
        record.num_cached_tokens = output.num_cached_tokens
        record.num_preemptions = output.num_preemptions

    def _end(self, request_id: str, reason: str, now: float) -> None:
        record = self._records.pop(request_id)
        self._num_ended[reason] += 1
        total_seconds = now - record.arrived_at
        if reason in ("stop", "length"):
            self._histograms["e2e_request_latency_seconds"].observe(total_seconds)
        first = "none"
        if record.first_token_at is not None:
            first = f"{record.first_token_at - record.arrived_at:.3f}"
        logger.info(
            "request=%s%s prompt_tokens=%d cached_tokens=%d output_tokens=%d queue_s=%.3f "
            "first_token_s=%s total_s=%.3f preemptions=%d finish=%s",
            request_id,
            record.client_id and f" client_id={record.client_id}",
            record.num_prompt_tokens,
            record.num_cached_tokens,
            record.num_output_tokens,
            record.queue_seconds,
            first,
            total_seconds,
            record.num_preemptions,
            reason,
        )
