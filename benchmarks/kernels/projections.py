"""Projections ``y = x W^T`` of few tokens, whose time is that of reading the weights."""

import concurrent.futures
import functools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels.bench import Bench, Case, Figures, Target, Tuned, relative_error
from pagetier import kernels
from pagetier.kernels import tuning

logger = logging.getLogger(__name__)

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
# Numbers of tokens that are tuned together, as if there were the most of them.
_BUCKETS = ((1, 1), (9, 16), (33, 64), (2, 8), (17, 32), (129, 256), (65, 128))
# Ours has to be faster than cuBLAS by this much to be chosen: less is noise.
_CLEARLY_FASTER = 1.02
# Of candidates whose other settings are tried too.
_NUM_PROMISING = 3
_QUICK = {"replays": 5, "replay_seconds": 5e-4}

Use = dict[str, Any]  # an entry's settings


class _Inputs:
    """Weights, more of them than the L2 cache holds, and tokens."""

    def __init__(self, bench: Bench, shape: tuple[int, int], num_tokens: int) -> None:
        out_size, in_size = shape
        self.num_bytes = out_size * in_size * bench.dtype.itemsize
        self.weights = [
            torch.randn(shape, dtype=bench.dtype, device=bench.device) * in_size**-0.5
            for _ in range(bench.num_sets(self.num_bytes))
        ]
        self.x = torch.randn(num_tokens, in_size, dtype=bench.dtype, device=bench.device)
        self.out = self.x.new_empty(num_tokens, out_size)

    def ours(self, bench: Bench, **how: float) -> float:
        """Seconds of our kernel, with the settings that the tables name."""
        launches = [
            functools.partial(kernels.linear, self.x, weight, out=self.out)
            for weight in self.weights
        ]
        return bench.seconds(launches, **how)

    def cublas(self, bench: Bench, **how: float) -> float:
        """Seconds of torch's product."""
        launches = [functools.partial(functional.linear, self.x, w) for w in self.weights]
        return bench.seconds(launches, **how)

    def error(self) -> float:
        """How far ours is off the product in fp32."""
        expected = self.x.float() @ self.weights[0].float().t()
        return relative_error(kernels.linear(self.x, self.weights[0]), expected)


def _projection(name: str, num_tokens: int) -> Case:
    def measure(bench: Bench) -> Figures:
        shape = (48, 32) if bench.tiny else SHAPES[name]
        inputs = _Inputs(bench, shape, num_tokens)
        use = tuning.settings(
            "linear",
            bench.device,
            {"kernel": "torch"},
            itemsize=bench.dtype.itemsize,
            num_tokens=num_tokens,
            out_size=shape[0],
            in_size=shape[1],
        )
        ours, cublas = inputs.ours(bench), inputs.cublas(bench)
        return {
            "us": ours * 1e6,
            "GB/s": inputs.num_bytes / ours / 1e9,
            "of read": inputs.num_bytes / ours / bench.ceilings.read,
            "cuBLAS us": cublas * 1e6,
            "cuBLAS of read": inputs.num_bytes / cublas / bench.ceilings.read,
            "kernel": use["kernel"],
            "error": inputs.error(),
        }

    targets = ()
    if name.startswith("8B") and num_tokens in _TARGETS:
        targets = (Target("of read", at_least=_TARGETS[num_tokens]),)
    return Case(f"{name}, {num_tokens} tokens", measure, targets)


def cases(bench: Bench) -> list[Case]:
    """All shapes at several numbers of tokens."""
    counts = (1, 16) if bench.tiny else (1, 16, 64, 4, 256)
    return [_projection(name, count) for count in counts for name in SHAPES]


def tune(bench: Bench, deadline: float) -> Iterator[Tuned]:
    """The fastest settings of each shape, until ``deadline`` on the monotonic clock."""
    shapes = {"tiny": (48, 64)} if bench.tiny else SHAPES
    for low, high in _BUCKETS[:2] if bench.tiny else _BUCKETS:
        candidates = _candidates(bench, high)
        _compile(bench, candidates, high, deadline)
        for name, shape in shapes.items():
            if time.monotonic() > deadline:
                return
            inputs = _Inputs(bench, shape, high)
            use, figures = _search(bench, inputs, candidates)
            when = {
                "itemsize": 2,
                "out_size": shape[0],
                "in_size": shape[1],
                "num_tokens": [low, high],
            }
            shown = {"shape": name, "num_tokens": high, **figures, "chosen": use["kernel"]}
            yield Tuned("linear", tuning.Entry(when, use), shown)


def _candidates(bench: Bench, num_tokens: int) -> list[Use]:
    """Settings to try, without splits; kernels that cannot be launched drop out later."""
    found: list[Use] = []
    if num_tokens == 1:
        tiles = [
            (4, 512, 2, 2), (4, 1024, 4, 1), (8, 512, 4, 1), (8, 512, 4, 2), (8, 1024, 4, 1),
            (16, 512, 4, 1), (8, 1024, 8, 1), (16, 1024, 8, 1), (4, 2048, 4, 1), (4, 2048, 8, 1),
            (2, 2048, 4, 1), (16, 256, 4, 2), (2, 2048, 2, 1), (1, 2048, 2, 1), (1, 4096, 4, 1),
            (2, 4096, 8, 1), (2, 1024, 2, 2), (4, 1024, 2, 1),
        ]  # fmt: skip
        found += [
            {"kernel": "vector", "outs": o, "ins": i, "num_warps": w, "unroll": u}
            for o, i, w, u in tiles
        ]
    tiles = [
        (False, 32, 256, 4, 4), (False, 64, 128, 4, 4), (False, 64, 128, 4, 6),
        (False, 128, 64, 4, 5), (False, 128, 128, 4, 4), (True, 64, 128, 4, 4),
        (True, 64, 128, 4, 6), (True, 64, 256, 4, 3), (True, 128, 64, 4, 5),
        (True, 128, 128, 4, 4), (True, 128, 128, 8, 4), (True, 256, 64, 8, 4),
        (True, 64, 128, 4, 3), (True, 64, 64, 4, 6), (False, 32, 128, 4, 5),
    ]  # fmt: skip
    if num_tokens > 64:
        tiles = [
            (False, 64, 64, 4, 5), (False, 128, 64, 8, 4), (False, 128, 64, 4, 4),
            (False, 128, 128, 8, 3), (False, 256, 64, 8, 3), (True, 64, 64, 4, 5),
            (True, 128, 64, 8, 4), (True, 256, 64, 8, 3), (True, 128, 128, 8, 3),
        ]  # fmt: skip
    # Hopper's way of multiplying, which reads both operands from shared memory, begins with 16.
    heights = [8] if num_tokens == 1 else [8, 16] if num_tokens <= 8 else [max(num_tokens, 16)]
    if num_tokens > 64:
        heights = [64, 128] if num_tokens <= 128 else [64, 128, 256]
    for height in heights:
        for swap, outs, ins, warps, stages in tiles:
            if not swap and height < 16:
                continue  # 16 are computed all the same
            rows = height
            # Sums in fp32 have to stay in registers, with room for addresses.
            too_wide = rows * outs > 128 * 32 * warps or (rows > 128 and warps < 8)
            shared = stages * (rows + outs) * ins * bench.dtype.itemsize
            if too_wide or shared > _shared_bytes(bench):
                continue
            found.append({
                "kernel": "matrix", "tokens": rows, "outs": outs, "ins": ins, "swap": swap,
                "num_warps": warps, "num_stages": stages,
            })  # fmt: skip
    return found[:2] if bench.tiny else found


def _shared_bytes(bench: Bench) -> int:
    """Shared memory that one program may have."""
    if bench.device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(bench.device)
    return int(properties.shared_memory_per_block_optin)


def _compile(bench: Bench, candidates: Sequence[Use], num_tokens: int, deadline: float) -> None:
    """Compile all candidates side by side: one after the other would take most of the time."""
    x = torch.zeros(num_tokens, 256 if bench.tiny else 2048, dtype=bench.dtype, device=bench.device)
    weight = x.new_zeros(256, x.shape[1])

    def launch(use: Use) -> None:
        if time.monotonic() < deadline:
            for prefetch in _prefetches(bench):
                _try(x, weight, {**use, "splits": 1, "prefetch": prefetch})

    # The interpreter has one state for all threads.
    num_threads = os.cpu_count() if bench.device.type == "cuda" else 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(launch, candidates))


def _prefetches(bench: Bench) -> tuple[int, ...]:
    """Steps to ask for before the last kernel has ended, where one can start so early."""
    early = bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) >= (9, 0)
    return (2, 0, 1, 4) if early else (0,)


def _try(x: torch.Tensor, weight: torch.Tensor, use: Use) -> None:
    from pagetier.kernels import projection

    try:
        projection.launch(x, weight, None, x.new_empty(x.shape[0], weight.shape[0]), use)
    except Exception as error:
        logger.warning("%s does not run: %s", use, error)


def _search(bench: Bench, inputs: _Inputs, candidates: Sequence[Use]) -> tuple[Use, Figures]:
    """The fastest settings for these inputs, cuBLAS among them."""
    seconds: dict[tuple[tuple[str, Any], ...], float] = {}

    def measure(use: Use) -> None:
        key = tuple(use.items())
        if key in seconds:
            return
        with tuning.using({"linear": [tuning.Entry({}, use)]}):
            try:
                taken = inputs.ours(bench, **_QUICK)
                error = inputs.error()
            except Exception as problem:
                logger.warning("%s does not run: %s", use, problem)
                return
        if error < 1e-2:
            seconds[key] = taken
        else:
            logger.error("%s is wrong: off by %.2g", use, error)

    def best() -> list[Use]:
        return [dict(key) for key in sorted(seconds, key=lambda key: seconds[key])]

    for use in candidates:
        splits = _splits(bench, inputs, use)
        measure({**use, "splits": splits, "prefetch": _prefetches(bench)[0]})
    for use in best()[:_NUM_PROMISING]:
        splits = use["splits"]
        for other in {1, splits // 2, splits - 1, splits + 1, splits * 2} - {0, splits}:
            measure({**use, "splits": other})
    for use in best()[:_NUM_PROMISING]:
        for prefetch in _prefetches(bench)[1:]:
            measure({**use, "prefetch": prefetch})
    cublas = inputs.cublas(bench, **_QUICK)
    figures: Figures = {"cuBLAS us": cublas * 1e6}
    if not seconds:
        return {"kernel": "torch"}, figures
    fastest = best()[0]
    taken = seconds[tuple(fastest.items())]
    figures |= {
        "us": taken * 1e6,
        "of read": inputs.num_bytes / taken / bench.ceilings.read,
        "ours": " ".join(f"{name}={value}" for name, value in fastest.items()),
    }
    return fastest if taken * _CLEARLY_FASTER < cublas else {"kernel": "torch"}, figures


def _splits(bench: Bench, inputs: _Inputs, use: Use) -> int:
    """So many that programs fill the device about once."""
    sizes = {name: use.get(name, 1) for name in ("tokens", "outs", "ins", "num_stages")}
    shared = sizes["num_stages"] * (sizes["tokens"] + sizes["outs"]) * sizes["ins"] * 2
    resident = 4 if use["kernel"] == "vector" else max(1, min(4, _shared_bytes(bench) // shared))
    count = 4
    if bench.device.type == "cuda":
        count = torch.cuda.get_device_properties(bench.device).multi_processor_count
    num_tokens, out_size = inputs.out.shape
    tiles = -(-num_tokens // sizes["tokens"]) * -(-out_size // sizes["outs"])
    return max(1, min(16, count * resident // tiles))
