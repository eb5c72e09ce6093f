"""Choosing a token for each row of logits, as Triton kernels that neither sort nor wait.

Owns the kernels, the division of rows into tiles, and the launch. Knows nothing of requests. The
reference, which also says what the distribution, the weights and the random numbers are, is
``reference.sampling``.

An all-greedy batch takes the first of these kernels, and one that compares the tiles:

- ``_maxima_kernel``, grid ``(tiles, rows)``: each tile's highest logit and where it is.
- ``_weights_kernel``, grid ``(tiles, rows)``: each tile's sum of weights; and for rows with top-k
  or top-p, how many tokens, or how much weight, lie above each of some pivots.
- ``_choose_kernel``, grid ``(rows,)``: collects the tokens above the highest pivot that has enough
  above it (usually a few hundred), finds by bisection the logit down to which tokens are kept, and
  walks along what is kept to the token that the random number picks. A row without filters walks
  only the tile that the number falls into.

So logits are read from memory two or three times, in full only twice where the distribution has a
peak: tiles whose highest logit is below the pivot are skipped. Where more than a tile's worth of
tokens is left (a nearly flat distribution, or a top-k of thousands), each step of the bisection
reads the row again, which is slower and as exact.

Results equal the reference's but where ``exp`` rounds otherwise: a token may differ whose
cumulative weight is within some 1e-6 of the random number's, and top-p may keep one token more or
fewer whose cumulative share is within as much of ``top_p``. Sums are of integers, hence exact; the
comparison of pivots in floating point decides how much is read, not what is chosen.
"""

import torch
import triton
import triton.language as tl

from pagetier.kernels.reference.sampling import WEIGHT_BITS

_TILE = 4096
_NUM_WARPS = 4
_CHOOSE_NUM_WARPS = 8

_PIVOTS = tl.constexpr(16)
_WEIGHT_ONE = tl.constexpr(2.0**WEIGHT_BITS)
_LOWEST_KEY = tl.constexpr(-(2**31))
# Bits of a float32 that are 0 if it was converted from a narrower type.
_EMPTY_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE: tl.constexpr):
    token = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(
        logits_ptr + row * stride + token, mask=token < vocabulary, other=float("-inf")
    )
    return logits.to(tl.float32)


@triton.jit
def _weight(logits, highest, inverse_temperature, min_p):
    """Integer weights; comparisons are false for NaN, whose weight is 0 then."""
    weights = tl.exp((logits - highest) * inverse_temperature)
    kept = (weights >= min_p) & (weights > 0.0)
    return (tl.where(kept, weights, 0.0) * _WEIGHT_ONE).to(tl.int64)


@triton.jit
def _pivot(index, highest, temperature):
    """A logit below the highest, from half an octave of weight to 41: beyond, weights are 0.

    At temperatures above 1 octaves are those of temperature 1, which reach less far.
    """
    index = index * 1.0
    octaves = 0.5 + 0.6 * index + 0.14 * index * index
    return highest - 0.6931472 * octaves * tl.minimum(temperature, 1.0)


@triton.jit
def _key(logits, EMPTY_BITS: tl.constexpr):
    """Integers in the order of the logits; both zeros are the same."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS


@triton.jit
def _logit(key, EMPTY_BITS: tl.constexpr):
    """A logit that has this key."""
    bits = key.to(tl.int32) << EMPTY_BITS
    # The bits that negative numbers shifted out were ones, after their exclusive or.
    bits = tl.where(bits < 0, (bits | ((1 << EMPTY_BITS) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    start = _mix(seed.to(tl.uint64, bitcast=True) + gamma)
    bits = _mix(start + (position.to(tl.uint64, bitcast=True) + 1) * gamma)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _maxima_kernel(
    logits_ptr, maxima_ptr, argmaxima_ptr, stride, vocabulary, num_tiles, TILE: tl.constexpr
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    logits = _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE)
    highest, where = tl.max(logits, 0, return_indices=True)
    place = row * num_tiles + tile
    tl.store(maxima_ptr + place, highest)
    tl.store(argmaxima_ptr + place, tile * TILE + where)


@triton.jit
def _weights_kernel(
    logits_ptr, maxima_ptr, sums_ptr, above_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    stride, float_stride, int_stride, vocabulary, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, ANY_FILTER: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * float_stride)
    if temperature > 0.0:
        tiles = tl.arange(0, TILES)
        maxima = tl.load(
            maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
        )
        highest = tl.max(maxima, 0)
        inverse_temperature = 1.0 / tl.maximum(temperature, 1e-30)
        logits = _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE)
        min_p = tl.load(min_p_ptr + row * float_stride)
        weights = _weight(logits, highest, inverse_temperature, min_p)
        place = row * num_tiles + tile
        tl.store(sums_ptr + place, tl.sum(weights, 0))
        if ANY_FILTER:
            has_top_k = tl.load(top_k_ptr + row * int_stride) < vocabulary
            if has_top_k | (tl.load(top_p_ptr + row * float_stride) < 1.0):
                counted = tl.where(has_top_k, 1.0, weights.to(tl.float32))
                for pivot in tl.static_range(_PIVOTS):
                    bound = _pivot(pivot, highest, temperature)
                    above = tl.sum(tl.where(logits >= bound, counted, 0.0), 0)
                    tl.store(above_ptr + place * _PIVOTS + pivot, above)


@triton.jit
def _load_candidates(
    logits_ptr, found_ptr, row, stride, start, count, is_compact, TILE: tl.constexpr
):
    """A tile of the collected tokens, or of the row if they were too many; and which are there."""
    place = start + tl.arange(0, TILE)
    exists = place < count
    nothing = float("-inf")
    collected = tl.load(found_ptr + row * TILE + place, mask=exists & is_compact, other=nothing)
    logits = tl.load(
        logits_ptr + row * stride + place, mask=exists & (is_compact == 0), other=nothing
    )
    return tl.where(is_compact, collected, logits.to(tl.float32)), exists


@triton.jit
def _total(
    key, BY_WEIGHT: tl.constexpr,
    logits_ptr, found_ptr, row, stride, count, is_compact, highest, inverse_temperature, min_p,
    TILE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """How many candidates have at least this key, or how much they weigh."""
    total = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        logits, exists = _load_candidates(
            logits_ptr, found_ptr, row, stride, start, count, is_compact, TILE
        )
        chosen = exists & (_key(logits, EMPTY_BITS) >= key)
        if BY_WEIGHT:
            weights = _weight(logits, highest, inverse_temperature, min_p)
            total += tl.sum(tl.where(chosen, weights, 0), 0)
        else:
            total += tl.sum(chosen.to(tl.int32), 0)
    return total


@triton.jit
def _bisect(
    low, high, needed, BY_WEIGHT: tl.constexpr,
    logits_ptr, found_ptr, row, stride, count, is_compact, highest, inverse_temperature, min_p,
    TILE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """The highest key whose total reaches what is needed, and the total above it.

    The total of ``low`` reaches it, that of ``high`` is 0.
    """
    above = tl.zeros([], tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        total = _total(
            middle, BY_WEIGHT, logits_ptr, found_ptr, row, stride, count, is_compact, highest,
            inverse_temperature, min_p, TILE, EMPTY_BITS,
        )  # fmt: skip
        reaches = total >= needed
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
        above = tl.where(reaches, above, total)
    return low, above


@triton.jit
def _highest(maxima_ptr, argmaxima_ptr, row, num_tiles, TILES: tl.constexpr):
    """A row's highest logit and the first token that has it."""
    tiles = tl.arange(0, TILES)
    maxima = tl.load(
        maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
    )
    highest, best = tl.max(maxima, 0, return_indices=True)
    # In a row of NaN it may be anything.
    best = tl.minimum(best, num_tiles - 1)
    return highest, tl.load(argmaxima_ptr + row * num_tiles + best)


@triton.jit
def _highest_kernel(maxima_ptr, argmaxima_ptr, out_ptr, vocabulary, num_tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, token = _highest(maxima_ptr, argmaxima_ptr, row, num_tiles, TILES)
    tl.store(out_ptr + row, tl.minimum(token, vocabulary - 1).to(tl.int64))


@triton.jit
def _choose_kernel(
    logits_ptr, maxima_ptr, argmaxima_ptr, sums_ptr, above_ptr, found_ptr, found_ids_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr,
    out_ptr,
    stride, float_stride, int_stride, vocabulary, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, EMPTY_BITS: tl.constexpr,
    ANY_FILTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    highest, token = _highest(maxima_ptr, argmaxima_ptr, row, num_tiles, TILES)
    temperature = tl.load(temperature_ptr + row * float_stride)
    if temperature > 0.0:
        inverse_temperature = 1.0 / tl.maximum(temperature, 1e-30)
        min_p = tl.load(min_p_ptr + row * float_stride)
        sums = tl.load(sums_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0)
        total = tl.sum(sums, 0)
        # What is kept: keys above this one, and so many tokens that have it.
        key = tl.full([], _LOWEST_KEY, tl.int64)
        num_ties = tl.zeros([], tl.int64)
        # Where the kept are looked for: all of the row.
        count = tl.zeros([], tl.int32) + vocabulary
        is_compact = tl.full([], 0, tl.int1)
        is_filtered = is_compact
        if ANY_FILTER:
            top_k = tl.load(top_k_ptr + row * int_stride)
            top_p = tl.load(top_p_ptr + row * float_stride)
            has_top_k = top_k < vocabulary
            is_filtered = has_top_k | (top_p < 1.0)
            if is_filtered:
                # The first pivot with enough above it. Sums in float32 need a margin.
                pivots = tl.arange(0, _PIVOTS)
                above = tl.sum(
                    tl.load(
                        above_ptr + (row * num_tiles + tiles[:, None]) * _PIVOTS + pivots[None, :],
                        mask=tiles[:, None] < num_tiles,
                        other=0.0,
                    ),
                    0,
                )
                enough = tl.where(
                    has_top_k, top_k.to(tl.float32), total.to(tl.float32) * top_p * 1.001
                )
                first = tl.sum((above < enough).to(tl.int32), 0)
                reaches = (first < _PIVOTS) | (temperature <= 1.0)
                first = tl.minimum(first, _PIVOTS - 1)
                bound = _pivot(first, highest, temperature)
                # Lower by more than its rounding, which may differ from the other kernel's.
                bound -= (tl.abs(highest) + tl.abs(bound)) * 1e-6
                bound = tl.where(reaches, bound, float("-inf"))

                num_found = tl.zeros([], tl.int32)
                for tile in range(num_tiles):
                    is_useful = tl.load(maxima_ptr + row * num_tiles + tile) >= bound
                    if is_useful & (num_found <= TILE) & reaches:
                        logits = _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE)
                        wanted = logits >= bound
                        place = num_found + tl.cumsum(wanted.to(tl.int32), 0) - 1
                        fits = wanted & (place < TILE)
                        tl.store(found_ptr + row * TILE + place, logits, mask=fits)
                        tl.store(
                            found_ids_ptr + row * TILE + place,
                            tile * TILE + tl.arange(0, TILE),
                            mask=fits,
                        )
                        num_found += tl.sum(wanted.to(tl.int32), 0)
                tl.debug_barrier()  # what one thread has stored, another one loads
                is_compact = reaches & (num_found <= TILE)
                count = tl.where(is_compact, num_found, vocabulary)

                low = tl.where(reaches, _key(bound, EMPTY_BITS), _LOWEST_KEY).to(tl.int64)
                end = _key(highest, EMPTY_BITS).to(tl.int64) + 1
                if has_top_k:
                    available = _total(
                        low, False, logits_ptr, found_ptr, row, stride, count, is_compact,
                        highest, inverse_temperature, min_p, TILE, EMPTY_BITS,
                    )  # fmt: skip
                    # If there are fewer, all others weigh nothing.
                    if available >= top_k:
                        key, num_above = _bisect(
                            low, end, top_k, False, logits_ptr, found_ptr, row, stride, count,
                            is_compact, highest, inverse_temperature, min_p, TILE, EMPTY_BITS,
                        )  # fmt: skip
                        num_ties = top_k - num_above
                        weight = _weight(
                            _logit(key, EMPTY_BITS), highest, inverse_temperature, min_p
                        )
                        total = num_ties * weight + _total(
                            key + 1, True, logits_ptr, found_ptr, row, stride, count,
                            is_compact, highest, inverse_temperature, min_p, TILE, EMPTY_BITS,
                        )  # fmt: skip
                        low = key
                if top_p < 1.0:
                    needed = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
                    needed = tl.maximum(needed, 1)
                    # Of the lowest that top-k kept there may be more than it kept, which does
                    # not matter here: their total reaches what is needed in either case.
                    key, above_key = _bisect(
                        low, end, needed, True, logits_ptr, found_ptr, row, stride, count,
                        is_compact, highest, inverse_temperature, min_p, TILE, EMPTY_BITS,
                    )  # fmt: skip
                    weight = _weight(_logit(key, EMPTY_BITS), highest, inverse_temperature, min_p)
                    num_ties = (needed - above_key + weight - 1) // tl.maximum(weight, 1)
                    total = above_key + num_ties * weight

        seed = tl.load(seeds_ptr + row * int_stride)
        position = tl.load(positions_ptr + row * int_stride)
        target = (_uniform(seed, position) * total.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, total - 1)
        start = tl.zeros([], tl.int32)
        cumulative = tl.zeros([], tl.int64)
        if is_filtered == 0:
            # Only the tile that the number falls into.
            passed = tl.cumsum(sums, 0) <= target
            start = tl.minimum(tl.sum(passed.to(tl.int32), 0), num_tiles - 1) * TILE
            cumulative = tl.sum(tl.where(passed, sums, 0), 0)
            count = tl.minimum(vocabulary, start + TILE)
        num_tied = tl.zeros([], tl.int64)
        for place in range(start, count, TILE):
            logits, exists = _load_candidates(
                logits_ptr, found_ptr, row, stride, place, count, is_compact, TILE
            )
            keys = _key(logits, EMPTY_BITS)
            tied = (exists & (keys == key)).to(tl.int64)
            kept = exists & (
                (keys > key) | ((tied > 0) & (num_tied + tl.cumsum(tied, 0) <= num_ties))
            )
            weights = _weight(logits, highest, inverse_temperature, min_p)
            weights = tl.where(kept, weights, 0)
            passed = cumulative + tl.cumsum(weights, 0) <= target
            index = tl.sum(passed.to(tl.int32), 0)
            if (cumulative <= target) & (index < TILE):
                token = place + index
                if is_compact:
                    token = tl.load(found_ids_ptr + row * TILE + token)
            cumulative += tl.sum(weights, 0)
            num_tied += tl.sum(tied, 0)
    # In a row of NaN it may be anything.
    token = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
    tl.store(out_ptr + row, token.to(tl.int64))


def greedy_tokens(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The first highest token of each row; takes and returns what ``reference.greedy_tokens`` does.

    Raises:
        ValueError: the logits' dtype or strides are not served.
    """
    _check_logits(logits)
    num_rows, vocabulary = logits.shape
    num_tiles = triton.cdiv(vocabulary, _TILE)
    maxima, argmaxima = _maxima(logits, num_tiles)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _highest_kernel[(num_rows,)](
            maxima, argmaxima, out, vocabulary, num_tiles,
            TILES=triton.next_power_of_2(num_tiles), num_warps=1,
        )  # fmt: skip
    return out


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    any_filter: bool = True,
) -> torch.Tensor:
    """Choose a token for each row; takes and returns what ``reference.sample_tokens`` does.

    ``temperature``, ``top_p`` and ``min_p`` have one stride, and so have ``top_k``, ``seeds`` and
    ``positions``.

    Raises:
        ValueError: shapes, strides or the dtype are not as described.
    """
    _check_logits(logits)
    num_rows, vocabulary = logits.shape
    for group in ((temperature, top_p, min_p), (top_k, seeds, positions)):
        if any(t.shape != (num_rows,) or t.stride() != group[0].stride() for t in group):
            raise ValueError(
                f"Settings of {[tuple(t.shape) for t in group]} with strides "
                f"{[t.stride() for t in group]} do not belong to {num_rows} rows."
            )
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_tiles = triton.cdiv(vocabulary, _TILE)
    maxima, argmaxima = _maxima(logits, num_tiles)
    sums = torch.empty_like(maxima, dtype=torch.int64)
    above, found, found_ids = maxima, maxima, argmaxima  # not touched without a filter
    if any_filter:
        above = maxima.new_empty(num_rows, num_tiles, _PIVOTS.value)
        found, found_ids = maxima.new_empty(2, num_rows, _TILE).unbind()
        found_ids = found_ids.view(torch.int32)
    strides = (logits.stride(0), temperature.stride(0), top_k.stride(0))
    constants = {
        "TILE": _TILE,
        "TILES": triton.next_power_of_2(num_tiles),
        "ANY_FILTER": any_filter,
    }
    _weights_kernel[(num_tiles, num_rows)](
        logits, maxima, sums, above, temperature, top_k, top_p, min_p,
        *strides, vocabulary, num_tiles, **constants, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _choose_kernel[(num_rows,)](
        logits, maxima, argmaxima, sums, above, found, found_ids,
        temperature, top_k, top_p, min_p, seeds, positions, out,
        *strides, vocabulary, num_tiles,
        **constants, EMPTY_BITS=_EMPTY_BITS[logits.dtype], num_warps=_CHOOSE_NUM_WARPS,
    )  # fmt: skip
    return out


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dtype not in _EMPTY_BITS or logits.stride(1) != 1:
        raise ValueError(
            f"Logits are of dtype {logits.dtype} and stride {logits.stride()}; they must be "
            "float32, float16 or bfloat16, and dense in the last dimension."
        )


def _maxima(logits: torch.Tensor, num_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logit of each tile, float32 ``(rows, tiles)``, and its token, int32."""
    num_rows, vocabulary = logits.shape
    maxima = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=logits.device)
    argmaxima = torch.empty_like(maxima, dtype=torch.int32)
    if num_rows:
        _maxima_kernel[(num_tiles, num_rows)](
            logits, maxima, argmaxima, logits.stride(0), vocabulary, num_tiles,
            TILE=_TILE, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return maxima, argmaxima
