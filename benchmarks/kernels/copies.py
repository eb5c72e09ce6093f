"""Copies of blocks: between the tiers, inside one, and of new keys and values into their slots.

Rates over the link to the host count each byte once; inside the device's memory they count what is
read and what is written.
"""

import torch

from benchmarks.kernels.bench import Bench, Case, Figures, Target
from pagetier import kernels
from pagetier.offload.tiers import KVLayout, LayerKV

_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 1024


class _Blocks:
    """Scattered blocks on the device, and room for them in pinned memory."""

    def __init__(self, bench: Bench) -> None:
        self.count = 4 if bench.tiny else _NUM_BLOCKS
        block_bytes = 64 if bench.tiny else _BLOCK_BYTES
        device, self.num_bytes = bench.device, self.count * block_bytes
        num_pages = 4 * self.count
        self.pages = torch.zeros(num_pages, block_bytes, dtype=torch.uint8, device=device)
        self.staging = torch.zeros(self.count, block_bytes, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self.host = torch.zeros(self.count, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.ids = torch.randperm(num_pages)[: self.count].to(device)


def _to_host(bench: Bench) -> Figures:
    blocks = _Blocks(bench)

    def launch() -> None:
        gathered = kernels.gather_blocks(blocks.pages, blocks.ids, blocks.staging)
        blocks.host.copy_(gathered, non_blocking=True)

    return _link(blocks, bench.seconds([launch]), bench.ceilings.device_to_host)


def _to_device(bench: Bench) -> Figures:
    blocks = _Blocks(bench)

    def launch() -> None:
        blocks.staging.copy_(blocks.host, non_blocking=True)
        kernels.scatter_blocks(blocks.staging, blocks.pages, blocks.ids)

    return _link(blocks, bench.seconds([launch]), bench.ceilings.host_to_device)


def _link(blocks: _Blocks, seconds: float, ceiling: float) -> Figures:
    rate = blocks.num_bytes / seconds
    return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of pinned copy": rate / ceiling}


def _inside(bench: Bench) -> Figures:
    blocks = _Blocks(bench)
    order = torch.randperm(4 * blocks.count)[: 2 * blocks.count].view(-1, 2).to(bench.device)
    seconds = bench.seconds([lambda: kernels.copy_blocks(blocks.pages, order)])
    rate = 2 * blocks.num_bytes / seconds
    return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / bench.ceilings.copy}


def _write_kv(num_tokens: int) -> Case:
    """New keys and values of a layer of the 8B shape into scattered slots."""

    def measure(bench: Bench) -> Figures:
        count = 3 if bench.tiny else num_tokens
        kv_heads, head_dim, block_size = (2, 16, 4) if bench.tiny else (8, 128, 16)
        layout = KVLayout((LayerKV(kv_heads, head_dim, head_dim),), block_size, bench.dtype)
        num_blocks = 2 * -(-count // block_size)
        pages = layout.allocate(num_blocks, bench.device)
        # Of a fused projection, as a model hands them over.
        fused = torch.randn(count, 6, kv_heads, head_dim, dtype=bench.dtype, device=bench.device)
        slots = torch.randperm(num_blocks * block_size)[:count].to(bench.device)
        k_cache, v_cache = layout.views(pages)[0]
        seconds = bench.seconds(
            [lambda: kernels.write_kv(fused[:, 4], fused[:, 5], k_cache, v_cache, slots)]
        )
        num_bytes = 2 * 2 * count * kv_heads * head_dim * bench.dtype.itemsize
        rate = num_bytes / seconds
        return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / bench.ceilings.copy}

    return Case(f"write_kv, {num_tokens} tokens", measure)


def cases(_bench: Bench) -> list[Case]:
    """All cases."""
    target = Target("of pinned copy", at_least=0.9)
    return [
        Case("1024 blocks of 64 KiB to the host", _to_host, (target,)),
        Case("1024 blocks of 64 KiB to the device", _to_device, (target,)),
        Case("1024 blocks of 64 KiB inside the device", _inside),
        _write_kv(256),
        _write_kv(8192),
    ]
