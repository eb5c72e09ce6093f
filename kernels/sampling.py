"""Choosing a token for each row of logits, as Triton kernels that neither sort nor wait.

Owns the kernels, the division of rows into tiles, and the launch. Knows nothing of requests. The
reference, which also says what the distribution, the weights and the random numbers are, is
``reference.sampling``.

An all-greedy batch takes the first of these kernels, and one that compares the tiles:

- ``_maxima_kernel``, grid ``(tiles, rows)``: each tile's highest logit and where it is.
- ``_weights_kernel``, grid ``(tiles, rows)``: each tile's sum of weights; and for rows with top-k
  or top-p, how many tokens, and how much weight, lie above each of some pivots.
- ``_collect_kernel``, grid ``(tiles, rows)``: the tokens above the highest pivot that has enough
  above it, usually a few hundred, in order.
- ``_choose_kernel``, grid ``(rows,)``: finds by bisection of these the logit down to which tokens
  are kept, and walks along what is kept to the token that the random number picks. A row without
  filters walks only along the tile that the number falls into.

So logits are read from memory two or three times, in full only twice where the distribution has a
peak: tiles without a token above the pivot are skipped. Where more tokens than are collected are
left (a nearly flat distribution, or a top-k of thousands), each step of the bisection reads the row
again, which is slower and as exact.

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
# Tokens of a row that are collected at most, and how many of them are looked at at once.
_FOUND = 16384
_PIECE = 1024
_NUM_WARPS = 4
# Where a tile takes many registers: more threads share it, and where they still take too many for
# three programs on a multiprocessor, so many and no more.
_WIDE_NUM_WARPS = 8
_MOST_REGISTERS = 80

# Where they lie depends on the number of rows, for which nothing is to be compiled anew.
_SETTINGS = ("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seeds_ptr", "positions_ptr")
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
def _share(logits, highest, inverse_temperature, min_p):
    """Weights as shares of the highest; comparisons are false for NaN, whose weight is 0 then."""
    shares = tl.exp((logits - highest) * inverse_temperature)
    return tl.where((shares >= min_p) & (shares > 0.0), shares, 0.0)


@triton.jit
def _weight(logits, highest, inverse_temperature, min_p):
    """Integer weights."""
    return (_share(logits, highest, inverse_temperature, min_p) * _WEIGHT_ONE).to(tl.int64)


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


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _weights_kernel(
    logits_ptr, maxima_ptr, sums_ptr, bounds_ptr, counts_ptr, above_ptr,
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
        logits = _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE)
        min_p = tl.load(min_p_ptr + row * float_stride)
        shares = _share(logits, highest, 1.0 / tl.maximum(temperature, 1e-30), min_p)
        place = row * num_tiles + tile
        tl.store(sums_ptr + place, tl.sum((shares * _WEIGHT_ONE).to(tl.int64), 0))
        if ANY_FILTER:
            has_top_k = tl.load(top_k_ptr + row * int_stride) < vocabulary
            has_top_p = tl.load(top_p_ptr + row * float_stride) < 1.0
            if has_top_k | has_top_p:
                # Octaves of weight; at temperatures above 1, those of temperature 1. The last pivot
                # is 41 below the highest: up to temperature 1, nothing beyond has weight.
                octave = 0.6931472 * tl.minimum(temperature, 1.0)
                for pair in tl.static_range(_PIVOTS // 2):
                    # Two counts of up to a tile are summed as one number.
                    packed = tl.zeros([TILE], tl.int32)
                    for index in tl.static_range(2):
                        pivot = pair * 2 + index
                        # The highest tokens may lie anywhere, but much weight only near the top.
                        far = 0.5 + 0.6 * pivot + 0.14 * pivot * pivot
                        near = 1.0 + pivot if pivot < _PIVOTS - 1 else far
                        bound = highest - octave * tl.where(has_top_k, far, near)
                        # The same from every tile.
                        tl.store(bounds_ptr + row * _PIVOTS + pivot, bound)
                        is_above = logits >= bound
                        packed += is_above.to(tl.int32) << (16 * index)
                        if has_top_k == 0:
                            above = tl.sum(tl.where(is_above, shares, 0.0), 0)
                            tl.store(above_ptr + place * _PIVOTS + pivot, above)
                    counts = tl.sum(packed, 0)
                    tl.store(counts_ptr + place * _PIVOTS + pair * 2, counts & 0xFFFF)
                    tl.store(counts_ptr + place * _PIVOTS + pair * 2 + 1, counts >> 16)


@triton.jit
def _pivot(
    sums_ptr, bounds_ptr, counts_ptr, above_ptr, row, tile, temperature, top_k, top_p, has_top_k,
    num_tiles, TILES: tl.constexpr,
):  # fmt: skip
    """Which tokens to collect: those from the highest pivot on that has enough above it.

    Returns:
        The pivot's logit; whether it can be relied on; how many tokens lie above it in all tiles,
        in those before ``tile``, and in ``tile``.
    """
    tiles = tl.arange(0, TILES)
    pivots = tl.arange(0, _PIVOTS)
    place = (row * num_tiles + tiles[:, None]) * _PIVOTS + pivots[None, :]
    exists = tiles[:, None] < num_tiles
    counts = tl.load(counts_ptr + place, mask=exists, other=0)
    if has_top_k:
        too_few = tl.sum(counts, 0) < top_k
    else:
        sums = tl.load(sums_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0)
        above = tl.sum(tl.load(above_ptr + place, mask=exists, other=0.0), 0)
        # Sums in float32 need a margin.
        too_few = above < tl.sum(sums, 0).to(tl.float32) / _WEIGHT_ONE * top_p * 1.001
    first = tl.sum(too_few.to(tl.int32), 0)
    is_reliable = (first < _PIVOTS) | (temperature <= 1.0)
    first = tl.minimum(first, _PIVOTS - 1)
    counts = tl.sum(tl.where(pivots[None, :] == first, counts, 0), 1)
    num_before = tl.sum(tl.where(tiles < tile, counts, 0), 0)
    num_inside = tl.sum(tl.where(tiles == tile, counts, 0), 0)
    bound = tl.load(bounds_ptr + row * _PIVOTS + first)
    return bound, is_reliable, tl.sum(counts, 0), num_before, num_inside


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _collect_kernel(
    logits_ptr, sums_ptr, bounds_ptr, counts_ptr, above_ptr, found_ptr, found_ids_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr,
    stride, float_stride, int_stride, vocabulary, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * float_stride)
    top_k = tl.load(top_k_ptr + row * int_stride)
    top_p = tl.load(top_p_ptr + row * float_stride)
    has_top_k = top_k < vocabulary
    if (temperature > 0.0) & (has_top_k | (top_p < 1.0)):
        bound, is_reliable, num_found, num_before, num_inside = _pivot(
            sums_ptr, bounds_ptr, counts_ptr, above_ptr, row, tile, temperature, top_k, top_p,
            has_top_k, num_tiles, TILES,
        )  # fmt: skip
        if is_reliable & (num_found <= FOUND) & (num_inside > 0):
            logits = _load_tile(logits_ptr, row, stride, tile, vocabulary, TILE)
            wanted = logits >= bound
            place = row * FOUND + num_before + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(found_ptr + place, logits, mask=wanted)
            tl.store(found_ids_ptr + place, tile * TILE + tl.arange(0, TILE), mask=wanted)


@triton.jit
def _load_piece(ptr, start, count, PIECE: tl.constexpr):
    """Candidates of a row, and which are there."""
    place = start + tl.arange(0, PIECE)
    exists = place < count
    return tl.load(ptr + place, mask=exists, other=float("-inf")).to(tl.float32), exists


@triton.jit
def _total(
    key, BY_WEIGHT: tl.constexpr, ptr, count, highest, inverse_temperature, min_p,
    PIECE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """How many candidates have at least this key, or how much they weigh."""
    total = tl.zeros([], tl.int64)
    for start in range(0, count, PIECE):
        logits, exists = _load_piece(ptr, start, count, PIECE)
        chosen = exists & (_key(logits, EMPTY_BITS) >= key)
        if BY_WEIGHT:
            weights = _weight(logits, highest, inverse_temperature, min_p)
            total += tl.sum(tl.where(chosen, weights, 0), 0)
        else:
            total += tl.sum(chosen.to(tl.int32), 0)
    return total


@triton.jit
def _bisect(
    low, high, needed, BY_WEIGHT: tl.constexpr, ptr, count, highest, inverse_temperature, min_p,
    PIECE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """The highest key whose total reaches what is needed, and the total above it.

    The total of ``low`` reaches it, that of ``high`` is 0.
    """
    above = tl.zeros([], tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        total = _total(
            middle, BY_WEIGHT, ptr, count, highest, inverse_temperature, min_p, PIECE, EMPTY_BITS
        )
        reaches = total >= needed
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
        above = tl.where(reaches, above, total)
    return low, above


@triton.jit
def _cut(
    ptr, count, low, total, top_k, top_p, has_top_k, highest, inverse_temperature, min_p,
    PIECE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """What top-k and top-p keep of the candidates, whose keys are at least ``low``.

    ``total`` is the weight of the whole row.

    Returns:
        A key; how many of the tokens that have it are kept; and the weight of these and of all
        tokens of higher keys.
    """
    key = tl.full([], _LOWEST_KEY, tl.int64)
    num_ties = tl.zeros([], tl.int64)
    end = _key(highest, EMPTY_BITS).to(tl.int64) + 1
    if has_top_k:
        available = _total(
            low, False, ptr, count, highest, inverse_temperature, min_p, PIECE, EMPTY_BITS
        )
        # If there are fewer, all others weigh nothing.
        if available >= top_k:
            key, num_above = _bisect(
                low, end, top_k, False, ptr, count, highest, inverse_temperature, min_p,
                PIECE, EMPTY_BITS,
            )  # fmt: skip
            num_ties = top_k - num_above
            above = _total(
                key + 1, True, ptr, count, highest, inverse_temperature, min_p, PIECE, EMPTY_BITS
            )
            weight = _weight(_logit(key, EMPTY_BITS), highest, inverse_temperature, min_p)
            total = above + num_ties * weight
            low = key
    if top_p < 1.0:
        needed = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        needed = tl.maximum(needed, 1)
        # There may be more tokens of top-k's key than it keeps, which does not matter here: their
        # total reaches what is needed in either case.
        key, above = _bisect(
            low, end, needed, True, ptr, count, highest, inverse_temperature, min_p,
            PIECE, EMPTY_BITS,
        )  # fmt: skip
        weight = _weight(_logit(key, EMPTY_BITS), highest, inverse_temperature, min_p)
        num_ties = (needed - above + weight - 1) // tl.maximum(weight, 1)
        total = above + num_ties * weight
    return key, num_ties, total


@triton.jit
def _walk(
    ptr, start, count, cumulative, target, key, num_ties, highest, inverse_temperature, min_p,
    PIECE: tl.constexpr, EMPTY_BITS: tl.constexpr,
):  # fmt: skip
    """Where the cumulative weight of what is kept first exceeds ``target``; -1 if nowhere."""
    found = tl.full([], -1, tl.int32)
    num_tied = tl.zeros([], tl.int64)
    for first in range(start, count, PIECE):
        logits, exists = _load_piece(ptr, first, count, PIECE)
        keys = _key(logits, EMPTY_BITS)
        tied = (exists & (keys == key)).to(tl.int64)
        kept = exists & ((keys > key) | ((tied > 0) & (num_tied + tl.cumsum(tied, 0) <= num_ties)))
        weights = _weight(logits, highest, inverse_temperature, min_p)
        weights = tl.where(kept, weights, 0)
        passed = cumulative + tl.cumsum(weights, 0) <= target
        index = tl.sum(passed.to(tl.int32), 0)
        found = tl.where((cumulative <= target) & (index < PIECE), first + index, found)
        cumulative += tl.sum(weights, 0)
        num_tied += tl.sum(tied, 0)
    return found


@triton.jit
def _target(number, total):
    return tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)


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


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _choose_kernel(
    logits_ptr, maxima_ptr, argmaxima_ptr, sums_ptr, bounds_ptr, counts_ptr, above_ptr,
    found_ptr, found_ids_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr, out_ptr,
    stride, float_stride, int_stride, vocabulary, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, FOUND: tl.constexpr, PIECE: tl.constexpr,
    EMPTY_BITS: tl.constexpr, ANY_FILTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    highest, token = _highest(maxima_ptr, argmaxima_ptr, row, num_tiles, TILES)
    temperature = tl.load(temperature_ptr + row * float_stride)
    if temperature > 0.0:
        inverse_temperature = 1.0 / tl.maximum(temperature, 1e-30)
        min_p = tl.load(min_p_ptr + row * float_stride)
        number = _uniform(
            tl.load(seeds_ptr + row * int_stride), tl.load(positions_ptr + row * int_stride)
        )
        tiles = tl.arange(0, TILES)
        sums = tl.load(sums_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0)
        total = tl.sum(sums, 0)
        logits_ptr += row * stride
        is_filtered = tl.full([], 0, tl.int1)
        if ANY_FILTER:
            top_k = tl.load(top_k_ptr + row * int_stride)
            top_p = tl.load(top_p_ptr + row * float_stride)
            has_top_k = top_k < vocabulary
            is_filtered = has_top_k | (top_p < 1.0)
        place = tl.full([], -1, tl.int32)
        if is_filtered:
            if ANY_FILTER:
                bound, is_reliable, num_found, _, _ = _pivot(
                    sums_ptr, bounds_ptr, counts_ptr, above_ptr, row, 0, temperature, top_k,
                    top_p, has_top_k, num_tiles, TILES,
                )  # fmt: skip
                low = tl.where(is_reliable, _key(bound, EMPTY_BITS), _LOWEST_KEY).to(tl.int64)
                if is_reliable & (num_found <= FOUND):
                    found_ptr += row * FOUND
                    key, num_ties, total = _cut(
                        found_ptr, num_found, low, total, top_k, top_p, has_top_k, highest,
                        inverse_temperature, min_p, PIECE, EMPTY_BITS,
                    )  # fmt: skip
                    place = _walk(
                        found_ptr, 0, num_found, tl.zeros([], tl.int64), _target(number, total),
                        key, num_ties, highest, inverse_temperature, min_p, PIECE, EMPTY_BITS,
                    )  # fmt: skip
                    if place >= 0:
                        place = tl.load(found_ids_ptr + row * FOUND + place)
                else:
                    key, num_ties, total = _cut(
                        logits_ptr, vocabulary, low, total, top_k, top_p, has_top_k, highest,
                        inverse_temperature, min_p, TILE, EMPTY_BITS,
                    )  # fmt: skip
                    place = _walk(
                        logits_ptr, 0, vocabulary, tl.zeros([], tl.int64), _target(number, total),
                        key, num_ties, highest, inverse_temperature, min_p, TILE, EMPTY_BITS,
                    )  # fmt: skip
        else:
            # Only the tile that the number falls into.
            target = _target(number, total)
            passed = tl.cumsum(sums, 0) <= target
            start = tl.minimum(tl.sum(passed.to(tl.int32), 0), num_tiles - 1) * TILE
            place = _walk(
                logits_ptr, start, tl.minimum(start + TILE, vocabulary),
                tl.sum(tl.where(passed, sums, 0), 0), target,
                tl.full([], _LOWEST_KEY, tl.int64), tl.zeros([], tl.int64),
                highest, inverse_temperature, min_p, PIECE, EMPTY_BITS,
            )  # fmt: skip
        # Where nothing has weight, as in a row of NaN, it stays the highest.
        token = tl.where(place >= 0, place, token)
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
    strides = (logits.stride(0), temperature.stride(0), top_k.stride(0))
    constants = {"TILE": _TILE, "TILES": triton.next_power_of_2(num_tiles)}
    bounds, counts, above, found, found_ids = [maxima] * 5  # not touched without a filter
    if any_filter:
        bounds = maxima.new_empty(num_rows, _PIVOTS.value)
        counts, above = maxima.new_empty(2, num_rows, num_tiles, _PIVOTS.value).unbind()
        found, found_ids = maxima.new_empty(2, num_rows, _FOUND).unbind()
        counts, found_ids = counts.view(torch.int32), found_ids.view(torch.int32)
    _weights_kernel[(num_tiles, num_rows)](
        logits, maxima, sums, bounds, counts, above, temperature, top_k, top_p, min_p,
        *strides, vocabulary, num_tiles,
        **constants, ANY_FILTER=any_filter, num_warps=_WIDE_NUM_WARPS, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    if any_filter:
        _collect_kernel[(num_tiles, num_rows)](
            logits, sums, bounds, counts, above, found, found_ids, temperature, top_k, top_p,
            *strides, vocabulary, num_tiles,
            **constants, FOUND=_FOUND, num_warps=_WIDE_NUM_WARPS,
        )  # fmt: skip
    _choose_kernel[(num_rows,)](
        logits, maxima, argmaxima, sums, bounds, counts, above, found, found_ids,
        temperature, top_k, top_p, min_p, seeds, positions, out,
        *strides, vocabulary, num_tiles,
        **constants, FOUND=_FOUND, PIECE=min(_PIECE, _TILE), EMPTY_BITS=_EMPTY_BITS[logits.dtype],
        ANY_FILTER=any_filter, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out


def scratch_bytes(num_rows: int, vocabulary: int) -> int:
    """Bytes that ``sample_tokens`` takes for a moment, with filters, beside the logits."""
    num_tiles = triton.cdiv(vocabulary, _TILE)
    by_tile = num_tiles * (4 + 4 + 8 + 2 * 4 * _PIVOTS.value)
    return int(num_rows * (by_tile + 4 * _PIVOTS.value + 2 * 4 * _FOUND + 8))


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
