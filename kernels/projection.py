"""Projections ``y = x W^T + b`` of few tokens, whose time is that of reading the weights.

Owns two Triton kernels, their launch, and the choice between them and torch (cuBLAS), which the
tables of ``tuning`` make by shape: without a measured entry, torch serves. Knows nothing of models.
The reference is ``reference.linear``.

Layout. ``x`` is ``(tokens, in)``, ``W`` is ``(out, in)`` as ``nn.Linear`` stores it, rows dense.

*matrix* multiplies tiles ``(TOKENS, INS) x (INS, OUTS)`` on tensor cores, weights as the right
operand, or as the left one if ``SWAP``: a chip takes 64 rows at a time on the left and as few as 8
on the right, so that few tokens waste less there. *vector* is for one token: it multiplies without
tensor cores and adds a tile's columns up once, at the end. Grid of both ``(tiles, splits)``: the
columns of ``W`` are divided among ``splits`` programs, so that programs fill the device however few
rows there are. Each leaves its partial sum in a workspace and the last one to finish adds them all
in order, so the result does not depend on which one was last.

With ``PREFETCH`` a kernel starts while the one before it still runs (programmatic dependent launch,
compute capability 9.0): it asks for its first weights, which no kernel writes, and only then waits
for the other's results.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pagetier.kernels import tuning

# Of the workspace that the launches on a device share: fp32 sums, and tiles of one launch.
_MAX_PARTIAL_SUMS = 1 << 22
_MAX_TILES = 1 << 14
_CACHE_LINE_BYTES = 128
_TORCH = {"kernel": "torch"}


@triton.jit
def _prefetch(pointers):
    """Ask for these addresses' cache lines, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _wait_for_inputs(weight_rows, first, last, LINES: tl.constexpr, LINE: tl.constexpr):
    """Wait for the kernel before this one; meanwhile, ask for the first ``LINES`` of each row."""
    at = first + tl.arange(0, LINES) * LINE
    _prefetch(weight_rows[:, None] + tl.minimum(at, last - 1)[None, :])
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def finish(
    total, bias_ptr, out_ptr, partial_ptr, counters_ptr, tokens, outs, num_tokens, out_size,
    out_stride, splits,
    TOKENS: tl.constexpr, OUTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add up the splits' sums ``(TOKENS, OUTS)``, and store the result from the last one.

    Of a grid ``(tiles, splits)``; ``workspace`` gives ``partial_ptr`` and ``counters_ptr``.
    """
    exists = (tokens < num_tokens)[:, None] & (outs < out_size)[None, :]
    is_last = splits == 1
    if splits > 1:
        tile = tl.program_id(0)
        place = partial_ptr + tl.arange(0, TOKENS)[:, None] * OUTS + tl.arange(0, OUTS)[None, :]
        place += (tile * splits).to(tl.int64) * (TOKENS * OUTS)
        tl.store(place + tl.program_id(1) * (TOKENS * OUTS), total, mask=exists)
        # All of this program's stores come before its count, and the count is one thread's work.
        tl.debug_barrier()
        num_done = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        is_last = num_done == splits - 1
        if is_last:
            tl.store(counters_ptr + tile, 0)  # for the next launch
            total = tl.zeros([TOKENS, OUTS], tl.float32)
            for other in range(splits):
                total += tl.load(
                    place + other * (TOKENS * OUTS), mask=exists, other=0.0, cache_modifier=".cg"
                )
    if is_last:
        if HAS_BIAS:
            total += tl.load(bias_ptr + outs, mask=outs < out_size, other=0.0)[None, :]
        tl.store(
            out_ptr + tokens.to(tl.int64)[:, None] * out_stride + outs[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=exists,
        )


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _matrix_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr,
    num_tokens, out_size, in_size, splits, x_stride, weight_stride, out_stride,
    TOKENS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, SWAP: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, PREFETCH: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    # Tiles of the same weights are neighbours, so that these are read from memory once.
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    tokens = (tl.program_id(0) % token_tiles) * TOKENS + tl.arange(0, TOKENS)
    outs = (tl.program_id(0) // token_tiles) * OUTS + tl.arange(0, OUTS)
    per_split = tl.cdiv(tl.cdiv(in_size, INS), splits) * INS
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, in_size)
    # Rows that do not exist repeat the last one, so that loads need no mask.
    weight_rows = weight_ptr + tl.minimum(outs, out_size - 1).to(tl.int64) * weight_stride
    x_rows = x_ptr + tl.minimum(tokens, num_tokens - 1).to(tl.int64) * x_stride
    if PREFETCH > 0:
        _wait_for_inputs(weight_rows, first, last, PREFETCH * INS // LINE, LINE)
    ins = tl.arange(0, INS)
    total = tl.zeros([OUTS, TOKENS] if SWAP else [TOKENS, OUTS], tl.float32)
    for start in range(first, last, INS):
        at = start + ins
        if EVEN:
            weight = tl.load(weight_rows[:, None] + at[None, :], eviction_policy="evict_first")
            x = tl.load(x_rows[:, None] + at[None, :])
        else:
            exists = (at < in_size)[None, :]
            weight = tl.load(
                weight_rows[:, None] + at[None, :],
                mask=exists,
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_rows[:, None] + at[None, :], mask=exists, other=0.0)
        if SWAP:
            total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    if SWAP:
        total = tl.trans(total)
    finish(
        total, bias_ptr, out_ptr, partial_ptr, counters_ptr, tokens, outs, num_tokens, out_size,
        out_stride, splits, TOKENS, OUTS, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _vector_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr,
    out_size, in_size, splits, weight_stride,
    OUTS: tl.constexpr, INS: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, PREFETCH: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    per_split = tl.cdiv(tl.cdiv(in_size, INS), splits) * INS
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, in_size)
    weight_rows = weight_ptr + tl.minimum(outs, out_size - 1).to(tl.int64) * weight_stride
    if PREFETCH > 0:
        _wait_for_inputs(weight_rows, first, last, PREFETCH * INS // LINE, LINE)
    ins = tl.arange(0, INS)
    total = tl.zeros([OUTS, INS], tl.float32)
    for start in tl.range(first, last, INS, loop_unroll_factor=UNROLL):
        at = start + ins
        if EVEN:
            weight = tl.load(weight_rows[:, None] + at[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + at)
        else:
            exists = at < in_size
            weight = tl.load(
                weight_rows[:, None] + at[None, :],
                mask=exists[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_ptr + at, mask=exists, other=0.0)
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    finish(
        tl.sum(total, 1)[None, :], bias_ptr, out_ptr, partial_ptr, counters_ptr,
        tl.arange(0, 1), outs, 1, out_size, 0, splits, 1, OUTS, HAS_BIAS,
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens by a layer's weights; takes and returns what ``reference.linear`` does.

    The launches on a device share a workspace: they have to be on one stream, or wait for each
    other. Inside ``torch.compile``, call ``torch.ops.pagetier.linear(x, weight, bias)``.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    out_size, in_size = weight.shape
    if x.shape[-1] != in_size or x.dtype != weight.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} of {x.dtype} and weight {tuple(weight.shape)} of {weight.dtype} "
            "do not belong together."
        )
    if bias is not None and bias.shape != (out_size,):
        raise ValueError(f"bias {tuple(bias.shape)} does not belong to {out_size} outputs.")
    shape = (*x.shape[:-1], out_size)
    if out is None:
        out = x.new_empty(shape)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} must be contiguous and of shape {shape}.")
    num_tokens = out.numel() // out_size
    if num_tokens == 0:
        return out
    rows, result = x.reshape(num_tokens, in_size), out.view(num_tokens, out_size)
    use = tuning.settings(
        "linear",
        x.device,
        _TORCH,
        itemsize=x.element_size(),
        num_tokens=num_tokens,
        out_size=out_size,
        in_size=in_size,
    )
    if use["kernel"] == "torch" or weight.stride(1) != 1:
        if bias is None:
            torch.mm(rows, weight.t(), out=result)
        else:
            torch.addmm(bias, rows, weight.t(), out=result)
        return out
    launch(rows if rows.stride(1) == 1 else rows.contiguous(), weight, bias, result, use)
    return out


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    use: tuning.Settings,
) -> None:
    """Run the kernel and settings ``use``, whose meaning is that of the kernels' arguments.

    Args:
        x: ``(tokens, in)``, rows dense.
        weight: ``(out, in)``, rows dense.
        bias: ``(out,)`` or None.
        out: ``(tokens, out)``, rows dense; written.
        use: an entry of a table whose kernel is not torch's.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0]
    is_vector = use["kernel"] == "vector"
    tile_tokens, tile_outs, tile_ins = 1 if is_vector else use["tokens"], use["outs"], use["ins"]
    assert num_tokens == 1 or not is_vector, f"{use} is for one token, not for {num_tokens}"
    tiles = -(-num_tokens // tile_tokens) * -(-out_size // tile_outs)
    splits = num_splits(use["splits"], -(-in_size // tile_ins), tiles, tile_tokens * tile_outs)
    partial_sums, counters = workspace(out.device)
    prefetch = use.get("prefetch", 0)
    tensors = (x, weight, out if bias is None else bias, out, partial_sums, counters)
    shared = {
        "OUTS": tile_outs,
        "INS": tile_ins,
        "EVEN": in_size % tile_ins == 0,
        "HAS_BIAS": bias is not None,
        "PREFETCH": prefetch,
        "LINE": _CACHE_LINE_BYTES // x.element_size(),
        "num_warps": use["num_warps"],
        "launch_pdl": prefetch > 0,
    }
    if is_vector:
        _vector_kernel[tiles, splits](
            *tensors, out_size, in_size, splits, weight.stride(0), UNROLL=use["unroll"], **shared
        )
    else:
        _matrix_kernel[tiles, splits](
            *tensors, num_tokens, out_size, in_size, splits,
            x.stride(0), weight.stride(0), out.stride(0),
            TOKENS=tile_tokens, SWAP=use["swap"], num_stages=use["num_stages"], **shared,
        )  # fmt: skip


def num_splits(wanted: int, steps: int, tiles: int, tile_sums: int) -> int:
    """Programs among which ``steps`` of each of ``tiles`` are divided, as far as there is room.

    None is left without a step: the last one would wait for none of them, but prefetching would
    read before a row's start.
    """
    splits = min(wanted, steps, _MAX_PARTIAL_SUMS // (tiles * tile_sums))
    splits = 1 if tiles > _MAX_TILES else max(splits, 1)
    return -(-steps // -(-steps // splits))


_workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}


def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums, and a counter for each tile that every launch leaves at zero."""
    if device not in _workspaces:
        made = (
            torch.empty(_MAX_PARTIAL_SUMS, dtype=torch.float32, device=device),
            torch.zeros(_MAX_TILES, dtype=torch.int32, device=device),
        )
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Such memory is the graph's, and zero only when that is replayed: of no use to others.
            return made
        _workspaces[device] = made
    return _workspaces[device]


@torch.library.custom_op("pagetier::linear", mutates_args=())
def _linear_operator(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return linear(x, weight, bias)


@_linear_operator.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
