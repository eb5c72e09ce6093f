"""The kernels that keep a decode's inputs on the device, and their references."""

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import reference, step_state


@pytest.fixture(params=["reference", *DEVICES])
def place(request: pytest.FixtureRequest) -> tuple[object, str]:
    """Whose operations, on which device."""
    if request.param == "reference":
        return reference, "cpu"
    skip_unless_kernels_run(request.param)
    return step_state, request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=10)


class Rows:
    """Five rows and one of padding, tables of random blocks, and buffers full of rubbish."""

    def __init__(self, device: str, max_blocks: int = 7) -> None:
        generator = torch.Generator().manual_seed(0)
        tables = torch.randint(1, 1000, (6, max_blocks), generator=generator, dtype=torch.int32)
        self.block_tables = tables.to(device)
        self.last_token_ids = torch.tensor([11, 12, 13, 14, 15, 99], device=device)
        self.num_computed = torch.tensor([0, 3, 4, 7, 20, 5], device=device)
        self.device = device

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.last_token_ids, self.num_computed, self.block_tables

    def read(self, operations, rows: list[int], block_size: int) -> dict[str, torch.Tensor]:
        size, width = len(rows), self.block_tables.shape[1]
        out = {
            name: torch.full((size,), -7, device=self.device)
            for name in ("token_ids", "positions", "slots", "seq_lens")
        }
        out["seq_lens"] = out["seq_lens"].int()
        out["batch_tables"] = torch.full((size, width), -7, device=self.device).int()
        indices = torch.tensor(rows, dtype=torch.int64, device=self.device)
        operations.read_rows(indices, *self.tensors(), block_size=block_size, **out)
        return {name: tensor.cpu() for name, tensor in out.items()}


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_reading_gives_each_row_its_inputs(block_size, place):
    operations, device = place
    state = Rows(device, max_blocks=300 if block_size == 1 else 7)
    if block_size == 1:
        state.num_computed[3] = 290  # its table takes a second round
    batch = [3, 0, 5, 4, 2, 5]
    out = state.read(operations, batch, block_size)
    lengths, tables = state.num_computed.tolist(), state.block_tables.cpu()
    for index, row in enumerate(batch):
        position = 0 if row == 5 else lengths[row]
        assert out["positions"][index] == position
        if row == 5:
            assert (out["slots"][index], out["seq_lens"][index]) == (-1, 0)
            continue
        assert out["token_ids"][index] == 11 + row
        assert out["seq_lens"][index] == position + 1
        used = position // block_size + 1
        assert torch.equal(out["batch_tables"][index, :used], tables[row, :used])
        expected = int(tables[row, used - 1]) * block_size + position % block_size
        assert out["slots"][index] == expected


def test_advancing_moves_rows_of_the_batch_only(place):
    operations, device = place
    state = Rows(device)
    rows = torch.tensor([4, 5, 1, 5], device=device)
    operations.advance_rows(rows, torch.tensor([7, 70, 8, 71], device=device), *state.tensors()[:2])
    assert state.last_token_ids[:5].tolist() == [11, 8, 13, 14, 7]
    assert state.num_computed.tolist() == [0, 4, 4, 7, 21, 5]


def test_changes_reach_their_entries_and_nothing_else(place):
    operations, device = place
    state = Rows(device)
    expected = state.block_tables.clone()
    expected[2, 3], expected[0, 6] = 500, 501

    def table(rows: list[list[int]], columns: int) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, columns)

    blocks, lengths = table([[2, 3, 500], [0, 6, 501]], 3), table([[1, 40]], 2)
    operations.change_rows(blocks, lengths, table([], 2), *state.tensors())
    operations.change_rows(table([], 3), table([], 2), table([[4, 3], [0, 2], [3, 1]], 2),
                           *state.tensors())  # fmt: skip
    operations.change_rows(table([], 3), table([], 2), table([], 2), *state.tensors())
    assert torch.equal(state.block_tables, expected)
    assert state.num_computed.tolist() == [0, 40, 4, 7, 20, 5]
    assert state.last_token_ids.tolist() == [2, 12, 13, 1, 3, 99]


def test_an_empty_batch_is_fine(place):
    operations, device = place
    state = Rows(device)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    assert state.read(operations, [], 4)["slots"].shape == (0,)
    operations.advance_rows(nothing, nothing, *state.tensors()[:2])
    assert state.num_computed.tolist() == [0, 3, 4, 7, 20, 5]


def test_buffers_of_another_batch_are_refused():
    state = Rows("cpu")
    rows, four = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit 3 rows and tables of 7 columns"):
        step_state.read_rows(rows, *state.tensors(), block_size=4, token_ids=four, positions=four,
                             slots=four, seq_lens=four, batch_tables=four)  # fmt: skip
    with pytest.raises(ValueError, match="do not belong together"):
        step_state.advance_rows(rows, four, four, four)
    with pytest.raises(ValueError, match="3, 2 and 2 numbers"):
        step_state.change_rows(rows[:, None], rows[:, None], rows[:, None], *state.tensors())


@pytest.mark.gpu
def test_a_captured_step_reads_and_advances_whatever_the_rows_hold():
    skip_unless_kernels_run("cuda")
    state, plain = Rows("cuda"), Rows("cpu")
    rows = torch.tensor([4, 0, 5], device="cuda")
    chosen = torch.zeros(3, dtype=torch.int64, device="cuda")
    out = {name: torch.zeros(3, dtype=torch.int64, device="cuda")
           for name in ("token_ids", "positions", "slots")}  # fmt: skip
    out["seq_lens"] = torch.zeros(3, dtype=torch.int32, device="cuda")
    out["batch_tables"] = torch.zeros(3, 7, dtype=torch.int32, device="cuda")

    def step() -> None:
        step_state.read_rows(rows, *state.tensors(), block_size=4, **out)
        step_state.advance_rows(rows, chosen, *state.tensors()[:2])

    saved = [tensor.clone() for tensor in state.tensors()]
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, before in zip(state.tensors(), saved, strict=True):
        tensor.copy_(before)
    for tokens in ([5, 6, 7], [8, 9, 10]):
        chosen.copy_(torch.tensor(tokens))
        expected = plain.read(reference, [4, 0, 5], 4)
        graph.replay()
        assert {name: out[name].tolist() for name in ("token_ids", "positions", "slots")} == {
            name: expected[name].tolist() for name in ("token_ids", "positions", "slots")
        } | {"token_ids": [*expected["token_ids"].tolist()[:2], 99]}
        reference.advance_rows(rows.cpu(), torch.tensor([*tokens[:2], 99]), *plain.tensors()[:2])
        assert state.num_computed.tolist() == plain.num_computed.tolist()
