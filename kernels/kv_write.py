"""Writing new keys and values into their slots, rotated and quantised on the way, in one launch.

Owns the kernel and its launch. Knows nothing of which sequence a slot belongs to, nor of how a
model makes its cosines and sines. The references, which also say how numbers are quantised, are
those of ``reference.kv_write``.

Grid ``(token groups, tiles of heads)``. A program takes a few tokens with several heads of each, as
many as make a tile worth launching: usually all KV heads of one token. The first tiles along the
second axis are of keys and values, those that follow, if there are queries to rotate, of queries.
A slot of -1 is skipped.

Rotation needs two numbers for each result. Both are loaded by the thread that computes it, so
nothing is exchanged; where queries are rotated in place, all are loaded before any is stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from pagetier.kernels.reference.kv_write import QUANTISED_MAX

# Numbers in a tile, at most and if tokens are many: 16 and 8 for each thread.
_MOST_NUMBERS = 2048
_FEW_NUMBERS = 1024
_NUMBERS_PER_THREAD = 8
_INT8, _FP8 = 1, 2
_KINDS = {torch.int8: _INT8, torch.float8_e4m3fn: _FP8}


@triton.jit
def _load_rows(
    ptr, rows, dim, mask, cos_ptr, sin_ptr, cos_rows, sin_rows,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of a tile in float32, rotated if there is anything to rotate."""
    x = tl.load(ptr + rows[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        is_first = dim % 2 == 0 if INTERLEAVED else dim < HALF
        step = 1 if INTERLEAVED else HALF
        partner = tl.where(is_first, dim + step, dim - step)
        rotates = mask & (dim < ROTARY_DIM)[None, :]
        y = tl.load(ptr + rows[:, None] + partner[None, :], mask=rotates, other=0.0)
        cos = tl.load(cos_ptr + cos_rows[:, None] + dim[None, :], mask=rotates, other=1.0)
        sin = tl.load(sin_ptr + sin_rows[:, None] + dim[None, :], mask=rotates, other=0.0)
        y = tl.where(is_first[None, :], -y.to(tl.float32), y.to(tl.float32))
        x = x * cos.to(tl.float32) + y * sin.to(tl.float32)
    return x


@triton.jit
def _store_rows(ptr, rows, dim, mask, x, scale_ptr, scale_rows, row_mask, KIND: tl.constexpr):
    """Store rows of a tile into a cache, quantised if it has scales."""
    if KIND > 0:
        MOST: tl.constexpr = 127.0 if KIND == 1 else 448.0
        largest = tl.max(tl.abs(x), 1)
        tl.store(scale_ptr + scale_rows, tl.math.div_rn(largest, MOST), mask=row_mask)
        divisor = tl.where(largest > 0.0, largest, 1.0)
        inverse = tl.where(largest > 0.0, tl.math.div_rn(MOST, divisor), 0.0)
        x = tl.minimum(tl.maximum(x * inverse[:, None], -MOST), MOST)
        if KIND == 1:
            # Adding and taking away 1.5 * 2**23 rounds to the nearest whole number, ties to even.
            x = (x + 12582912.0) - 12582912.0
    tl.store(ptr + rows[:, None] + dim[None, :], x.to(ptr.dtype.element_ty), mask=mask)


# Nothing is compiled anew for another number of tokens.
@triton.jit(do_not_specialize=("num_tokens",))
def _write_kernel(
    q_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
    slots_ptr, num_tokens, num_heads, kv_heads,
    q_stride_token, q_stride_head, key_stride_token, key_stride_head,
    value_stride_token, value_stride_head, cos_stride, sin_stride, out_stride_token,
    out_stride_head,
    k_stride_block, k_stride_head, k_stride_slot, v_stride_block, v_stride_head, v_stride_slot,
    k_scale_stride_block, k_scale_stride_head, k_scale_stride_slot,
    v_scale_stride_block, v_scale_stride_head, v_scale_stride_slot,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KV_TILES: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + row // HEADS
    exists = token < num_tokens
    key_dim = tl.arange(0, KEY_DIM_PADDED)
    tile = tl.program_id(1)
    if tile < KV_TILES:
        head = tile * HEADS + row % HEADS
        slot = tl.load(slots_ptr + token, mask=exists, other=-1).to(tl.int64)
        is_written = (slot >= 0) & (head < kv_heads)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        key_mask = is_written[:, None] & (key_dim < KEY_DIM)[None, :]
        key = _load_rows(
            key_ptr, token * key_stride_token + head * key_stride_head, key_dim, key_mask,
            cos_ptr, sin_ptr, token * cos_stride, token * sin_stride, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip
        _store_rows(
            k_ptr, block * k_stride_block + head * k_stride_head + offset * k_stride_slot,
            key_dim, key_mask, key, k_scale_ptr,
            block * k_scale_stride_block + head * k_scale_stride_head
            + offset * k_scale_stride_slot,
            is_written, K_KIND,
        )  # fmt: skip
        value_dim = tl.arange(0, VALUE_DIM_PADDED)
        value_mask = is_written[:, None] & (value_dim < VALUE_DIM)[None, :]
        value = _load_rows(
            value_ptr, token * value_stride_token + head * value_stride_head, value_dim, value_mask,
            cos_ptr, sin_ptr, token, token, 0, False,
        )  # fmt: skip
        _store_rows(
            v_ptr, block * v_stride_block + head * v_stride_head + offset * v_stride_slot,
            value_dim, value_mask, value, v_scale_ptr,
            block * v_scale_stride_block + head * v_scale_stride_head
            + offset * v_scale_stride_slot,
            is_written, V_KIND,
        )  # fmt: skip
    else:
        head = (tile - KV_TILES) * HEADS + row % HEADS
        q_mask = (exists & (head < num_heads))[:, None] & (key_dim < KEY_DIM)[None, :]
        q = _load_rows(
            q_ptr, token * q_stride_token + head * q_stride_head, key_dim, q_mask,
            cos_ptr, sin_ptr, token * cos_stride, token * sin_stride, ROTARY_DIM, INTERLEAVED,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()
        place = token * out_stride_token + head * out_stride_head
        tl.store(
            out_ptr + place[:, None] + key_dim[None, :], q.to(out_ptr.dtype.element_ty), mask=q_mask
        )


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write each token's keys and values into its slot; takes what ``reference.write_kv`` does.

    Raises:
        ValueError: shapes do not belong together, a cache's last dimension has gaps, or a cache of
            8 bits has no scales.
    """
    _write(None, key, value, None, None, k_cache, v_cache, slots, k_scale, v_scale, None, False)


def write_rotated_kv(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values; see ``reference.write_rotated_kv``.

    Raises:
        ValueError: as ``write_kv``; or ``cos`` and ``sin`` are not of these tokens, or are longer
            than a head.
    """
    q = _dense(q)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _write(q, key, value, cos, sin, k_cache, v_cache, slots, k_scale, v_scale, out, interleaved)
    return out


def _write(
    q: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor | None,
    interleaved: bool,
) -> None:
    _check(key, value, k_cache, v_cache, slots)
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        _check_scale(cache, scale)
    num_tokens, kv_heads, key_dim = key.shape
    block_size, value_dim = v_cache.shape[2:]
    rotary_dim = 0
    if q is not None and cos is not None and sin is not None and out is not None:
        rotary_dim = cos.shape[-1]
        _check_rotation(q, key, cos, sin, out)
        cos, sin = _dense(cos), _dense(sin)
    else:
        q = cos = sin = out = key  # not touched
    if num_tokens == 0:
        return
    key, value = _dense(key), _dense(value)
    width = max(triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim))
    num_heads = q.shape[1] if rotary_dim else 0
    heads = min(triton.next_power_of_2(kv_heads), max(_MOST_NUMBERS // width, 1))
    tokens = max(_FEW_NUMBERS // (heads * width), 1)
    kv_tiles = triton.cdiv(kv_heads, heads)
    num_warps = max(1, min(8, tokens * heads * width // (32 * _NUMBERS_PER_THREAD)))
    # Without scales, any pointer will do.
    k_scales = key if k_scale is None else k_scale
    v_scales = key if v_scale is None else v_scale
    grid = (triton.cdiv(num_tokens, tokens), kv_tiles + triton.cdiv(num_heads, heads))
    _write_kernel[grid](
        q, key, value, cos, sin, k_cache, v_cache, k_scales, v_scales, out,
        slots, num_tokens, num_heads, kv_heads,
        q.stride(0), q.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), cos.stride(0), sin.stride(0), out.stride(0),
        out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        k_scales.stride(0), k_scales.stride(1), k_scales.stride(2),
        v_scales.stride(0), v_scales.stride(1), v_scales.stride(2),
        KEY_DIM=key_dim, KEY_DIM_PADDED=triton.next_power_of_2(key_dim),
        VALUE_DIM=value_dim, VALUE_DIM_PADDED=triton.next_power_of_2(value_dim),
        BLOCK_SIZE=block_size, TOKENS=tokens, HEADS=heads, KV_TILES=kv_tiles,
        ROTARY_DIM=rotary_dim, INTERLEAVED=interleaved,
        K_KIND=_KINDS.get(k_cache.dtype, 0), V_KIND=_KINDS.get(v_cache.dtype, 0),
        IN_PLACE=out.data_ptr() == q.data_ptr(), num_warps=num_warps,
    )  # fmt: skip


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    num_tokens, kv_heads, key_dim = key.shape
    _, cache_heads, block_size, value_dim = v_cache.shape
    if (
        cache_heads != kv_heads
        or value.shape != (num_tokens, kv_heads, value_dim)
        or k_cache.shape[1:] != (kv_heads, block_size, key_dim)
        or slots.shape != (num_tokens,)
    ):
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)}, k_cache {tuple(k_cache.shape)}, "
            f"v_cache {tuple(v_cache.shape)} and slots {tuple(slots.shape)} do not belong together."
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("The last dimension of k_cache and v_cache must be dense.")


def _check_scale(cache: torch.Tensor, scale: torch.Tensor | None) -> None:
    if cache.dtype in QUANTISED_MAX:
        if scale is None or scale.shape != cache.shape[:3] or scale.dtype != torch.float32:
            described: Any = scale if scale is None else (tuple(scale.shape), scale.dtype)
            raise ValueError(
                f"A cache of {cache.dtype} and shape {tuple(cache.shape)} needs float32 scales of "
                f"its first three dimensions, not {described}."
            )
    elif scale is not None:
        raise ValueError(f"A cache of {cache.dtype} has no scales.")


def _check_rotation(
    q: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    num_tokens, _, key_dim = key.shape
    rotary_dim = cos.shape[-1]
    if (
        (q.shape[0], q.shape[2]) != (num_tokens, key_dim)
        or out.shape != q.shape
        or not cos.shape == sin.shape == (num_tokens, rotary_dim)
        or rotary_dim > key_dim
        or rotary_dim % 2
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)}, key {tuple(key.shape)}, "
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not belong together."
        )
    if out.stride(2) != 1:
        raise ValueError("The last dimension of out must be dense.")
