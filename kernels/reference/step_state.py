"""A decode's inputs, read from rows that stay on the device, and moved on by it; in plain torch.

Knows nothing of requests or models. Each running sequence has a row of some tables; one row more is
of padding, for batches smaller than their buffers.
"""

import torch


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
    """Write the inputs of a decode, one new token for each row, into buffers that stay.

    Args:
        rows: of the batch, int64 ``(size,)``; the last of all rows is padding.
        last_token_ids: by row, int64 ``(all rows,)``.
        num_computed: by row, tokens in the cache: the new token's position, int64 ``(all rows,)``.
        block_tables: by row, int32 ``(all rows, max_blocks)``.
        block_size: tokens in a block.
        token_ids: written, int64 ``(size,)``.
        positions: written, int64 ``(size,)``; 0 for padding.
        slots: written, int64 ``(size,)``; -1 for padding.
        seq_lens: written, new token included, int32 ``(size,)``; 0 for padding.
        batch_tables: written as far as ``seq_lens`` reaches, int32 ``(size, max_blocks)``.
    """
    is_live = rows != num_computed.shape[0] - 1
    torch.index_select(last_token_ids, 0, rows, out=token_ids)
    positions.copy_(num_computed.index_select(0, rows) * is_live)
    torch.index_select(block_tables, 0, rows, out=batch_tables)
    seq_lens.copy_((positions + 1) * is_live)
    blocks = batch_tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    slots.copy_(torch.where(is_live, blocks * block_size + positions % block_size, -1))


def advance_rows(
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    last_token_ids: torch.Tensor,
    num_computed: torch.Tensor,
) -> None:
    """Note the tokens that a decode chose: each row's last one, and one more in its cache.

    Args:
        rows: of the batch, all different but for padding, int64 ``(size,)``.
        token_ids: int64 ``(size,)``.
        last_token_ids: by row, changed in place, int64 ``(all rows,)``.
        num_computed: by row, changed in place, int64 ``(all rows,)``; padding stays as it is.
    """
    last_token_ids.index_copy_(0, rows, token_ids)
    is_live = rows != num_computed.shape[0] - 1
    num_computed.index_copy_(0, rows, num_computed.index_select(0, rows) + is_live)


def change_rows(
    blocks: torch.Tensor,
    lengths: torch.Tensor,
    tokens: torch.Tensor,
    last_token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Take in what the host knows better; no entry is named twice.

    Args:
        blocks: (row, column, block) of entries of block tables, int64 ``(n, 3)``.
        lengths: (row, tokens in the cache), int64 ``(n, 2)``.
        tokens: (row, last token), int64 ``(n, 2)``.
        last_token_ids: by row, changed in place, int64 ``(all rows,)``.
        num_computed: by row, changed in place, int64 ``(all rows,)``.
        block_tables: by row, changed in place, int32 ``(all rows, max_blocks)``.
    """
    rows, columns, block_ids = blocks.unbind(1)
    block_tables.index_put_((rows, columns), block_ids.int())
    num_computed.index_copy_(0, lengths[:, 0], lengths[:, 1])
    last_token_ids.index_copy_(0, tokens[:, 0], tokens[:, 1])
