"""How much host memory is taken, and how."""

import logging
from types import SimpleNamespace

import pytest
import torch

from pagetier.offload import host_memory
from pagetier.offload.tiers import KVLayout, LayerKV

LAYOUT = KVLayout((LayerKV(1, 8, 8),), 16, torch.float32)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 1000 bytes available, and a control group that a test may write."""
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(
        host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    monkeypatch.setattr(host_memory, "_CGROUP_FILES", ((str(limit), str(usage)),))
    return limit, usage


def test_available_is_the_machines_without_a_control_group(machine):
    assert host_memory.available_bytes() == 1000
    assert host_memory.budget_bytes() == 800


@pytest.mark.parametrize(
    ("limit", "usage", "expected"),
    [("max", "300", 1000), ("900", "300", 600), ("5000", "300", 1000), ("900", "1200", 0)],
)
def test_available_is_the_least_of_machine_and_group(machine, limit, usage, expected):
    machine[0].write_text(limit + "\n")
    machine[1].write_text(usage + "\n")
    assert host_memory.available_bytes() == expected


def test_tier_shrinks_to_the_budget_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(host_memory, "budget_bytes", lambda: 3 * LAYOUT.block_bytes + 1)
    with caplog.at_level(logging.WARNING):
        host = host_memory.allocate_cpu_tier(LAYOUT, 10, pin=False)
    assert host.pages.shape == (3, LAYOUT.block_bytes)
    assert host.rung == "pageable"
    assert "instead of" in caplog.text


def test_no_blocks_is_no_tier():
    assert host_memory.allocate_cpu_tier(LAYOUT, 0, pin=False).rung == "none"


def test_refused_pinning_falls_back_to_pageable_memory(monkeypatch):
    calls = []

    class Refusing:
        def cudaHostRegister(self, pointer, size, flags):
            calls.append(("register", pointer))
            return 0 if len(calls) == 1 else 2

        def cudaHostUnregister(self, pointer):
            calls.append(("unregister", pointer))

    monkeypatch.setattr(host_memory.torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(host_memory, "_clear_cuda_error", lambda: calls.append(("clear", 0)))
    monkeypatch.setattr(host_memory, "_REGISTERED_PIECE_BYTES", LAYOUT.block_bytes)
    host = host_memory.allocate_cpu_tier(LAYOUT, 2, pin=True)
    assert host.rung == "pageable"
    start = host.pages.data_ptr()
    # The piece that was pinned before the refusal is let go.
    assert calls == [
        ("register", start),
        ("register", start + LAYOUT.block_bytes),
        ("unregister", start),
        ("clear", 0),
    ]
    host.close()
    assert len(calls) == 4, "nothing is left to unpin"
