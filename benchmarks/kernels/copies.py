"""What a step moves: blocks between the tiers and inside one, keys and values, rows of inputs.

Rates over the link to the host count each byte once; inside the device's memory they count what is
read and what is written.
"""

import functools

import torch

from benchmarks.kernels.bench import Bench, Case, Figures, Target
from pagetier import kernels
from pagetier.kernels import block_copy
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


def _direct(*, to_host: bool) -> Case:
    """Scattered blocks to scattered pinned pages, or back, by programs that reach over the link."""

    def measure(bench: Bench) -> Figures:
        blocks = _Blocks(bench)
        num_pages, block_bytes = blocks.pages.shape
        pinned = bench.device.type == "cuda"
        host = torch.zeros(num_pages, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        host_ids = torch.randperm(num_pages)[: blocks.count].to(bench.device)
        ids = (blocks.ids, host_ids) if to_host else (host_ids, blocks.ids)
        tiers = (blocks.pages, host) if to_host else (host, blocks.pages)
        pairs = torch.stack(ids, dim=1)
        seconds = bench.seconds([lambda: kernels.transfer_blocks(*tiers, pairs)])
        ceiling = bench.ceilings.device_to_host if to_host else bench.ceilings.host_to_device
        figures = _link(blocks, seconds, ceiling)
        if bench.tiny or not pinned:
            return figures
        # What other numbers of programs would reach.
        saved = block_copy._HOST_PROGRAMS
        try:
            for count in (1, 2, 8, 16, 32):
                block_copy._HOST_PROGRAMS = count
                seconds = bench.seconds([lambda: kernels.transfer_blocks(*tiers, pairs)], replays=5)
                figures[f"GB/s of {count} programs"] = blocks.num_bytes / seconds / 1e9
        finally:
            block_copy._HOST_PROGRAMS = saved
        return figures

    way = "to scattered pinned pages" if to_host else "from scattered pinned pages"
    return Case(f"1024 blocks of 64 KiB {way}", measure, (Target("of pinned copy", at_least=0.9),))


def _link(blocks: _Blocks, seconds: float, ceiling: float) -> Figures:
    rate = blocks.num_bytes / seconds
    return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of pinned copy": rate / ceiling}


def _inside(num_pairs: int) -> Case:
    def measure(bench: Bench) -> Figures:
        blocks = _Blocks(bench)
        count = min(num_pairs, blocks.count)
        order = torch.randperm(4 * blocks.count)[: 2 * count].view(-1, 2).to(bench.device)
        seconds = bench.seconds([lambda: kernels.copy_blocks(blocks.pages, order)])
        rate = 2 * count * blocks.pages.shape[1] / seconds
        return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / bench.ceilings.copy}

    return Case(f"{num_pairs} blocks of 64 KiB inside the device", measure)


def _gather(bench: Bench) -> Figures:
    blocks = _Blocks(bench)
    seconds = bench.seconds(
        [lambda: kernels.gather_blocks(blocks.pages, blocks.ids, blocks.staging)]
    )
    rate = 2 * blocks.num_bytes / seconds
    return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / bench.ceilings.copy}


def _write_kv(
    num_tokens: int, cache_dtype: torch.dtype | None = None, *, rotated: bool = False
) -> Case:
    """New keys and values of a layer of the 8B shape into scattered slots.

    If ``rotated``, so are four times as many heads of queries on the way, and the keys.
    """

    def measure(bench: Bench) -> Figures:
        count = 3 if bench.tiny else num_tokens
        kv_heads, head_dim, block_size = (2, 16, 4) if bench.tiny else (8, 128, 16)
        dtype = cache_dtype or bench.dtype
        layout = KVLayout((LayerKV(kv_heads, head_dim, head_dim),), block_size, dtype)
        num_blocks = 2 * -(-count // block_size)
        pages = layout.allocate(num_blocks, bench.device)
        # Of a fused projection, as a model hands them over.
        fused = torch.randn(count, 6, kv_heads, head_dim, dtype=bench.dtype, device=bench.device)
        slots = torch.randperm(num_blocks * block_size)[:count].to(bench.device)
        *caches, scales = layout.views(pages)[0]
        new = (fused[:, 4], fused[:, 5])
        num_bytes = 2 * count * kv_heads * head_dim * (bench.dtype.itemsize + dtype.itemsize)
        if rotated:
            q = fused[:, :4].flatten(1, 2)  # of as many heads as that
            cos = torch.randn(count, head_dim, dtype=bench.dtype, device=bench.device)
            num_bytes += 2 * q.numel() * q.itemsize
            launch = functools.partial(
                kernels.write_rotated_kv, q, *new, cos, cos, *caches, slots, out=q, **scales
            )
        else:
            launch = functools.partial(kernels.write_kv, *new, *caches, slots, **scales)
        seconds = bench.seconds([launch])
        rate = num_bytes / seconds
        return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of copy": rate / bench.ceilings.copy}

    what = "write_rotated_kv" if rotated else "write_kv"
    name = "" if cache_dtype is None else f", {str(cache_dtype).removeprefix('torch.')}"
    return Case(f"{what}, {num_tokens} tokens{name}", measure)


def _rows(bench: Bench) -> Figures:
    """The inputs of a decode of 256 sequences, read and moved on."""
    size, max_blocks = (3, 4) if bench.tiny else (256, 512)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=bench.device)

    rows = torch.arange(size, device=bench.device)
    last_token_ids, num_computed = zeros(size + 1), zeros(size + 1)
    num_computed += 16 * max_blocks // 2
    tables = zeros(size + 1, max_blocks, dtype=torch.int32)
    out = {name: zeros(size) for name in ("token_ids", "positions", "slots")}
    out["seq_lens"] = zeros(size, dtype=torch.int32)
    out["batch_tables"] = zeros(size, max_blocks, dtype=torch.int32)

    def read() -> None:
        kernels.read_rows(rows, last_token_ids, num_computed, tables, block_size=16, **out)

    figures = {"us": bench.seconds([read]) * 1e6}
    # Measured last: the rows move on and on.
    advance = functools.partial(
        kernels.advance_rows, rows, out["token_ids"], last_token_ids, num_computed
    )
    return figures | {"us to advance": bench.seconds([advance]) * 1e6}


def cases(_bench: Bench) -> list[Case]:
    """All cases."""
    target = Target("of pinned copy", at_least=0.9)
    return [
        Case("1024 blocks of 64 KiB to the host", _to_host, (target,)),
        Case("1024 blocks of 64 KiB to the device", _to_device, (target,)),
        _direct(to_host=True),
        _direct(to_host=False),
        Case("1024 blocks of 64 KiB gathered inside the device", _gather),
        _inside(1024),
        _inside(16),
        _write_kv(256),
        _write_kv(8192),
        _write_kv(8192, torch.int8),
        _write_kv(256, rotated=True),
        _write_kv(8192, rotated=True),
        Case("read_rows, 256 sequences", _rows),
    ]
