"""What the device knows of running sequences: a row for each, at its ``Sequence.row``.

Owns the tensors, how changes from the host get into them, and how a decode reads its inputs from
them and moves them on. So the host need not know a sequence's last token to launch its next step,
and sends next to nothing. Knows nothing of models or of when a step runs.

One row more than there are sequences is of padding: what a batch smaller than its buffers points
to. Its inputs are harmless: length 0, and a slot that is written nowhere.
"""

import dataclasses

import torch

from pagetier import kernels
from pagetier.handler.step_inputs import RowChanges
from pagetier.kernels.metadata import upload


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """Inputs of one new token for each sequence of a batch, in buffers that outlive the step.

    Attributes:
        token_ids: int64 ``(size,)``.
        positions: int64 ``(size,)``.
        slots: int64 ``(size,)``; -1 for padding.
        seq_lens: new token included, int32 ``(size,)``; 0 for padding.
        block_tables: int32 ``(size, max_blocks)``.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def allocate(cls, size: int, max_blocks: int, device: torch.device) -> "DecodeInputs":
        """Buffers for ``size`` sequences."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(size),
            zeros(size),
            zeros(size),
            zeros(size, dtype=torch.int32),
            zeros(size, max_blocks, dtype=torch.int32),
        )

    def first(self, size: int) -> "DecodeInputs":
        """The buffers' first ``size`` entries, sharing their memory."""
        return DecodeInputs(*(getattr(self, f.name)[:size] for f in dataclasses.fields(self)))


class DeviceRows:
    """The rows.

    Args:
        max_num_seqs: rows of sequences.
        max_blocks: columns of a row's block table.
        block_size: tokens in a block.
        device: where they are.

    Attributes:
        padding: the row of padding.
        last_token_ids: by row, the token chosen last, int64 ``(rows,)``.
        num_computed: by row, tokens whose keys and values are computed: the position of the last
            token, int64 ``(rows,)``.
        block_tables: by row, int32 ``(rows, max_blocks)``.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.padding = max_num_seqs
        self._block_size = block_size
        self._device = device
        num_rows = max_num_seqs + 1
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)

    def change(self, changes: RowChanges) -> None:
        """Take in what the host knows better, without waiting for the device."""
        if not (len(changes.blocks) or len(changes.lengths) or len(changes.tokens)):
            return
        blocks, lengths, tokens = upload(
            [changes.blocks, changes.lengths, changes.tokens], self._device
        )
        kernels.change_rows(
            blocks, lengths, tokens, self.last_token_ids, self.num_computed, self.block_tables
        )

    def read(self, rows: torch.Tensor, out: DecodeInputs) -> None:
        """Write the inputs of a decode of these rows, int64 ``(size,)``, to ``out``."""
        kernels.read_rows(
            rows,
            self.last_token_ids,
            self.num_computed,
            self.block_tables,
            block_size=self._block_size,
            token_ids=out.token_ids,
            positions=out.positions,
            slots=out.slots,
            seq_lens=out.seq_lens,
            batch_tables=out.block_tables,
        )

    def advance(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Note the tokens that a decode chose, int64 ``(size,)``; each row is one token longer."""
        kernels.advance_rows(rows, token_ids, self.last_token_ids, self.num_computed)
