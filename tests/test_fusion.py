"""Fused projections against the layers they replace, on every architecture that is served."""

import pathlib

import pytest
import torch
from support import tiny_models
from torch import nn

from pagetier.handler import fusion
from pagetier.handler.config import EngineConfig
from pagetier.handler.model_loader import LoadedModel, load_model

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")
LATENT = ("q_a_proj", "kv_a_proj_with_mqa")
# What each architecture has to fuse; those that come fused already, and GPT-2's, have nothing.
# Experts are one tensor each and no linear layers.
FUSIBLE: dict[str, set[tuple[str, ...]]] = {
    **{name: {QKV, GATED} for name in tiny_models.EXACT},
    **{
        name: {QKV}
        for name in (
            "biogpt", "glm4", "gpt_oss", "mixtral", "nemotron", "opt", "opt_350m", "phi",
            "qwen3_moe", "starcoder2",
        )
    },
    **{name: set() for name in ("gpt2", "gpt_bigcode", "gpt_neox", "persimmon", "phi3")},
    "deepseek_v3": {LATENT, GATED},
}  # fmt: skip


def load(folder: pathlib.Path, *, fuse: bool, **settings: object) -> LoadedModel:
    config = EngineConfig.create({"model": str(folder), "device": "cpu", **settings})
    return load_model(config, fuse=fuse)


def fused_modules(model: nn.Module) -> dict[str, fusion.FusedPart]:
    return {n: m for n, m in model.named_modules() if isinstance(m, fusion.FusedPart)}


def logits(model: nn.Module) -> torch.Tensor:
    """Of nine tokens, with transformers' own attention."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny_models.VOCABULARY, (1, 9), generator=generator)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_every_architecture_computes_the_same_when_fused(name: str, tmp_path: pathlib.Path) -> None:
    tiny_models.save(name, tmp_path)
    plain, fused = load(tmp_path, fuse=False), load(tmp_path, fuse=True)
    found: dict[str, set[str]] = {}
    for path in fused_modules(fused.model):
        parent, _, child = path.rpartition(".")
        found.setdefault(parent, set()).add(child)
    assert {frozenset(names) for names in found.values()} == set(map(frozenset, FUSIBLE[name]))
    assert not fused_modules(plain.model)
    # As many weights as before, none of them twice.
    totals = [sum(p.numel() for p in m.model.parameters()) for m in (plain, fused)]
    assert totals[0] == totals[1]
    assert plain.num_parameters == fused.num_parameters
    torch.testing.assert_close(logits(fused.model), logits(plain.model), atol=1e-4, rtol=1e-4)


class Projections(nn.Module):
    """Three projections whose inputs the test chooses."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6, **settings)
        self.b = nn.Linear(8, 4, **settings)
        self.c = nn.Linear(8, 5, **settings)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> list[torch.Tensor]:
        return [self.a(x), self.b(y), self.c(z)]


def groups_of(model: nn.Module, *inputs: torch.Tensor) -> list[fusion.Group]:
    with torch.no_grad(), fusion.watch(model) as groups:
        model(*inputs)
    return groups


def test_layers_that_read_different_tensors_stay_apart() -> None:
    x, y = torch.randn(2, 3, 8)
    assert groups_of(Projections(), x, y, x) == [("", ("a", "c"))]
    assert groups_of(Projections(), x, y, x.clone()) == []
    twice = Projections()
    with torch.no_grad(), fusion.watch(twice) as groups:
        twice(x, x, x)
        twice(x, x, x)
    assert groups == []


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_parts_called_otherwise_than_in_the_trial_run_are_still_right(bias: bool) -> None:
    model, reference = Projections(bias=bias), Projections(bias=bias)
    reference.load_state_dict(model.state_dict())
    x, y, z = torch.randn(3, 2, 8)
    assert fusion.fuse(model, groups_of(model, x, x, x)) == 1
    for inputs in ((x, x, x), (x, y, z), (x, y, y), (y, x, y)):
        for found, expected in zip(model(*inputs), reference(*inputs), strict=True):
            torch.testing.assert_close(found, expected)
    for part, layer in ((model.c, reference.c), (model.a, reference.a), (model.b, reference.b)):
        torch.testing.assert_close(part(z), layer(z))


@torch.no_grad()
def test_nothing_is_kept_between_passes_and_no_weight_twice() -> None:
    model = Projections()
    x = torch.randn(2, 8)
    fusion.fuse(model, groups_of(model, x, x, x))
    model(x, x, x)
    shared = model.a._shared
    assert shared.source is None
    assert shared.results == []
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "a.bias"]


@torch.no_grad()
def test_layers_that_do_not_match_stay_as_they_are() -> None:
    class Other(nn.Linear):
        pass

    x = torch.randn(2, 8)
    for change in (
        lambda m: setattr(m, "b", Other(8, 4)),
        lambda m: setattr(m, "b", nn.Linear(8, 4, bias=False)),
        lambda m: m.b.to(torch.float64),
        lambda m: setattr(m, "b", nn.Linear(7, 4)),
    ):
        model = Projections()
        change(model)
        assert fusion.fuse(model, [("", ("a", "b"))]) == 0
        assert type(model.a) is nn.Linear
    with_subclass = Projections()
    with_subclass.b = Other(8, 4)
    assert groups_of(with_subclass, x, x, x) == [("", ("a", "c"))]


@torch.no_grad()
def test_group_whose_product_differs_is_refused_and_left_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Projections()
    x = torch.randn(2, 8)
    expected = model(x, x, x)
    forward = fusion.FusedPart.forward
    monkeypatch.setattr(fusion.FusedPart, "forward", lambda part, x: forward(part, x) + 1e-3)
    assert fusion.fuse(model, [("", ("a", "b"))]) == 0
    assert "a, b of ''" in caplog.text
    assert torch.equal(model(x, x, x)[0], expected[0])
