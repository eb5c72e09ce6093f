"""Paged attention in plain torch, without waiting for the device.

Owns how a batch is divided into products of bounded size. Knows nothing of models, requests, or
which block holds what. A *context* is a sequence's cached keys or values in order of position,
padded to whole blocks.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from pagetier.kernels.metadata import AttentionMetadata, IntArray, upload

# Bounds on what one product gathers or makes, so that a step's peak memory does not grow with the
# batch: elements of gathered keys or values, and of attention scores (fp32: 128 MiB each).
_MAX_GATHERED_ELEMENTS = 1 << 25
_MAX_SCORE_ELEMENTS = 1 << 25
# Keys that may be gathered in vain before a product of its own is cheaper: about as long to copy
# as the operators of a product take to start.
_MAX_PADDING_ELEMENTS = 1 << 17


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a batch's new tokens over their sequences' cached keys and values.

    The new tokens' own keys and values are in the cache already. Sequences with equally many new
    tokens, in particular decodes, are computed together if they are about equally long.

    Args:
        q: queries ``(tokens, heads, head_dim)``, any strides; heads is a multiple of kv_heads.
        k_cache: keys ``(blocks, kv_heads, block_size, head_dim)``.
        v_cache: values ``(blocks, kv_heads, block_size, v_dim)``, of the same dtype. Caches in
            int8 or float8_e4m3fn are multiplied by their scales.
        metadata: the step's block tables and lengths.
        scale: factor of the scores.
        window: number of last positions that a token sees, itself included; 0 means all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 means they stay.
        sinks: a score for each head that takes part in the softmax and has no value, ``(heads,)``.
        k_scale: of each key of a quantised cache, float32 ``(blocks, kv_heads, block_size)``, any
            strides; None for others.
        v_scale: of each value, likewise.
        out: where to write, ``(tokens, heads, v_dim)``; None allocates it.

    Returns:
        ``out``, of ``q``'s dtype unless it was given. Rows of padding, and of tokens beyond the
        last sequence, are zero.
    """
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, block_size, value_dim = v_cache.shape[1:]
    if out is None:
        out = q.new_empty(num_tokens, num_heads, value_dim)
    if metadata.num_tokens < num_tokens:
        out[metadata.num_tokens :] = 0
    grouped_sinks = None if sinks is None else sinks.float().view(1, kv_heads, -1, 1, 1)
    key = (block_size, window, num_heads, kv_heads, max(head_dim, value_dim))
    if key not in metadata.shared:
        metadata.shared[key] = list(_plan(metadata, *key))
    # All layers gather into the same memory: taking fresh memory for each costs a CPU more, in page
    # faults, than the copy itself.
    buffers = metadata.workspace.setdefault("buffers", ([], []))
    for context in metadata.shared[key]:
        keys = _gather(k_cache, k_scale, context, buffers[0])
        values = _gather(v_cache, v_scale, context, buffers[1])
        for piece in context.pieces:
            queries = q.index_select(0, piece.tokens).float()
            # The heads that share a KV head become rows of one product.
            rows = queries.view(*piece.shape, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
            rows = rows.reshape(piece.shape[0], kv_heads, -1, head_dim)
            if softcap or sinks is not None or q.device.type != "cpu":
                mixed = _attend(rows, keys, values, piece, scale, softcap, grouped_sinks)
            else:
                mixed = scaled_dot_product_attention(
                    rows, keys, values, attn_mask=piece.mask(rows.shape[2]), scale=scale
                )
            mixed = mixed.view(piece.shape[0], kv_heads, -1, piece.shape[1], value_dim)
            mixed = mixed.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, value_dim)
            out.index_copy_(0, piece.tokens, mixed.to(out.dtype))
    return out


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Queries that one product serves.

    Attributes:
        tokens: where they are in the batch, int64, sequence by sequence.
        shape: sequences, and queries of each.
        hidden: positions that each does not see, ``(sequences, 1, 1, queries, context)``.
    """

    tokens: torch.Tensor
    shape: tuple[int, int]
    hidden: torch.Tensor
    _masks: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def mask(self, num_rows: int) -> torch.Tensor:
        """What is added to the scores of ``num_rows`` rows, ``(sequences, 1, rows, context)``."""
        if num_rows not in self._masks:
            hidden = self.hidden[:, 0]
            mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -math.inf)
            num_queries = self.shape[1]
            if num_queries > 1:
                mask = mask.repeat(1, 1, num_rows // num_queries, 1)
            self._masks[num_rows] = mask
        return self._masks[num_rows]


@dataclasses.dataclass(frozen=True)
class _Context:
    """Contexts that are gathered together, and the queries that look at them.

    A gathered *row* is one head's part of one block; rows are in the order of sequence, head and
    block.

    Attributes:
        block_ids: ``(sequences, 1, blocks)``.
        heads: all KV heads, ``(kv_heads, 1)``.
        unreadable: gathered keys or values that may be NaN, since nobody may look at them, int64;
            a number counts those of all sequences and heads.
        pieces: one after the other.
        source_rows: rows to gather, by how many of them a page of the cache is long.
    """

    block_ids: torch.Tensor
    heads: torch.Tensor
    unreadable: torch.Tensor
    pieces: list[_Piece]
    source_rows: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def rows(self, rows_per_page: int) -> torch.Tensor:
        """Which rows of the cache to gather, int64 ``(sequences * kv_heads * blocks,)``."""
        if rows_per_page not in self.source_rows:
            rows = self.block_ids * rows_per_page + self.heads
            self.source_rows[rows_per_page] = rows.flatten()
        return self.source_rows[rows_per_page]


def _plan(
    metadata: AttentionMetadata,
    block_size: int,
    window: int,
    num_heads: int,
    kv_heads: int,
    width: int,
) -> Iterator[_Context]:
    """Divide a step into products of bounded size; ``width`` is the larger of key and value."""
    device = metadata.seq_lens.device
    assert metadata.host_seq_lens is not None, "the reference must know the lengths"
    heads = torch.arange(kv_heads, device=device)[:, None]
    for group in metadata.query_groups:
        members = np.flatnonzero(metadata.host_query_lens == group.query_len)
        host_seq_lens = metadata.host_seq_lens[members]
        for picked, num_blocks in _batches(
            host_seq_lens, group.query_len, block_size, num_heads, kv_heads, width
        ):
            length = num_blocks * block_size
            readable = _readable(host_seq_lens[picked], group.query_len, length, window)
            by_block = readable.reshape(len(picked), num_blocks, block_size)
            used, whole = by_block.any(-1), by_block.all(-1)
            # A block without a readable slot may have any id, or be somebody else's. Another one
            # of the sequence stands in for it, of which all is readable: its weights will be 0.
            # Where there is none, it is block 0, and unclean.
            has_whole = whole.any(-1, keepdims=True)
            stand_in = np.where(used, np.arange(num_blocks), whole.argmax(-1)[:, None])
            unclean = np.where(has_whole, used & ~whole, ~whole)
            row, position = np.nonzero(~readable & unclean.repeat(block_size, axis=1))
            unreadable_rows = (row[:, None] * kv_heads + np.arange(kv_heads)) * length
            chosen, source, has_source, unreadable = upload(
                [
                    picked,
                    stand_in,
                    np.asarray(used | has_whole, dtype=np.int32),
                    (unreadable_rows + position[:, None]).reshape(-1),
                ],
                device,
            )
            sequences, tokens = group.sequences[chosen], group.tokens[chosen]
            tables = metadata.block_tables[sequences].gather(1, source).long() * has_source
            yield _Context(
                block_ids=tables[:, None],
                heads=heads,
                unreadable=unreadable,
                pieces=_pieces(metadata, sequences, tokens, num_heads, length, window),
            )


def _batches(
    seq_lens: IntArray,
    query_len: int,
    block_size: int,
    num_heads: int,
    kv_heads: int,
    width: int,
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Which sequences of a group are gathered together, and to how many blocks they are padded.

    Neighbours in length, longest first, so that little is gathered that nobody looks at.
    """
    order = np.argsort(-seq_lens, kind="stable")
    # At least one block keeps shapes non-empty.
    num_blocks = np.maximum(1, -(-seq_lens[order].astype(np.int64) // block_size))
    first = 0
    while first < len(order):
        length = int(num_blocks[first]) * block_size
        at_once = min(
            _MAX_GATHERED_ELEMENTS // (kv_heads * length * width),
            _MAX_SCORE_ELEMENTS // (num_heads * length * query_len),
        )
        padding = np.cumsum(num_blocks[first] - num_blocks[first : first + max(1, at_once)])
        padded_elements = padding * (kv_heads * block_size * width)
        count = int(np.searchsorted(padded_elements, _MAX_PADDING_ELEMENTS, side="right"))
        yield order[first : first + count], int(num_blocks[first])
        first += count


def _readable(
    seq_lens: IntArray, query_len: int, length: int, window: int
) -> npt.NDArray[np.bool_]:
    """Positions that any query of a sequence sees, ``(sequences, length)``."""
    positions = np.arange(length)
    readable: npt.NDArray[np.bool_] = positions < seq_lens[:, None]
    if window:
        readable &= positions > seq_lens[:, None] - query_len - window
    return readable


def _pieces(
    metadata: AttentionMetadata,
    sequences: torch.Tensor,
    tokens: torch.Tensor,
    num_heads: int,
    length: int,
    window: int,
) -> list[_Piece]:
    """Queries ``tokens`` ``(sequences, query_len)`` in pieces whose scores are few enough."""
    num_sequences, query_len = tokens.shape
    device = tokens.device
    at_once = max(1, _MAX_SCORE_ELEMENTS // (num_heads * length * num_sequences))
    positions = torch.arange(length, device=device)
    # A sequence's new tokens are its last ones.
    starts = metadata.seq_lens[sequences].long()[:, None] - query_len
    pieces = []
    for first in range(0, query_len, at_once):
        own = tokens[:, first : first + at_once]
        steps = torch.arange(first, first + own.shape[1], device=device)
        query_positions = (starts + steps)[..., None]
        hidden = positions > query_positions
        if window:
            hidden |= positions <= query_positions - window
        pieces.append(_Piece(own.reshape(-1), (num_sequences, own.shape[1]), hidden[:, None, None]))
    return pieces


def _gather(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    context: _Context,
    buffer: list[torch.Tensor],
) -> torch.Tensor:
    """Keys or values in order of position, fp32 ``(sequences, kv_heads, context, dim)``.

    Unwritten slots may hold NaN, and a weight of 0 would not do, since 0 * NaN is NaN: what nobody
    may look at is zero.

    ``buffer`` holds memory to gather into, or nothing yet; it may keep another piece instead.
    """
    num_blocks, kv_heads, block_size, dim = cache.shape
    dtype = cache.dtype
    if dtype == torch.float8_e4m3fn:
        cache = cache.view(torch.uint8)  # which every device can select from
    row = block_size * dim
    if cache.stride()[1:] == (row, dim, 1) and cache.stride(0) % row == 0:
        # Pages of whole rows: selecting rows takes a third of the time of indexing on a CPU.
        rows_per_page = cache.stride(0) // row
        num_rows = (num_blocks - 1) * rows_per_page + kv_heads
        rows = cache.as_strided((num_rows, row), (row, 1))
        wanted = context.rows(rows_per_page)
        num_elements = wanted.shape[0] * row
        if not buffer or buffer[0].dtype != cache.dtype or buffer[0].shape[0] < num_elements:
            buffer[:] = [cache.new_empty(num_elements)]
        gathered = buffer[0][:num_elements].view(-1, row)
        torch.index_select(rows, 0, wanted, out=gathered)
    else:
        # Indexing heads too puts them before the blocks in the same copy.
        gathered = cache[context.block_ids, context.heads]
    gathered = gathered.view(dtype).view(context.block_ids.shape[0], kv_heads, -1, dim).float()
    if scales is not None:
        by_position = scales[context.block_ids, context.heads]
        gathered *= by_position.view(*gathered.shape[:3], 1)
    if len(context.unreadable):
        gathered.view(-1, dim).index_fill_(0, context.unreadable, 0.0)
    return gathered


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    piece: _Piece,
    scale: float,
    softcap: float,
    grouped_sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a piece over its gathered contexts, where torch's own does not serve.

    That knows neither a cap nor sinks, and is relied on for rows that see nothing on a CPU alone.

    ``rows`` is ``(sequences, kv_heads, heads per KV head * queries, head_dim)``, ``grouped_sinks``
    ``(1, kv_heads, heads per KV head, 1, 1)``; the result is like ``rows``, with ``v_dim``.
    """
    num_sequences, kv_heads, num_rows, _ = rows.shape
    length = keys.shape[2]
    scores = (rows * scale @ keys.transpose(-1, -2)).view(
        num_sequences, kv_heads, -1, piece.shape[1], length
    )
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(piece.hidden, -math.inf)
    # A padding row sees nothing: its weights must come out 0, not exp(-inf - -inf).
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    if grouped_sinks is not None:
        highest = torch.maximum(highest, grouped_sinks)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if grouped_sinks is not None:
        total += (grouped_sinks - highest).exp()
    weights /= total.clamp_min(torch.finfo(torch.float32).tiny)
    return weights.view(num_sequences, kv_heads, num_rows, length) @ values
