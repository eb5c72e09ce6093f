"""Choosing tokens: 256 rows of logits over a vocabulary of 128k, by the settings of their rows."""

import torch

from benchmarks.kernels.bench import Bench, Case, Figures, Target
from pagetier import SamplingParams
from pagetier.handler import sampler


def _sample(name: str, params: SamplingParams, *targets: Target) -> Case:
    def measure(bench: Bench) -> Figures:
        rows, vocabulary = (3, 50) if bench.tiny else (256, 128256)
        settings = sampler.RowSettings.of(
            [params] * rows, seeds=list(range(rows)), positions=[7] * rows
        )
        packed = torch.from_numpy(settings.packed()).to(bench.device)
        num_sets = bench.num_sets(rows * vocabulary * bench.dtype.itemsize, most=8)
        sets = [
            # About as wide as a model's.
            2.5 * torch.randn(rows, vocabulary, dtype=bench.dtype, device=bench.device)
            for _ in range(num_sets)
        ]
        seconds = bench.seconds(
            [lambda logits=logits: sampler.sample(logits, settings, packed) for logits in sets]
        )
        figures = {"us": seconds * 1e6}
        peer = bench.seconds([lambda logits=logits: logits.argmax(-1) for logits in sets])
        return figures | {"torch argmax us": peer * 1e6}

    return Case(name, measure, targets)


def cases(_bench: Bench) -> list[Case]:
    """All cases."""
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(temperature=0.8)
    filtered = SamplingParams(temperature=0.8, top_k=50, top_p=0.9)
    return [
        _sample("greedy 256 x 128256", greedy, Target("us", at_most=60)),
        _sample("top-k and top-p 256 x 128256", filtered, Target("us", at_most=250)),
        _sample("temperature 256 x 128256", drawn),
        _sample("top-p 256 x 128256", SamplingParams(temperature=0.8, top_p=0.9)),
        _sample("min-p 256 x 128256", SamplingParams(temperature=0.8, min_p=0.05)),
    ]
