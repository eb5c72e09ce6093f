"""Choosing tokens: rows of logits over a vocabulary of 128k, by the settings of their rows."""

import functools

import torch

from benchmarks.kernels.bench import Bench, Case, Figures, Target
from pagetier import SamplingParams
from pagetier.handler import sampler
from pagetier.kernels import reference

_VOCABULARY = 128256


def _sample(
    name: str,
    params: SamplingParams,
    *targets: Target,
    rows: int = 256,
    dtype: torch.dtype | None = None,
) -> Case:
    """``dtype`` of the logits; None is the benchmark's 16 bits."""

    def measure(bench: Bench) -> Figures:
        count, vocabulary = (3, 50) if bench.tiny else (rows, _VOCABULARY)
        settings = sampler.RowSettings.of([params] * count, list(range(count)), [7] * count)
        packed = torch.from_numpy(settings.packed()).to(bench.device)
        shape, own_dtype = (count, vocabulary), dtype or bench.dtype
        num_sets = bench.num_sets(count * vocabulary * own_dtype.itemsize, most=8)
        # About as wide as a model's.
        sets = [2.5 * torch.randn(shape, device=bench.device) for _ in range(num_sets)]
        sets = [logits.to(own_dtype) for logits in sets]
        launches = [functools.partial(sampler.sample, x, settings, packed) for x in sets]
        figures = {"us": bench.seconds(launches) * 1e6}
        argmax = [functools.partial(torch.argmax, x, -1) for x in sets]
        figures["torch argmax us"] = bench.seconds(argmax) * 1e6
        if settings.all_greedy:
            return figures
        first, second, top_k, seeds, positions = packed.unbind()
        temperature, top_p = first.view(torch.float32).view(-1, 2).unbind(1)
        min_p = second.view(torch.float32).view(-1, 2)[:, 0]
        plain = functools.partial(
            reference.sample_tokens, sets[0], temperature, top_k, top_p, min_p, seeds, positions,
            any_filter=settings.any_filter,
        )  # fmt: skip
        # Rounding may send a draw to a neighbouring token, one of many thousands.
        figures["error"] = (launches[0]().token_ids != plain()).float().mean().item()
        return figures | {"plain torch us": bench.seconds([plain], replays=3) * 1e6}

    return Case(f"{name} {rows} x {_VOCABULARY}", measure, targets)


def cases(_bench: Bench) -> list[Case]:
    """All cases."""
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(temperature=0.8)
    filtered = SamplingParams(temperature=0.8, top_k=50, top_p=0.9)
    fast, slow = Target("us", at_most=60), Target("us", at_most=250)
    return [
        _sample("greedy", greedy, fast),
        _sample("greedy, float32,", greedy, fast, dtype=torch.float32),
        _sample("top-k and top-p", filtered, slow),
        _sample("top-k and top-p, float32,", filtered, slow, dtype=torch.float32),
        _sample("temperature", drawn),
        _sample("top-p", SamplingParams(temperature=0.8, top_p=0.9)),
        _sample("flat top-p", SamplingParams(temperature=3.0, top_p=0.9)),
        _sample("min-p", SamplingParams(temperature=0.8, min_p=0.05)),
        _sample("greedy", greedy, rows=1),
        _sample("top-k and top-p", filtered, rows=1),
        _sample("top-p", SamplingParams(temperature=0.8, top_p=0.9), rows=1),
    ]
