"""Changes to logits by tables that lie on the device, as Triton kernels that read next to nothing.

Owns the kernels and their launch. Knows nothing of requests. The references, which also say what
the changes are, are those of ``reference.logit_changes``.

Grid ``(tiles, rows)`` for both. A mask costs a read of its bits and a write of what it forbids; a
penalty a read of the counts, and of the few logits whose count is not 0.
"""

import torch
import triton
import triton.language as tl

from pagetier.kernels.reference.logit_changes import IN_PROMPT

_TILE = 4096
_NUM_WARPS = 4
_COUNT_BITS = tl.constexpr(IN_PROMPT - 1)


@triton.jit(do_not_specialize=("mask_stride",))
def _allow_kernel(
    logits_ptr, rows_ptr, masks_ptr, stride, mask_stride, vocabulary, TILE: tl.constexpr
):
    index = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + index)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = token < vocabulary
    words = tl.load(masks_ptr + index * mask_stride + token // 32, mask=exists, other=0)
    is_forbidden = exists & (((words >> (token % 32)) & 1) == 0)
    nothing = tl.full([TILE], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + token, nothing, mask=is_forbidden)


@triton.jit
def _penalise_kernel(
    logits_ptr, samples_ptr, counts_ptr, rows_ptr, strengths_ptr,
    stride, count_stride, vocabulary, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1).to(tl.int64)
    sample = tl.load(samples_ptr + index)
    row = tl.load(rows_ptr + index)
    repetition = tl.load(strengths_ptr + index * 3)
    presence = tl.load(strengths_ptr + index * 3 + 1)
    frequency = tl.load(strengths_ptr + index * 3 + 2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    counts = tl.load(counts_ptr + row * count_stride + token, mask=token < vocabulary, other=0)
    has_come = counts != 0
    place = logits_ptr + sample * stride + token
    logits = tl.load(place, mask=has_come, other=0.0)
    divided = tl.math.div_rn(logits, tl.zeros_like(logits) + repetition)
    logits = tl.where(logits > 0.0, divided, logits * repetition)
    in_output = counts & _COUNT_BITS
    logits -= frequency * in_output.to(tl.float32)
    logits -= tl.where(in_output > 0, presence, 0.0)
    tl.store(place, logits, mask=has_come)


def allow_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Forbid all but the allowed tokens in some rows; see ``reference.allow_tokens``.

    Raises:
        ValueError: shapes do not belong together, or rows have gaps.
    """
    vocabulary = logits.shape[1]
    if masks.shape[0] != rows.shape[0] or masks.shape[1] * 32 < vocabulary:
        raise ValueError(
            f"Masks of {tuple(masks.shape)} words are not of {rows.shape[0]} rows of {vocabulary} "
            "tokens."
        )
    _check_dense(logits, masks)
    if len(rows):
        _allow_kernel[(triton.cdiv(vocabulary, _TILE), len(rows))](
            logits, rows, masks, logits.stride(0), masks.stride(0), vocabulary,
            TILE=_TILE, num_warps=_NUM_WARPS,
        )  # fmt: skip


def penalise_rows(
    logits: torch.Tensor,
    samples: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    strengths: torch.Tensor,
) -> None:
    """Apply penalties to some rows, in place; see ``reference.penalise_rows``.

    Raises:
        ValueError: shapes do not belong together, or rows have gaps.
    """
    vocabulary = logits.shape[1]
    if counts.shape[1] != vocabulary or not (
        samples.shape == rows.shape and strengths.shape == (*rows.shape, 3)
    ):
        raise ValueError(
            f"logits {tuple(logits.shape)}, samples {tuple(samples.shape)}, counts "
            f"{tuple(counts.shape)}, rows {tuple(rows.shape)} and strengths "
            f"{tuple(strengths.shape)} do not belong together."
        )
    _check_dense(logits, counts, strengths)
    if len(rows):
        _penalise_kernel[(triton.cdiv(vocabulary, _TILE), len(rows))](
            logits, samples.contiguous(), counts, rows.contiguous(), strengths.contiguous(),
            logits.stride(0), counts.stride(0), vocabulary, TILE=_TILE, num_warps=_NUM_WARPS,
        )  # fmt: skip


def _check_dense(*tables: torch.Tensor) -> None:
    if any(table.stride(1) != 1 for table in tables if table.shape[1] > 1):
        raise ValueError(
            f"Strides of {[table.stride() for table in tables]}: the last must all be 1."
        )
