"""A decode's inputs, read from rows that stay on the device, and moved on by it; one kernel each.

Owns the kernels and their launch. Knows nothing of requests or models. The references, in a dozen
small operators, are those of ``reference.step_state``. All of them write into given buffers, take
nothing from the host that changes from step to step, and may be captured in a graph.

Grids. ``_read_kernel``: a program for each row of the batch; it copies no more of its block table
than the sequence has. ``_advance_kernel`` and ``_change_kernel``: a thread for each entry.
"""

import torch
import triton
import triton.language as tl

_COLUMNS = 256
_ENTRIES = 256


@triton.jit
def _read_kernel(
    rows_ptr, last_token_ids_ptr, num_computed_ptr, tables_ptr,
    token_ids_ptr, positions_ptr, slots_ptr, seq_lens_ptr, batch_tables_ptr,
    padding, table_stride, batch_table_stride, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    is_live = row != padding
    position = tl.where(is_live, tl.load(num_computed_ptr + row), 0)
    column = position // BLOCK_SIZE
    block = tl.load(tables_ptr + row * table_stride + column).to(tl.int64)
    tl.store(token_ids_ptr + index, tl.load(last_token_ids_ptr + row))
    tl.store(positions_ptr + index, position)
    slot = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots_ptr + index, tl.where(is_live, slot, -1))
    tl.store(seq_lens_ptr + index, tl.where(is_live, position + 1, 0).to(tl.int32))
    num_columns = tl.where(is_live, column + 1, 0).to(tl.int32)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        exists = columns < num_columns
        blocks = tl.load(tables_ptr + row * table_stride + columns, mask=exists)
        tl.store(batch_tables_ptr + index * batch_table_stride + columns, blocks, mask=exists)


@triton.jit(do_not_specialize=("size",))
def _advance_kernel(
    rows_ptr, token_ids_ptr, last_token_ids_ptr, num_computed_ptr, size, padding,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    exists = index < size
    row = tl.load(rows_ptr + index, mask=exists, other=0)
    token = tl.load(token_ids_ptr + index, mask=exists, other=0)
    is_live = exists & (row != padding)
    tl.store(last_token_ids_ptr + row, token, mask=is_live)
    length = tl.load(num_computed_ptr + row, mask=is_live, other=0)
    tl.store(num_computed_ptr + row, length + 1, mask=is_live)


@triton.jit(do_not_specialize=("num_blocks", "num_lengths", "num_tokens"))
def _change_kernel(
    blocks_ptr, lengths_ptr, tokens_ptr, last_token_ids_ptr, num_computed_ptr, tables_ptr,
    num_blocks, num_lengths, num_tokens, table_stride, ENTRIES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    exists = index < num_blocks
    row = tl.load(blocks_ptr + index * 3, mask=exists, other=0)
    column = tl.load(blocks_ptr + index * 3 + 1, mask=exists, other=0)
    block = tl.load(blocks_ptr + index * 3 + 2, mask=exists, other=0)
    tl.store(tables_ptr + row * table_stride + column, block.to(tl.int32), mask=exists)
    exists = index < num_lengths
    row = tl.load(lengths_ptr + index * 2, mask=exists, other=0)
    length = tl.load(lengths_ptr + index * 2 + 1, mask=exists, other=0)
    tl.store(num_computed_ptr + row, length, mask=exists)
    exists = index < num_tokens
    row = tl.load(tokens_ptr + index * 2, mask=exists, other=0)
    token = tl.load(tokens_ptr + index * 2 + 1, mask=exists, other=0)
    tl.store(last_token_ids_ptr + row, token, mask=exists)


def read_rows(
    rows: torch.Tensor,
    last_token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_tables: torch.Tensor,
) -> None:
    """Write the inputs of a decode into buffers that stay; see ``reference.read_rows``.

    What ``batch_tables`` has beyond ``seq_lens`` stays as it was.

    Raises:
        ValueError: shapes do not belong together.
    """
    size, width = rows.shape[0], block_tables.shape[1]
    shapes = [tuple(t.shape) for t in (token_ids, positions, slots, seq_lens, batch_tables)]
    if shapes != [*[(size,)] * 4, (size, width)]:
        raise ValueError(
            f"Buffers of {shapes} do not fit {size} rows and tables of {width} columns."
        )
    if size == 0:
        return
    _read_kernel[(size,)](
        rows, last_token_ids, num_computed, block_tables,
        token_ids, positions, slots, seq_lens, batch_tables,
        num_computed.shape[0] - 1, block_tables.stride(0), batch_tables.stride(0),
        BLOCK_SIZE=block_size, COLUMNS=_COLUMNS, num_warps=2,
    )  # fmt: skip


def advance_rows(
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
    num_computed: torch.Tensor,
) -> None:
    """Note the tokens that a decode chose; see ``reference.advance_rows``.

    The row of padding keeps its last token too.

    Raises:
        ValueError: shapes do not belong together.
    """
    size = rows.shape[0]
    if token_ids.shape != rows.shape or last_token_ids.shape != num_computed.shape:
        raise ValueError(
            f"rows {tuple(rows.shape)} and token_ids {tuple(token_ids.shape)}, last_token_ids "
            f"{tuple(last_token_ids.shape)} and num_computed {tuple(num_computed.shape)} do not "
            "belong together."
        )
    if size == 0:
        return
    _advance_kernel[(triton.cdiv(size, _ENTRIES),)](
        rows, token_ids, last_token_ids, num_computed, size, num_computed.shape[0] - 1,
        ENTRIES=_ENTRIES, num_warps=4,
    )  # fmt: skip


def change_rows(
    blocks: torch.Tensor,
    lengths: torch.Tensor,
    tokens: torch.Tensor,
    last_token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Take in what the host knows better; see ``reference.change_rows``.

    Raises:
        ValueError: shapes are not as described.
    """
    shapes = [tuple(changes.shape[1:]) for changes in (blocks, lengths, tokens)]
    if shapes != [(3,), (2,), (2,)]:
        raise ValueError(f"Changes have entries of {shapes}; they must be of 3, 2 and 2 numbers.")
    counts = [changes.shape[0] for changes in (blocks, lengths, tokens)]
    if max(counts) == 0:
        return
    _change_kernel[(triton.cdiv(max(counts), _ENTRIES),)](
        blocks, lengths, tokens, last_token_ids, num_computed, block_tables,
        *counts, block_tables.stride(0), ENTRIES=_ENTRIES, num_warps=4,
    )  # fmt: skip
