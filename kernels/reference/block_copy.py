"""Copies of whole blocks in plain torch.

Knows nothing of what blocks hold, nor of who may touch them.
"""

from collections.abc import Sequence

import torch


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


def transfer_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    pairs: torch.Tensor | Sequence[tuple[int, int]],
) -> None:
    """Copy blocks from one tier to another.

    Args:
        source: pages of a tier ``(blocks, block_bytes)``.
        destination: pages of another, written in place; blocks are of the same size.
        pairs: (source, destination) block ids, ``(pairs, 2)``; destinations are all different.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.int64).view(-1, 2)
    moved = source.index_select(0, pairs[:, 0].to(source.device)).to(destination.device)
    destination.index_copy_(0, pairs[:, 1].to(destination.device), moved)
