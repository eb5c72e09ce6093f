"""Paged attention: decodes, prompts, both in one batch, and smaller keys and values.

Rates of decodes are bytes of keys and values per second, against the device's read ceiling; those
of prompts are floating-point operations per second, counting what the causal mask leaves.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from benchmarks.kernels import peers
from benchmarks.kernels.bench import (
    Bench,
    Case,
    Figures,
    SkipCase,
    Target,
    Tuned,
    relative_error,
)  # fmt: skip
from benchmarks.kernels.timing import Launch
from pagetier import kernels
from pagetier.kernels import AttentionMetadata, reference
from pagetier.kernels.reference.kv_write import quantise
from pagetier.offload.tiers import KVLayout, LayerCaches, LayerKV

Lens = Sequence[tuple[int, int]]  # (new tokens, tokens in all) of each sequence


@dataclasses.dataclass(frozen=True)
class Heads:
    """The shape of a layer."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of a step in a layer of some shape."""

    lens: Lens
    heads: Heads = Heads()
    block_size: int = 16

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return sum(query_len for query_len, _ in self.lens)

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values that have to be read at least once."""
        positions = sum(seq_len for _, seq_len in self.lens)
        return positions * self.heads.kv_heads * self.heads.head_dim * 2

    @property
    def flops(self) -> int:
        """Floating-point operations of both products, without what the causal mask hides."""
        seen = sum(
            query_len * (seq_len - query_len) + query_len * query_len // 2
            for query_len, seq_len in self.lens
        )
        return 4 * seen * self.heads.heads * self.heads.head_dim

    def fit(self, bench: Bench) -> "Batch":
        """This, or something of its kind that an interpreted kernel finishes in a moment."""
        if not bench.tiny:
            return self
        lens = [(min(q, 5), min(q, 5) + (s - q) % 23) for q, s in (*self.lens[:2], self.lens[-1])]
        return Batch(lens, Heads(4, 2, 16), block_size=4)


class Inputs:
    """Sets of a batch's data: queries, a cache with shuffled blocks, and block tables."""

    def __init__(self, bench: Bench, batch: Batch) -> None:
        self.bench, self.batch = bench, batch
        shape = batch.heads
        layer = LayerKV(shape.kv_heads, shape.head_dim, shape.head_dim)
        self.layout = KVLayout((layer,), batch.block_size, bench.dtype)
        self.counts = np.array([-(-s // batch.block_size) for _, s in batch.lens])
        # Prompts compute much longer than they read.
        most = 64 if batch.num_tokens == len(batch.lens) else 4
        self.num_sets = bench.num_sets(batch.kv_elements * bench.dtype.itemsize, most=most)
        num_blocks = int(self.counts.sum()) * self.num_sets
        pages = self.layout.allocate(num_blocks, bench.device)
        pages.view(bench.dtype).normal_()
        self.k_cache, self.v_cache, _ = self.layout.views(pages)[0]
        self.q = torch.randn(
            batch.num_tokens, shape.heads, shape.head_dim, dtype=bench.dtype, device=bench.device
        )
        self.scale = shape.head_dim**-0.5
        order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self.steps = [self._metadata(part) for part in np.split(order, self.num_sets)]

    def _metadata(self, ids: np.ndarray) -> AttentionMetadata:
        lens = self.batch.lens
        tables = np.zeros((len(lens), int(self.counts.max())), dtype=np.int32)
        ends = self.counts.cumsum()
        for row, (end, count) in enumerate(zip(ends, self.counts, strict=True)):
            tables[row, :count] = ids[end - count : end]
        seq_lens = np.array([s for _, s in lens], dtype=np.int32)
        starts = np.cumsum([0] + [q for q, _ in lens]).astype(np.int32)
        device = self.bench.device
        return AttentionMetadata.build(
            *(torch.from_numpy(x).to(device) for x in (tables, seq_lens, starts)),
            host_seq_lens=seq_lens,
            host_query_start_loc=starts,
        )

    def quantised(self, dtype: torch.dtype) -> LayerCaches:
        """The cache in 8 bits, in pages of its own."""
        layout = dataclasses.replace(self.layout, dtype=dtype)
        caches = layout.views(layout.allocate(self.k_cache.shape[0], self.bench.device))[0]
        for cache, name, exact in (
            (caches.k_cache, "k_scale", self.k_cache),
            (caches.v_cache, "v_scale", self.v_cache),
        ):
            numbers, scale = quantise(exact, dtype)
            cache.copy_(numbers)
            caches.scales[name].copy_(scale)
        return caches

    def launches(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, **more: object
    ) -> list[Launch]:
        """A call of the kernel for each set, all into the same output."""
        out = torch.empty_like(self.q)

        def launch(step: AttentionMetadata) -> Launch:
            return lambda: kernels.paged_attention(
                self.q, k_cache, v_cache, step, scale=self.scale, out=out, **more
            )

        return [launch(step) for step in self.steps]

    def expected(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """What the reference makes of the first set."""
        step = dataclasses.replace(self.steps[0], shared={})
        return reference.paged_attention(self.q, k_cache, v_cache, step, scale=self.scale)


def _decode(batch: Batch, name: str, *targets: Target) -> Case:
    def measure(bench: Bench) -> Figures:
        fitted = batch.fit(bench)
        inputs = Inputs(bench, fitted)
        launches = inputs.launches(inputs.k_cache, inputs.v_cache)
        seconds = bench.seconds(launches)
        error = relative_error(launches[0](), inputs.expected(inputs.k_cache, inputs.v_cache))
        figures = _rate(bench, fitted, seconds, bench.dtype) | {"error": error}
        return figures | _beside_flash3(bench, fitted, inputs, figures["us"])

    return Case(name, measure, targets)


def _rate(bench: Bench, batch: Batch, seconds: float, dtype: torch.dtype) -> Figures:
    rate = batch.kv_elements * dtype.itemsize / seconds
    return {"us": seconds * 1e6, "GB/s": rate / 1e9, "of read": rate / bench.ceilings.read}


def _beside_flash3(bench: Bench, batch: Batch, inputs: Inputs, microseconds: float) -> Figures:
    found = peers.flash3_paged(
        bench, inputs.q, batch.lens, batch.heads.kv_heads, batch.block_size, inputs.num_sets
    )
    if found:
        found["FA3 / ours"] = found["FA3 us"] / microseconds
    return found


def ragged_lens() -> Lens:
    """128 decodes of lengths from 100 to 4000."""
    draw = random.Random(0)
    return [(1, draw.randint(100, 4000)) for _ in range(128)]


def _ragged() -> Case:
    """Lengths that differ must not cost more than equal ones of the same sum."""
    lens = ragged_lens()
    mean = sum(seq_len for _, seq_len in lens) // len(lens)

    def measure(bench: Bench) -> Figures:
        ragged = _decode(Batch(lens), "").measure(bench)
        equal = _decode(Batch([(1, mean)] * len(lens)), "").measure(bench)
        return ragged | {"equal us": equal["us"], "ragged / equal": ragged["us"] / equal["us"]}

    target = Target("ragged / equal", at_most=1.1)
    return Case("decode 128 x 100..4000", measure, (target,))


def _quantised(name: str, dtype: torch.dtype, lens: Lens) -> Case:
    """Decodes over keys and values of 8 bits with a scale per token and head."""

    def measure(bench: Bench) -> Figures:
        if dtype == torch.float8_e4m3fn and not _has_fp8(bench.device):
            raise SkipCase("fp8 needs compute capability 8.9")
        batch = Batch(lens).fit(bench)
        inputs = Inputs(bench, batch)
        wide = inputs.launches(inputs.k_cache, inputs.v_cache)
        wide_seconds = bench.seconds(wide)
        keys, values, scales = inputs.quantised(dtype)
        launches = inputs.launches(keys, values, **scales)
        seconds = bench.seconds(launches)
        # The reference sees what the kernel reads, made wide again.
        expected = inputs.expected(
            _widen(keys, scales["k_scale"], bench), _widen(values, scales["v_scale"], bench)
        )
        return _rate(bench, batch, seconds, keys.dtype) | {
            "error": relative_error(launches[0](), expected),
            "bf16 us": wide_seconds * 1e6,
            "bf16 / ours": wide_seconds / seconds,
        }

    return Case(f"{name} KV, decode 256 x 900", measure, (Target("bf16 / ours", at_least=1.7),))


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _widen(cache: torch.Tensor, scale: torch.Tensor, bench: Bench) -> torch.Tensor:
    return (cache.float() * scale[..., None]).to(bench.dtype)


def _prompt(name: str, batch: Batch, *targets: Target, fresh: bool = False) -> Case:
    """Prompts, ``fresh`` without anything cached before them, so that SDPA can do the same."""

    def measure(bench: Bench) -> Figures:
        fitted = batch.fit(bench)
        inputs = Inputs(bench, fitted)
        launches = inputs.launches(inputs.k_cache, inputs.v_cache)
        seconds = bench.seconds(launches)
        error = relative_error(launches[0](), inputs.expected(inputs.k_cache, inputs.v_cache))
        rate = fitted.flops / seconds
        figures = {
            "us": seconds * 1e6,
            "TFLOP/s": rate / 1e12,
            "of GEMM": rate / bench.ceilings.gemm,
            "error": error,
        }
        figures |= _beside_flash3(bench, fitted, inputs, figures["us"])
        if "FA3 us" in figures:
            figures["ours / FA3"] = figures["us"] / figures["FA3 us"]
        if fresh:
            shape, (query_len, _) = fitted.heads, fitted.lens[0]
            figures |= peers.sdpa(
                bench, query_len, shape.heads, shape.kv_heads, shape.head_dim, len(fitted.lens)
            )
        return figures

    return Case(name, measure, targets)


def tune(bench: Bench, deadline: float) -> Iterator[Tuned]:
    """Launch settings for this device; see ``attention_tuning``."""
    from benchmarks.kernels import attention_tuning

    return attention_tuning.tune(bench, deadline)


def cases(_bench: Bench) -> list[Case]:
    """All cases, the most telling first."""
    read = "of read"
    small = Heads(head_dim=64)
    faster = Target("FA3 / ours", at_least=1.05)
    nine_tenths = Target("FA3 / ours", at_least=0.9)
    return [
        _decode(Batch([(1, 900)] * 256), "decode 256 x 900", Target(read, at_least=0.95), faster),
        _decode(Batch([(1, 1024)] * 64), "decode 64 x 1024", Target(read, at_least=0.95), faster),
        _decode(Batch([(1, 1024)] * 16), "decode 16 x 1024", Target(read, at_least=0.75)),
        _decode(Batch([(1, 32768)]), "decode 1 x 32768", Target(read, at_least=0.84)),
        _decode(Batch([(1, 4096)]), "decode 1 x 4096", Target("FA3 / ours", at_least=1.3)),
        _decode(
            Batch([(1, 900)] * 256, small), "decode 256 x 900, head size 64",
            Target(read, at_least=0.88), Target("FA3 / ours", at_least=1.1),
        ),
        _ragged(),
        _quantised("int8", torch.int8, [(1, 900)] * 256),
        _quantised("fp8", torch.float8_e4m3fn, [(1, 900)] * 256),
        _prompt("prefill 8192", Batch([(8192, 8192)]), nine_tenths, fresh=True),
        _prompt(
            "prefill 8192, head size 64", Batch([(8192, 8192)], small), nine_tenths, fresh=True
        ),
        _prompt("512 new after 8192 cached", Batch([(512, 8704)]), nine_tenths),
        _prompt(
            "200 decodes at 1000 and 2048 new", Batch([(1, 1000)] * 200 + [(2048, 2048)]),
            Target("ours / FA3", at_most=1.1),
        ),
        _prompt("prefill 4 x 1024", Batch([(1024, 1024)] * 4), fresh=True),
    ]  # fmt: skip
