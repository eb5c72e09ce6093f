"""How the attention of a step is cut into items, each the work of one program for one KV head.

Owns the form of an item and its making: for decodes by a small kernel on the device, so that a
captured graph serves any lengths; for prompts, whose lengths the host knows, by the host. Knows
nothing of queries, keys and values themselves, nor of how an item is computed.

An item is some neighbouring queries of one sequence and a range of the positions they look at. The
positions of a long sequence are divided among several items, so that few sequences keep a whole
device busy; the one that finishes last combines their results. Items are the rows of one int32
tensor ``(items, 8)``; where there are fewer than rows, the others have 0 ``num_items``::

    sequence │ token │ first │ last │ position │ num_queries │ first_item │ num_items
    ─ row of the block tables
               ─ of the batch: its first query
                       ─ positions [first, last) are read
                                      ─ of the first query in its sequence
                                                                ─ of those with the same queries
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pagetier.kernels.metadata import AttentionMetadata, upload

FIELDS = 8
_LANES = 32


@dataclasses.dataclass(frozen=True)
class Items:
    """Items of one launch.

    Attributes:
        rows: int32 ``(items, 8)`` on the device, see the module; a launch has as many programs for
            each KV head.
    """

    rows: torch.Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]


@triton.jit(
    do_not_specialize=["num_sequences", "max_items", "window", "target_items", "keys", "min_keys"]
)
def _plan_decodes_kernel(
    seq_lens_ptr, query_start_loc_ptr, items_ptr,
    num_sequences, max_items, window, target_items, keys, min_keys,
    PADDED: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # Each program works out the whole plan, which is little, and writes its own sequence's items.
    own = tl.program_id(0)
    row = tl.arange(0, PADDED)
    ok = row < num_sequences
    seq_len = tl.load(seq_lens_ptr + row, mask=ok, other=0)
    query_start = tl.load(query_start_loc_ptr + row, mask=ok, other=0)
    query_end = tl.load(query_start_loc_ptr + row + 1, mask=ok, other=0)
    is_decode = query_end - query_start == 1
    num_keys = tl.where(is_decode, tl.minimum(seq_len, window), 0)
    total = tl.sum(num_keys, 0)
    wanted = tl.maximum(tl.cdiv(total, target_items), min_keys)
    # As many items as come closest to what is wanted, equally long but for the last. A sequence of
    # length 0 gets an item too, which writes its zeros.
    counts = tl.maximum((num_keys + wanted // 2) // wanted, 1)
    per_items = tl.maximum(tl.cdiv(tl.cdiv(num_keys, counts), keys), 1) * keys
    counts = tl.where(is_decode, tl.maximum(tl.cdiv(num_keys, per_items), 1), 0)
    if own == 0:
        for start in range(tl.sum(counts, 0), max_items, LANES):
            unused = start + tl.arange(0, LANES)
            no_items = tl.zeros([LANES], tl.int32)
            tl.store(items_ptr + unused * FIELDS + 7, no_items, mask=unused < max_items)
    first_item = tl.sum(tl.where(row < own, counts, 0), 0)
    num_items = tl.sum(tl.where(row == own, counts, 0), 0)
    own_len = tl.sum(tl.where(row == own, seq_len, 0), 0)
    own_token = tl.sum(tl.where(row == own, query_start, 0), 0)
    per_item = tl.sum(tl.where(row == own, per_items, 0), 0)
    begin = tl.maximum(own_len - window, 0)
    for start in range(0, num_items, LANES):
        part = start + tl.arange(0, LANES)
        mine = part < num_items
        first = begin + part * per_item
        at = items_ptr + (first_item + part) * FIELDS
        tl.store(at, tl.zeros([LANES], tl.int32) + own, mask=mine)
        tl.store(at + 1, tl.zeros([LANES], tl.int32) + own_token, mask=mine)
        tl.store(at + 2, first, mask=mine)
        tl.store(at + 3, tl.minimum(first + per_item, own_len), mask=mine)
        tl.store(at + 4, tl.zeros([LANES], tl.int32) + (own_len - 1), mask=mine)
        tl.store(at + 5, tl.full([LANES], 1, tl.int32), mask=mine)
        tl.store(at + 6, tl.zeros([LANES], tl.int32) + first_item, mask=mine)
        tl.store(at + 7, tl.zeros([LANES], tl.int32) + num_items, mask=mine)


def decode_items(
    metadata: AttentionMetadata, *, window: int, target_items: int, keys: int, min_keys: int
) -> Items:
    """The items of all sequences with one new token; planned once a step, by the device.

    Args:
        metadata: of the step.
        window: last positions that a token sees; 0 means all.
        target_items: about how many items all positions together would be divided into.
        keys: positions that a program reads in one round; items are multiples of it.
        min_keys: fewest positions of an item, if its sequence has as many.
    """
    num_sequences = metadata.seq_lens.shape[0]
    key = ("decode items", window, target_items, keys, min_keys)
    if key not in metadata.workspace:
        rows = metadata.seq_lens.new_empty((num_sequences + target_items, FIELDS))
        metadata.workspace[key] = Items(rows)
    items: Items = metadata.workspace[key]
    if key not in metadata.shared:
        metadata.shared[key] = True
        _plan_decodes_kernel[(num_sequences,)](
            metadata.seq_lens, metadata.query_start_loc, items.rows,
            num_sequences, len(items), window or 2**31 - 1, target_items, keys, min_keys,
            PADDED=triton.next_power_of_2(num_sequences), FIELDS=FIELDS, LANES=_LANES, num_warps=4,
        )  # fmt: skip
    return items


def prefill_items(
    metadata: AttentionMetadata,
    *,
    window: int,
    queries: int,
    target_items: int,
    keys: int,
    min_keys: int,
) -> Items:
    """The items of all sequences with more than one new token; made once a step, by the host.

    ``queries`` is how many neighbouring queries share an item, at most; for the others see
    ``decode_items``. Items with the most keys come first: started last they would end last.
    """
    key: Any = ("prefill items", window, queries, target_items, keys, min_keys)
    if key not in metadata.shared:
        assert metadata.host_seq_lens is not None
        query_lens = np.asarray(metadata.host_query_lens, dtype=np.int64)
        sequences = np.flatnonzero(query_lens > 1)
        sequence, within = _repeat(sequences, -(-query_lens[sequences] // queries))
        offset = within * queries
        num_queries = np.minimum(queries, query_lens[sequence] - offset)
        starts = np.cumsum(query_lens) - query_lens
        seq_lens = np.asarray(metadata.host_seq_lens, dtype=np.int64)[sequence]
        position = seq_lens - query_lens[sequence] + offset
        end = position + num_queries
        begin = np.maximum(position - window + 1, 0) if window else np.zeros_like(position)
        num_keys = end - begin
        wanted = max(-(-num_keys.sum() // target_items), min_keys)
        counts = np.maximum((num_keys + wanted // 2) // wanted, 1)
        per_item = -(-num_keys // (counts * keys)) * keys
        order = np.argsort(-num_keys, kind="stable")
        counts = -(-num_keys // per_item)[order]
        tile, part = _repeat(order, counts)
        first = begin[tile] + part * per_item[tile]
        rows = np.empty((len(tile), FIELDS), dtype=np.int32)
        for field, values in enumerate((
            sequence[tile],
            (starts[sequence] + offset)[tile],
            first,
            np.minimum(first + per_item[tile], end[tile]),
            position[tile],
            num_queries[tile],
            np.arange(len(tile)) - part,
            np.repeat(counts, counts),
        )):  # fmt: skip
            rows[:, field] = values
        metadata.shared[key] = Items(upload([rows], metadata.seq_lens.device)[0])
    items: Items = metadata.shared[key]
    return items


def _repeat(values: Any, counts: Any) -> tuple[Any, Any]:
    """Each value as often as its count says, and which repetition of it each of them is."""
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(values, counts), within
