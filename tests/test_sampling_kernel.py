"""The Triton kernels that choose tokens: interpreted on the CPU, compiled on a GPU."""

import dataclasses

import pytest
import torch
from support.interpreter import DEVICES, INTERPRETED, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import reference, sampling


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of small vocabularies, and more candidates than are collected.

    On a GPU each of these is another kernel to compile, so vocabularies are large there instead.
    """
    if INTERPRETED:
        for name, value in (("_TILE", 64), ("_FOUND", 64), ("_PIECE", 32)):
            monkeypatch.setattr(sampling, name, value)


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=18)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row asks for."""

    temperature: float = 1.0
    top_k: int = 2**62
    top_p: float = 1.0
    min_p: float = 0.0


ROWS = [
    Row(temperature=0.0),
    Row(),
    Row(temperature=0.05),
    Row(temperature=30.0, min_p=0.97),
    Row(temperature=0.8, top_k=5),
    Row(top_k=1),
    Row(top_k=100),  # more than a tile holds
    Row(temperature=30.0, top_k=9),
    Row(temperature=0.02, top_k=40),  # more than have any weight
    Row(temperature=0.8, top_p=0.9),
    Row(temperature=30.0, top_p=0.7),  # of more than a tile holds
    Row(temperature=0.9, top_k=20, top_p=0.8, min_p=0.02),
]


def columns(rows: list[Row], device: str, seed: int = 0) -> list[torch.Tensor]:
    """Settings as ``sample_tokens`` takes them, those in floats with gaps between them."""
    floats = torch.tensor([[r.temperature, r.top_p, r.min_p] for r in rows], device=device)
    floats = floats.view(-1, 3)
    top_k = torch.tensor([r.top_k for r in rows], device=device)
    seeds = torch.arange(seed, seed + len(rows), device=device)
    positions = torch.full((len(rows),), 7, device=device)
    return [floats[:, 0], top_k, floats[:, 1], floats[:, 2], seeds, positions]


def make_logits(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> torch.Tensor:
    """As wide as a model's, in rows that do not touch."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = 2.5 * torch.randn(rows, vocabulary + 3, generator=generator)
    return logits.to(device, dtype)[:, :vocabulary]


def check(logits: torch.Tensor, rows: list[Row], seed: int = 0, **flags: bool) -> torch.Tensor:
    arguments = columns(rows, str(logits.device), seed)
    actual = sampling.sample_tokens(logits, *arguments, **flags)
    expected = reference.sample_tokens(logits, *arguments, **flags)
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected.tolist()
    return actual


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        *((1, torch.float32), (64, torch.float32), (180, torch.float32)),
        *((180, torch.float16), (180, torch.bfloat16)),
    ],
)
def test_tokens_are_those_of_the_reference(vocabulary, dtype, device):
    # Interpreted, a bisection takes half a second.
    rows = ROWS if vocabulary == 180 and dtype is torch.float32 else ROWS[4::3]
    check(make_logits(len(rows), vocabulary, dtype, device), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 64, 300])
def test_greedy_takes_the_first_highest(dtype, vocabulary, device):
    logits = make_logits(5, vocabulary, dtype, device)
    logits[1] = 1.0
    logits[2, vocabulary // 2 :] = 30.0
    logits[3, 0], logits[3, -1] = -0.0, 30.0
    actual = sampling.greedy_tokens(logits)
    assert actual.dtype == torch.int64
    assert actual.tolist() == reference.greedy_tokens(logits).tolist()
    assert actual[1:3].tolist() == [0, vocabulary // 2]
    out = torch.full((5,), -1, device=device)
    assert sampling.greedy_tokens(logits, out) is out
    assert torch.equal(out, actual)


def test_rows_without_filters_are_drawn_alike_with_and_without_the_filters_kernel(device):
    logits = make_logits(4, 300, device=device)
    rows = [Row(), Row(temperature=0.5), Row(temperature=0.0), Row(min_p=0.2)]
    assert torch.equal(check(logits, rows, any_filter=False), check(logits, rows))


def test_ties_are_kept_in_order_of_token(device):
    # More equal logits than a tile holds, and more than top-k and top-p keep.
    logits = torch.zeros(3, 150, device=device)
    logits[:, 140:] = -1.0
    logits[:, 77] = 1.0
    rows = [Row(top_k=100), Row(top_p=0.4), Row(top_k=100, top_p=0.9)]
    for seed in range(2):
        assert (check(logits, rows, seed) < 101).all()


def test_forbidden_tokens_are_never_drawn_and_zeros_are_equal(device):
    logits = torch.full((4, 200), float("-inf"), device=device)
    logits[:, 3], logits[:, 150] = 0.0, -0.0
    rows = [Row(), Row(top_k=1), Row(top_p=0.5), Row(temperature=9.0, top_k=100)]
    tokens = check(logits, rows).tolist()
    assert tokens[1:3] == [3, 3]
    assert set(tokens) <= {3, 150}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_allows_nothing_yields_some_token_and_spares_the_others(device):
    logits = make_logits(5, 130, device=device)
    rows = [Row(top_k=5, top_p=0.7), Row(), Row(temperature=0.0), Row(top_p=0.4), Row()]
    expected = check(logits, rows).tolist()
    for value in (float("nan"), float("-inf")):
        logits[:3] = value
        tokens = sampling.sample_tokens(logits, *columns(rows, device)).tolist()
        assert all(0 <= token < 130 for token in tokens[:3])
        assert tokens[3:] == expected[3:]


def test_what_does_not_fit_is_refused(device):
    logits = make_logits(3, 50, device=device)
    settings = columns([Row()] * 3, device)
    with pytest.raises(ValueError, match="do not belong to 3 rows"):
        sampling.sample_tokens(logits, settings[0][:2], *settings[1:])
    with pytest.raises(ValueError, match="dense in the last dimension"):
        sampling.greedy_tokens(logits[:, ::2])
    with pytest.raises(ValueError, match="float64"):
        sampling.greedy_tokens(logits.double())


def test_no_rows_are_fine(device):
    logits = torch.zeros(0, 50, device=device)
    assert sampling.greedy_tokens(logits).shape == (0,)
    assert sampling.sample_tokens(logits, *columns([], device)).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.1, 2.5, 10.0])
def test_large_vocabularies_on_a_gpu(dtype, spread):
    skip_unless_kernels_run("cuda")
    rows = [*ROWS, Row(top_k=50, top_p=0.9), Row(top_k=20_000), Row(top_p=0.99)] * 8
    logits = make_logits(len(rows), 128_256, dtype, "cuda") * (spread / 2.5)
    settings = columns(rows, "cuda")
    actual = sampling.sample_tokens(logits, *settings)
    expected = reference.sample_tokens(logits, *settings)
    # exp rounds otherwise: a number may fall on the other side of a token's edge.
    assert (actual != expected).sum() <= 1
    assert torch.equal(sampling.greedy_tokens(logits), logits.argmax(-1))


@pytest.mark.gpu
def test_sampling_in_a_captured_graph_uses_the_settings_of_each_replay():
    skip_unless_kernels_run("cuda")
    logits = make_logits(len(ROWS), 5000, device="cuda")
    settings = columns(ROWS, "cuda")
    sampling.sample_tokens(logits, *settings)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampling.sample_tokens(logits, *settings)
    for seed in range(3):
        for static, fresh in zip(settings, columns(ROWS[::-1], "cuda", seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert tokens.tolist() == reference.sample_tokens(logits, *settings).tolist()
