"""Choosing a token for each row of logits in plain torch, without waiting for the device.

Owns what the filters keep, the random numbers, and which token a number picks. Knows nothing of
requests: settings arrive as one value for each row.

Weights. A token's weight is ``exp((logit - highest) / temperature)``, as an integer in units of
``2 ** -WEIGHT_BITS``. So sums are exact, whatever their order: a row's token does not depend on how
its vocabulary is divided, nor on what shares the batch.

Random numbers are counter-based. A row's only randomness is one uniform number, a hash of its
request's seed and of the position of the token to be chosen. So a request gets the same tokens
whatever shares the batch, and again after it was preempted, and there is no random state to keep.
The token is found by inverting the cumulative distribution in order of token id. The alternative,
Gumbel noise on every logit, needs a hash for every token of the vocabulary where this needs one a
row.
"""

import torch

# The highest weight is 2**40: of a vocabulary of 2**22, all of them highest, the sum fits into 63
# bits. A token of less than 2**-40 of the highest's weight is never drawn.
WEIGHT_BITS = 40

# Constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# 2014), as signed 64-bit integers, which torch multiplies modulo 2**64.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def greedy_tokens(logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The first highest token of each row.

    Args:
        logits: scores ``(rows, vocabulary)``, any float dtype, dense in the last dimension.
        out: where to write, int64 ``(rows,)``; None allocates it.

    Returns:
        Token ids, int64 ``(rows,)``.
    """
    return torch.argmax(logits, -1, out=out)


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
    """Choose a token for each row.

    The distribution of a row: ``exp(logit / temperature)``, without the tokens of less than
    ``min_p`` of the highest's weight; of these exactly the ``top_k`` highest, the lower token ids
    first among equals; of these the fewest, highest first, whose share reaches ``top_p``.

    Args:
        logits: scores ``(rows, vocabulary)``, any float dtype; computed with in float32. The last
            dimension is dense.
        temperature: float32 ``(rows,)``; 0 takes the first highest.
        top_k: integers ``(rows,)``; the size of the vocabulary or more keeps all.
        top_p: float32 ``(rows,)``; 1 keeps all.
        min_p: float32 ``(rows,)``; 0 keeps all.
        seeds: int64 ``(rows,)``.
        positions: of the tokens to be chosen, int64 ``(rows,)``.
        any_filter: False if every row has a ``top_k`` and a ``top_p`` that keep all.

    Returns:
        Token ids, int64 ``(rows,)``.
    """
    logits = logits.float()
    weights = token_weights(logits, temperature, min_p)
    if any_filter:
        weights = _filter(logits, weights, top_k, top_p)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    drawn = torch.searchsorted(cumulative, _target(seeds, positions, total)[:, None], right=True)
    # Where no token has weight, as in a row of NaN, the row is lost, not the process.
    return torch.where((temperature > 0) & (total > 0), drawn[:, 0], logits.argmax(-1))


def token_weights(
    logits: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Weights in units of ``2 ** -WEIGHT_BITS``, int64 ``(rows, vocabulary)``.

    Greedy rows come out as if their temperature were 1.
    """
    divisor = torch.where(temperature > 0, temperature, 1.0)
    weights = ((logits - logits.amax(-1, keepdim=True)) / divisor[:, None]).exp_()
    # The highest weight is 1, so a weight is a share of it. Neither holds for NaN.
    kept = (weights >= min_p[:, None]) & (weights > 0)
    return (weights.masked_fill_(~kept, 0.0) * 2.0**WEIGHT_BITS).long()


def _filter(
    logits: torch.Tensor, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Weights with 0 for the tokens that top-k, then top-p among those left, leave out."""
    token_ids = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, token_ids)
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    ordered = ordered.masked_fill_(ranks >= top_k[:, None], 0)
    cumulative = ordered.cumsum(-1)
    enough = (top_p.double() * cumulative[:, -1].double()).ceil().long().clamp_min(1)
    keep = cumulative - ordered < enough[:, None]
    # Where all is kept, rounding must not drop the least likely.
    keep |= top_p[:, None] >= 1.0
    return torch.zeros_like(weights).scatter_(-1, token_ids, ordered.masked_fill_(~keep, 0))


def _target(seeds: torch.Tensor, positions: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A number from 0 to below ``total`` for each row, int64."""
    # Rounding up to the total would point past the last token that has weight.
    return torch.minimum((uniform(seeds, positions) * total.double()).long(), total - 1)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1) that depend on seed and position alone, float64, with 53 random bits.

    Two rounds of splitmix64: the seed's hash is where the stream of positions starts, so that
    neighbouring seeds do not share shifted streams.
    """
    start = _mix(seeds + _GOLDEN_GAMMA)
    bits = _mix(start + (positions + 1) * _GOLDEN_GAMMA)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; torch's own repeats the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
