"""Which layers of a model are streamed, and through how many slots.

Owns that choice, from sizes in bytes alone. Knows nothing of tensors and imports no torch.

Streaming a layer frees its memory on the device, but slots take some back. There are two, so that
one is filled while the other one computes, and streamed layers take them in turn, step after step.
Their number is even: else the last one of a step and the first of the next would share a slot, and
the link would wait for the last one to be computed. A third slot would cure that, too, and take as
much memory as streaming another layer frees.
"""

import dataclasses
from collections.abc import Sequence

_NUM_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """Which layers are streamed.

    Attributes:
        layers: their indices in the model, ascending; empty if none.
        num_slots: layers of room on the device for them.
        streamed_bytes: what each step copies.
        slot_bytes: of one slot, that of the largest streamed layer.
    """

    layers: tuple[int, ...]
    num_slots: int
    streamed_bytes: int
    slot_bytes: int

    @property
    def freed_bytes(self) -> int:
        """Memory of the device that streaming gains: what is streamed, less the slots."""
        return self.streamed_bytes - self.num_slots * self.slot_bytes


def plan_weights(layer_bytes: Sequence[int], wanted_bytes: int) -> WeightPlan:
    """The fewest layers whose streaming frees ``wanted_bytes``, spread evenly over the model.

    Args:
        layer_bytes: of each layer of the model, packed.
        wanted_bytes: to be freed on the device; 0 or less streams none. If no number of layers
            frees as much, the one that frees most is taken; if none frees anything, none is.
    """
    best = WeightPlan((), 0, 0, 0)
    if wanted_bytes <= 0:
        return best
    for count in range(2, len(layer_bytes) + 1, 2):
        plan = spread(layer_bytes, count)
        if plan.freed_bytes > best.freed_bytes:
            best = plan
        if best.freed_bytes >= wanted_bytes:
            break
    return best


def spread(layer_bytes: Sequence[int], count: int) -> WeightPlan:
    """``count`` layers, evenly spread among the others, so that the link is never idle for long."""
    layers = tuple(number * len(layer_bytes) // count for number in range(count))
    sizes = [layer_bytes[layer] for layer in layers]
    return WeightPlan(layers, _NUM_SLOTS, sum(sizes), max(sizes))
