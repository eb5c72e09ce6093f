"""How fast the attention kernel reads KV in decoding, beside the device's own ceiling.

Needs a CUDA device. Each figure is the median over replays of a CUDA graph that runs the kernel
on many different sets of blocks, together larger than the L2 cache, so that keys and values come
from memory. The ceiling is measured in the same run: reading a large tensor once.
"""

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from pagetier.kernels import AttentionMetadata, attention, reference
from pagetier.offload.tiers import KVLayout, LayerKV

_MIN_BYTES = 1 << 30  # of all sets together
_CEILING_BYTES = 4 << 30
_REPLAYS = 15


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode: sequences of equal lengths, and the shape of a layer."""

    name: str
    num_sequences: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read, in 16 bits."""
        return self.num_sequences * self.length * self.kv_heads * self.head_dim * 2 * 2


CASES = (
    Case("8B 256 x 900", 256, 900),
    Case("8B 64 x 1024", 64, 1024),
    Case("8B 16 x 1024", 16, 1024),
    Case("8B 1 x 32768", 1, 32768),
    Case("8B 1 x 4096", 1, 4096),
    Case("head size 64, 256 x 900", 256, 900, head_dim=64),
)


def time_graph(launches: list[Callable[[], Any]]) -> float:
    """Seconds of one launch: the median over replays of a graph of all of them."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(launches))
    return statistics.median(times)


def read_ceiling() -> float:
    """Bytes per second of reading a large tensor once."""
    data = torch.randint(0, 1 << 30, (_CEILING_BYTES // 8,), device="cuda")
    return _CEILING_BYTES / time_graph([lambda: data.sum()])


def measure(case: Case, block_size: int) -> dict[str, Any]:
    """Bandwidth of the kernel and of the reference, and how far apart their results are."""
    num_sets = max(_MIN_BYTES // case.kv_bytes, 1)
    layout = KVLayout(
        (LayerKV(case.kv_heads, case.head_dim, case.head_dim),), block_size, torch.bfloat16
    )
    blocks_each = -(-case.length // block_size) * case.num_sequences
    pages = layout.allocate(blocks_each * num_sets, "cuda")
    pages.view(torch.bfloat16).normal_()
    k_cache, v_cache = layout.views(pages)[0]
    order = np.random.default_rng(0).permutation(blocks_each * num_sets).astype(np.int32)
    tables = torch.tensor(order, device="cuda").view(num_sets, case.num_sequences, -1)
    lens = torch.full((case.num_sequences,), case.length, dtype=torch.int32, device="cuda")
    starts = torch.arange(case.num_sequences + 1, dtype=torch.int32, device="cuda")
    q = torch.randn(
        case.num_sequences, case.heads, case.head_dim, dtype=torch.bfloat16, device="cuda"
    )
    scale = case.head_dim**-0.5
    batches = [AttentionMetadata.build(table, lens, starts) for table in tables]

    def launcher(batch: AttentionMetadata) -> Callable[[], torch.Tensor]:
        return lambda: attention.paged_attention(q, k_cache, v_cache, batch, scale=scale)

    seconds = time_graph([launcher(batch) for batch in batches])
    ours = launcher(batches[0])().float()
    expected = reference.paged_attention(q, k_cache, v_cache, batches[0], scale=scale).float()
    return {
        "case": case.name,
        "microseconds": seconds * 1e6,
        "gb_per_second": case.kv_bytes / seconds / 1e9,
        "relative_error": float((ours - expected).norm() / expected.norm()),
    }


def main() -> int:
    """Measure all cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device, and there is none here.")
        return 1
    ceiling = read_ceiling() / 1e9
    results = [measure(case, args.block_size) for case in CASES]
    table = Table(title=f"Decode attention, block size {args.block_size}, bf16")
    for column in ("case", "us", "GB/s", f"of {ceiling:.0f} GB/s", "error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        result["fraction_of_ceiling"] = result["gb_per_second"] / ceiling
        table.add_row(
            result["case"],
            f"{result['microseconds']:.1f}",
            f"{result['gb_per_second']:.0f}",
            f"{result['fraction_of_ceiling']:.0%}",
            f"{result['relative_error']:.1e}",
        )
    Console(width=100).print(table)
    content = {
        "flags": {"block_size": args.block_size},
        "read_ceiling_gb_per_second": ceiling,
        "results": results,
    }
    record.save("kernels", content, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
