"""What attention must know of a step: block tables and lengths, on the device and on the host.

Owns ``AttentionMetadata``, built once a step and shared by all layers of a KV group. Knows nothing
of models, requests or how attention is computed.

The device tensors are for kernels. The host keeps its own copy of the lengths, so that launching
never has to ask the device for a number.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]

_UPLOAD_ALIGNMENT_BYTES = 16


def upload(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """Copy several integer arrays to ``device`` in one transfer, without waiting for it.

    On a CUDA device they travel in one pinned buffer, whose reuse torch orders after the copy.

    Args:
        arrays: int32 or int64 arrays of any shapes.
        device: where to put them; on the CPU they are copied too, so the caller may reuse its own.

    Returns:
        A tensor for each array, of its shape and dtype; they are views of one buffer.
    """
    offsets = [0]
    for array in arrays:
        end = offsets[-1] + array.nbytes
        offsets.append(-(-end // _UPLOAD_ALIGNMENT_BYTES) * _UPLOAD_ALIGNMENT_BYTES)
    on_device = device.type != "cpu"
    host = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=on_device)
    host_bytes = host.numpy()
    for offset, array in zip(offsets, arrays, strict=False):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        host_bytes[offset : offset + array.nbytes] = flat
    buffer = host.to(device, non_blocking=True) if on_device else host
    tensors = []
    for offset, array in zip(offsets, arrays, strict=False):
        dtype = torch.int64 if array.dtype == np.int64 else torch.int32
        piece = buffer[offset : offset + array.nbytes].view(dtype)
        tensors.append(piece.view(array.shape))
    return tensors


@dataclasses.dataclass(frozen=True)
class QueryGroup:
    """Sequences that have equally many new tokens, so that one batched product serves them.

    Attributes:
        sequences: which sequences of the batch, int64 ``(sequences,)``.
        tokens: where their new tokens are in the batch, int64 ``(sequences, query_len)``.
        query_len: new tokens of each.
    """

    sequences: torch.Tensor
    tokens: torch.Tensor
    query_len: int


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where each sequence's keys and values are, and which tokens of the batch are its own.

    Make it with ``build`` for a step, or with ``for_decodes`` once for many steps.

    Attributes:
        block_tables: block ids in order of position, int32 ``(sequences, max_blocks)``. Entries
            past a sequence's length are never used and may hold anything.
        seq_lens: tokens of each sequence, new ones included, int32 ``(sequences,)``; 0 marks a
            padding row.
        query_start_loc: where each sequence's new tokens start in the batch, and the number of all
            new tokens last, int32 ``(sequences + 1,)``.
        host_seq_lens: ``seq_lens`` on the host; None where only the device knows them
            (``for_decodes`` on a CUDA device).
        host_query_lens: new tokens of each sequence, on the host.
        num_tokens: new tokens of the batch.
        num_decodes: sequences with exactly one new token.
        num_prefills: sequences with more than one.
        max_query_len: most new tokens of a sequence.
        shared: what an implementation works out in the first layer and keeps for the others.
        workspace: memory that an implementation takes once and keeps; ``plan`` leaves it.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    host_seq_lens: IntArray | None
    host_query_lens: IntArray
    num_tokens: int
    num_decodes: int
    num_prefills: int
    max_query_len: int
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    workspace: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        *,
        host_seq_lens: IntArray | None = None,
        host_query_start_loc: IntArray | None = None,
    ) -> "AttentionMetadata":
        """Plan a step from its device tensors.

        Args:
            block_tables: see the class.
            seq_lens: see the class.
            query_start_loc: see the class.
            host_seq_lens: the values of ``seq_lens``. Without them, and without
                ``host_query_start_loc``, they are read back from the device, which waits for it.
            host_query_start_loc: the values of ``query_start_loc``.

        Raises:
            ValueError: the shapes do not belong together.
        """
        num_sequences = seq_lens.shape[0]
        if block_tables.shape[0] != num_sequences or query_start_loc.shape[0] != num_sequences + 1:
            raise ValueError(
                f"block_tables {tuple(block_tables.shape)}, seq_lens {tuple(seq_lens.shape)} and "
                f"query_start_loc {tuple(query_start_loc.shape)} are not of one batch."
            )
        if host_seq_lens is None:
            host_seq_lens = seq_lens.cpu().numpy()
        if host_query_start_loc is None:
            host_query_start_loc = query_start_loc.cpu().numpy()
        query_lens = np.diff(host_query_start_loc)
        return cls(
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            host_seq_lens=host_seq_lens,
            host_query_lens=query_lens,
            num_tokens=int(host_query_start_loc[-1]),
            num_decodes=int(np.count_nonzero(query_lens == 1)),
            num_prefills=int(np.count_nonzero(query_lens > 1)),
            max_query_len=int(query_lens.max(initial=0)),
        )

    @classmethod
    def for_decodes(cls, block_tables: torch.Tensor, seq_lens: torch.Tensor) -> "AttentionMetadata":
        """Describe steps of one new token for each sequence, by buffers that outlive the step.

        The buffers' contents may change between steps, on the device too; ``plan`` tells of it.
        On a CUDA device nothing is asked of the host then, so that a captured graph that begins
        with ``plan`` serves any lengths.

        Args:
            block_tables: int32 ``(sequences, max_blocks)``.
            seq_lens: int32 ``(sequences,)``; 0 marks a padding row.
        """
        num_sequences = seq_lens.shape[0]
        if block_tables.shape[0] != num_sequences:
            raise ValueError(
                f"block_tables {tuple(block_tables.shape)} and seq_lens {tuple(seq_lens.shape)} "
                "are not of one batch."
            )
        return cls(
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start_loc=torch.arange(
                num_sequences + 1, dtype=torch.int32, device=seq_lens.device
            ),
            # On the CPU this is the tensor's own memory, and changes with it.
            host_seq_lens=seq_lens.numpy() if seq_lens.device.type == "cpu" else None,
            host_query_lens=np.ones(num_sequences, dtype=np.int32),
            num_tokens=num_sequences,
            num_decodes=num_sequences,
            num_prefills=0,
            max_query_len=min(num_sequences, 1),
        )

    def plan(self) -> None:
        """Forget what was worked out for the step before; its first layer works it out anew.

        Needed once a step after ``for_decodes``, before the first layer, and inside the captured
        region where there is one.
        """
        self.shared.clear()

    @functools.cached_property
    def query_groups(self) -> list[QueryGroup]:
        """The sequences with new tokens, grouped by how many; all decodes are one group.

        Made on first use and kept: kernels that take ragged batches as they are never pay for it.
        """
        starts = np.concatenate([[0], np.cumsum(self.host_query_lens)[:-1]])
        members, tokens = [], []
        for query_len in np.unique(self.host_query_lens[self.host_query_lens > 0]):
            rows = np.flatnonzero(self.host_query_lens == query_len)
            members.append(rows)
            tokens.append(starts[rows, None] + np.arange(query_len)[None])
        uploaded = upload([*members, *tokens], self.seq_lens.device)
        count = len(members)
        return [
            QueryGroup(
                sequences=uploaded[index],
                tokens=uploaded[count + index],
                query_len=tokens[index].shape[1],
            )
            for index in range(count)
        ]
