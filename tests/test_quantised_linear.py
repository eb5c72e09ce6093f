"""Quantised layers: the layout, how far rounding goes, and the product beside float64."""

import sys

import pytest
import torch
from torch import nn

from pagetier import kernels
from pagetier.handler import fusion, quantised_linear
from pagetier.handler.quantised_linear import QuantisedLinear
from pagetier.kernels import packing, reference

KINDS = [(8, 0, True), (8, 64, False), (4, 32, False), (4, 128, False), (4, 0, True)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_size", [1, 32, 100, 256, 300])
def test_packed_numbers_come_back_and_lie_where_the_layout_says(in_size: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(in_size)
    numbers = torch.randint(0, 2**bits, (5, in_size), generator=generator)
    packed = packing.pack(numbers, bits)
    columns = 32 * (32 // bits)
    assert packed.shape == (5, -(-in_size // columns) * 32)
    assert torch.equal(packing.unpack(packed, bits, in_size).long(), numbers)
    for column in range(in_size):
        line, within = divmod(column, columns)
        field, word = divmod(within, 32)
        found = (packed[:, line * 32 + word].long() >> (field * bits)) & (2**bits - 1)
        assert torch.equal(found, numbers[:, column])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_no_weight_is_off_by_more_than_half_its_scale(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = (randn(6, 200) * 0.02).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].abs()  # no weight below zero, and one far out
    weight[1, 3] = 5
    weight[2, :32] = -1e-6  # smaller than what float16 keeps all digits of
    layer = QuantisedLinear.rounded(weight, bits, group_size, symmetric=symmetric)
    assert layer.scales.dtype == dtype
    assert (layer.zeros is None) == symmetric
    size = group_size or 200
    half = layer.scales.t().float()[:, torch.arange(200) // size] / 2
    error = (layer.dequantised() - weight.float()).abs()
    assert (error <= half * (1 + 1e-5)).all()
    # Nor is a scale larger than the numbers need: by the last digit of its dtype at most.
    span = 200 if group_size == 0 else size
    groups = nn.functional.pad(weight.float(), (0, -200 % span)).view(6, -1, span)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    needed = (
        torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        if symmetric
        else ((high - low) / (2**bits - 1))
    )
    needed = torch.where(needed == 0, 1.0, needed)
    slack = needed * torch.finfo(dtype).eps + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert (layer.scales.t().float() <= needed + slack).all()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), KINDS)
def test_results_stay_within_what_the_rounding_allows(
    bits: int, group_size: int, symmetric: bool
) -> None:
    """An output is off by at most the sum over inputs of |x| times half a scale."""
    weight, x, bias = randn(24, 160), randn(2, 3, 160, seed=1), nn.Parameter(randn(24))
    layer = QuantisedLinear.rounded(weight, bits, group_size, symmetric=symmetric, bias=bias)
    exact = x.double() @ weight.double().t() + bias.double()
    half = layer.scales.t().double()[:, torch.arange(160) // (group_size or 160)] / 2
    bound = x.double().abs() @ half.t()
    with torch.no_grad():
        found = layer(x)
    assert found.dtype == torch.float32
    error = (found.double() - exact).abs()
    assert (error <= bound + 1e-4).all()
    assert error.max() > bound.max() / 100  # a bound that nothing comes near shows nothing
    # And but for the rounding of sums, it is the product by the dequantised weight.
    expected = x.double() @ layer.dequantised().double().t() + bias.double()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_large_layers_are_rounded_and_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, bias = randn(37, 96), randn(5, 96, seed=1), nn.Parameter(randn(37))

    def made() -> tuple[QuantisedLinear, torch.Tensor]:
        layer = QuantisedLinear.rounded(weight, 4, 32, symmetric=False, bias=bias)
        with torch.no_grad():
            return layer, layer(x)

    whole, product = made()
    monkeypatch.setattr(quantised_linear, "_MAX_ELEMENTS", 96 * 10)
    of_reference = sys.modules[reference.quantised_linear.__module__]
    monkeypatch.setattr(of_reference, "_MAX_ELEMENTS", 96 * 7)
    parted, same = made()
    for name, buffer in whole.named_buffers():
        assert torch.equal(parted.get_buffer(name), buffer), name
    torch.testing.assert_close(same, product)


def test_columns_may_be_stored_in_another_order() -> None:
    weight, x = randn(8, 64), randn(3, 64, seed=1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    plain = QuantisedLinear.rounded(weight[:, order], 8, 32, symmetric=True)
    layer = QuantisedLinear(64, 8, 32, plain.packed, plain.scales, None, order)
    torch.testing.assert_close(layer.dequantised(), plain.dequantised()[:, order.argsort()])
    torch.testing.assert_close(layer(x), x @ layer.dequantised().t())
    assert (layer.dequantised() - weight).abs().max() < 0.05


class Projections(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = layers

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.a(x), self.b(x)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@torch.no_grad()
def test_layers_that_read_the_same_are_one_with_the_same_numbers(
    permuted: bool, with_bias: bool
) -> None:
    x = randn(2, 96, seed=3)
    layers = []
    for out_size in (6, 5):
        bias = nn.Parameter(randn(out_size)) if with_bias else None
        layer = QuantisedLinear.rounded(randn(out_size, 96), 4, 32, symmetric=False, bias=bias)
        if permuted:
            layer.permutation = torch.arange(96).flip(0)
        layers.append(layer)
    model = Projections(*layers)
    expected = model(x)
    assert fusion.fuse(model, [("", ("a", "b"))]) == 1
    for found, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    names = {name for name, _ in model.named_buffers()}
    assert names == {f"a.joined.{name}" for name in ("packed", "scales", "zeros")} | (
        {"a.joined.permutation"} if permuted else set()
    )
    assert [name for name, _ in model.named_parameters()] == ["a.joined.bias"] * with_bias


@torch.no_grad()
def test_layers_that_differ_in_kind_stay_apart() -> None:
    weight = randn(6, 96)
    first = QuantisedLinear.rounded(weight, 4, 32, symmetric=False)
    permuted = QuantisedLinear.rounded(weight, 4, 32, symmetric=False)
    permuted.permutation = torch.arange(96).flip(0)
    otherwise = QuantisedLinear.rounded(weight, 4, 32, symmetric=False)
    otherwise.permutation = torch.arange(96).roll(1)
    assert quantised_linear.join([permuted, otherwise]) is None
    for other in (
        QuantisedLinear.rounded(weight, 8, 32, symmetric=False),
        QuantisedLinear.rounded(weight, 4, 64, symmetric=False),
        QuantisedLinear.rounded(weight, 4, 32, symmetric=True),
        QuantisedLinear.rounded(weight.half(), 4, 32, symmetric=False),
        QuantisedLinear.rounded(weight, 4, 32, symmetric=False, bias=nn.Parameter(randn(6))),
        QuantisedLinear.rounded(weight[:, :64], 4, 32, symmetric=False),
        permuted,
        nn.Linear(96, 6, bias=False),
    ):
        model = Projections(first, other)
        assert fusion.fuse(model, [("", ("a", "b"))]) == 0
        assert model.a is first


@torch.no_grad()
def test_joined_layers_that_would_differ_stay_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Projections(
        *(QuantisedLinear.rounded(randn(6, 96), 8, 0, symmetric=True) for _ in range(2))
    )
    join = quantised_linear.join

    def wrong(layers: list[QuantisedLinear]) -> QuantisedLinear | None:
        joined = join(layers)
        assert joined is not None
        joined.scales *= 1.001
        return joined

    monkeypatch.setattr(quantised_linear, "join", wrong)
    assert fusion.fuse(model, [("", ("a", "b"))]) == 0
    assert type(model.a) is QuantisedLinear
    assert "stay apart" in caplog.text


def test_each_kind_of_layer_is_warmed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = [QuantisedLinear.rounded(randn(6, 96), 4, 32, symmetric=False) for _ in range(3)]
    other = QuantisedLinear.rounded(randn(7, 96), 4, 32, symmetric=False)
    seen: list[tuple[torch.Size, torch.dtype]] = []
    forward = QuantisedLinear.forward

    def note(layer: QuantisedLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append((forward(layer, x).shape, x.dtype))
        return forward(layer, x)

    monkeypatch.setattr(QuantisedLinear, "forward", note)
    quantised_linear.warm_up(nn.Sequential(*alike, nn.Linear(6, 6), other), torch.bfloat16)
    counts = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert seen == [((n, size), torch.bfloat16) for size in (6, 7) for n in counts]


def test_operator_for_compilers_has_the_shape_and_value_of_the_function() -> None:
    layer = QuantisedLinear.rounded(randn(6, 96), 4, 32, symmetric=False)
    arguments = (randn(2, 3, 96), layer.packed, layer.scales, layer.zeros, None, 32, 4)
    torch.library.opcheck(
        torch.ops.pagetier.quantised_linear.default, arguments, test_utils="test_faketensor"
    )
    expected = reference.quantised_linear(*arguments)
    torch.testing.assert_close(torch.ops.pagetier.quantised_linear(*arguments), expected)
    torch.testing.assert_close(kernels.quantised_linear(*arguments), expected)
    empty = torch.ops.pagetier.quantised_linear(arguments[0][:0], *arguments[1:])
    assert empty.shape == (0, 3, 6)
