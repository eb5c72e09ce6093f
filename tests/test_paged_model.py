"""The place where a forward pass finds its keys and values."""

import threading

import pytest
import torch

from pagetier.handler import paged_model
from pagetier.handler.paged_model import ForwardContext, forward_context


def test_the_forward_context_belongs_to_a_thread_and_nests() -> None:
    outer, inner = (ForwardContext([], torch.empty(0), None) for _ in range(2))
    seen: list[ForwardContext | None] = []
    with forward_context(outer):
        with forward_context(inner):
            assert paged_model._current.context is inner
        assert paged_model._current.context is outer
        thread = threading.Thread(target=lambda: seen.append(paged_model._current.context))
        thread.start()
        thread.join()
    assert seen == [None]
    assert paged_model._current.context is None


def test_the_forward_context_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError), forward_context(ForwardContext([], torch.empty(0), None)):
        raise RuntimeError
    assert paged_model._current.context is None
