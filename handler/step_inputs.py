"""A step's inputs as arrays, read from its plan, and what the device's rows have to be told.

Owns the host's picture of the device's rows (``device_rows``): whose each is, its block table and
how many of its tokens are computed. A step's plan is compared with it, and only what differs
travels: a decode needs nothing new but, every ``block_size`` steps, the id of a block. Knows
nothing of torch, devices, logits or how a step is run.
"""

import dataclasses
from collections.abc import Sequence as AbcSequence

import numpy as np
import numpy.typing as npt

from pagetier.handler.sequence import Sequence
from pagetier.handler.step import ScheduledSequence, StepPlan

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class RowChanges:
    """What of the device's rows changes before a step.

    Attributes:
        blocks: (row, column, block) of entries of block tables, int64 ``(n, 3)``.
        lengths: (row, tokens computed) of rows that start or go back, int64 ``(n, 2)``.
        tokens: (row, token) where the host knows a last token that the device does not, int64
            ``(n, 2)``.
    """

    blocks: Int64Array
    lengths: Int64Array
    tokens: Int64Array


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """A step's inputs.

    Attributes:
        rows: of the scheduled sequences, int64 ``(sequences,)``.
        changes: of the device's rows, to be made first.
        is_decode: whether each sequence has one new token and samples, and nothing else is wanted
            of the forward pass: then the device's rows hold all other inputs, and those below are
            None.
        starts: position of each sequence's first new token, int64 ``(sequences,)``.
        lens: new tokens of each sequence, int64 ``(sequences,)``.
        flat: the inputs of a step that is no decode.
        block_copies: (source, destination) blocks, int64 ``(copies, 2)``.
    """

    rows: Int64Array
    changes: RowChanges
    is_decode: bool
    starts: Int64Array
    lens: Int64Array
    flat: "FlatBatch | None"
    block_copies: Int64Array

    @property
    def ends(self) -> Int64Array:
        """Tokens of each sequence that are computed after the step."""
        return self.starts + self.lens


@dataclasses.dataclass(frozen=True)
class FlatBatch:
    """New tokens of all sequences, one after the other.

    Attributes:
        token_ids: int64 ``(tokens,)``; 0 where the device knows better.
        positions: int64 ``(tokens,)``.
        slots: where their keys and values go, int64 ``(tokens,)``.
        unknown_tokens: which of them are the last tokens of rows, int64.
        unknown_rows: of which rows, int64.
        block_tables: int32 ``(sequences, max_blocks)``.
        seq_lens: new tokens included, int32 ``(sequences,)``.
        query_start_loc: int32 ``(sequences + 1,)``.
        sampled_tokens: after which tokens one is sampled, int64 ``(samples,)``.
        prompt_tokens: for whose successors log-probabilities are wanted, int64 ``(positions,)``.
        prompt_targets: these successors, int64 ``(positions,)``.
        prompt_wishes: for each sequence that wants such, how many positions and how many most
            likely tokens of each.
    """

    token_ids: Int64Array
    positions: Int64Array
    slots: Int64Array
    unknown_tokens: Int64Array
    unknown_rows: Int64Array
    block_tables: Int32Array
    seq_lens: Int32Array
    query_start_loc: Int32Array
    sampled_tokens: Int64Array
    prompt_tokens: Int64Array
    prompt_targets: Int64Array
    prompt_wishes: list[tuple[int, int]]


class StepReader:
    """Reads plans, once each and in the order of their launches.

    Args:
        max_num_seqs: rows; each sequence's ``row`` is below it.
        max_blocks: columns of a row's block table.
        block_size: tokens in a block.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_computed = np.full(max_num_seqs, -1, dtype=np.int64)
        self._owners: list[Sequence | None] = [None] * max_num_seqs
        self._epochs = [-1] * max_num_seqs
        # Of the last step, if it was a decode: whom it had, and what was read of it.
        self._members: list[tuple[Sequence, int]] = []
        self._last: StepInputs | None = None

    def read(self, plan: StepPlan) -> StepInputs:
        """Everything that the step needs from its sequences, which change afterwards."""
        assert plan.scheduled, f"step {plan.step_id} has nothing to run"
        members = [(s.sequence, s.sequence.num_preemptions) for s in plan.scheduled]
        is_decode = all(
            s.num_tokens == 1 and s.samples and not s.prompt_logprobs[1] for s in plan.scheduled
        )
        inputs = None
        if is_decode and not plan.block_copies and members == self._members:
            inputs = self._read_next(plan)
        if inputs is None:
            inputs = self._read_any(plan, is_decode)
        self._members, self._last = (members, inputs) if is_decode else ([], None)
        return inputs

    def _read_next(self, plan: StepPlan) -> StepInputs | None:
        """A decode of the same sequences as the one before, which has changed least.

        None if it is not the step that follows.
        """
        scheduled, last = plan.scheduled, self._last
        assert last is not None
        starts = last.ends
        if [s.start for s in scheduled] != starts.tolist():
            return None
        blocks = []
        # A table can only have changed where a block begins: copies of blocks are told of.
        for index in np.flatnonzero(starts % self._block_size == 0).tolist():
            sequence = scheduled[index].sequence
            column = int(starts[index]) // self._block_size
            block = sequence.block_tables[0][column]
            self._tables[sequence.row, column] = block
            blocks.append((sequence.row, column, block))
        self._num_computed[last.rows] += 1
        return StepInputs(
            rows=last.rows,
            changes=RowChanges(
                blocks=_table(blocks, 3), lengths=_table([], 2), tokens=_known_tokens(scheduled)
            ),
            is_decode=True,
            starts=starts,
            lens=last.lens,
            flat=None,
            block_copies=_table([], 2),
        )

    def _read_any(self, plan: StepPlan, is_decode: bool) -> StepInputs:
        """Any step."""
        scheduled = plan.scheduled
        rows = np.array([s.sequence.row for s in scheduled], dtype=np.int64)
        assert rows.min() >= 0, "a scheduled sequence has no row"
        starts = np.array([s.start for s in scheduled], dtype=np.int64)
        lens = np.array([s.num_tokens for s in scheduled], dtype=np.int64)
        blocks = self._changed_blocks(scheduled)
        moved = np.flatnonzero(self._num_computed[rows] != starts)
        self._num_computed[rows] = starts + lens
        inputs = StepInputs(
            rows=rows,
            changes=RowChanges(
                blocks=_table(blocks, 3),
                lengths=np.stack([rows[moved], starts[moved]], axis=1),
                tokens=_known_tokens(scheduled),
            ),
            is_decode=is_decode,
            starts=starts,
            lens=lens,
            flat=None,
            block_copies=_table(plan.block_copies, 2),
        )
        return inputs if is_decode else dataclasses.replace(inputs, flat=self.flat(plan, inputs))

    def flat(self, plan: StepPlan, inputs: StepInputs) -> FlatBatch:
        """The flat batch of a step that was just read, whatever kind of step it is."""
        if inputs.flat is not None:
            return inputs.flat
        num_blocks = -(-int(inputs.ends.max()) // self._block_size)
        tables = self._tables[inputs.rows, :num_blocks]
        return _flat(plan.scheduled, inputs.starts, inputs.lens, tables, self._block_size)

    def _changed_blocks(self, scheduled: list[ScheduledSequence]) -> list[tuple[int, int, int]]:
        """(row, column, block) where block tables are not as they were.

        A running sequence's table changes only where it is written next: it grows, or its last
        block is replaced by a copy. A row that another sequence had, or the same one before a
        preemption, is compared from its beginning.
        """
        changed = []
        tables, owners, epochs = self._tables, self._owners, self._epochs
        block_size = self._block_size
        for share in scheduled:
            sequence = share.sequence
            row, start, table = sequence.row, share.start, sequence.block_tables[0]
            column = start // block_size
            if owners[row] is not sequence or epochs[row] != sequence.num_preemptions:
                owners[row], epochs[row] = sequence, sequence.num_preemptions
                column = 0
            last = (start + share.num_tokens - 1) // block_size
            for index in range(column, last + 1):
                if tables[row, index] != table[index]:
                    tables[row, index] = table[index]
                    changed.append((row, index, table[index]))
        return changed


def _known_tokens(scheduled: list[ScheduledSequence]) -> Int64Array:
    """(row, token) of single new tokens that the host knows."""
    known = [
        (s.sequence.row, s.sequence.token_ids[s.start])
        for s in scheduled
        if s.num_tokens == 1 and s.start < len(s.sequence.token_ids)
    ]
    return _table(known, 2)


def _table(rows: AbcSequence[tuple[int, ...]], num_columns: int) -> Int64Array:
    return np.array(rows, dtype=np.int64).reshape(-1, num_columns)


def flat_of(plan: StepPlan, block_size: int) -> FlatBatch:
    """A step's flat batch, read from its sequences alone; no row is looked at or changed."""
    starts = np.array([s.start for s in plan.scheduled], dtype=np.int64)
    lens = np.array([s.num_tokens for s in plan.scheduled], dtype=np.int64)
    lists = [s.sequence.block_tables[0] for s in plan.scheduled]
    tables = np.zeros((len(lists), max(map(len, lists))), dtype=np.int32)
    for index, block_ids in enumerate(lists):
        tables[index, : len(block_ids)] = block_ids
    return _flat(plan.scheduled, starts, lens, tables, block_size)


def _flat(
    scheduled: list[ScheduledSequence],
    starts: Int64Array,
    lens: Int64Array,
    block_tables: Int32Array,
    block_size: int,
) -> FlatBatch:
    """The new tokens of all sequences, one after the other."""
    query_start_loc = np.concatenate([[0], np.cumsum(lens)])
    token_ids: list[int] = []
    unknown: list[int] = []
    prompt_tokens: list[int] = []
    prompt_targets: list[int] = []
    prompt_wishes = []
    for index, share in enumerate(scheduled):
        sequence = share.sequence
        known = sequence.token_ids[share.start : share.start + share.num_tokens]
        token_ids += known
        if len(known) < share.num_tokens:
            assert len(known) == share.num_tokens - 1, (sequence.request_id, share)
            token_ids.append(0)
            unknown.append(index)
        first, end = share.prompt_logprobs
        if end:
            offset = int(query_start_loc[index]) - share.start
            prompt_tokens += range(offset + first, offset + end)
            prompt_targets += sequence.token_ids[first + 1 : end + 1]
            prompt_wishes.append((end - first, sequence.params.prompt_logprobs or 0))
    owner = np.repeat(np.arange(len(scheduled)), lens)
    positions = np.arange(len(token_ids)) - query_start_loc[owner] + starts[owner]
    blocks = block_tables[owner, positions // block_size].astype(np.int64)
    samples = np.array([s.samples for s in scheduled], dtype=bool)
    return FlatBatch(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        unknown_tokens=query_start_loc[np.array(unknown, dtype=np.int64) + 1] - 1,
        unknown_rows=np.array([scheduled[i].sequence.row for i in unknown], dtype=np.int64),
        block_tables=block_tables,
        seq_lens=(starts + lens).astype(np.int32),
        query_start_loc=query_start_loc.astype(np.int32),
        sampled_tokens=query_start_loc[1:][samples] - 1,
        prompt_tokens=np.array(prompt_tokens, dtype=np.int64),
        prompt_targets=np.array(prompt_targets, dtype=np.int64),
        prompt_wishes=prompt_wishes,
    )
