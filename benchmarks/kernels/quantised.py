"""Projections by weights of 4 and 8 bits, beside torch's own kernel for them and cuBLAS in bf16."""

import concurrent.futures
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels.bench import Bench, Case, Figures, Target, Tuned, relative_error
from benchmarks.kernels.projections import SHAPES
from pagetier import kernels
from pagetier.kernels import packing, tuning

logger = logging.getLogger(__name__)

_GROUP_SIZE = 128
_TARGETS = {1: 0.80, 16: 0.80}
_BUCKETS = ((1, 1), (2, 16), (17, 64), (65, 256))
_QUICK = {"replays": 5, "replay_seconds": 5e-4}

Use = dict[str, Any]  # an entry's settings


class _Inputs:
    """Weights, more of them than the L2 cache holds, and tokens."""

    def __init__(self, bench: Bench, shape: tuple[int, int], num_tokens: int, bits: int) -> None:
        out_size, in_size = self.shape = shape
        self.bits = bits
        # As the setting makes them: int4 in groups with zeros, int8 by output without.
        self.group_size = min(_GROUP_SIZE, in_size) if bits == 4 else 0
        groups = in_size // self.group_size if self.group_size else 1
        device = bench.device
        words = (out_size, packing.num_lines(in_size, bits) * packing.WORDS)
        scales = torch.rand(groups, out_size, device=device).to(bench.dtype)
        self.scales = (scales + 0.5) * (2.0 ** (1 - bits) * in_size**-0.5)
        self.zeros = None
        if bits == 4:
            self.zeros = torch.randint(0, 16, (groups, out_size), device=device).to(torch.uint8)
        self.num_bytes = words[0] * words[1] * 4 + self.scales.nbytes
        self.num_bytes += 0 if self.zeros is None else self.zeros.nbytes
        self.num_sets = bench.num_sets(self.num_bytes)
        self.packed = [
            torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=device)
            for _ in range(self.num_sets)
        ]
        self.x = torch.randn(num_tokens, in_size, dtype=bench.dtype, device=device)

    def product(self, packed: torch.Tensor) -> torch.Tensor:
        return kernels.quantised_linear(
            self.x, packed, self.scales, self.zeros, None, self.group_size, self.bits
        )

    def ours(self, bench: Bench, **how: float) -> float:
        """Seconds of our kernel, with the settings that the tables name."""
        return bench.seconds([functools.partial(self.product, p) for p in self.packed], **how)

    def cublas(self, bench: Bench) -> float:
        """Seconds of torch's product by weights of 16 bits."""
        num_sets = bench.num_sets(self.shape[0] * self.shape[1] * 2)
        weights = [self.x.new_empty(self.shape).normal_() for _ in range(num_sets)]
        return bench.seconds([functools.partial(functional.linear, self.x, w) for w in weights])

    def torchs(self, bench: Bench) -> float | None:
        """Seconds of torch's own kernel for such weights ("tinygemm"), where it has one."""
        out_size, in_size = self.shape
        if bench.device.type != "cuda":
            return None
        try:
            launches: list[Callable[[], torch.Tensor]]
            if self.bits == 4:
                halves = torch.randint(
                    0, 256, (out_size, in_size // 2), dtype=torch.uint8, device=bench.device
                )
                weights = [
                    torch.ops.aten._convert_weight_to_int4pack(halves, 8)
                    for _ in range(self.num_sets)
                ]
                shape = (in_size // _GROUP_SIZE, out_size, 2)
                both = torch.ones(shape, dtype=torch.bfloat16, device=bench.device)
                launches = [
                    functools.partial(
                        torch.ops.aten._weight_int4pack_mm, self.x, w, _GROUP_SIZE, both
                    )
                    for w in weights
                ]
            else:
                scales = self.scales[0].contiguous()
                launches = [
                    functools.partial(
                        torch.ops.aten._weight_int8pack_mm,
                        self.x,
                        packed.view(torch.int8)[:, :in_size].contiguous(),
                        scales,
                    )
                    for packed in self.packed
                ]
            launches[0]()
            return bench.seconds(launches)
        except (RuntimeError, NotImplementedError) as error:
            logger.warning("torch's own kernel does not run: %s", str(error).partition("\n")[0])
            return None

    def error(self) -> float:
        """How far ours is off the product by the dequantised weight in fp32."""
        weight = kernels.reference.dequantise(
            self.packed[0], self.scales, self.zeros, self.group_size, self.bits, self.shape[1]
        )
        return relative_error(self.product(self.packed[0]), self.x.float() @ weight.t())


def _projection(name: str, num_tokens: int, bits: int) -> Case:
    def measure(bench: Bench) -> Figures:
        inputs = _Inputs(bench, (48, 512) if bench.tiny else SHAPES[name], num_tokens, bits)
        ours, cublas, torchs = inputs.ours(bench), inputs.cublas(bench), inputs.torchs(bench)
        return {
            "us": ours * 1e6,
            "of read": inputs.num_bytes / ours / bench.ceilings.read,
            "torch us": None if torchs is None else torchs * 1e6,
            "torch / ours": None if torchs is None else torchs / ours,
            "cuBLAS bf16 us": cublas * 1e6,
            "cuBLAS / ours": cublas / ours,
            "kernel": _settings(bench, inputs)["kernel"],
            "error": inputs.error(),
        }

    targets = ()
    if name.startswith("8B") and num_tokens in _TARGETS and bits == 4:
        targets = (Target("of read", at_least=_TARGETS[num_tokens]),)
    return Case(f"{name}, {num_tokens} tokens, int{bits}", measure, targets)


def _settings(bench: Bench, inputs: _Inputs) -> tuning.Settings:
    out_size, in_size = inputs.shape
    return tuning.settings(
        "quantised_linear",
        bench.device,
        bits=inputs.bits,
        num_tokens=len(inputs.x),
        out_size=out_size,
        in_size=in_size,
    )


def _names() -> list[str]:
    """Projections that are quantised: the output layer is not."""
    return [name for name in SHAPES if "lm_head" not in name]


def cases(bench: Bench) -> list[Case]:
    """All shapes at several numbers of tokens."""
    if bench.tiny:
        return [_projection("8B qkv", count, bits) for count in (1, 16, 300) for bits in (4, 8)]
    counts = (1, 16, 4, 64, 512)
    return [_projection(n, count, bits) for count in counts for bits in (4, 8) for n in _names()]


def tune(bench: Bench, deadline: float) -> Iterator[Tuned]:
    """The fastest settings of each shape, until ``deadline`` on the monotonic clock."""
    shapes = {"tiny": (48, 512)} if bench.tiny else {name: SHAPES[name] for name in _names()}
    for low, high in _BUCKETS[:2] if bench.tiny else _BUCKETS:
        candidates = _candidates(high)[: 2 if bench.tiny else None]
        for bits in (4, 8):
            _compile(bench, candidates, high, bits)
            for name, shape in shapes.items():
                if time.monotonic() > deadline:
                    return
                inputs = _Inputs(bench, shape, high, bits)
                seconds, use = min(
                    (
                        (_seconds(bench, inputs, use), use)
                        for use in _with_splits(bench, candidates)
                    ),
                    key=lambda pair: pair[0],
                )
                when = {
                    "bits": bits,
                    "out_size": shape[0],
                    "in_size": shape[1],
                    "num_tokens": [low, high],
                }
                figures = {"shape": name, "num_tokens": high, "bits": bits, "us": seconds * 1e6}
                of_read = inputs.num_bytes / seconds / bench.ceilings.read
                yield Tuned(
                    "quantised_linear",
                    tuning.Entry(when, use),
                    {**figures, "of read": of_read, "chosen": str(use)},
                )


def _candidates(num_tokens: int) -> list[Use]:
    """Settings to try, without splits; kernels that cannot be launched drop out later."""
    found: list[Use] = []
    if num_tokens == 1:
        tiles = [(2, 4, 4), (4, 4, 4), (8, 2, 4), (4, 8, 8), (2, 8, 4), (8, 4, 8), (1, 16, 4),
                 (4, 2, 2), (2, 2, 1), (16, 1, 4)]  # fmt: skip
        found += [{"kernel": "vector", "outs": o, "lines": n, "num_warps": w} for o, n, w in tiles]
    height = 8 if num_tokens == 1 else min(max(num_tokens, 16), 64)
    wide = [(True, 64, 4, 3), (True, 64, 4, 5), (True, 128, 4, 3), (True, 128, 8, 4)]
    narrow = [(False, 32, 4, 4), (False, 64, 4, 3), (False, 64, 4, 5), (False, 128, 8, 3)]
    found += [
        {"kernel": "matrix", "tokens": height, "outs": o, "swap": swap, "num_warps": w,
         "num_stages": s}
        for swap, o, w, s in [*wide, *(narrow if height >= 16 else [])]
    ]  # fmt: skip
    if num_tokens > 16:
        found.append({"kernel": "dequantise", "outs": 8, "num_warps": 4})
    return found


def _with_splits(bench: Bench, candidates: list[Use]) -> list[Use]:
    """Each with the numbers of splits to try; that recompiles nothing."""
    return [
        {**use, "splits": splits}
        for use in candidates
        for splits in ((1,) if bench.tiny or use["kernel"] == "dequantise" else (1, 2, 4, 8))
    ]


def _seconds(bench: Bench, inputs: _Inputs, use: Use) -> float:
    """Of one product with these settings; infinite if they do not run."""
    try:
        with tuning.using({"quantised_linear": [tuning.Entry({}, use)]}):
            return inputs.ours(bench, **_QUICK)
    except Exception as error:
        logger.warning("%s does not run: %s", use, error)
        return float("inf")


def _compile(bench: Bench, candidates: list[Use], num_tokens: int, bits: int) -> None:
    """Compile all candidates side by side: one after the other would take most of the time."""
    from pagetier.kernels import quantised_projection

    if bench.tiny:
        return
    inputs = _Inputs(bench, (512, 2048), num_tokens, bits)

    def launch(use: Use) -> None:
        out = inputs.x.new_empty(num_tokens, inputs.shape[0])
        try:
            quantised_projection.launch(
                inputs.x, inputs.packed[0], inputs.scales, inputs.zeros, None, out,
                inputs.group_size, bits, {**use, "splits": 1},
            )  # fmt: skip
        except Exception as error:
            logger.warning("%s does not run: %s", use, error)

    # The interpreter has one state for all threads.
    num_threads = os.cpu_count() if bench.device.type == "cuda" else 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(launch, candidates))
