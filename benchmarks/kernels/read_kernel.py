"""A Triton kernel that reads a tensor once and keeps one number of each tile: the read ceiling."""

import torch
import triton
import triton.language as tl

from benchmarks.kernels.timing import Launch

# Elements of 8 bytes that a program reads at once, how often it does so, and its warps.
SETTINGS = [
    (tile, rounds, warps)
    for tile, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16))
    for rounds in (1, 4, 16)
]


@triton.jit
def _read_kernel(data_ptr, out_ptr, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    place = program * TILE * ROUNDS + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int64)
    for part in tl.static_range(ROUNDS):
        total += tl.load(data_ptr + place + part * TILE, eviction_policy="evict_first")
    tl.store(out_ptr + program, tl.sum(total, 0))


def launcher(data: torch.Tensor, tile: int, rounds: int, warps: int) -> Launch:
    """A launch that reads all of ``data``, int64 of a size that ``tile * rounds`` divides."""
    programs = data.numel() // (tile * rounds)
    out = torch.empty(programs, dtype=torch.int64, device=data.device)
    return lambda: _read_kernel[(programs,)](data, out, tile, rounds, num_warps=warps)
