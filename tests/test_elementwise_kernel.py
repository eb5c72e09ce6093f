"""The Triton kernels of norms and gated activations, beside their references."""

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import elementwise
from pagetier.kernels.reference import elementwise as reference

# Computed in fp32 on both sides and rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=40)


def rows(num_tokens, size, device, dtype, seed=0):
    """Rows with a gap of NaN after each."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((num_tokens, size + 8), float("nan"), dtype=dtype, device=device)
    memory[:, :size] = 3 * torch.randn(num_tokens, size, generator=generator).to(device, dtype) + 1
    return memory[:, :size], memory[:, size:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
@pytest.mark.parametrize("norm", ["rms", "offset", "layer", "layer without bias"])
def test_norms_match_the_reference(norm, size, dtype, device):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter rounds to bf16 towards zero")
    weight, bias = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
    for residual in (None, *rows(3, size, device, dtype, seed=1)[:1]):
        x, gap = rows(3, size, device, dtype)
        results = []
        for module in (elementwise, reference):
            total = None if residual is None else residual.clone()
            if norm.startswith("layer"):
                shift = bias if norm == "layer" else None
                result = module.layer_norm(x, weight, shift, 1e-5, residual=total)
            else:
                offset = 1.0 if norm == "offset" else 0.0
                result = module.rms_norm(x, weight, 1e-5, residual=total, weight_offset=offset)
            results += [result, total]
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(results[0], results[2], atol=tolerance, rtol=tolerance)
        if residual is not None:
            assert torch.equal(results[1], results[3])
        assert gap.isnan().all()


# The sigmoid of a large negative number is 1 / (1 + inf), as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations_match_the_reference(activation, dtype, device):
    for size in (2, 66, 2500):
        x, _ = rows(2, size, device, dtype)
        torch.testing.assert_close(
            elementwise.gated(x, activation), reference.gated(x, activation),
            atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype],
        )  # fmt: skip


def test_residual_rows_with_gaps_are_updated_in_place_and_gaps_are_not(device):
    x, _ = rows(3, 20, device, torch.float32)
    residual, gap = rows(3, 20, device, torch.float32, seed=1)
    expected = x + residual
    elementwise.rms_norm(x, torch.ones(20, device=device), 1e-5, residual=residual)
    torch.testing.assert_close(residual, expected)
    assert gap.isnan().all()


def test_rows_that_do_not_fit_are_refused_and_none_are_taken(device):
    x = torch.randn(4, 6, device=device)
    weight = torch.ones(6, device=device)
    with pytest.raises(ValueError, match="must be dense"):
        elementwise.rms_norm(torch.randn(6, 4, device=device).t(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"weight \(6,\) or residual does not fit"):
        elementwise.rms_norm(x, weight, 1e-5, residual=x[:3])
    with pytest.raises(ValueError, match="even length"):
        elementwise.gated(x[:, :5], "silu")
    assert elementwise.rms_norm(x[:0], weight, 1e-5).shape == (0, 6)
    assert elementwise.gated(x[:0], "silu").shape == (0, 3)
