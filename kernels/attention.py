"""Paged attention as one Triton kernel: decodes and prompts, any prefix, read from the blocks.

Owns the kernel, how a batch is cut into tiles, and the launch settings. Knows nothing of models or
of who owns a block. The reference is ``reference.paged_attention``.

Formula. For a query at position ``i`` of its sequence, over positions ``j <= i`` (and
``j > i - window``, with a window)::

    out = sum_j softmax_j(cap(scale * q . k_j)) v_j,    cap(x) = softcap * tanh(x / softcap)

where a sink adds ``exp(sink)`` to the softmax's denominator. It is computed in one pass with a
running maximum, in base 2 and fp32.

Grid ``(tiles, kv_heads, splits)``. A tile is up to ``QUERIES`` neighbouring tokens of one sequence
with all query heads of one KV head: ``QUERIES * GROUP`` rows that share every key they read. A
decode is a tile of one token. For few and long sequences the keys of a tile are split among
programs; the last one to finish combines their partial results (the splitting of Flash-Decoding,
Dao et al. 2023), so that one launch does it all.

Reads stay inside a sequence: no slot at or beyond its length is loaded, and with a window no block
outside of it.
"""

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

from pagetier.kernels.metadata import AttentionMetadata, IntArray, upload

# Rows of a tile: tl.dot takes no fewer than 16.
_MIN_ROWS = 16
_PREFILL_ROWS = 64
_KEYS_PER_ROUND = 64
_MAX_SPLITS = 32
# Keys of a split, at least: below, combining costs more than it gains.
_MIN_SPLIT_KEYS = 256
# Programs that are launched if splitting can make so many, for each multiprocessor.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_MULTIPROCESSORS_OF_UNKNOWN_DEVICE = 64


@triton.jit
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sinks_ptr,
    block_tables_ptr, seq_lens_ptr, query_start_loc_ptr, tile_sequences_ptr, tile_offsets_ptr,
    partial_ptr, statistics_ptr, counters_ptr,
    scale, softcap, window,
    q_stride_token, q_stride_head,
    k_stride_block, k_stride_head, k_stride_slot,
    v_stride_block, v_stride_head, v_stride_slot,
    out_stride_token, out_stride_head, table_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, QUERIES: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = QUERIES * GROUP_PADDED
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tile_sequences_ptr + tile).to(tl.int64)
    offset = tl.load(tile_offsets_ptr + tile)
    query_start = tl.load(query_start_loc_ptr + sequence)
    query_len = tl.load(query_start_loc_ptr + sequence + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + sequence)

    rows = tl.arange(0, ROWS)
    query = offset + rows // GROUP_PADDED
    in_group = rows % GROUP_PADDED
    row_ok = (query < query_len) & (in_group < GROUP)
    position = seq_len - query_len + query
    head = kv_head * GROUP + in_group
    token = (query_start + query).to(tl.int64)

    key_dim = tl.arange(0, KEY_DIM_PADDED)
    value_dim = tl.arange(0, VALUE_DIM_PADDED)
    q = tl.load(
        q_ptr + token[:, None] * q_stride_token + head[:, None] * q_stride_head + key_dim[None, :],
        mask=row_ok[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )

    # The tile's last query sees up to its own position, the first from its window on.
    end = tl.minimum(seq_len, seq_len - query_len + offset + QUERIES)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(seq_len - query_len + offset - window + 1, 0)
    per_split = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), KEYS) * KEYS
    first = begin + split * per_split
    last = tl.minimum(end, first + per_split)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        readable = at < last
        block = tl.load(
            block_tables_ptr + sequence * table_stride + at // BLOCK_SIZE, mask=readable, other=0
        ).to(tl.int64)
        slot = at % BLOCK_SIZE
        k_row = block * k_stride_block + kv_head * k_stride_head + slot * k_stride_slot
        k = tl.load(
            k_ptr + k_row[None, :] + key_dim[:, None],
            mask=readable[None, :] & (key_dim < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh by way of exp, which every Triton has.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        visible = row_ok[:, None] & readable[None, :] & (at[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (at[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores * 1.4426950408889634, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet would compute inf - inf.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(maximum - shift)
        v_row = block * v_stride_block + kv_head * v_stride_head + slot * v_stride_slot
        v = tl.load(
            v_ptr + v_row[:, None] + value_dim[None, :],
            mask=readable[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        mixed = mixed * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        maximum = new_maximum

    is_last = True
    if SPLITS > 1:
        place = (tile * tl.num_programs(1) + kv_head).to(tl.int64)
        row_place = (place * SPLITS + split) * ROWS + rows
        tl.store(statistics_ptr + row_place * 2, maximum)
        tl.store(statistics_ptr + row_place * 2 + 1, total)
        tl.store(partial_ptr + row_place[:, None] * VALUE_DIM_PADDED + value_dim[None, :], mixed)
        # All of this program's stores come before its count, and the count is one thread's work.
        tl.debug_barrier()
        num_done = tl.atomic_add(counters_ptr + place, 1, sem="acq_rel")
        is_last = num_done == SPLITS - 1
        if is_last:
            tl.store(counters_ptr + place, 0)  # for the next launch
            maximum = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
            for other in range(SPLITS):
                row_place = (place * SPLITS + other) * ROWS + rows
                other_maximum = tl.load(statistics_ptr + row_place * 2, cache_modifier=".cg")
                other_total = tl.load(statistics_ptr + row_place * 2 + 1, cache_modifier=".cg")
                other_mixed = tl.load(
                    partial_ptr + row_place[:, None] * VALUE_DIM_PADDED + value_dim[None, :],
                    cache_modifier=".cg",
                )
                new_maximum = tl.maximum(maximum, other_maximum)
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                decay = tl.exp2(maximum - shift)
                other_decay = tl.exp2(other_maximum - shift)
                mixed = mixed * decay[:, None] + other_mixed * other_decay[:, None]
                total = total * decay + other_total * other_decay
                maximum = new_maximum

    if is_last:
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=in_group < GROUP, other=0.0).to(tl.float32)
            sink = sink * 1.4426950408889634
            new_maximum = tl.maximum(maximum, sink)
            decay = tl.exp2(maximum - new_maximum)
            mixed = mixed * decay[:, None]
            total = total * decay + tl.exp2(sink - new_maximum)
        result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            out_ptr
            + token[:, None] * out_stride_token
            + head[:, None] * out_stride_head
            + value_dim[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=row_ok[:, None] & (value_dim < VALUE_DIM)[None, :],
        )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Tiles of one launch: which sequence each is of, and its first token within the new ones."""

    sequences: torch.Tensor
    offsets: torch.Tensor
    longest: int  # tokens of the longest sequence among them

    def __len__(self) -> int:
        return self.sequences.shape[0]


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

    Takes and returns what ``reference.paged_attention`` does. The caches' last dimension must be
    dense.

    Raises:
        ValueError: shapes do not belong together, or a cache's last dimension has gaps.
    """
    num_tokens, num_heads, key_dim = q.shape
    _, kv_heads, block_size, value_dim = v_cache.shape
    if num_heads % kv_heads or k_cache.shape[1:] != (kv_heads, block_size, key_dim):
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not belong together."
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("The last dimension of k_cache and v_cache must be dense.")
    if q.stride(2) != 1:
        q = q.contiguous()
    if out is None:
        out = q.new_empty(num_tokens, num_heads, value_dim)
    if metadata.num_tokens < num_tokens:
        out[metadata.num_tokens :] = 0
    group = num_heads // kv_heads
    padded_group = triton.next_power_of_2(group)
    for is_decode in (True, False):
        rows = _MIN_ROWS if is_decode else _PREFILL_ROWS
        queries = max(rows // padded_group, 1)
        tiles = _tiles(metadata, queries, is_decode=is_decode)
        if tiles is None:
            continue
        splits = _num_splits(tiles, kv_heads, window, q.device) if is_decode else 1
        workspace = _workspace(
            metadata, len(tiles), kv_heads, splits, queries * padded_group, value_dim, q.device
        )
        _paged_attention_kernel[(len(tiles), kv_heads, splits)](
            q, k_cache, v_cache, out, q if sinks is None else sinks,
            metadata.block_tables, metadata.seq_lens, metadata.query_start_loc,
            tiles.sequences, tiles.offsets,
            *workspace,
            scale, softcap, window,
            q.stride(0), q.stride(1),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
            out.stride(0), out.stride(1), metadata.block_tables.stride(0),
            GROUP=group, GROUP_PADDED=padded_group, QUERIES=queries,
            KEY_DIM=key_dim, KEY_DIM_PADDED=_padded(key_dim),
            VALUE_DIM=value_dim, VALUE_DIM_PADDED=_padded(value_dim),
            BLOCK_SIZE=block_size, KEYS=_keys_per_round(q.dtype, key_dim, value_dim),
            SPLITS=splits,
            HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0.0, HAS_SINKS=sinks is not None,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def _padded(dim: int) -> int:
    return int(max(triton.next_power_of_2(dim), 16))


def _keys_per_round(dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Keys that fit into the shared memory of small cards too, with their values, twice."""
    wide = max(_padded(key_dim), _padded(value_dim)) * dtype.itemsize
    return 16 if wide > 512 else 32 if wide > 256 else _KEYS_PER_ROUND


def _tiles(metadata: AttentionMetadata, queries: int, *, is_decode: bool) -> _Tiles | None:
    """The tiles of all decodes, or of all prompts, of a step; None if there are none."""
    key = ("tiles", queries, is_decode)
    if key not in metadata.shared:
        lens = np.asarray(metadata.host_query_lens, dtype=np.int64)
        members = np.flatnonzero(lens == 1 if is_decode else lens > 1)
        shared: _Tiles | None = None
        if len(members):
            counts = -(-lens[members] // queries)
            sequences = np.repeat(members, counts)
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            offsets = (np.arange(len(sequences)) - starts) * queries
            arrays: list[IntArray] = [sequences.astype(np.int32), offsets.astype(np.int32)]
            on_device = upload(arrays, metadata.seq_lens.device)
            longest = int(metadata.host_seq_lens[members].max())
            shared = _Tiles(on_device[0], on_device[1], longest)
        metadata.shared[key] = shared
    tiles: _Tiles | None = metadata.shared[key]
    return tiles


def _num_splits(tiles: _Tiles, kv_heads: int, window: int, device: torch.device) -> int:
    """A power of two, so that few kernels are compiled."""
    num_keys = min(tiles.longest, window) if window else tiles.longest
    wanted = _num_multiprocessors(device) * _PROGRAMS_PER_MULTIPROCESSOR
    splits = min(wanted // max(len(tiles) * kv_heads, 1), num_keys // _MIN_SPLIT_KEYS, _MAX_SPLITS)
    return 1 << max(splits, 1).bit_length() - 1


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_OF_UNKNOWN_DEVICE
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _workspace(
    metadata: AttentionMetadata,
    num_tiles: int,
    kv_heads: int,
    splits: int,
    rows: int,
    value_dim: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial results, their statistics and counters; the layers of a step share them."""
    if splits == 1:
        empty = metadata.seq_lens  # never touched
        return empty, empty, empty
    key = ("workspace", num_tiles, kv_heads, splits, rows, value_dim)
    if key not in metadata.shared:
        num_rows = num_tiles * kv_heads * splits * rows
        metadata.shared[key] = (
            torch.empty(num_rows * _padded(value_dim), dtype=torch.float32, device=device),
            torch.empty(num_rows * 2, dtype=torch.float32, device=device),
            torch.zeros(num_tiles * kv_heads, dtype=torch.int32, device=device),
        )
    workspace: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = metadata.shared[key]
    return workspace
