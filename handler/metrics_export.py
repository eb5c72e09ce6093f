"""Carries the engine's figures to TorchServe's metrics port.

Owns which figures are exported, under which names, and the lines by which a worker tells TorchServe
of them. ``metrics.yaml`` declares the same names to the frontend, which drops any other. Knows
nothing of how the figures come about. Imports no torch.

The frontend parses one line of a worker's output for each change of a value, so figures are told
from time to time and not as they happen, and only those that have changed. For the same reason the
latencies are not histograms of TorchServe's own, which take a line for every value and whose
highest bound of ten seconds is too low for whole texts. They are counters with the names and labels
of a histogram's parts (``_bucket`` with ``le``, ``_sum``, ``_count``), which Prometheus cannot tell
from one.

A counter's line says by how much it has grown. The frontend adds that up, so totals outlive the
worker.
"""

import contextlib
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pagetier.handler.errors import EngineError
from pagetier.handler.metrics import Histogram

logger = logging.getLogger(__name__)

PREFIX = "pagetier_"
EXPORT_SECONDS = 2.0

# Keys of the statistics.
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_swapped",
    "kv_cache_usage_perc",
    "cpu_cache_usage_perc",
    "num_gpu_blocks",
    "num_cpu_blocks",
)
COUNTERS = (
    "num_preemptions",
    "num_recomputed_tokens",
    "num_failed_transfers",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "kv_offload_load_bytes",
    "kv_offload_store_bytes",
    "kv_offload_load_time",
    "kv_offload_store_time",
)
# Gauges keep their last values while no worker runs: this one tells how old they are.
UPDATED = "updated_timestamp_seconds"

# Lines are written in pieces of at most this many bytes: so many reach a pipe in one piece, beside
# those of the engine's process.
_PIPE_BYTES = 4096
# What would end a label or a line for the frontend.
_NOT_IN_LABELS = re.compile(r"[\s,:|#]")


class Sample(NamedTuple):
    """One value of a metric; ``labels`` are names and values beside the model's."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float
    is_counter: bool


class MetricsExporter:
    """Tells TorchServe what has changed."""

    def __init__(
        self,
        model_name: str,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Have told nothing yet.

        Args:
            model_name: the label of all metrics.
            write: takes lines, each with its end; None writes them to the standard output.
            clock: seconds since the epoch.
        """
        self._model_name = _NOT_IN_LABELS.sub("_", model_name)
        self._host_name = _NOT_IN_LABELS.sub("_", socket.gethostname())
        self._write = write or _write_to_stdout
        self._clock = clock
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def export(self, stats: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> None:
        """Write a line for each figure that has changed since the last call.

        Args:
            stats: what ``EngineCore.stats`` and ``RequestLog.stats`` say, in one.
            histograms: of the latencies, in seconds, by the stems of their names.
        """
        lines = []
        for sample in samples(stats, histograms):
            key = (sample.name, sample.labels)
            told = self._told.get(key)
            if told == sample.value:
                continue
            self._told[key] = sample.value
            change = sample.value - (told or 0.0) if sample.is_counter else sample.value
            lines.append(self._line(sample, change))
        now = self._clock()
        lines.append(self._line(Sample(UPDATED, (), now, is_counter=False), now))
        for piece in _pieces(lines):
            self._write(piece)

    def _line(self, sample: Sample, value: float) -> str:
        labels = ",".join(
            f"{name}:{text}" for name, text in (("model_name", self._model_name), *sample.labels)
        )
        kind = "COUNTER" if sample.is_counter else "GAUGE"
        # The frontend's pattern of a number knows no plus sign.
        number = f"{value:.9f}".rstrip("0").rstrip(".")
        return (
            f"[METRICS]{PREFIX}{sample.name}.{_unit(sample.name)}:{number}|#{labels}"
            f"|#type:{kind}|#hostname:{self._host_name},{int(self._clock())}\n"
        )


def samples(stats: Mapping[str, Any], histograms: Mapping[str, Histogram]) -> Iterator[Sample]:
    """All figures that are exported, under their names without the prefix."""
    for key in GAUGES:
        yield Sample(key, (), stats[key], is_counter=False)
    for key in COUNTERS:
        yield Sample(f"{key}_total", (), stats[key], is_counter=True)
    for reason, count in stats["request_success"].items():
        labels = (("finished_reason", reason),)
        yield Sample("request_success_total", labels, count, is_counter=True)
    for name, histogram in histograms.items():
        count = 0
        for bound, in_bucket in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
            count += in_bucket
            label = "+Inf" if bound == math.inf else str(bound)
            yield Sample(f"{name}_bucket", (("le", label),), count, is_counter=True)
        yield Sample(f"{name}_sum", (), histogram.sum, is_counter=True)
        yield Sample(f"{name}_count", (), count, is_counter=True)


def start_exporting(
    exporter: MetricsExporter,
    read: Callable[[], tuple[Mapping[str, Any], Mapping[str, Histogram]]],
    goes_on: Callable[[], bool],
) -> None:
    """Export what ``read`` gives every ``EXPORT_SECONDS`` while ``goes_on``, from its own thread.

    Where ``read`` raises ``EngineError``, as when a long step keeps the engine from answering, that
    turn is left out.
    """

    def run() -> None:
        never = threading.Event()
        try:
            while goes_on():
                with contextlib.suppress(EngineError):
                    exporter.export(*read())
                never.wait(EXPORT_SECONDS)
        except Exception:
            logger.exception("metrics are not exported any more")

    threading.Thread(target=run, name="metrics", daemon=True).start()


def _unit(name: str) -> str:
    """What ``metrics.yaml`` says, too; it only shows in the metric's description."""
    if "seconds" in name or "_time" in name:
        return "seconds"
    if name.endswith("_bytes_total"):
        return "bytes"
    return "share" if name.endswith("_perc") else "count"


def _pieces(lines: list[str]) -> Iterator[str]:
    """``lines`` joined to pieces that a pipe takes whole."""
    piece = ""
    for line in lines:
        if piece and len((piece + line).encode()) > _PIPE_BYTES:
            yield piece
            piece = ""
        piece += line
    if piece:
        yield piece


def _write_to_stdout(piece: str) -> None:
    # Not through the stream: its buffer may hold a part of somebody's line, which stays there.
    os.write(sys.stdout.fileno(), piece.encode())
