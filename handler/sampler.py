"""Choosing a token for each row of a batch of logits, on the device, without waiting for it.

Owns the distributions (temperature, min-p, top-k, top-p), the random numbers, and
log-probabilities. Knows nothing of requests, models or steps: settings arrive as one value for each
row, and logits as ``logit_rules`` leaves them.

Random numbers are counter-based. A row's only randomness is one uniform number, a hash of its
request's seed and of the position of the token to be chosen. So a request gets the same tokens
whatever shares the batch, and again after it was preempted, and there is no random state to keep.
The token is found by inverting the cumulative distribution in order of token id. The alternative,
Gumbel noise on every logit, needs a hash for every token of the vocabulary where this needs one a
row; its advantage, that no sum over the vocabulary is involved whose rounding could depend on the
batch's shape, is met by summing in float64.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagetier.handler.sampling_params import SamplingParams

# Constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# 2014), as signed 64-bit integers, which torch multiplies modulo 2**64.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# Rows whose log-probabilities, or masks, are worked out at once.
_SCORED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What the host knows of a batch's sampling: a value for each row, and what can be left out.

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int64; the size of the vocabulary or more keeps all.
        top_p: float32; 1 keeps all.
        min_p: float32; 0 keeps all.
        seeds: int64.
        positions: position of the token to be chosen, int64.
        num_logprobs: most likely tokens reported for each row that wants log-probabilities, the
            most that any row asked for; None if no row wants any.
    """

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    num_logprobs: int | None

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
    ) -> "RowSettings":
        """Settings of rows that belong to these requests."""
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        return cls(
            temperature=np.array([p.temperature for p in params], dtype=np.float32),
            top_k=np.array([p.top_k if p.top_k > 0 else 2**62 for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params], dtype=np.float32),
            min_p=np.array([p.min_p for p in params], dtype=np.float32),
            seeds=np.array(seeds, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            num_logprobs=max(wanted, default=None),
        )

    @property
    def all_greedy(self) -> bool:
        """Whether no row needs a random number."""
        return not self.temperature.any()

    @property
    def any_min_p(self) -> bool:
        """Whether a row that is not greedy leaves tokens out by their share of the highest."""
        return bool(((self.min_p > 0) & (self.temperature > 0)).any())

    @property
    def any_filter(self) -> bool:
        """Whether a row that is not greedy leaves tokens out by their rank."""
        drops = (self.top_k < 2**62) | (self.top_p < 1.0)
        return bool((drops & (self.temperature > 0)).any())

    def packed(self) -> npt.NDArray[np.int64]:
        """All values as one array ``(5, rows)``, to travel to the device in one piece."""
        floats = [
            np.stack(pair, axis=1).view(np.int64)[:, 0]
            for pair in ((self.temperature, self.top_p), (self.min_p, self.min_p))
        ]
        return np.stack([*floats, self.top_k, self.seeds, self.positions])


@dataclasses.dataclass(frozen=True)
class SamplerOutput:
    """Chosen tokens and, where any row asked, log-probabilities; all on the device.

    Attributes:
        token_ids: int64 ``(rows,)``.
        logprobs: of the chosen tokens under the raw distribution, float32 ``(rows,)``.
        top_token_ids: most likely tokens, most likely first, int64 ``(rows, num_logprobs)``.
        top_logprobs: theirs, float32 ``(rows, num_logprobs)``.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(
    logits: torch.Tensor,
    settings: RowSettings,
    packed: torch.Tensor | None = None,
    *,
    raw_logits: torch.Tensor | None = None,
) -> SamplerOutput:
    """Choose a token for each row.

    Args:
        logits: scores ``(rows, vocabulary)``, any float dtype; computed with in float32.
        settings: of each row.
        packed: ``settings.packed()`` on the device of ``logits``; None copies it there, which may
            wait for the device.
        raw_logits: the model's own scores, if ``logits`` were changed.

    Returns:
        Tokens, and log-probabilities of the raw distribution (before temperature and filters).
    """
    logits = logits.float()
    token_ids = logits.argmax(-1)
    if not settings.all_greedy:
        if packed is None:
            packed = torch.from_numpy(settings.packed()).to(logits.device)
        first, second, top_k, seeds, positions = packed.unbind()
        temperature, top_p = first.view(torch.float32).view(-1, 2).unbind(1)
        weights = token_weights(logits, temperature)
        if settings.any_min_p:
            # The highest weight is 1, so a weight is a share of it.
            min_p = second.view(torch.float32).view(-1, 2)[:, :1]
            weights = weights.masked_fill_(weights < min_p, 0.0)
        if settings.any_filter:
            weights = _filter(weights, top_k, top_p)
        drawn = _invert(weights, uniform(seeds, positions))
        token_ids = torch.where(temperature > 0, drawn, token_ids)
    if settings.num_logprobs is None:
        return SamplerOutput(token_ids)
    return score(logits if raw_logits is None else raw_logits, token_ids, settings.num_logprobs)


def score(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> SamplerOutput:
    """Log-probabilities of given tokens and of the most likely ones.

    Args:
        logits: raw scores ``(rows, vocabulary)``, any float dtype.
        token_ids: int64 ``(rows,)``.
        num_top: how many of the most likely; all, if the vocabulary is smaller.
    """
    pieces = []
    # A slice at a time, since a prompt's rows are many, and their float32 copies are large.
    for rows in range(0, max(len(logits), 1), _SCORED_ROWS):
        logprobs = logits[rows : rows + _SCORED_ROWS].float().log_softmax(-1)
        top = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
        chosen = logprobs.gather(-1, token_ids[rows : rows + _SCORED_ROWS, None])[:, 0]
        pieces.append((chosen, top.indices, top.values))
    return SamplerOutput(token_ids, *map(torch.cat, zip(*pieces, strict=True)))


def allow_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Forbid all but the allowed tokens in some rows, in place.

    Args:
        logits: float32 ``(all rows, vocabulary)``.
        rows: which rows are masked, int64 ``(rows,)``.
        masks: a bit for each token id, lowest first, 1 where it is allowed; int32
            ``(rows, words)``, with at least as many bits as there are tokens.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    # A slice at a time: unpacked, a mask takes as much memory as the row.
    for start in range(0, len(rows), _SCORED_ROWS):
        some, words = (t[start : start + _SCORED_ROWS] for t in (rows, masks))
        is_allowed = (words[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]] > 0
        allowed = logits.index_select(0, some).masked_fill_(~is_allowed, -torch.inf)
        logits.index_copy_(0, some, allowed)


def token_weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Unnormalised probabilities ``exp((logit - highest) / temperature)``, ``(rows, vocabulary)``.

    Greedy rows come out as if their temperature were 1. The highest weight of a row is exactly 1,
    so that no temperature overflows.
    """
    divisor = torch.where(temperature > 0, temperature, 1.0)
    return ((logits - logits.amax(-1, keepdim=True)) / divisor[:, None]).exp_()


def _filter(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Weights with 0 for the tokens that top-k, then top-p among those left, leave out.

    Exactly ``top_k`` tokens stay, the lower token ids first among equals; of these the fewest,
    most likely first, whose share reaches ``top_p``.
    """
    ordered, token_ids = weights.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(weights.shape[-1], device=weights.device)
    ordered = ordered.masked_fill_(ranks >= top_k[:, None], 0.0)
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    before = cumulative - ordered
    keep = before < top_p.double()[:, None] * cumulative[:, -1:]
    # Where all is kept, rounding must not drop the least likely.
    keep |= top_p[:, None] >= 1.0
    # Back in order of token id: a row's draw must not depend on whether another row is filtered.
    return torch.zeros_like(weights).scatter_(-1, token_ids, ordered.masked_fill_(~keep, 0.0))


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative share of weights first exceeds each row's uniform number.

    Never a token of weight 0.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Rounding up to the total would point past the last token that has weight.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms * total, below_total)
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # Only where weights are not numbers is nothing found; the row is lost, not the process.
    return found.clamp_max(weights.shape[-1] - 1)


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
