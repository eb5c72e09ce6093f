"""Layers swapped for our kernels: which, that they compute the same, and inside a traced graph."""

import contextlib
import logging
import pathlib

import pytest
import torch
from support import tiny_models
from support.driver import NEW_TOKENS, Driver, generate, load, prompts
from torch import nn

from pagetier.handler import compilation, projections
from pagetier.handler.compilation import compile_forward
from pagetier.handler.fusion import FusedPart
from pagetier.handler.projections import TunedLinear
from pagetier.kernels import tuning
from pagetier.kernels.tuning import Entry


def entry(out_size: int, in_size: int) -> Entry:
    """For a few tokens that no check uses: there is no GPU here to run a kernel on."""
    when = {"itemsize": 4, "out_size": out_size, "in_size": in_size, "num_tokens": [8, 16]}
    return Entry(when, {"kernel": "matrix"})


def test_only_shapes_that_a_table_names_are_swapped(tmp_path: pathlib.Path) -> None:
    plain = load(tmp_path, "llama").model
    assert projections.swap(plain) == 0
    # Of a hidden size of 32: q, k and v are 64 outputs together, the head has 120.
    with tuning.using({"linear": [entry(64, 32), entry(120, 32)]}):
        assert projections.swap(plain) == 3 + 1
    assert type(plain.lm_head) is TunedLinear
    assert type(plain.model.layers[0].self_attn.o_proj) is nn.Linear
    products = {
        name: m._shared.product for name, m in plain.named_modules() if isinstance(m, FusedPart)
    }
    for name, product in products.items():
        assert (product is projections.multiply) == ("self_attn" in name)


@pytest.mark.parametrize("name", ["llama_tied", "opt", "gpt_neox", "qwen2"])
def test_swapped_models_generate_the_same(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "wins", lambda weight: True)
    reference = tiny_models.build(name)
    model = load(tmp_path, name, projection_kernels="triton")
    assert any(isinstance(m, TunedLinear) for m in model.model.modules())
    assert not any(type(m) is nn.Linear for m in model.model.modules())
    names = [n for n, _ in model.model.named_parameters()]
    assert len(names) == len(set(names))
    for by_kernels in (False, True):
        with projections.by_kernels() if by_kernels else contextlib.nullcontext():
            graph, _ = compilation._trace(model.model, *compilation._weights(model.model))
        assert ("pagetier.linear" in graph.code) == by_kernels
    forward = compile_forward(model.model, "graph")
    decode_forward = compile_forward(model.model, "graph", by_kernels=True)
    driver = Driver(model, forward=forward, decode_forward=decode_forward, graph_sizes=(1, 4))
    sequences = [driver.add(prompt) for prompt in prompts()]
    driver.finish(sequences)
    for sequence, prompt in zip(sequences, prompts(), strict=True):
        assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]


def test_a_layer_whose_product_differs_stays_torchs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projections, "wins", lambda weight: True)
    monkeypatch.setattr(
        projections, "multiply", lambda x, w, b: nn.functional.linear(x, w, b) * 1.001
    )
    model = nn.Sequential(nn.Linear(8, 4))
    with caplog.at_level(logging.WARNING):
        assert projections.swap(model) == 0
    assert type(model[0]) is nn.Linear
    assert "'0' stays torch's" in caplog.text


def test_the_operator_is_registered_with_the_module() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with projections.by_kernels():
        torch.testing.assert_close(projections.multiply(x, weight, None), x @ weight.T)
