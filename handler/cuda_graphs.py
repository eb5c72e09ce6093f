"""Decode steps as CUDA graphs: inputs, forward pass and greedy choice, replayed by one launch.

Owns the sizes of batches there are graphs for, their buffers, capture and replay. Knows nothing of
plans or of how tokens are sampled otherwise: what a graph leaves is the logits, the greedy tokens,
and the rows moved on by these.

A batch runs in the graph of the next larger size; rows of padding fill it, which read and write no
block. All graphs share one memory pool, captured largest first so that the smaller ones fit into
what the largest took: only one runs at a time, and what it leaves is used up before the next.

Nothing that a graph reads is at an address that changes: rows, inputs and caches stay where they
are, so a graph captured once serves whatever happens to sequences and blocks. Without a GPU the
same function runs on the same buffers, uncaptured.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagetier import kernels
from pagetier.handler.compilation import Forward
from pagetier.handler.config import EngineConfig
from pagetier.handler.device_rows import DecodeInputs, DeviceRows
from pagetier.handler.paged_model import ForwardContext, forward_context
from pagetier.kernels import AttentionMetadata
from pagetier.kernels.metadata import upload
from pagetier.offload.tiers import LayerCaches

_NUM_WARM_UPS = 2


@dataclasses.dataclass(frozen=True)
class DecodeOutputs:
    """What a decode leaves; valid until the next one, in the order of the device's work.

    Attributes:
        logits: ``(sequences, vocabulary)``, in the model's dtype.
        token_ids: the greedy tokens, int64 ``(sequences,)``.
        previous_token_ids: the tokens that went in, int64 ``(sequences,)``.
    """

    logits: torch.Tensor
    token_ids: torch.Tensor
    previous_token_ids: torch.Tensor


def default_sizes(max_num_seqs: int) -> list[int]:
    """Sizes of batches to capture, ascending: an eighth to a third apart, up to ``max_num_seqs``.

    A decode's time hardly depends on a few rows of padding, and each size costs memory and time at
    start.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    while sizes[-1] < max_num_seqs:
        sizes.append(sizes[-1] + max(32, sizes[-1] // 8))
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def graph_sizes(config: EngineConfig) -> tuple[int, ...]:
    """The sizes of batches that an engine with these settings captures, ascending."""
    sizes = config.cudagraph_capture_sizes or default_sizes(config.max_num_seqs)
    return tuple(sorted({min(size, config.max_num_seqs) for size in sizes}))


class DecodeGraphs:
    """A graph for each size of batch.

    Args:
        forward: the model, compiled or not.
        rows: of the running sequences.
        caches: each layer's keys and values.
        sizes: of batches; a larger batch than the largest does not run here.
    """

    def __init__(
        self,
        forward: Forward,
        rows: DeviceRows,
        caches: Sequence[LayerCaches],
        sizes: Sequence[int],
    ) -> None:
        self._forward = forward
        self._rows = rows
        self._caches = caches
        self.sizes = sorted(set(sizes))
        device = rows.last_token_ids.device
        self._device = device
        largest = self.sizes[-1]
        inputs = DecodeInputs.allocate(largest, rows.block_tables.shape[1], device)
        self._inputs = {size: inputs.first(size) for size in self.sizes}
        self._metadata = {
            size: AttentionMetadata.for_decodes(some.block_tables, some.seq_lens)
            for size, some in self._inputs.items()
        }
        self._batch_rows = torch.full((largest,), rows.padding, dtype=torch.int64, device=device)
        self._kept_tokens = torch.arange(largest, device=device)
        self._token_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._host_rows: npt.NDArray[np.int64] | None = None  # what ``_batch_rows`` holds
        self._replays: dict[int, Callable[[], object]] = {}
        self._logits: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[int], None] | None = None) -> None:
        """Capture a graph for each size, on a CUDA device; nothing to do elsewhere.

        Runs every size on padding alone, which writes no block.

        Args:
            progress: called with each size that is done.
        """
        if self._device.type != "cuda":
            return
        self._put_rows(np.zeros(0, dtype=np.int64), self.sizes[-1])
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        for size in reversed(self.sizes):
            stream.wait_stream(torch.cuda.current_stream(self._device))
            # Kernels are compiled and workspaces taken before anything is recorded.
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARM_UPS):
                    self._step(size)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._logits[size] = self._step(size)
            self._replays[size] = graph.replay
            if progress is not None:
                progress(size)
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Let go of graphs and caches; no replay may be under way."""
        self._replays.clear()
        self._logits.clear()
        self._caches = []

    def fits(self, num_sequences: int) -> bool:
        """Whether there is a graph for a batch of that many sequences."""
        return num_sequences <= self.sizes[-1]

    def size_for(self, num_sequences: int) -> int:
        """The size of the graph that such a batch runs in."""
        return self.sizes[bisect.bisect_left(self.sizes, num_sequences)]

    @torch.inference_mode()
    def run(self, host_rows: npt.NDArray[np.int64]) -> DecodeOutputs:
        """Run a decode of these rows; on a GPU, start it.

        Args:
            host_rows: rows of the batch, int64 ``(sequences,)``, on the host.
        """
        count = len(host_rows)
        size = self.size_for(count)
        self._put_rows(host_rows, size)
        previous = self._inputs[size].token_ids[:count]
        if size in self._replays:
            self._replays[size]()
            return DecodeOutputs(self._logits[size][:count], self._token_ids[:count], previous)
        logits = self._step(size)[:count]
        # Whoever reads tokens on the CPU may do so after the next step ran.
        return DecodeOutputs(logits, self._token_ids[:count].clone(), previous)

    def _put_rows(self, host_rows: npt.NDArray[np.int64], size: int) -> None:
        """Let ``_batch_rows`` begin with these rows and padding up to ``size``."""
        padded = np.full(size, self._rows.padding, dtype=np.int64)
        padded[: len(host_rows)] = host_rows
        if self._host_rows is not None and np.array_equal(self._host_rows, padded):
            return
        self._host_rows = padded
        (uploaded,) = upload([padded], self._device)
        self._batch_rows[:size].copy_(uploaded, non_blocking=True)

    def _step(self, size: int) -> torch.Tensor:
        """All of a decode on the device: what a graph records. Returns the logits."""
        rows, inputs, metadata = self._batch_rows[:size], self._inputs[size], self._metadata[size]
        self._rows.read(rows, inputs)
        metadata.plan()
        with forward_context(ForwardContext(self._caches, inputs.slots, metadata)):
            logits = self._forward(
                inputs.token_ids[None], inputs.positions[None], self._kept_tokens[:size]
            )[0]
        token_ids = self._token_ids[:size]
        kernels.greedy_tokens(logits, out=token_ids)
        self._rows.advance(rows, token_ids)
        return logits
