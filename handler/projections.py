"""Linear layers computed by our kernels, where the tables of the device say that these win.

Owns which layers of a loaded model are swapped, the proof that each computes the same, and when
they use the kernels: within ``by_kernels``, as the graphs of decodes are made. Elsewhere they are
torch's, since where no graph is replayed a kernel costs the host more than it saves the GPU. Knows
nothing of architectures, nor of how a kernel is chosen: ``kernels.linear`` looks the number of
tokens up at each call, and leaves to torch what it has no entry for.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pagetier.handler import fusion
from pagetier.kernels import projection as _registers_the_operator  # noqa: F401
from pagetier.kernels import tuning

logger = logging.getLogger(__name__)

# Numbers of tokens that are looked up in the tables, and on which swapped layers are checked.
_LOOKED_UP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CHECKED_TOKENS = (1, 4)


_uses_kernels = False


@contextlib.contextmanager
def by_kernels() -> Iterator[None]:
    """Let swapped layers use the kernels, while a model is checked or traced; not reentrant."""
    global _uses_kernels
    _uses_kernels = True
    try:
        yield
    finally:
        _uses_kernels = False


class TunedLinear(nn.Module):
    """In the place of a linear layer, whose parameters it takes over."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., out_features)`` for an input ``(..., in_features)``."""
        return multiply(x, self.weight, self.bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``kernels.linear`` as an operator that a compiler takes as it is, or torch's."""
    if not _uses_kernels:
        return nn.functional.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.pagetier.linear(x, weight, bias)
    return product


def wins(weight: torch.Tensor) -> bool:
    """Whether the tables of the weight's device name a kernel of ours for any number of tokens."""
    out_size, in_size = weight.shape
    return any(
        tuning.settings(
            "linear",
            weight.device,
            {"kernel": "torch"},
            itemsize=weight.element_size(),
            num_tokens=num_tokens,
            out_size=out_size,
            in_size=in_size,
        )["kernel"]
        != "torch"
        for num_tokens in _LOOKED_UP_TOKENS
    )


@torch.no_grad()
def swap(model: nn.Module) -> int:
    """Swap the layers whose shapes win, in place; returns how many."""
    num_swapped = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, fusion.FusedPart):
            if module.is_owner and wins(module.weight) and _is_right(name, module):
                module.use(multiply)
                num_swapped += 1
        elif type(module) is nn.Linear and wins(module.weight) and _is_right(name, module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, TunedLinear(module))
            num_swapped += 1
    return num_swapped


def _is_right(name: str, layer: Any) -> bool:
    """Whether our product equals torch's but for rounding, on random input."""
    weight, bias = layer.weight, layer.bias
    generator = torch.Generator().manual_seed(0)
    for num_tokens in _CHECKED_TOKENS:
        x = torch.randn(num_tokens, weight.shape[1], generator=generator)
        x = x.to(weight.device, weight.dtype)
        expected = nn.functional.linear(x, weight, bias)
        with by_kernels():
            product = multiply(x, weight, bias)
        if not fusion.is_close(weight.shape[1], product, expected):
            logger.warning("The layer '%s' stays torch's: our product differs from it.", name)
            return False
    return True
