"""Finds attention's launch settings for the present device, by measuring.

Owns the candidates and the batches that they are measured on. Each candidate is compiled in a
process of its own first, many at a time, since compiling takes a hundred times as long as
measuring; then all are timed one after the other in this process.
"""

import concurrent.futures
import itertools
import logging
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

import benchmarks
from benchmarks.kernels.attention import Batch, Heads, Inputs, ragged_lens
from benchmarks.kernels.bench import Bench, Tuned
from pagetier.kernels import tuning
from pagetier.kernels.attention import kv_name

logger = logging.getLogger(__name__)

Tile = dict[str, int]
_Key = tuple[tuple[str, int], ...]

# By sequences of a step, or by rows of the longest prompt's chunk.
_Classes = Sequence[tuple[tuple[int, int], list[Batch]]]
_DECODE_CLASSES: _Classes = (
    ((1, 7), [Batch([(1, 4096)]), Batch([(1, 32768)])]),
    ((8, 31), [Batch([(1, 1024)] * 16)]),
    ((32, 127), [Batch([(1, 1024)] * 64)]),
    ((128, 1 << 30), [Batch([(1, 900)] * 256), Batch(ragged_lens())]),
)
_PREFILL_CLASSES: _Classes = (((17, 1 << 30), [Batch([(8192, 8192)]), Batch([(512, 8704)])]),)
# Head size, and the dtype of keys and values (None for that of queries).
_KINDS: tuple[tuple[int, torch.dtype | None], ...] = (
    (128, None), (64, None), (128, torch.int8), (128, torch.float8_e4m3fn),
)  # fmt: skip


def _tiles(kind: str, head_dim: int, kv_itemsize: int) -> Iterator[Tile]:
    """Candidates, without how contexts are divided."""
    if kind == "decode_attention":
        options = itertools.product((16, 32, 64, 128), (1, 2, 4), (3, 5, 7))
        for keys, num_warps, num_stages in options:
            buffers = (num_stages + 1) // 2
            if keys * head_dim * kv_itemsize * 2 * buffers <= 160 << 10:
                yield {"keys": keys, "num_warps": num_warps, "num_stages": num_stages}
    else:
        options = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 5))
        for rows, keys, num_warps, num_stages in options:
            buffers = 3 if num_stages == 5 else 2
            shared = (rows + keys * 2 * buffers) * head_dim * kv_itemsize
            if shared <= 220 << 10 and rows * keys <= 2048 * num_warps:
                yield {"rows": rows, "keys": keys, "num_warps": num_warps, "num_stages": num_stages}


def _cuts(kind: str, sequences: int) -> list[Tile]:
    """Candidates of how contexts are divided; not compiled in."""
    if kind == "prefill_attention":
        return [{"programs": 1, "min_keys": 1024}, {"programs": 2, "min_keys": 1024}]
    if sequences >= 32:
        return [{"programs": programs, "min_keys": 256} for programs in (2, 8, 16, 32)]
    return [
        {"programs": programs, "min_keys": min_keys}
        for programs in (1, 2, 4, 8)
        for min_keys in (64, 128, 256)
    ]


def _some(bench: Bench, candidates: Iterable[Any]) -> list[Any]:
    """All of them, or one to try the tuner itself with."""
    return list(candidates)[: 1 if bench.tiny else None]


def _using(kind: str, tile: Tile) -> Any:
    return tuning.using({kind: [tuning.Entry({}, tile)]})


def _with_heads(batch: Batch, head_dim: int) -> Batch:
    return Batch(batch.lens, Heads(head_dim=head_dim), batch.block_size)


def _launches(bench: Bench, batch: Batch, dtype: torch.dtype | None) -> list[Any]:
    inputs = Inputs(bench, batch.fit(bench))
    if dtype is None:
        return inputs.launches(inputs.k_cache, inputs.v_cache)
    keys, values, scales = inputs.quantised(dtype)
    return inputs.launches(keys, values, **scales)


def _compile(job: tuple[Bench, str, int, torch.dtype | None, list[Tile]]) -> None:
    bench, kind, head_dim, dtype, tiles = job
    lens = [(1, 64)] if kind == "decode_attention" else [(64, 64)]
    launches = _launches(bench, Batch(lens, Heads(head_dim=head_dim)), dtype)
    for tile in tiles:
        try:
            with _using(kind, {**tile, "programs": 1, "min_keys": 64}):
                launches[0]()
        except Exception as error:
            logger.info("%s on %s does not compile: %s", tile, dtype, str(error)[:100])


def _compile_all(bench: Bench, kinds: Sequence[tuple[str, int, torch.dtype | None]]) -> None:
    start = time.monotonic()
    workers = max((os.cpu_count() or 2) - 2, 1)
    jobs = []
    for kind, head_dim, dtype in kinds:
        tiles = list(_tiles(kind, head_dim, (dtype or bench.dtype).itemsize))
        # A few at a time: starting a process costs as much as compiling one.
        jobs += [
            (bench, kind, head_dim, dtype, tiles[at : at + 3]) for at in range(0, len(tiles), 3)
        ]
    # "fork" would break CUDA. New processes find this module by our path, without its root since
    # `benchmarks` was imported.
    context = multiprocessing.get_context("spawn")
    root = str(pathlib.Path(benchmarks.__file__).parents[1])
    sys.path.append(root)
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            list(pool.map(_compile, jobs))
    finally:
        sys.path.remove(root)
    logger.info("Compiled %d batches of candidates in %.0f s.", len(jobs), time.monotonic() - start)


def _measure(bench: Bench, launches: list[Any], kind: str, tile: Tile) -> float:
    try:
        with _using(kind, tile):
            return bench.seconds(launches[: 8 if kind == "decode_attention" else 2], replays=5)
    except Exception as error:
        logger.info("%s failed: %s", tile, str(error)[:100])
        return math.inf


def _best(
    bench: Bench,
    kind: str,
    batches: Sequence[Batch],
    head_dim: int,
    dtype: torch.dtype | None,
    deadline: float,
) -> tuple[Tile, list[float]] | None:
    """The candidate with the lowest product of times over ``batches``, and these times."""
    results: list[dict[_Key, float]] = []
    tiles = _some(bench, _tiles(kind, head_dim, (dtype or bench.dtype).itemsize))
    for batch in batches:
        launches = _launches(bench, _with_heads(batch, head_dim), dtype)
        cuts = _some(bench, _cuts(kind, len(batch.lens)))
        # First the tiles, with the contexts divided in a middling way; then the best few, all ways.
        times: dict[_Key, float] = {}
        for tile in tiles:
            if time.monotonic() > deadline:
                return None
            full = {**tile, **cuts[len(cuts) // 2]}
            times[tuple(full.items())] = _measure(bench, launches, kind, full)
        best = sorted(times, key=lambda key: times[key])[:6]
        for key, cut in itertools.product(best, cuts):
            full = {**dict(key), **cut}
            times[tuple(full.items())] = _measure(bench, launches, kind, full)
        for key in sorted(times, key=lambda key: times[key])[:4]:
            logger.info("%s %s %.1f us %s", kind, batch.lens[0], times[key] * 1e6, dict(key))
        results.append(times)
    # Only candidates that were timed on all batches can win.
    common = set(results[0]).intersection(*results[1:])
    winner = min(common, key=lambda key: math.prod(times[key] for times in results))
    return dict(winner), [times[winner] for times in results]


def tune(bench: Bench, deadline: float) -> Iterator[Tuned]:
    """Settings for the present device, until ``deadline`` on the monotonic clock."""
    kinds = [
        (kind, head_dim, dtype)
        for kind in ("decode_attention", "prefill_attention")
        for head_dim, dtype in _some(bench, _KINDS)
        if kind == "decode_attention" or dtype is None
    ]
    if bench.device.type == "cuda":
        _compile_all(bench, kinds)
    for kind, head_dim, dtype in kinds:
        is_decode = kind == "decode_attention"
        for bounds, batches in _DECODE_CLASSES if is_decode else _PREFILL_CLASSES:
            best = _best(bench, kind, batches, head_dim, dtype, deadline)
            if best is None:
                return
            when = {
                "row_bytes": head_dim * (dtype or bench.dtype).itemsize,
                "kv": kv_name(dtype or bench.dtype),
                "sequences" if is_decode else "rows": list(bounds),
            }
            tile, seconds = best
            figures = {
                "head size": head_dim,
                "KV": str(dtype or bench.dtype).removeprefix("torch."),
                "batches": "; ".join(f"{len(b.lens)} x {b.lens[0]}" for b in batches),
                "us": "; ".join(f"{each * 1e6:.1f}" for each in seconds),
                "chosen": " ".join(f"{name}={value}" for name, value in tile.items()),
            }
            yield Tuned(kind, tuning.Entry(when, tile), figures)
