"""Packed linear layers: which layers of a model are packed, and that it computes the same."""

import logging
import pathlib

import pytest
import torch
from support import tiny_models
from support.driver import NEW_TOKENS, Driver, generate, load, prompts
from torch import nn

from pagetier.handler import packed_linear
from pagetier.handler.fusion import FusedPart
from pagetier.handler.packed_linear import PackedLinear, pack


@pytest.mark.parametrize("name", ["llama_tied", "opt", "gpt_neox", "qwen2", "mixtral"])
def test_packed_models_generate_the_same(name: str, tmp_path: pathlib.Path) -> None:
    reference = tiny_models.build(name)
    model = load(tmp_path, name)
    assert pack(model.model) > 0
    assert not any(type(m) is nn.Linear for m in model.model.modules())
    driver = Driver(model)
    sequences = [driver.add(prompt) for prompt in prompts()]
    driver.finish(sequences)
    for sequence, prompt in zip(sequences, prompts(), strict=True):
        assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]


def test_unpacked_weights_are_given_up_and_tied_ones_stay(tmp_path: pathlib.Path) -> None:
    model = load(tmp_path, "llama_tied").model
    embedding = model.get_input_embeddings().weight.clone()
    pack(model)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    parts = [module for module in model.modules() if isinstance(module, FusedPart)]
    owners = [part for part in parts if part._shared.owner[0] is part]
    assert owners
    assert all(owner.weight is None for owner in owners)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "proj" in name]


def test_a_result_does_not_depend_on_the_number_of_dimensions() -> None:
    layer = nn.Linear(24, 40)
    packed = PackedLinear(layer)
    x = torch.randn(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x))
        torch.testing.assert_close(packed(x[0]), layer(x[0]))
        torch.testing.assert_close(packed(x[:0]), layer(x[:0]))


def test_any_number_of_tokens_is_multiplied_in_a_few_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For each number oneDNN keeps memory as large as the result."""
    layer = nn.Linear(24, 40)
    packed = PackedLinear(layer)
    numbers = set()
    multiply = packed_linear._multiply

    def counted(rows: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        numbers.add(len(rows))
        return multiply(rows, *arguments)

    monkeypatch.setattr(packed_linear, "_multiply", counted)
    with torch.no_grad():
        for num_tokens in (*range(300), 511, 512, 513, 1024, 1500):
            x = torch.randn(num_tokens, 24)
            torch.testing.assert_close(packed(x), layer(x))
    assert numbers == set(packed_linear._SIZES)


def test_other_types_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_a_layer_that_differs_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    multiply = packed_linear._multiply
    monkeypatch.setattr(packed_linear, "_multiply", lambda x, w, b: multiply(x, w, b) * 1.001)
    model = nn.Sequential(nn.Linear(8, 4))
    with caplog.at_level(logging.WARNING):
        assert pack(model) == 0
    assert type(model[0]) is nn.Linear
    assert "'0' stays as it is" in caplog.text
