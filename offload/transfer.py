"""Copies of blocks between the tiers: submitted, ordered after events, polled, never waited for.

Owns the streams (on a GPU) or the worker thread (on a CPU machine) that move the bytes, and the
order of a copy after the step it must follow. Knows nothing of what blocks hold, who needs them,
or whether a block may be touched: the caller keeps sources whole and destinations unread until
``poll`` reports the transfer.
"""

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from pagetier.offload.host_memory import HostPages

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A transfer that has ended after ``seconds``; ``error`` is None if its bytes have arrived."""

    transfer_id: int
    error: str | None
    seconds: float


class Link(Protocol):
    """What moves blocks between the tiers."""

    def submit(
        self, transfer_id: int, block_ids: list[tuple[int, int]], *, to_cpu: bool, after: Any
    ) -> None:
        """Copy (source, destination) blocks, not before the event ``after`` (None: at once)."""
        ...

    def poll(self) -> list[Completion]:
        """The transfers that have ended since the last call."""
        ...

    def wait(self, seconds: float) -> None:
        """Block until a transfer may have ended, at most ``seconds``."""
        ...

    def close(self) -> None:
        """Let transfers under way end and take no more."""
        ...


def merge_runs(block_ids: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring blocks: (first source, first destination, number of blocks)."""
    runs: list[tuple[int, int, int]] = []
    for source, destination in sorted(block_ids):
        if runs:
            first_source, first_destination, length = runs[-1]
            if (source, destination) == (first_source + length, first_destination + length):
                runs[-1] = (first_source, first_destination, length + 1)
                continue
        runs.append((source, destination, 1))
    return runs


def _copy(
    source: torch.Tensor, destination: torch.Tensor, block_ids: list[tuple[int, int]]
) -> None:
    for first_source, first_destination, length in merge_runs(block_ids):
        destination[first_destination : first_destination + length].copy_(
            source[first_source : first_source + length], non_blocking=True
        )


class ThreadLink:
    """The link of a machine without a GPU: one worker thread copies, in order of submission.

    Args:
        gpu_pages: pages of the first tier, uint8 ``[blocks, block_bytes]``, in host memory.
        cpu_pages: pages of the second tier, likewise.
        copy: moves the blocks of one transfer; tests pass one that fails.
    """

    def __init__(
        self,
        gpu_pages: torch.Tensor,
        cpu_pages: torch.Tensor,
        copy: Callable[[torch.Tensor, torch.Tensor, list[tuple[int, int]]], None] = _copy,
    ) -> None:
        self._gpu_pages = gpu_pages
        self._cpu_pages = cpu_pages
        self._copy = copy
        self._jobs: queue.SimpleQueue[tuple[int, list[tuple[int, int]], bool, Any] | None] = (
            queue.SimpleQueue()
        )
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pagetier-link", daemon=True)
        self._thread.start()

    def submit(
        self, transfer_id: int, block_ids: list[tuple[int, int]], *, to_cpu: bool, after: Any
    ) -> None:
        """Queue a transfer; ``after`` is a ``concurrent.futures.Future`` or None."""
        self._jobs.put((transfer_id, block_ids, to_cpu, after))

    def poll(self) -> list[Completion]:
        """The transfers that have ended since the last call."""
        self._ended.clear()
        completions = []
        with contextlib.suppress(queue.Empty):
            while True:
                completions.append(self._done.get_nowait())
        return completions

    def wait(self, seconds: float) -> None:
        """Block until a transfer has ended since the last ``poll``, at most ``seconds``."""
        self._ended.wait(seconds)

    def close(self) -> None:
        """End the worker thread after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            transfer_id, block_ids, to_cpu, after = job
            error = None
            start = time.perf_counter()
            try:
                if isinstance(after, Future):
                    after.exception()  # waits; a failed step is told by its own handle
                    start = time.perf_counter()
                pair = (self._gpu_pages, self._cpu_pages)
                self._copy(*(pair if to_cpu else pair[::-1]), block_ids)
            except Exception as exc:
                error = str(exc) or type(exc).__name__
            self._done.put(Completion(transfer_id, error, time.perf_counter() - start))
            self._ended.set()


class CudaLink:
    """The link of a GPU: a stream out, a stream in, events polled.

    Args:
        gpu_pages: pages of the GPU tier, uint8 ``[blocks, block_bytes]``, on a CUDA device.
        host: pages of the CPU tier, pinned where the host allows it; the link closes them.
    """

    def __init__(self, gpu_pages: torch.Tensor, host: HostPages) -> None:
        self._gpu_pages = gpu_pages
        self._cpu_pages = host.pages
        self._host = host
        self._streams = {
            to_cpu: torch.cuda.Stream(gpu_pages.device)  # type: ignore[no-untyped-call]
            for to_cpu in (True, False)
        }
        self._under_way: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._failed: list[Completion] = []

    def submit(
        self, transfer_id: int, block_ids: list[tuple[int, int]], *, to_cpu: bool, after: Any
    ) -> None:
        """Queue a transfer on its direction's stream; ``after`` is a ``torch.cuda.Event``."""
        stream = self._streams[to_cpu]
        pair = (self._gpu_pages, self._cpu_pages)
        source, destination = pair if to_cpu else pair[::-1]
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        try:
            if after is not None:
                stream.wait_event(after)
            with torch.cuda.stream(stream):
                start.record(stream)
                _copy(source, destination, block_ids)
                end.record(stream)
        except RuntimeError as exc:
            self._failed.append(Completion(transfer_id, str(exc), 0.0))
            return
        self._under_way.append((transfer_id, start, end))

    def poll(self) -> list[Completion]:
        """The transfers that have ended since the last call."""
        completions, self._failed = self._failed, []
        still_under_way = []
        for transfer_id, start, end in self._under_way:
            if end.query():  # type: ignore[no-untyped-call]
                seconds = start.elapsed_time(end) / 1e3
                completions.append(Completion(transfer_id, None, seconds))
            else:
                still_under_way.append((transfer_id, start, end))
        self._under_way = still_under_way
        return completions

    def wait(self, seconds: float) -> None:
        """Block until a transfer may have ended, at most ``seconds``."""
        if self._under_way and not self._failed:
            time.sleep(min(seconds, 1e-4))

    def close(self) -> None:
        """Wait for both streams and unpin the host's pages."""
        for stream in self._streams.values():
            stream.synchronize()
        self._host.close()


def make_link(gpu_pages: torch.Tensor, host: HostPages) -> Link:
    """The link between these pages: streams if the first tier is on a GPU, else a thread."""
    if gpu_pages.is_cuda:
        return CudaLink(gpu_pages, host)
    return ThreadLink(gpu_pages, host.pages)
