"""Changes to logits by tables that lie on the device, in plain torch, without waiting for it.

Knows nothing of requests. The dimensions are rows of logits, and tokens of the vocabulary.
"""

import torch

# What a count of a token has beside how often it is in the output, if it is in the prompt.
IN_PROMPT = 1 << 30

# Rows whose masks are unpacked at once.
_MASKED_ROWS = 64

# Where tokens are looked for that have come, few of a vocabulary: elsewhere it would mean to wait.
_SEARCHED_DEVICE = "cpu"


def allow_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Forbid all but the allowed tokens in some rows, in place.

    Args:
        logits: floating point ``(all rows, vocabulary)``.
        rows: which rows are masked, all different, int64 ``(rows,)``.
        masks: a bit for each token id, lowest first, 1 where it is allowed; int32
            ``(rows, words)``, with at least as many bits as there are tokens.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    # A slice at a time: unpacked, a mask takes as much memory as the row.
    for start in range(0, len(rows), _MASKED_ROWS):
        some, words = (t[start : start + _MASKED_ROWS] for t in (rows, masks))
        is_allowed = (words[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]] > 0
        allowed = logits.index_select(0, some).masked_fill_(~is_allowed, -torch.inf)
        logits.index_copy_(0, some, allowed)


def penalise_rows(
    logits: torch.Tensor,
    samples: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    strengths: torch.Tensor,
) -> None:
    """Apply repetition, presence and frequency penalties to some rows, in place.

    Args:
        logits: float32 ``(all samples, vocabulary)``.
        samples: which rows of ``logits`` are penalised, all different, int64 ``(n,)``.
        counts: how often outputs have each token, and ``IN_PROMPT`` more if the prompt has it,
            int32 ``(all rows, vocabulary)``.
        rows: which row of ``counts`` belongs to each of ``samples``, int64 ``(n,)``.
        strengths: of each of ``samples``; see ``penalise``; float32 ``(n, 3)``.
    """
    own = counts.index_select(0, rows)
    if logits.device.type == _SEARCHED_DEVICE:
        found, tokens = own.nonzero(as_tuple=True)
        places = (samples[found], tokens)
        logits[places] = penalise(logits[places], own[found, tokens], strengths[found])
    else:
        changed = penalise(logits.index_select(0, samples), own, strengths[:, None, :])
        logits.index_copy_(0, samples, changed)


def penalise(logits: torch.Tensor, counts: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Logits after repetition, presence and frequency penalties, in this order.

    Neutral strengths change no bit. The repetition penalty is that of transformers'
    ``RepetitionPenaltyLogitsProcessor`` (Keskar et al. 2019, section 4.1), prompt included; the
    others are OpenAI's, of the output alone.

    Args:
        logits: float32, any shape.
        counts: see ``penalise_rows``, of the same shape.
        strengths: of repetition, presence and frequency, float32; the last dimension is these
            three, the others broadcast with ``logits``.
    """
    repetition, presence, frequency = strengths.unbind(-1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(counts != 0, repeated, logits)
    in_output = counts.bitwise_and(IN_PROMPT - 1)
    logits -= frequency * in_output
    logits -= presence * (in_output > 0)
    return logits
