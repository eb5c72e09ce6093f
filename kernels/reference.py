"""The KV cache's operations in plain torch: what every kernel is tested against, and the fallback.

Owns paged attention, writing of new keys and values, and copies of blocks. Knows nothing of models,
requests, or which block holds what. Runs on any device, in fp32 inside, and asks the device for no
number, so that it never waits.

Layout. A layer's ``k_cache`` is ``(blocks, kv_heads, block_size, head_dim)`` and its ``v_cache``
``(blocks, kv_heads, block_size, v_dim)``: views with any strides into block-major pages. A slot is
``block_id * block_size + offset``. A *context* is a sequence's cached keys or values in order of
position, padded to whole blocks.
"""

from collections.abc import Sequence

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
    num_tokens, num_heads, _ = q.shape
    kv_heads, block_size, value_dim = v_cache.shape[1:]
    if out is None:
        out = q.new_empty(num_tokens, num_heads, value_dim)
    if metadata.num_tokens < num_tokens:
        out[metadata.num_tokens :] = 0
    per_kv_head = num_heads // kv_heads
    grouped_sinks = None if sinks is None else sinks.float().view(kv_heads, per_kv_head)
    for group in metadata.query_groups:
        # Contexts are padded to the group's longest; at least one block keeps shapes non-empty.
        num_blocks = max(1, -(-group.max_seq_len // block_size))
        context = num_blocks * block_size
        gathered_per_sequence = kv_heads * context * max(q.shape[-1], value_dim)
        scores_per_query = num_heads * context
        sequences_at_once = max(
            1,
            min(
                _MAX_GATHERED_ELEMENTS // gathered_per_sequence,
                _MAX_SCORE_ELEMENTS // (scores_per_query * group.query_len),
            ),
        )
        queries_at_once = max(1, _MAX_SCORE_ELEMENTS // (scores_per_query * sequences_at_once))
        for first in range(0, group.sequences.shape[0], sequences_at_once):
            sequences = group.sequences[first : first + sequences_at_once]
            group_tokens = group.tokens[first : first + sequences_at_once]
            seq_lens = metadata.seq_lens[sequences].long()
            tables = metadata.block_tables[sequences, :num_blocks]
            keys, values = _gather_context(
                k_cache, v_cache, tables, seq_lens, group.query_len, window
            )
            for start in range(0, group.query_len, queries_at_once):
                tokens = group_tokens[:, start : start + queries_at_once]
                # A sequence's new tokens are its last ones.
                query_positions = (
                    seq_lens[:, None]
                    - group.query_len
                    + torch.arange(start, start + tokens.shape[1], device=q.device)
                )
                mixed = _attend(
                    q[tokens],
                    keys,
                    values,
                    query_positions,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                    grouped_sinks=grouped_sinks,
                )
                out[tokens] = mixed.to(out.dtype)
    return out


def _gather_context(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_len: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence's context, fp32, zero where nobody may look.

    Returns keys ``(sequences, kv_heads, context, head_dim)`` and values likewise.
    """
    num_sequences, num_blocks = tables.shape
    kv_heads, block_size = k_cache.shape[1:3]
    positions = torch.arange(num_blocks * block_size, device=k_cache.device)
    readable = positions < seq_lens[:, None]
    if window:
        readable &= positions > (seq_lens - query_len - window)[:, None]
    # A block without a readable slot may have any id, or be somebody else's: look at block 0.
    holds_readable = readable.view(num_sequences, num_blocks, block_size).any(-1)
    block_ids = torch.where(holds_readable, tables, 0).long()[:, None]
    heads = torch.arange(kv_heads, device=k_cache.device)[:, None]
    gathered = []
    for cache in (k_cache, v_cache):
        # Indexing heads too puts them before the blocks in the same copy.
        context = cache[block_ids, heads].flatten(2, 3).float()
        # Unwritten slots may hold NaN, and 0 * NaN is NaN: a weight of 0 would not do.
        gathered.append(context.masked_fill_(~readable[:, None, :, None], 0.0))
    return gathered[0], gathered[1]


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_positions: torch.Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
    grouped_sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over gathered contexts; the shapes are those of ``_gather_context``.

    ``q`` is ``(sequences, queries, heads, head_dim)``, ``query_positions`` is
    ``(sequences, queries)`` and ``grouped_sinks`` ``(kv_heads, heads per kv head)``; returns
    ``(sequences, queries, heads, v_dim)`` in fp32.
    """
    num_sequences, num_queries, num_heads, head_dim = q.shape
    kv_heads, context = keys.shape[1:3]
    per_kv_head = num_heads // kv_heads
    grouped = (num_sequences, kv_heads, per_kv_head, num_queries)
    by_kv_head = q.float().view(num_sequences, num_queries, kv_heads, per_kv_head, head_dim)
    # The heads that share a KV head become rows of one product.
    q_rows = by_kv_head.permute(0, 2, 3, 1, 4).reshape(num_sequences, kv_heads, -1, head_dim)
    scores = (q_rows @ keys.transpose(-1, -2) * scale).view(*grouped, context)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(context, device=q.device)
    visible = positions <= query_positions[..., None]
    if window:
        visible &= positions > query_positions[..., None] - window
    scores = scores.masked_fill_(~visible[:, None, None], float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    if grouped_sinks is not None:
        highest = torch.maximum(highest, grouped_sinks[None, :, :, None, None])
    # A padding row sees nothing: its weights must come out 0, not exp(-inf - -inf).
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (scores - highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if grouped_sinks is not None:
        total += (grouped_sinks[None, :, :, None, None] - highest).exp()
    weights /= total.clamp_min(torch.finfo(torch.float32).tiny)
    mixed = weights.view(num_sequences, kv_heads, -1, context) @ values
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
