"""Projections ``y = x W^T + b`` by weights of 4 or 8 bits, which are made floats in registers.

Owns three Triton kernels, their launch, and the choice among them, which the tables of ``tuning``
make by shape. Knows nothing of models. The reference is ``reference.quantised_linear``; the layout
of the numbers is that of ``packing``.

A weight is ``(number - zero) * scale``. A number less its zero is a whole number that every dtype
holds exactly, so sums are taken of those, in fp32, and multiplied by their group's scale once a
group: fewer operations than to scale each weight, and no rounding of weights.

*matrix* multiplies on tensor cores. A step is a line of each row: 32 words, from which each shift
gives 32 columns; ``SWAP`` makes the weights the left operand, as in ``projection``. *vector* is for
one token, without tensor cores; it takes several lines a step. Both divide lines among ``splits``
programs and add their sums up in order, as ``projection`` does. *dequantise* writes the weights as
floats, some megabytes at a time, for torch's own product: for many tokens, whose time is that of
multiplying.

Bits become floats without a conversion, which would cost more than the rest: put into the mantissa
of a power of two they are that power and the number, and the power is subtracted with the zero.
"""

import torch
import triton
import triton.language as tl

from pagetier.kernels import packing, projection, tuning
from pagetier.kernels.projection import finish

_WORDS = tl.constexpr(packing.WORDS)
# Of the weights that are made floats at once for torch's product.
_MAX_FLOATS = 1 << 25


@triton.jit
def _less_zero(words, zero, FIELD: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Numbers of a field of ``words``, less their ``zero`` (fp32), exactly, in ``dtype``."""
    numbers = (words >> (FIELD * BITS)) & ((1 << BITS) - 1)
    if dtype == tl.float16:
        # 1024, whose last digit is 1.
        floats = (numbers | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        less = floats - (zero + 1024).to(tl.float16)
    elif dtype == tl.bfloat16 and BITS == 4:
        # 128, whose last digit is 1.
        floats = (numbers | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        less = floats - (zero + 128).to(tl.bfloat16)
    else:
        less = (_over_power(words, FIELD, BITS) - (zero + (1 << BITS))).to(dtype)
    return less


@triton.jit
def _over_power(words, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Numbers of a field of ``words`` and ``2 ** BITS``, in fp32."""
    # The exponent of that power, above a mantissa of 23 bits whose first are the number's.
    POWER: tl.constexpr = (127 + BITS) << 23
    SHIFT: tl.constexpr = 23 - BITS
    numbers = (words >> (FIELD * BITS)) & ((1 << BITS) - 1)
    return ((numbers << SHIFT) | POWER).to(tl.float32, bitcast=True)


@triton.jit
def _group_of(line, in_size, FIELD: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """The group that a field of a line belongs to; ``GROUP`` 0 is one for all."""
    group = line * 0
    if GROUP > 0:
        # Of the last line, some columns may be beyond the last group.
        group = tl.minimum(line * COLUMNS + FIELD * 32, in_size - 1) // GROUP
    return group


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _quantised_matrix_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr,
    num_tokens, out_size, in_size, splits, x_stride, out_stride,
    TOKENS: tl.constexpr, OUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 32 // BITS
    COLUMNS: tl.constexpr = FIELDS * _WORDS
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    tokens = (tl.program_id(0) % token_tiles) * TOKENS + tl.arange(0, TOKENS)
    outs = (tl.program_id(0) // token_tiles) * OUTS + tl.arange(0, OUTS)
    lines = tl.cdiv(in_size, COLUMNS)
    per_split = tl.cdiv(lines, splits)
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, lines)
    # Rows that do not exist repeat the last one, so that loads need no mask.
    rows = tl.minimum(outs, out_size - 1)
    word = tl.arange(0, _WORDS)
    words_at = packed_ptr + rows.to(tl.int64)[:, None] * (lines * _WORDS) + word[None, :]
    x_rows = x_ptr + tl.minimum(tokens, num_tokens - 1).to(tl.int64) * x_stride
    zero = tl.full([OUTS], 1 << (BITS - 1), tl.float32)
    total = tl.zeros([OUTS, TOKENS] if SWAP else [TOKENS, OUTS], tl.float32)
    for line in range(first, last):
        words = tl.load(words_at + line * _WORDS, eviction_policy="evict_first")
        of_group = tl.zeros([OUTS, TOKENS] if SWAP else [TOKENS, OUTS], tl.float32)
        for FIELD in tl.static_range(FIELDS):
            group = _group_of(line, in_size, FIELD, GROUP, COLUMNS)
            if HAS_ZEROS and (FIELD == 0 or (GROUP > 0 and FIELD * 32 % GROUP == 0)):
                at = group.to(tl.int64) * out_size + rows
                zero = tl.load(zeros_ptr + at).to(tl.float32)
            columns = line * COLUMNS + FIELD * 32 + word
            if EVEN:
                x = tl.load(x_rows[:, None] + columns[None, :])
            else:
                x = tl.load(
                    x_rows[:, None] + columns[None, :], mask=(columns < in_size)[None, :], other=0.0
                )
            weight = _less_zero(words, zero[:, None], FIELD, BITS, x_ptr.dtype.element_ty)
            if SWAP:
                of_group = tl.dot(weight, tl.trans(x), of_group, input_precision="ieee")
            else:
                of_group = tl.dot(x, tl.trans(weight), of_group, input_precision="ieee")
            if GROUP > 0 and (FIELD == FIELDS - 1 or (FIELD * 32 + 32) % GROUP == 0):
                at = group.to(tl.int64) * out_size + rows
                scale = tl.load(scales_ptr + at).to(tl.float32)
                total += of_group * (scale[:, None] if SWAP else scale[None, :])
                of_group = tl.zeros([OUTS, TOKENS] if SWAP else [TOKENS, OUTS], tl.float32)
        if GROUP == 0:
            total += of_group
    if GROUP == 0:
        scale = tl.load(scales_ptr + rows).to(tl.float32)
        total *= scale[:, None] if SWAP else scale[None, :]
    if SWAP:
        total = tl.trans(total)
    finish(
        total, bias_ptr, out_ptr, partial_ptr, counters_ptr, tokens, outs, num_tokens, out_size,
        out_stride, splits, TOKENS, OUTS, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _quantised_vector_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr,
    out_size, in_size, splits,
    OUTS: tl.constexpr, LINES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 32 // BITS
    COLUMNS: tl.constexpr = FIELDS * _WORDS
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    lines = tl.cdiv(in_size, COLUMNS)
    per_split = tl.cdiv(tl.cdiv(lines, LINES), splits) * LINES
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, lines)
    rows = tl.minimum(outs, out_size - 1)
    word = tl.arange(0, _WORDS)
    words_at = packed_ptr + rows.to(tl.int64)[:, None, None] * (lines * _WORDS)
    words_at += word[None, None, :]
    zero = tl.full([OUTS, LINES], 1 << (BITS - 1), tl.float32)
    total = tl.zeros([OUTS, LINES, _WORDS], tl.float32)
    for start in range(first, last, LINES):
        line = start + tl.arange(0, LINES)
        exists = line < last
        # Lines that do not exist repeat the last one; their inputs are zeros.
        line = tl.minimum(line, last - 1)
        words = tl.load(words_at + (line * _WORDS)[None, :, None], eviction_policy="evict_first")
        products = tl.zeros([OUTS, LINES, _WORDS], tl.float32)
        inputs = tl.zeros([LINES, _WORDS], tl.float32)
        for FIELD in tl.static_range(FIELDS):
            group = _group_of(line, in_size, FIELD, GROUP, COLUMNS)
            at = group.to(tl.int64)[None, :] * out_size + rows[:, None]
            if HAS_ZEROS and (FIELD == 0 or (GROUP > 0 and FIELD * 32 % GROUP == 0)):
                zero = tl.load(zeros_ptr + at).to(tl.float32)
            columns = (line * COLUMNS + FIELD * 32)[:, None] + word[None, :]
            there = exists[:, None] if EVEN else exists[:, None] & (columns < in_size)
            x = tl.load(x_ptr + columns, mask=there, other=0.0).to(tl.float32)
            products += _over_power(words, FIELD, BITS) * x[None, :, :]
            inputs += x
            if FIELD == FIELDS - 1 or (GROUP > 0 and (FIELD * 32 + 32) % GROUP == 0):
                # What the power and the zero have added to each product is taken away at once.
                over = zero + (1 << BITS)
                products -= over[:, :, None] * inputs[None, :, :]
                if GROUP > 0:
                    products *= tl.load(scales_ptr + at).to(tl.float32)[:, :, None]
                total += products
                products = tl.zeros([OUTS, LINES, _WORDS], tl.float32)
                inputs = tl.zeros([LINES, _WORDS], tl.float32)
    sums = tl.sum(tl.sum(total, 2), 1)
    if GROUP == 0:
        sums *= tl.load(scales_ptr + rows).to(tl.float32)
    finish(
        sums[None, :], bias_ptr, out_ptr, partial_ptr, counters_ptr, tl.arange(0, 1), outs, 1,
        out_size, 0, splits, 1, OUTS, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _dequantise_kernel(
    packed_ptr, scales_ptr, zeros_ptr, out_ptr, first_row, last_row, out_size, in_size,
    OUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 32 // BITS
    COLUMNS: tl.constexpr = FIELDS * _WORDS
    rows = first_row + tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    line = tl.program_id(1)
    word = tl.arange(0, _WORDS)
    exists = (rows < last_row)[:, None]
    words_at = packed_ptr + rows.to(tl.int64)[:, None] * (tl.cdiv(in_size, COLUMNS) * _WORDS)
    words = tl.load(words_at + (line * _WORDS + word)[None, :], mask=exists, other=0)
    out_rows = out_ptr + (rows - first_row).to(tl.int64)[:, None] * in_size
    for FIELD in tl.static_range(FIELDS):
        columns = line * COLUMNS + FIELD * 32 + word
        group = _group_of(line, in_size, FIELD, GROUP, COLUMNS)
        at = group.to(tl.int64) * out_size + rows
        scale = tl.load(scales_ptr + at, mask=rows < last_row, other=0.0).to(tl.float32)
        zero = tl.full([OUTS], 1 << (BITS - 1), tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + at, mask=rows < last_row, other=0).to(tl.float32)
        weight = _less_zero(words, zero[:, None], FIELD, BITS, tl.float32) * scale[:, None]
        tl.store(
            out_rows + columns[None, :],
            weight.to(out_ptr.dtype.element_ty),
            mask=exists & (columns < in_size)[None, :],
        )


def quantised_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int,
) -> torch.Tensor:
    """Multiply tokens by quantised weights; as ``reference.quantised_linear``.

    The launches on a device share a workspace with those of ``projection``: they have to be on one
    stream, or wait for each other.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    out_size, in_size = packed.shape[0], x.shape[-1]
    num_groups = -(-in_size // group_size) if group_size else 1
    parts = (scales,) if zeros is None else (scales, zeros)
    if (
        bits not in (4, 8)
        or packed.shape[1] != packing.num_lines(in_size, bits) * packing.WORDS
        or any(part.shape != (num_groups, out_size) for part in parts)
        or (bias is not None and bias.shape != (out_size,))
        or not all(part.is_contiguous() for part in (packed, *parts))
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, packed {tuple(packed.shape)}, "
            f"scales {tuple(scales.shape)}, zeros and bias do not belong together at {bits} bits "
            f"and groups of {group_size}, or are not contiguous."
        )
    if group_size and (group_size < packing.WORDS or group_size.bit_count() != 1):
        raise ValueError(f"group_size must be 0 or a power of two from 32 on, not {group_size}.")
    out = x.new_empty((*x.shape[:-1], out_size))
    num_tokens = out.numel() // out_size
    if num_tokens == 0:
        return out
    rows = x.reshape(num_tokens, in_size)
    use = tuning.settings(
        "quantised_linear",
        x.device,
        bits=bits,
        num_tokens=num_tokens,
        out_size=out_size,
        in_size=in_size,
    )
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    launch(rows, packed, scales, zeros, bias, out.view(num_tokens, out_size), group_size, bits, use)
    return out


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group_size: int,
    bits: int,
    use: tuning.Settings,
) -> None:
    """Run the kernel and settings ``use``, whose meaning is that of the kernels' arguments.

    Args:
        x: ``(tokens, in)``, rows dense.
        packed, scales, zeros, bias, group_size, bits: as of ``quantised_linear``.
        out: ``(tokens, out)``, contiguous; written.
        use: an entry of a table.
    """
    num_tokens, in_size = x.shape
    if use["kernel"] == "dequantise":
        _launch_dequantised(x, packed, scales, zeros, bias, out, group_size, bits, use)
        return
    out_size = packed.shape[0]
    is_vector = use["kernel"] == "vector"
    assert num_tokens == 1 or not is_vector, f"{use} is for one token, not for {num_tokens}"
    tile_tokens, tile_outs = 1 if is_vector else use["tokens"], use["outs"]
    tiles = -(-num_tokens // tile_tokens) * -(-out_size // tile_outs)
    steps = -(-packing.num_lines(in_size, bits) // (use["lines"] if is_vector else 1))
    splits = projection.num_splits(use["splits"], steps, tiles, tile_tokens * tile_outs)
    tensors = (
        x, packed, scales, scales if zeros is None else zeros, out if bias is None else bias, out,
        *projection.workspace(out.device),
    )  # fmt: skip
    shared = {
        "OUTS": tile_outs,
        "BITS": bits,
        "GROUP": group_size,
        "EVEN": in_size % packing.columns_per_line(bits) == 0,
        "HAS_ZEROS": zeros is not None,
        "HAS_BIAS": bias is not None,
        "num_warps": use["num_warps"],
    }
    if is_vector:
        _quantised_vector_kernel[tiles, splits](
            *tensors, out_size, in_size, splits, LINES=use["lines"], **shared
        )
    else:
        _quantised_matrix_kernel[tiles, splits](
            *tensors, num_tokens, out_size, in_size, splits, x.stride(0), out.stride(0),
            TOKENS=tile_tokens, SWAP=use["swap"], num_stages=use["num_stages"], **shared,
        )  # fmt: skip


def _launch_dequantised(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group_size: int,
    bits: int,
    use: tuning.Settings,
) -> None:
    """Some rows of the weight after the other, as floats, by torch's product."""
    out_size, in_size = packed.shape[0], x.shape[1]
    num_rows = min(max(_MAX_FLOATS // in_size, 1), out_size)
    weight = x.new_empty(num_rows, in_size)
    for first in range(0, out_size, num_rows):
        last = min(first + num_rows, out_size)
        grid = (-(-(last - first) // use["outs"]), packing.num_lines(in_size, bits))
        _dequantise_kernel[grid](
            packed, scales, scales if zeros is None else zeros, weight, first, last, out_size,
            in_size, OUTS=use["outs"], BITS=bits, GROUP=group_size, HAS_ZEROS=zeros is not None,
            num_warps=use["num_warps"],
        )  # fmt: skip
        some = weight[: last - first].t()
        result = out[:, first:last]
        if bias is None:
            torch.mm(x, some, out=result)
        else:
            torch.addmm(bias[first:last], x, some, out=result)
