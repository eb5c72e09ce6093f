"""How much host memory may be taken, and the CPU tier's pages in it, pinned where that works.

Owns the budget (what psutil and the control group leave), the allocation of the CPU tier and the
registration of memory with CUDA. Knows nothing of what the memory holds or of copies.

Fallbacks, in order; the one in use is the ``rung``::

    pinned     all of it registered with CUDA: copies run at the link's rate
    pageable   registration refused, or no GPU: copies are staged by the driver
    none       no CPU tier: preempted sequences are recomputed
"""

import contextlib
import dataclasses
import logging
from pathlib import Path

import psutil
import torch

from pagetier.offload.tiers import KVLayout

logger = logging.getLogger(__name__)

# What stays free for everybody else on the machine.
_BUDGET_SHARE = 0.8
_REGISTERED_PIECE_BYTES = 1 << 30
# (limit, usage) of the control group this process is in, as a container sees them: v2, v1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclasses.dataclass(frozen=True)
class HostPages:
    """Host memory as pages, uint8 ``[blocks, block_bytes]``, and how it was had.

    ``close`` before the pages are freed: memory that is freed while it is registered makes every
    later registration of its addresses fail.
    """

    pages: torch.Tensor
    rung: str
    registered: tuple[int, ...] = ()

    def close(self) -> None:
        """Unpin the pages; no copy may be under way."""
        for address in self.registered:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def available_bytes() -> int:
    """Host memory that is free to take: the least of what the machine and the group have left."""
    available: int = psutil.virtual_memory().available
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            limit = Path(limit_file).read_text().strip()
            usage = int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():  # "max" is no limit
            available = min(available, max(int(limit) - usage, 0))
        break
    return available


def budget_bytes() -> int:
    """Host memory that pagetier allows itself to take now."""
    return budget_of(available_bytes())


def budget_of(available: int) -> int:
    """What pagetier allows itself of ``available`` bytes."""
    return int(available * _BUDGET_SHARE)


def allocate_cpu_tier(layout: KVLayout, num_blocks: int, *, pin: bool) -> HostPages:
    """Allocate ``num_blocks`` pages, or as many as the budget holds, and pin them if asked."""
    affordable = budget_bytes() // layout.block_bytes
    if num_blocks > affordable:
        logger.warning(
            "The CPU tier gets %.2f GiB instead of %.2f: that is what host memory allows.",
            affordable * layout.block_bytes / 2**30,
            num_blocks * layout.block_bytes / 2**30,
        )
        num_blocks = affordable
    # Pages that are to be pinned are touched now; others are committed as they come into use.
    pages = layout.allocate(num_blocks, "cpu", touch=pin)
    if num_blocks == 0:
        return HostPages(pages, "none")
    return pinned(pages) if pin else HostPages(pages, "pageable")


def pinned(pages: torch.Tensor) -> HostPages:
    """Pin these pages, uint8 ``[blocks, block_bytes]``, or say that they cannot be."""
    if registered := _register(pages):
        return HostPages(pages, "pinned", registered)
    logger.warning(
        "%.2f GiB of host memory cannot be pinned: copies will be slower.", pages.nbytes / 2**30
    )
    return HostPages(pages, "pageable")


def _register(pages: torch.Tensor) -> tuple[int, ...]:
    """Pin ``pages`` piece by piece and return the pieces' addresses: all of them, or none.

    Not torch's ``pin_memory``, which rounds sizes up to powers of two.
    """
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, num_bytes = pages.data_ptr(), pages.numel()
    registered: list[int] = []
    for offset in range(0, num_bytes, _REGISTERED_PIECE_BYTES):
        size = min(_REGISTERED_PIECE_BYTES, num_bytes - offset)
        if int(cudart.cudaHostRegister(address + offset, size, 0)) != 0:
            for piece in registered:
                cudart.cudaHostUnregister(piece)
            _clear_cuda_error()
            return ()
        registered.append(address + offset)
    return tuple(registered)


def _clear_cuda_error() -> None:
    """Let go of a refusal that CUDA keeps as its last error: the next operation would raise it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
