"""Projections by quantised weights in Triton, beside float64: every path of the tables."""

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import packing, projection, reference
from pagetier.kernels import quantised_projection as kernels

MATRIX = {
    "kernel": "matrix", "tokens": 16, "outs": 16, "splits": 1, "swap": False, "num_warps": 4,
    "num_stages": 2,
}  # fmt: skip
VECTOR = {"kernel": "vector", "outs": 4, "lines": 2, "splits": 1, "num_warps": 4}
DEQUANTISE = {"kernel": "dequantise", "outs": 8, "num_warps": 4}
# Of sums of products in fp32 that are rounded once to the result's dtype: its own precision. The
# whole numbers in them are up to 256, or stand on a power of two as large.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=40)


def make(out_size, in_size, bits, group_size, device, dtype=torch.float32, *, zeros=True):
    """Random numbers, scales and zeros; scales in float16, whatever the tokens are in."""
    generator = torch.Generator().manual_seed(out_size + in_size)
    num_groups = -(-in_size // group_size) if group_size else 1
    numbers = torch.randint(0, 2**bits, (out_size, in_size), generator=generator)
    scales = (torch.rand(num_groups, out_size, generator=generator) + 0.5) * 2.0 ** (1 - bits)
    some_zeros = torch.randint(0, 2**bits, (num_groups, out_size), generator=generator)
    return (
        packing.pack(numbers, bits).to(device),
        scales.half().to(device),
        some_zeros.to(torch.uint8).to(device) if zeros else None,
    )


def check(
    use, num_tokens, out_size, in_size, bits, group_size, device, *,
    dtype=torch.float32, bias=False, zeros=True,
):  # fmt: skip
    packed, scales, some_zeros = make(out_size, in_size, bits, group_size, device, zeros=zeros)
    generator = torch.Generator().manual_seed(num_tokens)
    # Rows with a stride of their own; what lies between them must not be read.
    x = torch.full((num_tokens, in_size + 16), float("nan"), device=device, dtype=dtype)
    x[:, :in_size] = torch.randn(num_tokens, in_size, generator=generator).to(device, dtype)
    x = x[:, :in_size]
    added = torch.randn(out_size, generator=generator).to(device, dtype) if bias else None
    # The rows after the result must stay as they are.
    memory = torch.full((num_tokens + 1, out_size), float("nan"), device=device, dtype=dtype)
    kernels.launch(x, packed, scales, some_zeros, added, memory[:num_tokens], group_size, bits, use)
    weight = reference.dequantise(packed, scales, some_zeros, group_size, bits, in_size)
    expected = x.double() @ weight.double().t() + (0 if added is None else added.double())
    scale = in_size**0.5
    torch.testing.assert_close(
        memory[:num_tokens].double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0
    )
    assert memory[num_tokens:].isnan().all()


# Lines are 256 columns of 4 bits and 128 of 8: groups within a line, of a line, of several.
SHAPES = [
    (1, 16, 256, 0), (3, 20, 512, 128), (17, 24, 600, 32), (4, 18, 600, 512), (1, 7, 31, 0),
    (1, 7, 31, 32),
]  # fmt: skip
GROUPS = [0, 32, 128, 512]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_tokens", "out_size", "in_size", "group_size"), SHAPES)
def test_matrix_kernel_matches_float64(num_tokens, out_size, in_size, group_size, bits, device):
    use = {**MATRIX, "swap": out_size % 2 == 0, "splits": 1 + num_tokens % 3}
    zeros = in_size != 512
    check(use, num_tokens, out_size, in_size, bits, group_size, device, zeros=zeros, bias=not zeros)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("out_size", "in_size", "splits"), [(4, 512, 1), (9, 600, 2), (3, 100, 5)])
def test_vector_kernel_matches_float64(out_size, in_size, splits, group_size, bits, device):
    use = {**VECTOR, "splits": splits}
    check(use, 1, out_size, in_size, bits, group_size, device, zeros=splits != 2, bias=splits == 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "in_size"), [(0, 300), (32, 256), (128, 600), (512, 600)])
def test_dequantising_for_torch_matches_float64(in_size, group_size, bits, device, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_FLOATS", 10 * in_size)  # in three parts
    check(DEQUANTISE, 40, 27, in_size, bits, group_size, device, bias=bits == 4)
    check(DEQUANTISE, 3, 27, in_size, bits, group_size, device, zeros=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "use", [MATRIX, {**MATRIX, "tokens": 8, "outs": 64, "swap": True}, VECTOR, DEQUANTISE]
)
def test_16_bits_match_float64(use, bits, dtype, device):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes tl.dot of bf16 wrongly")
    check({**use, "splits": 2}, 1, 20, 512, bits, 128, device, dtype=dtype, bias=True)


@pytest.mark.parametrize("use", [MATRIX, VECTOR])
def test_splits_leave_the_workspace_ready_for_other_shapes(use, device):
    for out_size in (20, 8, 33):
        check({**use, "splits": 4}, 1, out_size, 600, 4, 128, device)
    assert not projection.workspace(torch.zeros(1, device=device).device)[1].any()


@pytest.mark.parametrize("num_tokens", [1, 5, 17, 70])
def test_the_tables_name_a_kernel_for_any_number_of_tokens(num_tokens, device):
    packed, scales, zeros = make(24, 300, 4, 32, device)
    x = torch.randn(2, num_tokens, 300, device=device).transpose(0, 1)
    found = kernels.quantised_linear(x[:, 0], packed, scales, zeros, None, 32, 4)
    expected = reference.quantised_linear(x[:, 0], packed, scales, zeros, None, 32, 4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert kernels.quantised_linear(x[:0], packed, scales, zeros, None, 32, 4).shape == (0, 2, 24)


def test_tensors_that_do_not_belong_together_are_refused(device):
    packed, scales, zeros = make(24, 300, 4, 32, device)
    x, bias = torch.randn(2, 300, device=device), torch.randn(24, device=device)
    for wrong in (
        (x[:, :256], packed, scales, zeros, bias, 32, 4),
        (x, packed[:, :32], scales, zeros, bias, 32, 4),
        (x, packed, scales, zeros, bias, 64, 4),
        (x, packed, scales, zeros, bias, 32, 8),
        (x, packed, scales, zeros[:1], bias, 32, 4),
        (x, packed, scales, zeros, bias[:3], 32, 4),
        (x, packed, scales.t().contiguous().t(), zeros, bias, 32, 4),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            kernels.quantised_linear(*wrong)
    packed, scales, zeros = make(24, 300, 4, 48, device)
    with pytest.raises(ValueError, match="a power of two from 32 on, not 48"):
        kernels.quantised_linear(x, packed, scales, zeros, bias, 48, 4)
