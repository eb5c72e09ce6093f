"""Which implementation serves an operation."""

import logging

import pytest
import torch

from pagetier import kernels
from pagetier.kernels import kv_write, reference


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETED", False)


@pytest.fixture
def arguments():
    """Two tokens, and the cache that they go to."""
    cache = torch.zeros(3, 1, 4, 8)
    new = torch.ones(2, 1, 8)
    return [new, new, cache, cache.clone(), torch.tensor([5, 2])]


def test_plain_torch_serves_the_cpu_and_says_so_once(arguments, caplog, no_interpreter):
    operation = kernels._operation(reference.write_kv)
    with caplog.at_level(logging.INFO, "pagetier.kernels"):
        operation(*arguments)
        operation(*arguments)
    assert caplog.messages == ["write_kv on the CPU is served by plain torch."]
    assert arguments[2].count_nonzero() == 16


def test_kernel_serves_a_gpu_and_the_interpreter(arguments, caplog, monkeypatch, no_interpreter):
    monkeypatch.setattr(kv_write, "write_kv", lambda *args: args)
    for attribute, value in (("_on_gpu", lambda _: True), ("_INTERPRETED", True)):
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "pagetier.kernels"):
            patch.setattr(kernels, attribute, value)
            assert kernels._operation(reference.write_kv)(*arguments) == tuple(arguments)
    assert caplog.messages == [
        "write_kv on a GPU is served by its Triton kernel.",
        "write_kv on the CPU is served by its Triton kernel.",
    ]


def test_any_tensor_on_a_gpu_asks_for_the_kernel():
    assert not kernels._on_gpu([torch.zeros(1), 3, None])
    if torch.cuda.is_available():
        assert kernels._on_gpu([torch.zeros(1), torch.zeros(1, device="cuda")])
