"""The Triton kernels that copy blocks: interpreted on the CPU, compiled on a GPU."""

import itertools
import random

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import block_copy, reference
from pagetier.offload.host_memory import allocate_cpu_tier
from pagetier.offload.tiers import KVLayout, LayerKV


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=39)


def make_pages(num_blocks: int, block_bytes: int, device: str, *, gap: int = 0, offset: int = 0):
    """Random bytes; rows lie ``gap`` bytes apart, the first ``offset`` into its memory."""
    memory = torch.randint(
        0, 256, (offset + num_blocks * (block_bytes + gap),), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(num_blocks + block_bytes),
    ).to(device)  # fmt: skip
    return memory[offset:].as_strided((num_blocks, block_bytes), (block_bytes + gap, 1))


# Odd, of whole vectors, longer than a piece, and of no bytes in a last piece's second half.
SIZES = [1, 6, 100, 4096, 8192, 20_016]
# As (gap between rows, offset of the first): words of 16, 4, 2 and 1 bytes.
PLACES = [(0, 0), (4, 0), (0, 2), (3, 5)]


@pytest.mark.parametrize("block_bytes", SIZES)
@pytest.mark.parametrize(("gap", "offset"), PLACES)
def test_gather_scatter_and_transfer_equal_indexing(block_bytes, gap, offset, device):
    pages = make_pages(9, block_bytes, device, gap=gap, offset=offset)
    other = make_pages(7, block_bytes, device)
    block_ids = torch.tensor([8, 0, 3, 5], dtype=torch.int32, device=device)
    expected = other.clone()
    expected[:4] = pages[[8, 0, 3, 5]]
    filled = block_copy.gather_blocks(pages, block_ids, other)
    assert torch.equal(other, expected)
    assert (filled.data_ptr(), filled.shape[0]) == (other.data_ptr(), 4)

    expected = pages.clone()
    expected[[2, 7, 1]] = other[:3]
    block_copy.scatter_blocks(other, pages, [2, 7, 1])
    assert torch.equal(pages, expected)

    expected[[4, 6]] = other[[6, 2]]
    block_copy.transfer_blocks(other, pages, [(6, 4), (2, 6)])
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("block_bytes", SIZES)
def test_copies_touch_no_byte_between_and_around_rows(block_bytes, device):
    pages = make_pages(6, block_bytes, device, gap=32, offset=16)
    memory = pages.as_strided((16 + 6 * (block_bytes + 32),), (1,), 0)
    before = memory.clone()
    block_copy.copy_blocks(pages, [(0, 3), (5, 1)])
    changed = torch.zeros_like(before, dtype=torch.bool)
    for block in (1, 3):
        start = 16 + block * (block_bytes + 32)
        changed[start : start + block_bytes] = True
    assert torch.equal(memory[~changed], before[~changed])
    rows = before.as_strided(pages.shape, pages.stride(), 16)
    assert torch.equal(pages[[3, 1]], rows[[0, 5]])


@pytest.mark.parametrize("num_pairs", [1, 16, 17, 128, 129])
def test_copy_reads_all_sources_before_it_writes(num_pairs, device):
    # One long chain, in a random order: each destination is the next pair's source.
    pages = make_pages(num_pairs + 1, 64, device)
    pairs = list(itertools.pairwise(range(num_pairs + 1)))
    random.Random(0).shuffle(pairs)
    expected = pages.clone()
    expected[1:] = pages[:-1]
    block_copy.copy_blocks(pages, torch.tensor(pairs, device=device))
    assert torch.equal(pages, expected)


def test_more_pairs_than_a_program_holds_are_copied_all_the_same(device, monkeypatch):
    monkeypatch.setattr(block_copy, "_NUM_PAIRS", (2, 4))
    pages = make_pages(6, 64, device)
    expected = pages.clone()
    expected[1:] = pages[:-1]
    block_copy.copy_blocks(pages, list(itertools.pairwise(range(6))))
    assert torch.equal(pages, expected)


def test_few_programs_take_several_pieces_each(device, monkeypatch):
    monkeypatch.setattr(block_copy, "_MAX_PROGRAMS", 3)
    pages, staging = make_pages(5, 20_016, device), make_pages(5, 20_016, device)
    block_copy.gather_blocks(pages, [4, 1, 0, 2], staging)
    assert torch.equal(staging[:4], pages[[4, 1, 0, 2]])


def test_nothing_to_copy_is_fine(device):
    pages = make_pages(3, 64, device)
    before = pages.clone()
    block_copy.copy_blocks(pages, [])
    block_copy.scatter_blocks(pages.clone(), pages, [])
    block_copy.transfer_blocks(pages.clone(), pages, torch.zeros(0, 2, dtype=torch.int64))
    assert block_copy.gather_blocks(pages.clone(), [], pages).shape == (0, 64)
    assert torch.equal(pages, before)


def test_what_does_not_fit_is_refused(device):
    pages = make_pages(3, 64, device)
    with pytest.raises(ValueError, match="3 blocks do not fit into a staging buffer of 2"):
        block_copy.gather_blocks(pages, [0, 1, 2], make_pages(2, 64, device))
    with pytest.raises(ValueError, match=r"\(3, 64\) .* and \(3, 65\) .* not equally many"):
        block_copy.transfer_blocks(pages, make_pages(3, 65, device), [(0, 1)])
    with pytest.raises(ValueError, match="dense"):
        block_copy.copy_blocks(pages.t(), [(0, 1)])


def test_offsets_beyond_32_bits_reach_their_blocks(device):
    if device == "cpu":
        pytest.skip("takes 6 GiB")
    pages = torch.zeros(3, 2 << 30, dtype=torch.uint8, device=device)
    pages[2, -64:] = 7
    block_copy.copy_blocks(pages, [(2, 1)])
    assert (pages[1, -64:] == 7).all()
    assert not pages[0].any()


@pytest.mark.gpu
def test_pinned_host_pages_are_read_and_written_directly():
    skip_unless_kernels_run("cuda")
    layout = KVLayout((LayerKV(2, 64, 64),) * 3, 16, torch.float16)
    on_device = layout.allocate(20, "cuda").random_(0, 256)
    host = allocate_cpu_tier(layout, 30, pin=True)
    assert host.rung == "pinned"
    pinned = torch.empty(4, layout.block_bytes, dtype=torch.uint8, pin_memory=True)
    try:
        pairs = [(0, 29), (7, 3), (19, 12)]
        expected = host.pages.clone()
        reference.transfer_blocks(on_device, expected, pairs)
        block_copy.transfer_blocks(on_device, host.pages, pairs)
        torch.cuda.synchronize()
        assert torch.equal(host.pages, expected)

        on_device.zero_()
        block_copy.transfer_blocks(host.pages, on_device, [pair[::-1] for pair in pairs])
        assert torch.equal(on_device[[0, 7, 19]].cpu(), expected[[29, 3, 12]])

        block_copy.gather_blocks(on_device, [19, 7], pinned)
        torch.cuda.synchronize()
        assert torch.equal(pinned[:2], expected[[12, 3]])
        block_copy.scatter_blocks(pinned, on_device, [4, 5])
        assert torch.equal(on_device[4:6].cpu(), pinned[:2])
    finally:
        torch.cuda.synchronize()
        host.close()


@pytest.mark.gpu
def test_copies_run_in_a_captured_graph():
    skip_unless_kernels_run("cuda")
    pages = make_pages(8, 4096, "cuda")
    staging = torch.zeros_like(pages)
    pairs = torch.tensor([[0, 1], [2, 3]], device="cuda")
    block_ids = torch.tensor([1, 3], device="cuda")

    def run() -> None:
        block_copy.copy_blocks(pages, pairs)
        block_copy.gather_blocks(pages, block_ids, staging)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    pairs.copy_(torch.tensor([[4, 5], [6, 7]]))
    block_ids.copy_(torch.tensor([7, 5]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(staging[:2], pages[[6, 4]])


def test_reference_of_transfer_goes_from_one_tier_to_the_other():
    pages, other = make_pages(6, 20, "cpu"), torch.zeros(4, 20, dtype=torch.uint8)
    reference.transfer_blocks(pages, other, [(5, 0), (1, 3)])
    assert torch.equal(other[[0, 3]], pages[[5, 1]])
    assert not other[1:3].any()
