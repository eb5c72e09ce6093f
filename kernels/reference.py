"""The KV cache's operations in plain torch: what every kernel is tested against, and the fallback.

Owns paged attention, writing of new keys and values, and copies of blocks. Knows nothing of models,
requests, or which block holds what. Runs on any device, in fp32 inside, and asks the device for no
number, so that it never waits.

Layout. A layer's ``k_cache`` is ``(blocks, kv_heads, block_size, head_dim)`` and its ``v_cache``
``(blocks, kv_heads, block_size, v_dim)``: views with any strides into block-major pages. A slot is
``block_id * block_size + offset``. A *context* is a sequence's cached keys or values in order of
position, padded to whole blocks.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from pagetier.kernels.metadata import AttentionMetadata

# Bounds on what one product gathers or makes, so that a step's peak memory does not grow with the
# batch: elements of gathered keys or values, and of attention scores (fp32: 128 MiB each).
_MAX_GATHERED_ELEMENTS = 1 << 25
_MAX_SCORE_ELEMENTS = 1 << 25


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a batch's new tokens over their sequences' cached keys and values.

    The new tokens' own keys and values are in the cache already. All sequences with equally many
    new tokens are computed together; in particular, all decodes.

    Args:
        q: queries ``(tokens, heads, head_dim)``, any strides; heads is a multiple of kv_heads.
        k_cache: keys ``(blocks, kv_heads, block_size, head_dim)``.
        v_cache: values ``(blocks, kv_heads, block_size, v_dim)``.
        metadata: the step's block tables and lengths.
        scale: factor of the scores.
        window: number of last positions that a token sees, itself included; 0 means all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 means they stay.
        sinks: a score for each head that takes part in the softmax and has no value, ``(heads,)``.
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
    for context in metadata.shared[key]:
        keys = _gather(k_cache, context)
        values = _gather(v_cache, context)
        for piece in context.pieces:
            mixed = _attend(q[piece.tokens], keys, values, piece, scale, softcap, grouped_sinks)
            out[piece.tokens] = mixed.to(out.dtype)
    return out


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Queries that one product serves.

    Attributes:
        tokens: where they are in the batch, int64 ``(sequences, queries)``.
        hidden: positions that each does not see, ``(sequences, 1, 1, queries, context)``.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Context:
    """Contexts that are gathered together, and the queries that look at them.

    Attributes:
        block_ids: ``(sequences, 1, blocks)``.
        heads: all KV heads, ``(kv_heads, 1)``.
        unreadable: slots that nobody may look at, ``(sequences, 1, context, 1)``.
        pieces: one after the other.
    """

    block_ids: torch.Tensor
    heads: torch.Tensor
    unreadable: torch.Tensor
    pieces: list[_Piece]


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
    heads = torch.arange(kv_heads, device=device)[:, None]
    for group in metadata.query_groups:
        # Contexts are padded to the group's longest; at least one block keeps shapes non-empty.
        num_blocks = max(1, -(-group.max_seq_len // block_size))
        length = num_blocks * block_size
        scores_per_query = num_heads * length
        sequences_at_once = min(
            _MAX_GATHERED_ELEMENTS // (kv_heads * length * width),
            _MAX_SCORE_ELEMENTS // (scores_per_query * group.query_len),
        )
        sequences_at_once = max(1, sequences_at_once)
        queries_at_once = max(1, _MAX_SCORE_ELEMENTS // (scores_per_query * sequences_at_once))
        positions = torch.arange(length, device=device)
        for first in range(0, group.sequences.shape[0], sequences_at_once):
            sequences = group.sequences[first : first + sequences_at_once]
            tokens = group.tokens[first : first + sequences_at_once]
            seq_lens = metadata.seq_lens[sequences].long()[:, None]
            readable = positions < seq_lens
            if window:
                readable &= positions > seq_lens - group.query_len - window
            # A block without a readable slot may have any id, or be somebody else's: block 0 then.
            holds_readable = readable.view(-1, num_blocks, block_size).any(-1)
            tables = metadata.block_tables[sequences, :num_blocks]
            pieces = []
            for start in range(0, group.query_len, queries_at_once):
                own = tokens[:, start : start + queries_at_once]
                # A sequence's new tokens are its last ones.
                steps = torch.arange(start, start + own.shape[1], device=device)
                query_positions = (seq_lens - group.query_len + steps)[..., None]
                hidden = positions > query_positions
                if window:
                    hidden |= positions <= query_positions - window
                pieces.append(_Piece(own, hidden[:, None, None]))
            yield _Context(
                block_ids=torch.where(holds_readable, tables, 0).long()[:, None],
                heads=heads,
                unreadable=~readable[:, None, :, None],
                pieces=pieces,
            )


def _gather(cache: torch.Tensor, context: _Context) -> torch.Tensor:
    """Keys or values in order of position, fp32 ``(sequences, kv_heads, context, dim)``.

    They are zero where nobody may look: unwritten slots may hold NaN, and a weight of 0 would not
    do, since 0 * NaN is NaN.
    """
    # Indexing heads too puts them before the blocks in the same copy.
    gathered = cache[context.block_ids, context.heads].flatten(2, 3).float()
    return gathered.masked_fill_(context.unreadable, 0.0)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    piece: _Piece,
    scale: float,
    softcap: float,
    grouped_sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a piece over its gathered contexts.

    ``q`` is ``(sequences, queries, heads, head_dim)``, ``grouped_sinks``
    ``(1, kv_heads, heads per KV head, 1, 1)``; returns ``(sequences, queries, heads, v_dim)`` in
    fp32.
    """
    num_sequences, num_queries, num_heads, head_dim = q.shape
    kv_heads, length = keys.shape[1:3]
    grouped = (num_sequences, kv_heads, num_heads // kv_heads, num_queries)
    by_kv_head = q.float().view(num_sequences, num_queries, kv_heads, -1, head_dim)
    # The heads that share a KV head become rows of one product.
    q_rows = by_kv_head.permute(0, 2, 3, 1, 4).reshape(num_sequences, kv_heads, -1, head_dim)
    scores = (q_rows * scale @ keys.transpose(-1, -2)).view(*grouped, length)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(piece.hidden, float("-inf"))
    # A padding row sees nothing: its weights must come out 0, not exp(-inf - -inf).
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    if grouped_sinks is not None:
        highest = torch.maximum(highest, grouped_sinks)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if grouped_sinks is not None:
        total += (grouped_sinks - highest).exp()
    weights /= total.clamp_min(torch.finfo(torch.float32).tiny)
    mixed = weights.view(num_sequences, kv_heads, -1, length) @ values
    mixed = mixed.view(*grouped, -1).permute(0, 3, 1, 2, 4)
    return mixed.reshape(num_sequences, num_queries, num_heads, -1)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write new keys and values into their slots, in place, and touch nothing else.

    Args:
        key: ``(tokens, kv_heads, head_dim)``, any strides.
        value: ``(tokens, kv_heads, v_dim)``, any strides.
        k_cache: ``(blocks, kv_heads, block_size, head_dim)``, any strides.
        v_cache: ``(blocks, kv_heads, block_size, v_dim)``, any strides.
        slots: integers ``(tokens,)``, all different; -1 skips a token.
    """
    if slots.shape[0] == 0:
        return
    block_size = k_cache.shape[2]
    # Dropping skipped tokens would need their number, which only the device knows. So a skipped
    # token repeats the write of one that is not skipped; if there is none, slot 0 keeps its value.
    written = slots >= 0
    source = written.int().argmax()
    stand_in = torch.where(written, torch.arange(slots.shape[0], device=slots.device), source)
    slots = slots.index_select(0, stand_in).long()
    any_written = slots >= 0
    slots = slots.clamp_min(0)
    blocks, offsets = slots // block_size, slots % block_size
    for new, cache in ((key, k_cache), (value, v_cache)):
        new = new.index_select(0, stand_in).to(cache.dtype)
        by_slot = cache.transpose(1, 2)
        by_slot[blocks, offsets] = torch.where(
            any_written[:, None, None], new, by_slot[blocks, offsets]
        )


def copy_blocks(pages: torch.Tensor, pairs: torch.Tensor | Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks inside a tier, in place.

    Every source is read before any destination is written.

    Args:
        pages: a tier's pages ``(blocks, block_bytes)``.
        pairs: (source, destination) block ids, ``(pairs, 2)``; destinations are all different.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.int64, device=pages.device).view(-1, 2)
    pages.index_copy_(0, pairs[:, 1], pages.index_select(0, pairs[:, 0]))


def gather_blocks(
    pages: torch.Tensor, block_ids: torch.Tensor | Sequence[int], staging: torch.Tensor
) -> torch.Tensor:
    """Copy scattered blocks into the start of a contiguous staging buffer.

    Args:
        pages: a tier's pages ``(blocks, block_bytes)``.
        block_ids: which blocks, in the order wanted.
        staging: ``(at least len(block_ids), block_bytes)``, on the device of ``pages``.

    Returns:
        The part of ``staging`` that was filled.
    """
    block_ids = torch.as_tensor(block_ids, dtype=torch.int64, device=pages.device)
    filled = staging[: block_ids.shape[0]]
    filled.copy_(pages.index_select(0, block_ids))
    return filled


def scatter_blocks(
    staging: torch.Tensor, pages: torch.Tensor, block_ids: torch.Tensor | Sequence[int]
) -> None:
    """Copy blocks from the start of a contiguous staging buffer to where they belong.

    Args:
        staging: ``(at least len(block_ids), block_bytes)``, on the device of ``pages``.
        pages: a tier's pages ``(blocks, block_bytes)``, written in place.
        block_ids: where each staged block goes, in order; all different.
    """
    block_ids = torch.as_tensor(block_ids, dtype=torch.int64, device=pages.device)
    pages.index_copy_(0, block_ids, staging[: block_ids.shape[0]])
