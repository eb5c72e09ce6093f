"""Copies of whole blocks as Triton kernels: inside a tier, to and from staging, between tiers.

Owns the kernels, the width of a word, and how many programs move bytes. Knows nothing of what
blocks hold, nor of who may touch them. The references are those of ``reference.block_copy``.

Layout. Pages are ``(blocks, block_bytes)``, dense in the last dimension, the first stride any. They
are copied in the widest word that divides every length, stride and address, at best 16 bytes at
once.

Pages in pinned host memory are read and written by the kernels directly, over the link: unified
addressing gives them the same address on both sides. A link is full with few programs, and few
leave the multiprocessors to the step that runs meanwhile.

Grids. ``_move_blocks_kernel``: any number of programs; each takes every so-manieth piece of a
block. ``_copy_blocks_kernel``: one program for each column of bytes of a block. It copies that
column of *all* pairs, first reading all and then writing all, so that a block may be the source of
one pair and the destination of another.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from pagetier.kernels import reference
from pagetier.kernels.metadata import upload

_VECTOR_BYTES = 16
# A piece of a block, on the device and over the link: 32 and 128 bytes of each thread.
_PIECE_BYTES = 8192
_HOST_PIECE_BYTES = 65536
_NUM_WARPS = 8
_HOST_NUM_WARPS = 16
# Programs that fill the link to the host.
_HOST_PROGRAMS = 4
# Programs that fill a device; each then takes several pieces.
_MAX_PROGRAMS = 1 << 16
# What a program of _copy_blocks_kernel holds at best, and for up to how many pairs kernels are
# compiled.
_COLUMN_BYTES = 65536
_NUM_PAIRS = (16, 128, 1024)
_COLUMN_NUM_WARPS = 16

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


# Nothing is compiled anew for another number of blocks.
@triton.jit(do_not_specialize=("num_pieces",))
def _move_blocks_kernel(
    source_ptr, destination_ptr, ids_ptr,
    source_stride, destination_stride, num_vectors, pieces_per_block, num_pieces,
    SOURCE_BY_ID: tl.constexpr, DESTINATION_BY_ID: tl.constexpr, IDS_PER_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Strides and ``num_vectors`` count vectors of ``VECTOR`` words, ``PIECE`` counts words."""
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        index = piece // pieces_per_block
        word = (piece % pieces_per_block) * PIECE + tl.arange(0, PIECE)
        inside = word < num_vectors * VECTOR
        source = index.to(tl.int64)
        destination = source
        if SOURCE_BY_ID:
            source = tl.load(ids_ptr + index * IDS_PER_BLOCK).to(tl.int64)
        if DESTINATION_BY_ID:
            last = index * IDS_PER_BLOCK + IDS_PER_BLOCK - 1
            destination = tl.load(ids_ptr + last).to(tl.int64)
        # Counting in vectors tells the compiler that rows start at a multiple of one.
        data = tl.load(source_ptr + source * source_stride * VECTOR + word, mask=inside)
        tl.store(destination_ptr + destination * destination_stride * VECTOR + word, data, inside)


@triton.jit(do_not_specialize=("num_pairs",))
def _copy_blocks_kernel(
    pages_ptr, pairs_ptr, stride, num_vectors, num_pairs,
    VECTOR: tl.constexpr, PAIRS: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """``stride`` and ``num_vectors`` count vectors of ``VECTOR`` words, ``COLUMN`` words."""
    pair = tl.arange(0, PAIRS)
    exists = pair < num_pairs
    source = tl.load(pairs_ptr + pair * 2, mask=exists, other=0).to(tl.int64)
    destination = tl.load(pairs_ptr + pair * 2 + 1, mask=exists, other=0).to(tl.int64)
    word = tl.program_id(0) * COLUMN + tl.arange(0, COLUMN)
    inside = exists[:, None] & (word < num_vectors * VECTOR)[None, :]
    data = tl.load(
        pages_ptr + (source * stride * VECTOR)[:, None] + word[None, :], mask=inside, other=0
    )
    # No thread writes before all have read.
    tl.debug_barrier()
    tl.store(
        pages_ptr + (destination * stride * VECTOR)[:, None] + word[None, :], data, mask=inside
    )


def copy_blocks(pages: torch.Tensor, pairs: torch.Tensor | Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks inside a tier, in place; takes what ``reference.copy_blocks`` does.

    Raises:
        ValueError: ``pages`` are not dense rows.
    """
    pairs = _ids(pairs, pages.device).view(-1, 2)
    num_pairs = pairs.shape[0]
    if num_pairs == 0:
        return
    if num_pairs > _NUM_PAIRS[-1]:
        reference.copy_blocks(pages, pairs)  # more than a program holds: by way of a copy of all
        return
    (words,), strides, num_vectors, vector = _in_vectors(pages)
    padded = next(count for count in _NUM_PAIRS if num_pairs <= count)
    # Narrower words take as many registers each, so a program takes fewer of their bytes.
    vector_bytes = vector * words.itemsize
    column = _COLUMN_BYTES * vector_bytes // _VECTOR_BYTES // padded // words.itemsize
    _copy_blocks_kernel[(triton.cdiv(num_vectors * vector, column),)](
        words, pairs, strides[0], num_vectors, num_pairs,
        VECTOR=vector, PAIRS=padded, COLUMN=column, num_warps=_COLUMN_NUM_WARPS,
    )  # fmt: skip


def gather_blocks(
    pages: torch.Tensor, block_ids: torch.Tensor | Sequence[int], staging: torch.Tensor
) -> torch.Tensor:
    """Copy scattered blocks to the start of a buffer; takes what ``reference.gather_blocks`` does.

    ``pages`` or ``staging``, but not both, may be pinned host memory; ``block_ids`` that are a
    tensor must then be on the other's device.

    Raises:
        ValueError: shapes do not belong together.
    """
    block_ids = _ids(block_ids, _device(pages, staging))
    num_blocks = block_ids.shape[0]
    _check_room(staging, num_blocks)
    _move(pages, staging, block_ids, num_blocks, by_id=(True, False))
    return staging[:num_blocks]


def scatter_blocks(
    staging: torch.Tensor, pages: torch.Tensor, block_ids: torch.Tensor | Sequence[int]
) -> None:
    """Copy blocks from the start of a buffer apart; takes what ``reference.scatter_blocks`` does.

    As for ``gather_blocks``, either side may be pinned host memory.

    Raises:
        ValueError: shapes do not belong together.
    """
    block_ids = _ids(block_ids, _device(pages, staging))
    num_blocks = block_ids.shape[0]
    _check_room(staging, num_blocks)
    _move(staging, pages, block_ids, num_blocks, by_id=(False, True))


def transfer_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    pairs: torch.Tensor | Sequence[tuple[int, int]],
) -> None:
    """Copy blocks from one tier to another; takes what ``reference.transfer_blocks`` does.

    As for ``gather_blocks``, either side may be pinned host memory.

    Raises:
        ValueError: shapes do not belong together.
    """
    pairs = _ids(pairs, _device(source, destination)).view(-1, 2)
    _move(source, destination, pairs, pairs.shape[0], by_id=(True, True))


def _move(
    source: torch.Tensor,
    destination: torch.Tensor,
    ids: torch.Tensor,
    num_blocks: int,
    *,
    by_id: tuple[bool, bool],
) -> None:
    if num_blocks == 0:
        return
    words, strides, num_vectors, vector = _in_vectors(source, destination)
    over_link = source.device != destination.device
    piece_bytes = _HOST_PIECE_BYTES if over_link else _PIECE_BYTES
    piece = piece_bytes // words[0].itemsize
    pieces_per_block = triton.cdiv(num_vectors * vector, piece)
    num_pieces = num_blocks * pieces_per_block
    num_programs = min(num_pieces, _HOST_PROGRAMS if over_link else _MAX_PROGRAMS)
    _move_blocks_kernel[(num_programs,)](
        *words, ids, *strides, num_vectors, pieces_per_block, num_pieces,
        SOURCE_BY_ID=by_id[0], DESTINATION_BY_ID=by_id[1], IDS_PER_BLOCK=sum(by_id),
        VECTOR=vector, PIECE=piece, num_warps=_HOST_NUM_WARPS if over_link else _NUM_WARPS,
    )  # fmt: skip


def _in_vectors(*buffers: torch.Tensor) -> tuple[list[torch.Tensor], list[int], int, int]:
    """Buffers of bytes as the widest words that fit all of them.

    Returns:
        The same memory as words; strides between rows, in vectors; vectors of a row; words of a
        vector.
    """
    widths = {buffer.shape[1] * buffer.itemsize for buffer in buffers}
    if len(widths) != 1 or any(b.stride(1) != 1 and b.shape[1] > 1 for b in buffers):
        shapes = " and ".join(f"{tuple(b.shape)} {b.dtype}" for b in buffers)
        raise ValueError(f"Blocks of {shapes} are not equally many dense bytes.")
    width = widths.pop()
    strides = [buffer.stride(0) * buffer.itemsize for buffer in buffers]
    addresses = [buffer.data_ptr() for buffer in buffers]
    vector_bytes = math.gcd(_VECTOR_BYTES, width, *strides, *addresses)
    word = _WORDS[min(vector_bytes, 4)]
    words = [buffer.view(word) for buffer in buffers]
    vectors = [stride // vector_bytes for stride in strides]
    return words, vectors, width // vector_bytes, vector_bytes // word.itemsize


def _ids(ids: torch.Tensor | Sequence[int] | Sequence[tuple[int, int]], device: torch.device) -> (
    torch.Tensor
):  # fmt: skip
    """Ids on the device, dense; those of the host go there without waiting."""
    if isinstance(ids, torch.Tensor):
        return ids.contiguous()
    return upload([np.array(ids, dtype=np.int64)], device)[0]


def _device(*buffers: torch.Tensor) -> torch.device:
    """Where a kernel on these runs."""
    return next((b.device for b in buffers if b.is_cuda), buffers[0].device)


def _check_room(staging: torch.Tensor, num_blocks: int) -> None:
    if staging.shape[0] < num_blocks:
        raise ValueError(
            f"{num_blocks} blocks do not fit into a staging buffer of {staging.shape[0]}."
        )
