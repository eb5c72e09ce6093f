"""Sampling against independent computations: plain Python hashes, sets by hand, frequencies."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagetier.handler.sampler import RowSettings, SamplerOutput, sample, score
from pagetier.handler.sampling_params import SamplingParams
from pagetier.kernels.reference import sampling
from pagetier.kernels.reference.sampling import _filter, token_weights, uniform

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


def draw(
    logits: torch.Tensor,
    params: SamplingParams | list[SamplingParams],
    seeds: range | list[int] = (0,),
    positions: range | list[int] = (0,),
    device: str = "cpu",
) -> SamplerOutput:
    """Sample rows; a single logit row, setting, seed or position serves all rows."""
    rows = max(logits.shape[0], len(seeds), len(positions))
    params = [params] * rows if isinstance(params, SamplingParams) else params
    seeds = list(seeds) * (rows // len(seeds))
    positions = list(positions) * (rows // len(positions))
    settings = RowSettings.of(params, seeds, positions)
    return sample(logits.expand(rows, -1).to(device), settings)


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def splitmix64(state: int) -> int:
    """One output of splitmix64, in Python's own integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_of_this_test_is_the_published_one() -> None:
    assert [splitmix64(n * 0x9E3779B97F4A7C15 % 2**64) for n in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_uniform_is_a_hash_of_seed_and_position_alone(device: str) -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 12345]
    positions = [0, 1, 7, 100_000, 3, 2**31]
    actual = uniform(torch.tensor(seeds, device=device), torch.tensor(positions, device=device))
    for value, seed, position in zip(actual.tolist(), seeds, positions, strict=True):
        start = splitmix64(seed % 2**64)
        bits = splitmix64((start + position * 0x9E3779B97F4A7C15) % 2**64)
        assert value == (bits >> 11) / 2**53


@pytest.mark.parametrize("what", ["seeds", "positions"])
def test_uniform_is_uniform_and_uncorrelated(what: str) -> None:
    count = 100_000
    zero, counter = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    numbers = uniform(counter, zero) if what == "seeds" else uniform(zero, counter)
    assert ((numbers >= 0) & (numbers < 1)).all()
    observed = torch.histc(numbers, 100, 0, 1)
    chi_square = ((observed - count / 100) ** 2 / (count / 100)).sum().item()
    assert chi_square < 149  # 99.9 % of a chi-square with 99 degrees of freedom
    lagged = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].abs().item()
    assert lagged < 4 / math.sqrt(count)


def test_greedy_takes_the_first_highest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 3.0]])
    assert draw(logits, SamplingParams(temperature=0)).token_ids.tolist() == [1, 0]


class Recorder(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_greedy_costs_an_argmax_only() -> None:
    settings = RowSettings.of([SamplingParams(temperature=0, top_p=0.5, top_k=3)] * 4, [0] * 4,
                              [0] * 4)  # fmt: skip
    logits = torch.zeros(4, 1000)
    with Recorder() as recorder:
        sample(logits, settings)
    assert recorder.names == ["argmax"]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=3.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.7),
        SamplingParams(temperature=2.0, top_k=6, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.3),
        SamplingParams(temperature=1.5, min_p=0.2, top_k=5, top_p=0.8),
    ],
    ids=lambda p: f"{p.temperature},min_p={p.min_p},top_k={p.top_k},top_p={p.top_p}",
)
def test_frequencies_over_seeds_follow_the_distribution(
    params: SamplingParams, device: str
) -> None:
    vocabulary, draws = 12, 20_000
    logits = random_logits(1, vocabulary) / 2  # no token so rare that it may not come
    # The distribution by hand, in float64: temperature, min-p, top-k, then top-p among the rest.
    scaled = logits[0].double().numpy() / params.temperature
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    order = np.argsort(-probabilities)
    order = [t for t in order if probabilities[t] >= params.min_p * probabilities.max()]
    kept = order[: params.top_k] if params.top_k else order
    share = probabilities[kept] / probabilities[kept].sum()
    while share[:-1].sum() >= params.top_p:
        kept, share = kept[:-1], share[:-1]
    expected = np.zeros(vocabulary)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    tokens = draw(logits, params, seeds=range(draws), positions=[17], device=device).token_ids
    observed = np.bincount(tokens.cpu().numpy(), minlength=vocabulary)
    assert set(np.flatnonzero(observed)) == set(kept)
    chi_square = sum((observed[t] - draws * expected[t]) ** 2 / (draws * expected[t]) for t in kept)
    # Mean plus 4.5 standard deviations of a chi-square of that many degrees of freedom.
    freedom = len(kept) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_frequencies_over_positions_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    tokens = draw(logits, SamplingParams(), seeds=[99], positions=range(16_000)).token_ids
    observed = torch.bincount(tokens, minlength=3).double()
    expected = torch.tensor([1, 2, 5]) / 8 * 16_000
    assert ((observed - expected) ** 2 / expected).sum() < 13.8  # 99.9 %, 2 degrees of freedom


def seen(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    return set(draw(logits, params, seeds=range(4000)).token_ids.tolist())


@pytest.mark.parametrize(("top_k", "kept"), [(1, {2}), (2, {2, 5}), (4, {2, 5, 0, 1}), (-1, None)])
def test_top_k_keeps_exactly_that_many_even_among_equals(top_k: int, kept: set[int] | None) -> None:
    logits = torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0, 2.0]])
    params = SamplingParams(temperature=3.0, top_k=top_k)
    assert seen(logits, params) == (kept or set(range(6)))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.5, {1}),
        (0.51, {1, 3}),
        (0.75, {1, 3}),
        (0.76, {0, 1, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[2.0, 8.0, 2.0, 4.0]]).log()  # shares 1/8, 1/2, 1/8, 1/4
    assert seen(logits, SamplingParams(top_p=top_p)) == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.2, {1, 3, 0, 2}), (0.3, {1, 3}), (1.0, {1})])
def test_min_p_keeps_tokens_by_their_share_of_the_most_likely(min_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[2.0, 8.0, 2.0, 4.0]]).log()  # shares of the highest: 1/4, 1, 1/4, 1/2
    assert seen(logits, SamplingParams(min_p=min_p)) == kept


def test_min_p_changes_no_greedy_row() -> None:
    settings = RowSettings.of([SamplingParams(temperature=0, min_p=0.5)], [0], [0])
    assert settings.all_greedy


def test_top_p_of_one_keeps_the_least_likely_token() -> None:
    # Another row is filtered, so this one passes through the filter as well.
    logits = torch.zeros(2, 50_000)
    logits[:, 49_999] = -20.0
    params = [SamplingParams(top_p=1.0), SamplingParams(top_p=0.5)]
    settings = RowSettings.of(params, [0, 0], [0, 0])
    assert settings.any_filter
    temperature, top_k = torch.ones(2), torch.from_numpy(settings.top_k)
    weights = token_weights(logits, temperature, torch.zeros(2))
    filtered = _filter(logits, weights, top_k, torch.from_numpy(settings.top_p))
    assert torch.equal(filtered[0], weights[0])
    assert filtered[1].count_nonzero() == 25_000


def test_tokens_do_not_depend_on_what_shares_the_batch(device: str) -> None:
    rows = 24
    logits = random_logits(rows, 500)
    params = [
        SamplingParams(
            temperature=[0.0, 0.7, 1.5][row % 3],
            top_k=[0, 5, 40][row % 4 % 3],
            top_p=[1.0, 0.6][row % 2],
            min_p=[0.0, 0.0, 0.1, 0.4, 0.02][row % 5],
            logprobs=[None, 3][row % 5 == 0],
        )
        for row in range(rows)
    ]
    seeds, positions = list(range(100, 100 + rows)), [row * 3 for row in range(rows)]
    together = draw(logits, params, seeds, positions, device).token_ids.tolist()
    alone = [
        draw(logits[row : row + 1], params[row], [seeds[row]], [positions[row]], device)
        .token_ids.item()
        for row in range(rows)
    ]  # fmt: skip
    assert alone == together
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    again = draw(
        logits[shuffled],
        [params[row] for row in shuffled],
        [seeds[row] for row in shuffled],
        [positions[row] for row in shuffled],
        device,
    )
    assert again.token_ids.tolist() == [together[row] for row in shuffled]


def test_a_seed_gives_other_tokens_at_other_positions() -> None:
    tokens = draw(torch.zeros(1, 1000), SamplingParams(), seeds=[7], positions=range(100))
    assert len(set(tokens.token_ids.tolist())) > 80


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, -1e30, 2.0]])
    tokens = seen(logits, SamplingParams(temperature=temperature))
    assert tokens == ({1} if temperature < 1 else {0, 1, 2, 3})


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 64), float("-inf"))
    logits[0, [3, 40]] = 0.0
    assert seen(logits, SamplingParams(top_p=0.99)) == {3, 40}
    assert seen(logits, SamplingParams()) == {3, 40}


@pytest.mark.parametrize(("number", "tokens"), [(1 - 2.0**-53, [9, 1]), (0.0, [0, 1])])
def test_extreme_uniform_numbers_fall_on_tokens_with_weight(
    number: float, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.full((2,), number, dtype=torch.float64)
    monkeypatch.setattr(sampling, "uniform", lambda *_: numbers)
    logits = torch.tensor([[0.1] * 10 + [0.0], [0.0, 1.0] + [0.0] * 9]).log()
    assert draw(logits, SamplingParams(), seeds=[0, 0]).token_ids.tolist() == tokens


def test_a_row_of_nan_yields_some_token_and_spares_the_others() -> None:
    logits = random_logits(2, 50)
    expected = draw(logits, SamplingParams(top_k=5), seeds=[1, 2]).token_ids[1]
    logits[0] = float("nan")
    tokens = draw(logits, SamplingParams(top_k=5), seeds=[1, 2]).token_ids
    assert 0 <= tokens[0] < 50
    assert tokens[1] == expected


def test_logprobs_are_of_the_raw_distribution(device: str) -> None:
    logits = random_logits(3, 30)
    params = [
        SamplingParams(temperature=0.0, logprobs=4),
        SamplingParams(temperature=2.0, top_k=3, logprobs=0),
        SamplingParams(temperature=1.0),
    ]
    output = draw(logits, params, seeds=[1, 2, 3], device=device)
    raw = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    for row in range(3):
        token = output.token_ids[row].item()
        assert output.logprobs[row].item() == pytest.approx(raw[row, token].item(), abs=1e-5)
        order = sorted(range(30), key=lambda t: -raw[row, t].item())[:4]
        assert output.top_token_ids[row].tolist() == order
        assert output.top_logprobs[row].tolist() == pytest.approx(
            [raw[row, t].item() for t in order], abs=1e-5
        )


def test_logprobs_are_raw_where_logits_were_changed() -> None:
    raw = random_logits(1, 30)
    changed = raw.clone()
    changed[0, raw[0].argmax()] = -torch.inf
    settings = RowSettings.of([SamplingParams(temperature=0, logprobs=2)], [0], [0])
    output = sample(changed, settings, raw_logits=raw)
    expected = raw[0].log_softmax(-1).topk(2)
    assert output.token_ids.tolist() == expected.indices[1:].tolist()
    assert output.top_token_ids[0].tolist() == expected.indices.tolist()
    assert torch.equal(output.logprobs, expected.values[1:])


def test_scores_of_many_rows_are_those_of_each_alone() -> None:
    logits = random_logits(150, 20)
    tokens = torch.arange(150) % 20
    output = score(logits, tokens, 3)
    expected = logits.log_softmax(-1)
    assert torch.equal(output.logprobs, expected[torch.arange(150), tokens])
    assert torch.equal(output.top_logprobs, expected.topk(3).values)
    assert score(logits[:0], tokens[:0], 3).top_token_ids.shape == (0, 3)


def test_no_logprobs_are_computed_unless_asked_for() -> None:
    output = draw(random_logits(2, 10), SamplingParams())
    assert output.logprobs is None
    assert output.top_token_ids is None


def test_more_logprobs_than_tokens_are_cut() -> None:
    output = draw(random_logits(1, 3), SamplingParams(logprobs=20))
    assert output.top_token_ids.shape == (1, 3)


def test_16_bit_logits_are_computed_in_32() -> None:
    logits = random_logits(1, 2000).half()
    params = SamplingParams(temperature=0.9, top_p=0.9, logprobs=2)
    low, high = draw(logits, params, range(50)), draw(logits.float(), params, range(50))
    assert torch.equal(low.token_ids, high.token_ids)
    assert torch.equal(low.logprobs, high.logprobs)
