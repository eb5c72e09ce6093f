"""What a request favours, disfavours or forbids: changes to the logits before a token is chosen.

Owns logit_bias, allowed_token_ids, bad_words, min_tokens and the penalties, and what the device
must remember for them: a row for each sequence, at its ``row``. Knows nothing of distributions
(``sampler``) and of models.

The host may not know a sequence's last token when it launches the step that chooses the next one.
So the counts of output tokens live on the device, and are added to where tokens are chosen. They
are made anew from the host's tokens whenever a sequence starts in a row, after a preemption for
instance, which it only does with all its tokens known. Bad words of several tokens are matched on
the host up to the token that it does not know; the rest is a condition, decided on the device.

If its rules forbid a request all tokens, any token may be chosen: what is certain to lead there is
refused when the request comes (``SamplingParams.check_tokens``).

Nothing is allocated before the first request needs it, and tables grow with the rows in use.
``read`` runs on the host, once for each launch and in their order; ``apply`` and ``count`` run on
the device, in the same order, and never wait for it.
"""

import dataclasses
from collections.abc import Sequence as AbcSequence

import numpy as np
import numpy.typing as npt
import torch

from pagetier import kernels
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence
from pagetier.handler.step import ScheduledSequence
from pagetier.kernels.metadata import upload
from pagetier.kernels.reference.logit_changes import IN_PROMPT

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

_ALWAYS = -1


@dataclasses.dataclass(frozen=True)
class HostRules:
    """The rules of one step, as the host knows them.

    Attributes:
        bias: (sample, row) of samples that have a row of the table of biases, int64 ``(n, 2)``.
        new_bias_rows: rows of that table to be written first, int64 ``(m,)``.
        new_bias: what to write, float32 ``(m, vocabulary)``.
        bans: (sample, row, token, last token) of tokens forbidden if the last token of the row is
            that one, or, where it is -1, at any rate; int64 ``(n, 4)``.
        penalties: (sample, row) of samples with penalties, int64 ``(n, 2)``.
        strengths: their repetition, presence and frequency penalties, float32 ``(n, 3)``.
        new_count_rows: rows of the table of counts to be written first, int64 ``(m,)``.
        new_counts: (row, token, value) of what is not 0 in these, int64 ``(n, 3)``.
    """

    bias: Int64Array
    new_bias_rows: Int64Array
    new_bias: Float32Array
    bans: Int64Array
    penalties: Int64Array
    strengths: Float32Array
    new_count_rows: Int64Array
    new_counts: Int64Array

    def packed(self) -> list[npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
        """All values as integer arrays, to travel to the device in one piece."""
        return [
            self.bias,
            self.new_bias_rows,
            self.new_bias.view(np.int32),
            self.bans,
            self.penalties,
            self.strengths.view(np.int32),
            self.new_count_rows,
            self.new_counts,
        ]


@dataclasses.dataclass(frozen=True)
class DeviceRules:
    """``HostRules`` on the device; the tables need ``num_rows`` rows for them."""

    num_rows: int
    bias: torch.Tensor
    new_bias_rows: torch.Tensor
    new_bias: torch.Tensor
    bans: torch.Tensor
    penalties: torch.Tensor
    strengths: torch.Tensor
    new_count_rows: torch.Tensor
    new_counts: torch.Tensor


class LogitRules:
    """Keeps what the rules of running sequences need, and applies them.

    Args:
        max_num_seqs: each sequence's ``row`` is below it.
        vocab_size: columns of the logits.
        device: of the logits.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._device = device
        self._bias = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._rows: dict[int, _Row] = {}  # the host's; all else is the device's

    # --- on the host -------------------------------------------------------------------------

    def read(self, scheduled: AbcSequence[ScheduledSequence]) -> HostRules | None:
        """The rules for the tokens that a step will choose; None if there are none.

        Args:
            scheduled: the sequences of the step that sample, in the order of the logits' rows.
        """
        if not any(share.sequence.changes_logits for share in scheduled):
            return None
        bias, new_bias_rows, new_bias = [], [], []
        bans = [np.zeros((0, 4), dtype=np.int64)]
        penalties, strengths, new_count_rows = [], [], []
        new_counts = [np.zeros((0, 3), dtype=np.int64)]
        for sample, share in enumerate(scheduled):
            sequence, position = share.sequence, share.start + share.num_tokens
            if not sequence.changes_logits:
                continue
            params, row = sequence.params, sequence.row
            state = self._rows.get(row)
            if state is None or state.owner != _owner(sequence):
                state = self._rows[row] = _Row(sequence)
                if state.has_bias:
                    new_bias_rows.append(row)
                    new_bias.append(bias_of(params, self._vocab_size))
            if state.has_bias:
                bias.append((sample, row))
            for tokens in (
                self._ends_of(sequence, position),
                *state.bad_words.bans(sequence, position),
            ):
                if len(tokens):
                    place = np.broadcast_to((sample, row), (len(tokens), 2))
                    bans.append(np.concatenate([place, tokens], axis=1))
            if params.has_penalties:
                penalties.append((sample, row))
                strengths.append(
                    (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
                )
                num_output = position - sequence.num_prompt_tokens
                if state.num_counted != num_output:
                    new_count_rows.append(row)
                    new_counts.append(_counts_of(sequence, position))
                # The token that this step chooses is counted as well.
                state.num_counted = num_output + 1
        if not bias and not penalties and len(bans) == 1:
            return None
        return HostRules(
            bias=_table(bias, 2),
            new_bias_rows=np.array(new_bias_rows, dtype=np.int64),
            new_bias=np.array(new_bias, dtype=np.float32).reshape(-1, self._vocab_size),
            bans=np.concatenate(bans),
            penalties=_table(penalties, 2),
            strengths=np.array(strengths, dtype=np.float32).reshape(-1, 3),
            new_count_rows=np.array(new_count_rows, dtype=np.int64),
            new_counts=np.concatenate(new_counts),
        )

    def _ends_of(self, sequence: Sequence, position: int) -> Int64Array:
        """(token, -1) of the ends that come too early at ``position``."""
        params = sequence.params
        if position - sequence.num_prompt_tokens >= params.min_tokens:
            return _table([], 2)
        ends = (*sequence.eos_token_ids, *(params.stop_token_ids or ()))
        # A model's configuration may name ends that it does not have.
        return _table([(t, _ALWAYS) for t in ends if 0 <= t < self._vocab_size], 2)

    # --- on the device -----------------------------------------------------------------------

    def upload(self, rules: HostRules) -> DeviceRules:
        """Copy rules to the device without waiting for it."""
        highest = max(rules.bias[:, 1].max(initial=-1), rules.penalties[:, 1].max(initial=-1))
        tensors = upload(rules.packed(), self._device)
        tensors[2], tensors[5] = tensors[2].view(torch.float32), tensors[5].view(torch.float32)
        return DeviceRules(int(highest) + 1, *tensors)

    def apply(self, logits: torch.Tensor, rules: DeviceRules, last_token_ids: torch.Tensor) -> None:
        """Change logits in place, in vLLM's order: biases, forbidden tokens, penalties.

        Args:
            logits: float32 ``(samples, vocabulary)``.
            rules: of the step.
            last_token_ids: the tokens chosen last, by row, int64.
        """
        if len(rules.bias):
            samples, rows = rules.bias.unbind(1)
            self._bias = self._grown(self._bias, rules.num_rows)
            self._bias.index_copy_(0, rules.new_bias_rows, rules.new_bias)
            logits.index_add_(0, samples, self._bias.index_select(0, rows))
        if len(rules.bans):
            samples, rows, tokens, required = rules.bans.unbind(1)
            holds = (required == _ALWAYS) | (last_token_ids.index_select(0, rows) == required)
            # Added and not set: of two bans on one token, one may hold and the other not.
            change = torch.zeros_like(holds, dtype=logits.dtype).masked_fill_(holds, -torch.inf)
            logits.index_put_((samples, tokens), change, accumulate=True)
        if len(rules.penalties):
            samples, rows = rules.penalties.unbind(1)
            self._counts = self._grown(self._counts, rules.num_rows)
            self._counts.index_fill_(0, rules.new_count_rows, 0)
            new_rows, new_tokens, values = rules.new_counts.unbind(1)
            self._counts.index_put_((new_rows, new_tokens), values.int(), accumulate=True)
            kernels.penalise_rows(logits, samples, self._counts, rows, rules.strengths)

    def count(self, rules: DeviceRules, token_ids: torch.Tensor) -> None:
        """Count the chosen tokens, int64 ``(samples,)``, for the steps that follow."""
        if len(rules.penalties):
            samples, rows = rules.penalties.unbind(1)
            ones = torch.ones_like(rows, dtype=torch.int32)
            chosen = token_ids.index_select(0, samples)
            self._counts.index_put_((rows, chosen), ones, accumulate=True)

    def _grown(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The table, made larger if it has fewer rows; low rows are in use first."""
        if num_rows <= len(table):
            return table
        grown = table.new_zeros(
            min(1 << (num_rows - 1).bit_length(), self._max_num_seqs), self._vocab_size
        )
        grown[: len(table)] = table
        return grown


def has_bias(params: SamplingParams) -> bool:
    """Whether a request changes logits by token alone, whatever came before."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids is not None
        or any(len(word) == 1 for word in _bad_words(params))
    )


def bias_of(params: SamplingParams, vocab_size: int) -> Float32Array:
    """What is added to a request's logits at every step: float32 ``(vocabulary,)``."""
    bias = np.zeros(vocab_size, dtype=np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0.0
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] += value
    for word in _bad_words(params):
        if len(word) == 1:
            bias[word[0]] = -np.inf
    return bias


def _bad_words(params: SamplingParams) -> list[AbcSequence[int]]:
    return [word for word in params.bad_words or () if not isinstance(word, str)]


class _BadWords:
    """Bad words of several tokens, arranged so that a step looks at few of them.

    Args:
        words: token ids of each.
    """

    def __init__(self, words: AbcSequence[AbcSequence[int]]) -> None:
        self._words = [list(word) for word in words if len(word) > 1]
        self._pairs = _table([(w[1], w[0]) for w in self._words if len(w) == 2], 2)
        # By the token that comes before the one that the host does not know.
        self._longer: dict[int, list[list[int]]] = {}
        for word in self._words:
            if len(word) > 2:
                self._longer.setdefault(word[-3], []).append(word)

    def bans(self, sequence: Sequence, position: int) -> list[Int64Array]:
        """(token, last token) of what may not stand at ``position``, the last token -1 if known.

        All tokens before ``position`` are known, except perhaps the last.
        """
        if not self._words or position == sequence.num_prompt_tokens:
            return []
        if sequence.num_tokens >= position:
            found = [(w[-1], _ALWAYS) for w in self._words if _ends_with(sequence, w[:-1])]
            return [_table(found, 2)]
        candidates = self._longer.get(sequence.token_ids[-1], ())
        found = [(w[-1], w[-2]) for w in candidates if _ends_with(sequence, w[:-2])]
        return [self._pairs, _table(found, 2)]


def _ends_with(sequence: Sequence, token_ids: list[int]) -> bool:
    """Whether the known output ends with these."""
    enough = sequence.num_output_tokens >= len(token_ids)
    return enough and sequence.token_ids[-len(token_ids) :] == token_ids


class _Row:
    """What the host remembers of the sequence that a row of the tables belongs to."""

    def __init__(self, sequence: Sequence) -> None:
        self.owner = _owner(sequence)
        self.has_bias = has_bias(sequence.params)
        self.bad_words = _BadWords(_bad_words(sequence.params))
        self.num_counted = -1  # output tokens in the row of counts


def _counts_of(sequence: Sequence, position: int) -> Int64Array:
    """(row, token, value) of the table of counts for a sequence whose tokens are all known."""
    assert sequence.num_tokens >= position, (sequence.request_id, sequence.num_tokens, position)
    num_prompt = sequence.num_prompt_tokens
    pieces = []
    prompt = np.unique(np.array(sequence.token_ids[:num_prompt], dtype=np.int64))
    output, counts = np.unique(
        np.array(sequence.token_ids[num_prompt:position], dtype=np.int64), return_counts=True
    )
    for token_ids, values in ((prompt, np.full_like(prompt, IN_PROMPT)), (output, counts)):
        rows = np.full_like(token_ids, sequence.row)
        pieces.append(np.stack([rows, token_ids, values], axis=1))
    return np.concatenate(pieces)


def _owner(sequence: Sequence) -> tuple[str, int, int]:
    """Who a row's contents belong to; another one after a preemption."""
    return (sequence.sequence_id, sequence.arrival, sequence.num_preemptions)


def _table(rows: AbcSequence[tuple[int, ...]], num_columns: int) -> Int64Array:
    return np.array(rows, dtype=np.int64).reshape(-1, num_columns)
