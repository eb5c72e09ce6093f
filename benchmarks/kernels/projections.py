"""Projections ``y = x W^T`` of few tokens, whose time is that of reading the weights."""

import torch
from torch.nn import functional

from benchmarks.kernels.bench import Bench, Case, Figures, Target

# (out, in) of each projection; q, k and v fused, and gate and up.
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "8B lm_head": (128256, 4096),
    "1B qkv": (3072, 2048),
    "1B o": (2048, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "1B lm_head": (128256, 2048),
}
_TARGETS = {1: 0.92, 16: 0.90, 64: 0.85}


def _projection(name: str, num_tokens: int) -> Case:
    out_size, in_size = SHAPES[name]

    def measure(bench: Bench) -> Figures:
        shape = (48, 32) if bench.tiny else (out_size, in_size)
        num_bytes = shape[0] * shape[1] * bench.dtype.itemsize
        weights = [
            torch.randn(shape, dtype=bench.dtype, device=bench.device) * shape[1] ** -0.5
            for _ in range(bench.num_sets(num_bytes))
        ]
        x = torch.randn(num_tokens, shape[1], dtype=bench.dtype, device=bench.device)
        cublas = bench.seconds([lambda w=w: functional.linear(x, w) for w in weights])
        return {
            "cuBLAS us": cublas * 1e6,
            "cuBLAS of read": num_bytes / cublas / bench.ceilings.read,
        }

    targets = ()
    if name.startswith("8B") and num_tokens in _TARGETS:
        targets = (Target("of read", at_least=_TARGETS[num_tokens]),)
    return Case(f"{name}, {num_tokens} tokens", measure, targets)


def cases(bench: Bench) -> list[Case]:
    """All shapes at several numbers of tokens."""
    counts = (1, 16) if bench.tiny else (1, 4, 16, 64, 256)
    return [_projection(name, count) for count in counts for name in SHAPES]
