"""Linear layers that read the same tensor, made one: q, k and v, or gate and up, in one product.

Owns which layers belong together, the fused weight, and the proof that it computes the same. Knows
nothing of architectures: which layers of a module read the same tensor is seen in a trial run
(``watch``), not guessed from names, so whatever a model calls its projections, and whether it has
any to fuse, needs no table.

A small product does not fill a GPU, and each costs a launch: one product of several layers' weights
reads the input once and takes one launch. The first of the fused layers that is called computes for
all, the others hand out their part of the result; the model's own code stays as it is.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pagetier.handler import quantised_linear
from pagetier.handler.quantised_linear import QuantisedLinear

logger = logging.getLogger(__name__)

# Tokens of the trial input on which fused layers must equal those they replace.
_CHECKED_TOKENS = 4

# A module's name, and the names of its linear layers that read the same tensor.
Group = tuple[str, tuple[str, ...]]


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[list[Group]]:
    """See which linear layers of one module read the same tensor in the passes run meanwhile.

    Only layers that are called exactly once, and whose type is ``nn.Linear`` itself: a subclass
    may compute something else. The yielded list is filled at the end.
    """
    readers: dict[tuple[str, str], list[torch.Tensor]] = {}
    hooks = []
    groups: list[Group] = []

    def note(key: tuple[str, str]) -> Any:
        readers[key] = []
        return lambda _, args: readers[key].append(args[0])

    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if type(child) is nn.Linear:
                hooks.append(child.register_forward_pre_hook(note((name, child_name))))
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    by_input: dict[tuple[str, int], list[str]] = {}
    for (name, child_name), inputs in readers.items():
        if len(inputs) == 1:  # kept until here, so that no two inputs have one id
            by_input.setdefault((name, id(inputs[0])), []).append(child_name)
    groups += [(name, tuple(names)) for (name, _), names in by_input.items() if len(names) > 1]


@torch.no_grad()
def fuse(model: nn.Module, groups: list[Group]) -> int:
    """Replace each group's layers by parts of one product; returns how many groups were fused.

    Group by group, and each layer's weight is freed once it was copied: the memory needed at the
    peak is that of the model and one fused weight. A group whose layers do not match, or whose
    fused product does not equal theirs on random input, stays as it is.
    """
    num_fused = 0
    for name, child_names in groups:
        parent = model.get_submodule(name)
        layers = [getattr(parent, child_name) for child_name in child_names]
        if all(isinstance(layer, QuantisedLinear) for layer in layers):
            joined = quantised_linear.join(layers)
            if joined is None:
                continue
            parts = _parts_of(joined, layers)
        elif _match(layers):
            parts = _fuse_layers(layers)
        else:
            continue
        if parts is None:
            logger.warning(
                "The layers %s of '%s' stay apart: fused, they compute something else.",
                ", ".join(child_names),
                name,
            )
            continue
        for child_name, part in zip(child_names, parts, strict=True):
            setattr(parent, child_name, part)
        num_fused += 1
    return num_fused


def _match(layers: list[Any]) -> bool:
    """Whether the layers can be one: plain, of one input size, dtype and device, alike in bias."""
    first = layers[0]
    return all(
        type(layer) is nn.Linear
        and layer.in_features == first.in_features
        and layer.weight.dtype == first.weight.dtype
        and layer.weight.device == first.weight.device
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
    )


def _fuse_layers(layers: list[nn.Linear]) -> "list[FusedPart] | None":
    """The parts that replace ``layers``; None, and the layers unchanged, if they would not equal.

    Checked layers lose their weights.
    """
    first = layers[0]
    sizes = [layer.out_features for layer in layers]
    weight = first.weight.new_empty(sum(sizes), first.in_features)
    bias = None if first.bias is None else first.bias.new_empty(sum(sizes))
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(_CHECKED_TOKENS, first.in_features, generator=generator)
    trial = trial.to(weight.device, weight.dtype)
    expected = [layer(trial) for layer in layers]
    shared = _Shared(sizes)
    parts = [FusedPart(shared, index) for index in range(len(layers))]
    parts[0].weight = nn.Parameter(weight, requires_grad=False)
    parts[0].bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    shared.owner = (parts[0],)
    rows = torch.split(weight, sizes)
    biases = [None] * len(sizes) if bias is None else list(torch.split(bias, sizes))
    for layer, some_rows, some_bias in zip(layers, rows, biases, strict=True):
        some_rows.copy_(layer.weight)
        if some_bias is not None:
            some_bias.copy_(layer.bias)
    found = [part(trial) for part in parts]
    if not all(map(functools.partial(is_close, first.in_features), found, expected)):
        return None
    for layer in layers:
        layer.weight = layer.bias = None  # type: ignore[assignment]
    return parts


def _parts_of(joined: QuantisedLinear, layers: list[QuantisedLinear]) -> "list[FusedPart] | None":
    """The parts of a ``joined`` layer that replace ``layers``; None if they would not equal."""
    shared = _Shared([layer.out_features for layer in layers])
    parts = [FusedPart(shared, index) for index in range(len(layers))]
    parts[0].weight = parts[0].bias = None  # type: ignore[assignment]
    parts[0].joined = joined
    shared.owner = (parts[0],)
    shared.product = lambda x, _weight, _bias: shared.owner[0].joined(x)
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(_CHECKED_TOKENS, joined.in_features, generator=generator)
    trial = trial.to(joined.packed.device, joined.scales.dtype)
    found, expected = [part(trial) for part in parts], [layer(trial) for layer in layers]
    if not all(map(functools.partial(is_close, joined.in_features), found, expected)):
        return None
    return parts


def is_close(num_summed: int, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they differ by no more than rounding: of the result, and of the sum in float32."""
    size = float(expected.float().abs().max())
    rounding = 2 * torch.finfo(expected.dtype).eps
    summing = 4 * math.sqrt(num_summed) * torch.finfo(torch.float32).eps
    difference = float((found.float() - expected.float()).abs().max())
    return difference <= (rounding + summing) * size


class _Shared:
    """What the parts of one fused product share: the result of a call, until all have had theirs.

    Args:
        sizes: output features of each part.

    Attributes:
        owner: the part that has the weight, in a tuple, so that it is no one else's submodule.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.owner: tuple[FusedPart, ...] = ()
        self.product: Callable[..., torch.Tensor] = nn.functional.linear
        self.source: torch.Tensor | None = None
        self.results: list[torch.Tensor] = []
        self.num_left = 0


class FusedPart(nn.Module):
    """In the place of one of the fused linear layers: gives its part of the one product.

    The parts may be called in any order. Called with another input than the one before, a part
    computes the product anew, so a model that behaves otherwise than in its trial run is slower,
    never wrong.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    joined: QuantisedLinear

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This part's ``(..., out_features)`` for an input ``(..., in_features)``."""
        shared = self._shared
        if shared.source is not x:
            owner = shared.owner[0]
            product = shared.product(x, owner.weight, owner.bias)
            shared.results = list(torch.split(product, shared.sizes, -1))
            shared.source = x
            shared.num_left = len(shared.sizes)
        result = shared.results[self._index]
        shared.num_left -= 1
        if shared.num_left == 0:  # nothing is kept between passes
            shared.source = None
            shared.results = []
        return result

    @property
    def is_owner(self) -> bool:
        """Whether it has the weight of all parts, and that is not quantised."""
        return self._shared.owner[0] is self and self.weight is not None

    def use(self, product: Callable[..., torch.Tensor]) -> None:
        """Let all parts compute by ``product(x, weight, bias)`` instead of torch's ``linear``."""
        self._shared.product = product

    def extra_repr(self) -> str:
        """Which part of which product it is."""
        sizes = self._shared.sizes
        return f"part={self._index}, out_features={sizes[self._index]} of {sum(sizes)}"
