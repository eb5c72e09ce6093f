"""Norms and gated activations, beside what ``torch.compile`` makes of their references.

A kernel of ours stays only where it is faster: this is where that is seen.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks.kernels.bench import (
    Bench,
    Case,
    Figures,
    SkipCase,
    Target,
    relative_error,
    triton_serves,
)
from pagetier.kernels.reference import elementwise as reference

_FASTER = Target("compiled / ours", at_least=1.02)

# Takes the module whose function to call.
Call = Callable[..., torch.Tensor]


def _compare(bench: Bench, make: Callable[[], Call], num_bytes: int) -> Figures:
    """Time ours and the compiled reference; ``make`` returns a call on data of its own."""
    if not triton_serves(bench.device):
        raise SkipCase("Triton does not serve this device")
    from pagetier.kernels import elementwise as ours

    error = relative_error(make()(ours), make()(reference))
    seconds = bench.seconds([functools.partial(make(), ours)])
    figures: Figures = {"us": seconds * 1e6, "GB/s": num_bytes / seconds / 1e9, "error": error}
    torch.compiler.reset()
    # Inductor would need a C++ compiler on a CPU; that it can be traced is seen there too.
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    compiled = torch.compile(functools.partial(make(), reference), fullgraph=True, backend=backend)
    others = bench.seconds([compiled])
    figures |= {"compiled us": others * 1e6, "compiled / ours": others / seconds}
    return figures


def _norm(function: str, num_tokens: int, size: int) -> Case:
    """A norm of the sum of ``x`` and a residual, which is kept."""

    def measure(bench: Bench) -> Figures:
        shape = (3, 48) if bench.tiny else (num_tokens, size)
        data = torch.randn(5, *shape, dtype=bench.dtype, device=bench.device)
        weight, bias = data[0, 0], data[1, 0]
        # So small that the residual stays finite however often it is added.
        x = data[2] * 1e-3
        arguments = (x, weight, 1e-5) if function == "rms_norm" else (x, weight, bias, 1e-5)

        def make() -> Call:
            residual = data[3].clone()
            return lambda module: getattr(module, function)(*arguments, residual=residual)

        return _compare(bench, make, 4 * x.nbytes)

    return Case(f"{function} and residual {num_tokens} x {size}", measure, (_FASTER,))


def _gated(activation: str, num_tokens: int, size: int) -> Case:
    def measure(bench: Bench) -> Figures:
        shape = (3, 96) if bench.tiny else (num_tokens, 2 * size)
        x = torch.randn(shape, dtype=bench.dtype, device=bench.device)
        return _compare(
            bench, lambda: lambda module: module.gated(x, activation), x.nbytes * 3 // 2
        )

    return Case(f"{activation} {num_tokens} x {size}", measure, (_FASTER,))


def cases(_bench: Bench) -> list[Case]:
    """A decode's, a middling and a prompt's number of tokens, in the 8B shape."""
    return [
        case
        for tokens in (1, 256, 8192)
        for case in (
            _norm("rms_norm", tokens, 4096),
            _norm("layer_norm", tokens, 4096),
            _gated("silu", tokens, 14336),
            _gated("gelu_tanh", tokens, 14336),
        )
    ]
