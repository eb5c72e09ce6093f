"""A token for each row of a batch of logits, on the device, without waiting for it.

Owns the settings of rows on their way to the device, and log-probabilities. Knows nothing of
requests, models or steps: settings arrive as one value for each row, and logits as ``logit_rules``
leaves them. Distributions and random numbers are those of ``kernels.sample_tokens``.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pagetier import kernels
from pagetier.handler.sampling_params import SamplingParams

# Rows whose log-probabilities are worked out at once.
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
    if settings.all_greedy:
        token_ids = kernels.greedy_tokens(logits)
    else:
        if packed is None:
            packed = torch.from_numpy(settings.packed()).to(logits.device)
        first, second, top_k, seeds, positions = packed.unbind()
        temperature, top_p = first.view(torch.float32).view(-1, 2).unbind(1)
        min_p = second.view(torch.float32).view(-1, 2)[:, 0]
        token_ids = kernels.sample_tokens(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            positions,
            any_filter=settings.any_filter,
        )
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


def score_bytes(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes that ``score`` takes for a moment: a slice's float32 copy and its log-softmax."""
    num_copies = 1 if dtype == torch.float32 else 2
    return min(num_rows, _SCORED_ROWS) * vocab_size * 4 * num_copies
