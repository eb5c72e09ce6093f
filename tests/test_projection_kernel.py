"""Projections by Triton kernels, beside float64: every path that a table may choose."""

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import projection as kernels
from pagetier.kernels import reference, tuning

MATRIX = {
    "kernel": "matrix", "tokens": 16, "outs": 16, "ins": 32, "splits": 1, "swap": False,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip
VECTOR = {"kernel": "vector", "outs": 4, "ins": 32, "splits": 1, "unroll": 2, "num_warps": 4}
# Of sums of products in fp32 that are rounded once to the result's dtype: its own precision.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=40)


def check(use, num_tokens, out_size, in_size, device, *, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(num_tokens + out_size)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # Slices with strides of their own; what lies between them must not be read.
    x = torch.full((num_tokens, in_size + 16), float("nan"), device=device, dtype=dtype)
    x[:, :in_size] = rand(num_tokens, in_size)
    weight = torch.full((out_size, in_size + 32), float("nan"), device=device, dtype=dtype)
    weight[:, :in_size] = rand(out_size, in_size)
    x, weight = x[:, :in_size], weight[:, :in_size]
    added = rand(out_size) if bias else None
    # The rows after the result must stay as they are.
    memory = torch.full((num_tokens + 1, out_size), float("nan"), device=device, dtype=dtype)
    out = memory[:num_tokens]
    table = {"linear": [tuning.Entry({}, use)]}
    with tuning.using(table):
        assert kernels.linear(x, weight, added, out=out) is out
    expected = torch.nn.functional.linear(
        x.double().cpu(), weight.double().cpu(), None if added is None else added.double().cpu()
    )
    scale = in_size**0.5
    torch.testing.assert_close(
        out.double().cpu() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0
    )
    assert memory[num_tokens:].isnan().all()


SHAPES = [(1, 16, 32), (3, 20, 64), (16, 33, 100), (37, 50, 96), (1, 7, 31)]


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("num_tokens", "out_size", "in_size"), SHAPES)
def test_matrix_kernel_matches_float64(num_tokens, out_size, in_size, swap, splits, device):
    use = {**MATRIX, "swap": swap, "splits": splits}
    check(use, num_tokens, out_size, in_size, device, bias=splits == 2)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("out_size", "in_size"), [(4, 32), (9, 100), (30, 320)])
def test_vector_kernel_matches_float64(out_size, in_size, splits, device):
    check({**VECTOR, "splits": splits}, 1, out_size, in_size, device, bias=splits == 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use", [MATRIX, {**MATRIX, "tokens": 8, "swap": True}, VECTOR])
def test_16_bits_match_float64(use, dtype, device):
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter computes tl.dot of bf16 wrongly")
    check({**use, "splits": 2}, 1, 40, 128, device, dtype=dtype, bias=True)


@pytest.mark.parametrize("use", [MATRIX, VECTOR])
def test_splits_leave_the_workspace_ready_for_other_shapes(use, device):
    for out_size in (40, 8, 64):
        check({**use, "splits": 4}, 1, out_size, 256, device)
    if kernels._workspaces:
        assert not kernels._workspaces[torch.zeros(1, device=device).device][1].any()


@pytest.mark.parametrize("swap", [False, True])
def test_kernels_that_start_early_match_float64(swap, device):
    if device == "cpu" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs programmatic dependent launch")
    matrix = {**MATRIX, "ins": 128, "splits": 2, "swap": swap, "prefetch": 2}
    check(matrix, 16, 512, 2048, device, dtype=torch.bfloat16)
    vector = {**VECTOR, "ins": 128, "splits": 2, "prefetch": 1}
    check(vector, 1, 512, 2048, device, dtype=torch.bfloat16)
    # Each reads what the one before wrote, in a replayed graph.
    weights = [torch.randn(2048, 2048, device=device).bfloat16() / 45 for _ in range(20)]
    x = torch.randn(16, 2048, device=device).bfloat16()

    def chain():
        y = x
        for weight in weights:
            y = kernels.linear(y, weight)
        return y

    expected = chain()
    with tuning.using({"linear": [tuning.Entry({}, {**matrix, "num_stages": 3})]}):
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = chain()
        for _ in range(10):
            graph.replay()
    torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.05)


def test_without_an_entry_torch_serves_and_equals_the_reference(device):
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((2, 3, 8), (5, 8), (5,)))
    for added in (None, bias):
        torch.testing.assert_close(
            kernels.linear(x, weight, added), reference.linear(x, weight, added)
        )
    assert kernels.linear(x[:0], weight).shape == (0, 3, 5)


def test_operator_for_compilers_has_the_shape_and_value_of_the_function(device):
    x, weight = torch.randn(2, 3, 8, device=device), torch.randn(5, 8, device=device)
    torch.library.opcheck(
        torch.ops.pagetier.linear.default, (x, weight), test_utils="test_faketensor"
    )
    torch.testing.assert_close(
        torch.ops.pagetier.linear(x, weight, None), reference.linear(x, weight)
    )


def test_tensors_that_do_not_belong_together_are_refused(device):
    x, weight = torch.randn(2, 8, device=device), torch.randn(5, 8, device=device)
    with pytest.raises(ValueError, match="do not belong together"):
        kernels.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="do not belong together"):
        kernels.linear(x.half(), weight)
    with pytest.raises(ValueError, match=r"bias \(4,\) does not belong to 5"):
        kernels.linear(x, weight, torch.randn(4, device=device))
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.linear(x, weight, out=torch.empty(5, 2, device=device).t())
