"""Copies between the tiers, on the worker thread that plays the link and on a GPU's streams."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from pagetier.offload.calibrate import measure_beside_copies, measure_link, measure_prefill
from pagetier.offload.host_memory import allocate_cpu_tier
from pagetier.offload.tiers import KVLayout, LayerKV
from pagetier.offload.transfer import Completion, CudaLink, Link, ThreadLink, merge_runs


def collect(link: Link, count: int) -> list[Completion]:
    done: list[Completion] = []
    deadline = time.monotonic() + 10
    while len(done) < count:
        assert time.monotonic() < deadline, done
        done += link.poll()
        link.wait(0.01)
    return done


def pages_of(num_blocks: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_blocks)
    pages = torch.randint(0, 256, (num_blocks, 64), dtype=torch.uint8, generator=generator)
    return pages.to(device)


def test_neighbouring_blocks_are_merged_into_runs():
    pairs = [(5, 1), (3, 9), (4, 0), (6, 2), (8, 3)]
    assert merge_runs(pairs) == [(3, 9, 1), (4, 0, 3), (8, 3, 1)]
    assert merge_runs([]) == []


def test_blocks_go_out_and_come_back_and_neighbours_stay():
    gpu, cpu = pages_of(8), pages_of(9)
    before, neighbours = gpu.clone(), cpu.clone()
    link = ThreadLink(gpu, cpu)
    link.submit(7, [(0, 4), (1, 5), (6, 2)], to_cpu=True, after=None)
    assert collect(link, 1)[0].transfer_id == 7
    gpu[[0, 1, 6]] = 0  # poison: what comes back must come from the other tier
    link.submit(8, [(4, 0), (5, 1), (2, 6)], to_cpu=False, after=None)
    collect(link, 1)
    link.close()
    assert torch.equal(gpu, before)
    untouched = [0, 1, 3, 6, 7, 8]
    assert torch.equal(cpu[untouched], neighbours[untouched])


def test_copy_waits_for_the_step_it_follows():
    gpu, cpu = pages_of(2), pages_of(3)
    link = ThreadLink(gpu, cpu)
    step: Future[None] = Future()
    link.submit(0, [(0, 0)], to_cpu=True, after=step)
    assert link.poll() == []
    gpu[0] = 42  # the step's own last write
    step.set_result(None)
    collect(link, 1)
    link.close()
    assert (cpu[0] == 42).all()


def test_failed_copy_is_reported_and_the_link_goes_on():
    def copy(source, destination, block_ids):
        if block_ids == [(0, 0)]:
            raise RuntimeError("no such luck")
        destination[1] = source[1]

    gpu, cpu = pages_of(2), pages_of(3)
    link = ThreadLink(gpu, cpu, copy)
    link.submit(0, [(0, 0)], to_cpu=True, after=None)
    link.submit(1, [(1, 1)], to_cpu=True, after=None)
    first, second = collect(link, 2)
    link.close()
    assert (first.transfer_id, first.error) == (0, "no such luck")
    assert (second.transfer_id, second.error) == (1, None)
    assert torch.equal(cpu[1], gpu[1])


def test_submit_returns_before_the_copy_is_made():
    release = threading.Event()

    def copy(source, destination, block_ids):
        assert release.wait(10)

    link = ThreadLink(pages_of(1), pages_of(1), copy)
    link.submit(0, [(0, 0)], to_cpu=True, after=None)
    assert link.poll() == []
    release.set()
    collect(link, 1)
    link.close()


@pytest.mark.gpu
def test_cuda_streams_carry_blocks_both_ways():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    layout = KVLayout((LayerKV(1, 8, 8),), 16, torch.float32)
    gpu = layout.allocate(8, "cuda")
    gpu.random_(0, 256)
    host = allocate_cpu_tier(layout, 9, pin=True)
    assert host.rung == "pinned"
    before = gpu.clone()
    link = CudaLink(gpu, host)
    event = torch.cuda.Event()
    gpu[2] += 1
    before[2] += 1
    event.record()
    link.submit(0, [(0, 4), (1, 5), (2, 6)], to_cpu=True, after=event)
    assert collect(link, 1)[0].error is None
    gpu[:3] = 0
    event.record()
    link.submit(1, [(4, 0), (5, 1), (6, 2)], to_cpu=False, after=event)
    assert collect(link, 1)[0].error is None
    link.close()
    assert torch.equal(gpu, before)
    # The pages were unpinned: the same memory can be pinned again.
    pinned = torch.cuda.cudart().cudaHostRegister(host.pages.data_ptr(), host.pages.numel(), 0)
    assert int(pinned) == 0
    host.close()


def test_link_rate_is_bytes_over_the_slower_direction():
    class Scripted:
        def __init__(self) -> None:
            self.seconds = iter([9.0, 0.5, 9.0, 2.0])  # each direction's first time is not counted
            self.moved: list[int] = []

        def submit(self, transfer_id, block_ids, *, to_cpu, after) -> None:
            self.moved.append(len(block_ids))

        def poll(self):
            return [Completion(-1, None, next(self.seconds))]

    link = Scripted()
    rate = measure_link(link, block_bytes=1 << 20, num_gpu_blocks=100, num_cpu_blocks=10)
    assert link.moved == [10] * 4
    assert rate == 10 * 2**20 / 2.0


def test_prefill_is_measured_on_enough_tokens():
    calls = []

    def run(num_tokens: int) -> None:
        calls.append(num_tokens)

    num_tokens, seconds = measure_prefill(run, max_tokens=300)
    assert num_tokens == 300
    assert seconds >= 0
    assert calls == [16, 16, 64, 256, 300]


def test_a_prompt_counts_as_what_it_adds_to_the_copies_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(num_tokens: int) -> None:
        clock[0] += max(0.2, num_tokens * 1e-3)

    assert measure_beside_copies(run, 10) == pytest.approx(0.05 * 0.2)
    assert measure_beside_copies(run, 800) == pytest.approx(0.6)
