"""Paged attention as one Triton kernel: decodes and prompts, any prefix, read from the blocks.

Owns the kernel, how rows of a tile map to queries and heads, and its launch. Knows nothing of
models or of who owns a block; ``attention_items`` cuts a step into items. The reference is
``reference.paged_attention``.

Formula. For a query at position ``i`` of its sequence, over positions ``j <= i`` (and
``j > i - window``, with a window)::

    out = sum_j softmax_j(cap(scale * q . k_j)) v_j,    cap(x) = softcap * tanh(x / softcap)

where a sink adds ``exp(sink)`` to the softmax's denominator. It is computed in one pass with a
running maximum, in base 2 and fp32. Quantised keys and values are multiplied by their scales where
that is cheapest: scores by a key's, weights by a value's (and by 64, so that small ones keep their
digits in fp16).

Grid ``(kv_heads, items)``, heads first: what the heads of a block hold is contiguous, so programs
that run together read whole pieces of a page. A program has up to ``QUERIES`` neighbouring tokens
of one sequence with all query heads of one KV head: ``QUERIES * GROUP`` rows that share every key
they read. A decode is one token. The positions of a long sequence may be divided among items; the
program that ends last combines their partial results (the splitting of Flash-Decoding, Dao et al.
2023), so that one launch does it all.

Reads stay inside a sequence: no slot at or beyond its length is loaded, and with a window no block
outside of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from pagetier.kernels import tuning
from pagetier.kernels.attention_items import FIELDS, decode_items, prefill_items
from pagetier.kernels.metadata import AttentionMetadata

# Rows of a tile: tl.dot takes no fewer than 16.
_MIN_ROWS = 16
# Elements of partial results that a warp combines at once; more would not fit its registers.
_COMBINED_ELEMENTS = 4096
_MULTIPROCESSORS_OF_UNKNOWN_DEVICE = 64
# Fewer decodes are over sooner than a second stream is started.
_MIN_DECODES_BESIDE_PROMPTS = 16


@triton.jit
def _unpack(words, dtype: tl.constexpr, IS_FP8: tl.constexpr):
    """``(keys, dim / 4)`` words of four values of 8 bits as ``(keys, dim)`` in ``dtype``; exact.

    Loaded as bytes, the compiler would turn the tile byte by byte and widen it then; words are
    widened as they came.
    """
    parts = tl.join(
        tl.join(_byte(words, 0, dtype, IS_FP8), _byte(words, 2, dtype, IS_FP8)),
        tl.join(_byte(words, 1, dtype, IS_FP8), _byte(words, 3, dtype, IS_FP8)),
    )
    return tl.reshape(parts, [words.shape[0], words.shape[1] * 4])


@triton.jit
def _byte(words, index: tl.constexpr, dtype: tl.constexpr, IS_FP8: tl.constexpr):
    if IS_FP8:
        byte = (words >> (8 * index)).to(tl.uint8)
        return byte.to(tl.float8e4nv, bitcast=True).to(dtype)
    # Keys keep the unit that converts integers busy. 2^23 + 128 + x has x in its low byte.
    bits = (((words >> (8 * index)) & 0xFF) ^ 0x80) | 0x4B000000
    return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)


@triton.jit
def _attend(
    q, maximum, total, mixed, first, end, last,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, position, row_scale, softcap, window,
    k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
    k_scale_stride_block, k_scale_stride_slot, v_scale_stride_block, v_scale_stride_slot,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Take in positions ``[first, end)``, those below ``last``, into the running softmax.

    ``BOUNDED`` says that some may be at or beyond ``last``, ``CAUSAL`` and ``HAS_WINDOW`` that some
    rows may not see some of them.
    """
    key_dim = tl.arange(0, KEY_DIM_PADDED)
    # Values of 8 bits come as words of four.
    value_dim = tl.arange(0, VALUE_DIM_PADDED // 4 if QUANTISED else VALUE_DIM_PADDED)
    for start in range(first, end, KEYS):
        at = start + tl.arange(0, KEYS)
        readable = at < last
        if BOUNDED:
            block = tl.load(table_ptr + at // BLOCK_SIZE, mask=readable, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + at // BLOCK_SIZE).to(tl.int64)
        slot = at % BLOCK_SIZE
        k_at = k_ptr + (block * k_stride_block + slot * k_stride_slot)[None, :] + key_dim[:, None]
        v_at = v_ptr + (block * v_stride_block + slot * v_stride_slot)[:, None] + value_dim[None, :]
        if BOUNDED or KEY_DIM != KEY_DIM_PADDED:
            k = tl.load(k_at, mask=readable[None, :] & (key_dim < KEY_DIM)[:, None], other=0.0)
        else:
            k = tl.load(k_at)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if QUANTISED:
            k_scale = tl.load(
                k_scale_ptr + block * k_scale_stride_block + slot * k_scale_stride_slot,
                mask=readable,
                other=0.0,
            )
            scores = scores * k_scale[None, :]
        if HAS_SOFTCAP:
            # tanh by way of exp, which every Triton has. Row scales hold log2(e) already.
            scores = 1.0 - 2.0 / (tl.exp2(scores * (row_scale * (2.0 / softcap))[:, None]) + 1.0)
            factor = softcap * 1.4426950408889634
        else:
            factor = row_scale[:, None]
        if CAUSAL or HAS_WINDOW or BOUNDED:
            visible = readable[None, :]
            if CAUSAL:
                visible = visible & (at[None, :] <= position[:, None])
            if HAS_WINDOW:
                visible = visible & (at[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        # The factor comes after the mask, so that it and the shift are one operation.
        if HAS_SOFTCAP:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
        else:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * row_scale)
        shift = new_maximum
        if CAUSAL or HAS_WINDOW:
            # A row that has seen nothing yet would compute inf - inf.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(maximum - shift)
        total = total * decay + tl.sum(weights, 1)
        if QUANTISED:
            words = tl.load(
                v_at, mask=readable[:, None] & (value_dim < VALUE_DIM // 4)[None, :], other=0
            )
            v = _unpack(words, q.dtype, k_ptr.dtype.element_ty == tl.float8e4nv)
        elif BOUNDED or VALUE_DIM != VALUE_DIM_PADDED:
            v = tl.load(v_at, mask=readable[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        if QUANTISED:
            v_scale = tl.load(
                v_scale_ptr + block * v_scale_stride_block + slot * v_scale_stride_slot,
                mask=readable,
                other=0.0,
            )
            weights = weights * (v_scale * 64.0)[None, :]
        mixed = mixed * decay[:, None]
        mixed = tl.dot(weights.to(q.dtype), v, mixed, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, mixed


@triton.jit
def _finish(
    maximum, total, mixed, sinks_ptr, out_ptr, row, query, num_queries, kv_head,
    out_stride_token, out_stride_head,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Divide by the softmax's denominator and write what rows of real queries and heads hold.

    ``out_ptr`` points to the first query's token.
    """
    in_group = row % GROUP_PADDED
    head = kv_head * GROUP + in_group
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=in_group < GROUP, other=0.0).to(tl.float32)
        sink = sink * 1.4426950408889634
        new_maximum = tl.maximum(maximum, sink)
        decay = tl.exp2(maximum - new_maximum)
        mixed = mixed * decay[:, None]
        total = total * decay + tl.exp2(sink - new_maximum)
    result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    value_dim = tl.arange(0, VALUE_DIM_PADDED)
    row_ok = (query < num_queries) & (in_group < GROUP)
    at = out_ptr + (query.to(tl.int64) * out_stride_token + head * out_stride_head)[:, None]
    tl.store(
        at + value_dim[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (value_dim < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["window", "table_stride"])
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr, sinks_ptr,
    block_tables_ptr, items_ptr, partial_ptr, statistics_ptr, counters_ptr,
    scale, softcap, window,
    q_stride_token, q_stride_head,
    k_stride_block, k_stride_head, k_stride_slot,
    v_stride_block, v_stride_head, v_stride_slot,
    k_scale_stride_block, k_scale_stride_head, k_scale_stride_slot,
    v_scale_stride_block, v_scale_stride_head, v_scale_stride_slot,
    out_stride_token, out_stride_head, table_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, FIELDS: tl.constexpr, COMBINED: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    fields = items_ptr + item * FIELDS
    sequence = tl.load(fields).to(tl.int64)
    token = tl.load(fields + 1).to(tl.int64)
    first = tl.load(fields + 2)
    last = tl.load(fields + 3)
    first_position = tl.load(fields + 4)
    num_queries = tl.load(fields + 5)
    first_item = tl.load(fields + 6)
    num_items = tl.load(fields + 7)
    # Asked after all loads, which so wait together.
    if num_items == 0:
        return

    row = tl.arange(0, ROWS)
    query = row // GROUP_PADDED
    in_group = row % GROUP_PADDED
    position = first_position + query
    key_dim = tl.arange(0, KEY_DIM_PADDED)
    row_ok = (query < num_queries) & (in_group < GROUP)
    q_row = (token + query) * q_stride_token + (kv_head * GROUP + in_group) * q_stride_head
    q = tl.load(
        q_ptr + q_row[:, None] + key_dim[None, :],
        mask=row_ok[:, None] & (key_dim < KEY_DIM)[None, :],
        other=0.0,
    )
    row_scale = tl.full([ROWS], 1.0, tl.float32) * scale
    if k_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        # fp8 becomes fp16 in one step, and bf16 in three. So that any query fits, the largest
        # element of its row becomes 1.
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
        row_scale = row_scale * largest
    k_ptr += kv_head * k_stride_head
    v_ptr += kv_head * v_stride_head
    if QUANTISED:
        k_scale_ptr += kv_head * k_scale_stride_head
        v_scale_ptr += kv_head * v_scale_stride_head
    out_ptr += token * out_stride_token
    table_ptr = block_tables_ptr + sequence * table_stride

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_DIM_PADDED], tl.float32)
    if QUERIES == 1:
        # The item's positions are those that its query sees.
        maximum, total, mixed = _attend(
            q, maximum, total, mixed, first, last, last,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, position, row_scale, softcap, window,
            k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
            k_scale_stride_block, k_scale_stride_slot, v_scale_stride_block, v_scale_stride_slot,
            KEY_DIM, KEY_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED, BLOCK_SIZE, KEYS,
            True, False, False, HAS_SOFTCAP, QUANTISED,
        )  # fmt: skip
    else:
        # Most rounds are seen by all rows, and need no masks: [all_first, all_end).
        all_first = first
        if HAS_WINDOW:
            seen_by_all = first_position + num_queries - window
            all_first = first + tl.cdiv(tl.maximum(seen_by_all - first, 0), KEYS) * KEYS
            all_first = tl.minimum(all_first, last)
            maximum, total, mixed = _attend(
                q, maximum, total, mixed, first, all_first, last,
                k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
                position, row_scale, softcap, window,
                k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
                k_scale_stride_block, k_scale_stride_slot,
                v_scale_stride_block, v_scale_stride_slot,
                KEY_DIM, KEY_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED, BLOCK_SIZE, KEYS,
                True, True, True, HAS_SOFTCAP, QUANTISED,
            )  # fmt: skip
        seen_end = tl.minimum(first_position + 1, last)
        all_end = all_first + tl.maximum(seen_end - all_first, 0) // KEYS * KEYS
        maximum, total, mixed = _attend(
            q, maximum, total, mixed, all_first, all_end, last,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, position, row_scale, softcap, window,
            k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
            k_scale_stride_block, k_scale_stride_slot, v_scale_stride_block, v_scale_stride_slot,
            KEY_DIM, KEY_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED, BLOCK_SIZE, KEYS,
            False, False, False, HAS_SOFTCAP, QUANTISED,
        )  # fmt: skip
        maximum, total, mixed = _attend(
            q, maximum, total, mixed, all_end, last, last,
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, position, row_scale, softcap, window,
            k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
            k_scale_stride_block, k_scale_stride_slot, v_scale_stride_block, v_scale_stride_slot,
            KEY_DIM, KEY_DIM_PADDED, VALUE_DIM, VALUE_DIM_PADDED, BLOCK_SIZE, KEYS,
            True, True, HAS_WINDOW, HAS_SOFTCAP, QUANTISED,
        )  # fmt: skip

    if QUANTISED:
        mixed = mixed * (1.0 / 64.0)
    if num_items == 1:
        _finish(
            maximum, total, mixed, sinks_ptr, out_ptr, row, query, num_queries, kv_head,
            out_stride_token, out_stride_head,
            GROUP, GROUP_PADDED, VALUE_DIM, VALUE_DIM_PADDED, HAS_SINKS,
        )  # fmt: skip
    else:
        # Rows that exist only because tl.dot wants 16 are not kept.
        KEPT: tl.constexpr = QUERIES * GROUP_PADDED
        kv_heads = tl.num_programs(0)
        value_dim = tl.arange(0, VALUE_DIM_PADDED)
        place = (item * kv_heads + kv_head).to(tl.int64) * KEPT + row
        tl.store(statistics_ptr + place * 2, maximum, mask=row < KEPT)
        tl.store(statistics_ptr + place * 2 + 1, total, mask=row < KEPT)
        tl.store(
            partial_ptr + place[:, None] * VALUE_DIM_PADDED + value_dim[None, :],
            mixed,
            mask=(row < KEPT)[:, None],
        )
        # All of this program's stores come before its count, and the count is one thread's work.
        tl.debug_barrier()
        counter = counters_ptr + first_item * kv_heads + kv_head
        num_done = tl.atomic_add(counter, 1, sem="acq_rel")
        if num_done == num_items - 1:
            tl.store(counter, 0)  # for the next launch
            kept = tl.arange(0, KEPT)
            all_maximum = tl.full([KEPT], float("-inf"), tl.float32)
            all_total = tl.zeros([KEPT], tl.float32)
            all_mixed = tl.zeros([KEPT, VALUE_DIM_PADDED], tl.float32)
            for start in range(0, num_items, COMBINED):
                part = start + tl.arange(0, COMBINED)
                ok = (part < num_items)[:, None]
                places = ((first_item + part) * kv_heads + kv_head).to(tl.int64) * KEPT
                places = places[:, None] + kept[None, :]
                # Past the first cache, which may hold older values.
                maxima = tl.load(
                    statistics_ptr + places * 2, mask=ok, other=float("-inf"), cache_modifier=".cg"
                )
                totals = tl.load(
                    statistics_ptr + places * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg"
                )
                mixes = tl.load(
                    partial_ptr + places[:, :, None] * VALUE_DIM_PADDED + value_dim[None, None, :],
                    mask=ok[:, :, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_maximum = tl.maximum(all_maximum, tl.max(maxima, 0))
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                factors = tl.exp2(maxima - shift[None, :])
                decay = tl.exp2(all_maximum - shift)
                all_total = all_total * decay + tl.sum(totals * factors, 0)
                all_mixed = all_mixed * decay[:, None] + tl.sum(mixes * factors[:, :, None], 0)
                all_maximum = new_maximum
            _finish(
                all_maximum, all_total, all_mixed, sinks_ptr, out_ptr,
                kept, kept // GROUP_PADDED, num_queries, kv_head,
                out_stride_token, out_stride_head,
                GROUP, GROUP_PADDED, VALUE_DIM, VALUE_DIM_PADDED, HAS_SINKS,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a launch is cut; found by measuring, never while serving.

    Attributes:
        rows: queries times heads of a program.
        keys: positions that it reads in one round.
        num_warps: of a program.
        num_stages: rounds that are under way at once.
        programs: for each multiprocessor, as many as long sequences are divided into.
        min_keys: fewest positions of an item, if its sequence has as many.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int
    min_keys: int


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

    Takes and returns what ``reference.paged_attention`` does. The caches' last dimension must be
    dense.

    Raises:
        ValueError: shapes do not belong together, a cache's last dimension has gaps, or ``scale``
            is not positive.
    """
    _check(q, k_cache, v_cache, k_scale, v_scale, scale)
    if q.stride(2) != 1:
        q = q.contiguous()
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
    if metadata.num_tokens < q.shape[0]:
        out[metadata.num_tokens :] = 0
    launches = [
        _prepare(
            q, k_cache, v_cache, k_scale, v_scale, out, sinks, metadata, is_decode,
            scale=scale, window=window, softcap=softcap,
        )
        for is_decode, count in (
            (False, metadata.num_prefills), (True, metadata.num_decodes)
        )
        if count
    ]  # fmt: skip
    if len(launches) == 2 and q.is_cuda and metadata.num_decodes >= _MIN_DECODES_BESIDE_PROMPTS:
        # Prompts compute while decodes wait for memory.
        main, side = torch.cuda.current_stream(q.device), _side_stream(q.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            launches[0]()
        launches[1]()
        main.wait_stream(side)
    else:
        for launch in launches:
            launch()
    return out


def _prepare(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    metadata: AttentionMetadata,
    is_decode: bool,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> Callable[[], object]:
    """Plan the attention of all decodes, or of all prompts, and return what launches it."""
    kv_heads, block_size, value_dim = v_cache.shape[1:]
    key_dim = q.shape[2]
    group_padded = triton.next_power_of_2(q.shape[1] // kv_heads)
    tile = _tile(q, k_cache, v_cache, metadata, group_padded, is_decode)
    queries = 1 if is_decode else max(tile.rows // group_padded, 1)
    cut = {
        "window": window,
        "target_items": max(tile.programs * _num_multiprocessors(q.device) // kv_heads, 1),
        "keys": tile.keys,
        "min_keys": tile.min_keys,
    }
    if is_decode:
        items = decode_items(metadata, **cut)
    else:
        items = prefill_items(metadata, queries=queries, **cut)
    kept_rows = queries * group_padded
    value_dim_padded = _padded(value_dim)
    partial, statistics, counters = _workspace(
        metadata, len(items) * kv_heads, kept_rows, value_dim_padded
    )
    if v_scale is not None:
        v_cache = v_cache.view(torch.int32)
    k_scale_strides = (0, 0, 0) if k_scale is None else k_scale.stride()
    v_scale_strides = (0, 0, 0) if v_scale is None else v_scale.stride()
    return functools.partial(
        _paged_attention_kernel[(kv_heads, len(items))],
        q, k_cache, v_cache,
        q if k_scale is None else k_scale, q if v_scale is None else v_scale,
        out, q if sinks is None else sinks,
        metadata.block_tables, items.rows, partial, statistics, counters,
        # Scores are in base 2.
        scale * 1.4426950408889634, float(softcap), window,
        q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        *k_scale_strides, *v_scale_strides,
        out.stride(0), out.stride(1), metadata.block_tables.stride(0),
        GROUP=q.shape[1] // kv_heads, GROUP_PADDED=group_padded,
        QUERIES=queries, ROWS=max(kept_rows, _MIN_ROWS),
        KEY_DIM=key_dim, KEY_DIM_PADDED=_padded(key_dim),
        VALUE_DIM=value_dim, VALUE_DIM_PADDED=value_dim_padded,
        BLOCK_SIZE=block_size, KEYS=tile.keys, FIELDS=FIELDS,
        COMBINED=_num_combined(tile, kept_rows * value_dim_padded),
        HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0.0, HAS_SINKS=sinks is not None,
        QUANTISED=k_scale is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scale: float,
) -> None:
    kv_heads, block_size = v_cache.shape[1:3]
    if q.shape[1] % kv_heads or k_cache.shape[1:] != (kv_heads, block_size, q.shape[2]):
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not belong together."
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("The last dimension of k_cache and v_cache must be dense.")
    if scale <= 0.0:
        raise ValueError(f"scale must be positive, not {scale}.")
    is_quantised = k_cache.dtype.itemsize == 1
    if is_quantised and (v_cache.shape[3] % 4 or any(n % 4 for n in v_cache.stride()[:3])):
        raise ValueError(
            f"A v_cache of {v_cache.dtype} must have sizes and strides of whole words of 4, not "
            f"{tuple(v_cache.shape)} with strides {v_cache.stride()}."
        )
    for scales in (k_scale, v_scale):
        if (scales is not None) != is_quantised:
            raise ValueError(
                f"A cache of {k_cache.dtype} "
                f"{'needs' if is_quantised else 'takes no'} k_scale and v_scale."
            )
        if scales is not None and scales.shape != k_cache.shape[:3]:
            raise ValueError(
                f"k_scale and v_scale must be (blocks, kv_heads, block_size), here "
                f"{tuple(k_cache.shape[:3])}, not {tuple(scales.shape)}."
            )


def _tile(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    group_padded: int,
    is_decode: bool,
) -> Tile:
    """Settings for one of the two kinds of tiles of a step."""
    row_bytes = max(_padded(q.shape[2]), _padded(v_cache.shape[3])) * k_cache.dtype.itemsize
    shape: dict[str, Any] = {"row_bytes": row_bytes, "kv": kv_name(k_cache.dtype)}
    if is_decode:
        operation, rows = "decode_attention", _MIN_ROWS
        shape["sequences"] = metadata.num_decodes
    else:
        operation = "prefill_attention"
        rows = metadata.max_query_len * group_padded
        shape["rows"] = min(triton.next_power_of_2(rows), 128)
    return Tile(**{"rows": rows, **tuning.settings(operation, q.device, **shape)})


def _num_combined(tile: Tile, elements: int) -> int:
    """Partial results of that size that are combined at once; what is left over costs prompts."""
    return max(_COMBINED_ELEMENTS * tile.num_warps // elements, 1) if tile.rows <= _MIN_ROWS else 1


def kv_name(dtype: torch.dtype) -> str:
    """A cache's dtype as tables of settings name it: dtypes of equal size may want others."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(dtype, f"{dtype.itemsize} bytes")


def _padded(dim: int) -> int:
    return int(max(triton.next_power_of_2(dim), 16))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_OF_UNKNOWN_DEVICE
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _workspace(
    metadata: AttentionMetadata, num_places: int, kept_rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial results, their statistics and counters; the layers of a step share them."""
    key = ("workspace", num_places, kept_rows, width)
    if key not in metadata.workspace:
        device = metadata.seq_lens.device
        num_rows = num_places * kept_rows
        metadata.workspace[key] = (
            torch.empty(num_rows * width, dtype=torch.float32, device=device),
            torch.empty(num_rows * 2, dtype=torch.float32, device=device),
            torch.zeros(num_places, dtype=torch.int32, device=device),
        )
    workspace: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = metadata.workspace[key]
    return workspace
