"""Weights streamed: layers whose tensors lie packed in host memory, and visit the device in turn.

Owns the host's slabs, the slots on the device, the copies from one to the other, and their order
with what computes. Knows nothing of models beyond modules with parameters and buffers.

Each streamed layer's tensors are packed into one slab of host memory, copied by one transfer. A
slot on the device has room for one layer, and the layer's parameters and buffers *are* views of its
slot: they never move, so compiled code needs not know that their contents come and go. A layer is
computed between ``acquire`` and ``release``::

    acquire   the work that follows waits, on the device, until the slot holds the layer
    release   once the work so far has ended, the slot's next layer is copied into it

So a copy runs while other layers compute, and the last ones of a step while the next step's first
layers do: a slot's next layer after the last is the first. ``acquire`` trusts no order: a slot that
was left with another layer, by a step that failed halfway, is filled again.

On a CUDA device a stream of its own copies, and waiting is an event. Host memory that cannot be
pinned goes through a pinned buffer, filled by a thread. Elsewhere slots are host memory and a
worker thread copies.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from pagetier.offload import host_memory
from pagetier.offload.weight_plan import WeightPlan

logger = logging.getLogger(__name__)

# Tensors begin at multiples of this in slab and slot, as in memory of torch's own.
_ALIGNMENT_BYTES = 256
_BOUNCE_BYTES = 16 << 20

# Copies a slab, uint8 ``(bytes,)``, into a slot of the same size.
Copy = Callable[[torch.Tensor, torch.Tensor], object]


class WeightCopyFailed(RuntimeError):
    """A layer's weights did not arrive in their slot; nothing was computed with what is there."""


# --- packing -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Where one tensor of a layer lies in slab and slot."""

    tensor: torch.Tensor
    owners: tuple[tuple[nn.Module, str], ...]  # a module, and its name for the tensor
    offset: int

    def view(self, packed: torch.Tensor) -> torch.Tensor:
        """The tensor in a slab or slot, uint8 ``(bytes,)``."""
        tensor = self.tensor
        typed = packed[self.offset : self.offset + tensor.nbytes].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), typed.storage_offset())


def find_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """A model's decoder layers: the largest list of as many modules, whatever its name.

    Returns:
        The layers; none if the model has no such list.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    sizes = [sum(t.nbytes for t in _tensors(some)) for some in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def packed_bytes(model: nn.Module, layers: Sequence[nn.Module]) -> list[int]:
    """What each layer takes in a slab: all of it that no other module has, too."""
    shared = _shared(model, layers)
    return [_layout(layer, shared)[1] for layer in layers]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's own tensors, without those of its parts."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _shared(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Tensors, by ``id``, that more than one layer has, or a layer and the rest of the model."""
    inside = {module for layer in layers for module in layer.modules()}
    outside = (module for module in model.modules() if module not in inside)
    shared = {id(tensor) for module in outside for _, tensor in _named(module)}
    seen: set[int] = set()
    for layer in layers:
        own = {id(tensor) for tensor in _tensors(layer)}
        shared |= own & seen
        seen |= own
    return shared


def _layout(layer: nn.Module, shared: set[int]) -> tuple[list[_Piece], int]:
    """Where the layer's own tensors lie when packed, and the size of that in bytes."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for module in layer.modules():
        for name, tensor in _named(module):
            if _is_packable(tensor) and id(tensor) not in shared:
                owners.setdefault(id(tensor), []).append((module, name))
                tensors[id(tensor)] = tensor
    pieces, offset = [], 0
    for key, tensor in tensors.items():
        pieces.append(_Piece(tensor, tuple(owners[key]), offset))
        offset += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return pieces, offset


def _is_packable(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order; anything else stays where it is."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return False
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()


# --- copies --------------------------------------------------------------------------------------


class _Lane(Protocol):
    """What fills slots."""

    def start(self, slot: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Begin a copy into a slot, not before what was launched so far has ended."""
        ...

    def wait(self, slot: int) -> None:
        """Let what is launched from now on follow the slot's last copy; raises if that failed."""
        ...

    def close(self) -> None:
        """Let copies under way end and take no more."""
        ...


class _ThreadLane:
    """Slots filled by a worker thread, in order; who computes waits for it.

    Args:
        num_slots: on the device.
        fill: fills a slot: ``fill(slot, source, destination)``.
    """

    def __init__(
        self, num_slots: int, fill: Callable[[int, torch.Tensor, torch.Tensor], object]
    ) -> None:
        self._fill = fill
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "pagetier-weights")
        self._copies: list[concurrent.futures.Future[object]] = [
            concurrent.futures.Future() for _ in range(num_slots)
        ]

    def start(self, slot: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._copies[slot] = self._worker.submit(self._fill, slot, source, destination)

    def wait(self, slot: int) -> None:
        self._copies[slot].result()

    def close(self) -> None:
        self._worker.shutdown()


class _StreamLane:
    """Slots on a CUDA device, filled on a stream of their own."""

    def __init__(self, num_slots: int, device: torch.device, copy: Copy) -> None:
        self._copy = copy
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._freed, self._filled = (
            [torch.cuda.Event() for _ in range(num_slots)]  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def start(self, slot: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._freed[slot].record(torch.cuda.current_stream(self._device))
        self._fill(slot, source, destination)

    def _fill(self, slot: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._stream.wait_event(self._freed[slot])
        with torch.cuda.stream(self._stream):
            self._copy(source, destination)
        self._filled[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[slot])

    def close(self) -> None:
        self._stream.synchronize()


class _BounceLane(_StreamLane):
    """The same from host memory that is not pinned: a thread moves it through two pinned pieces.

    The driver would do likewise, but hold up whoever launches meanwhile.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        super().__init__(num_slots, device, self._bounce)
        self._pinned = torch.empty(2, _BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._emptied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._thread = _ThreadLane(num_slots, self._fill)

    def start(self, slot: int, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._freed[slot].record(torch.cuda.current_stream(self._device))
        self._thread.start(slot, source, destination)

    def wait(self, slot: int) -> None:
        self._thread.wait(slot)
        super().wait(slot)

    def close(self) -> None:
        self._thread.close()
        super().close()

    def _bounce(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        for number, start in enumerate(range(0, len(source), _BOUNCE_BYTES)):
            some = source[start : start + _BOUNCE_BYTES]
            emptied, pinned = self._emptied[number % 2], self._pinned[number % 2][: len(some)]
            emptied.synchronize()
            pinned.copy_(some)
            destination[start : start + len(some)].copy_(pinned, non_blocking=True)
            emptied.record(self._stream)


def _copy(source: torch.Tensor, destination: torch.Tensor) -> None:
    destination.copy_(source, non_blocking=True)


# --- streaming -----------------------------------------------------------------------------------


class WeightStream:
    """Streamed layers of a model; made of them, it takes their tensors over.

    Args:
        model: on the host, with all that is to be done to its weights done: names and values of
            tensors stay, but those of streamed layers move into slots and must not be replaced.
            The rest of the model stays where it is.
        layers: of the model, in the order in which they are computed.
        plan: which of them are streamed, through how many slots.
        device: where the slots are.
        copy: fills a slot from a slab; tests pass one that is late or fails.
        progress: called with the number of streamed layers that are packed, after each.

    Attributes:
        plan: as given.
        layers: the streamed layers.
        rung: how the slabs' memory was had, as in ``host_memory``.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        plan: WeightPlan,
        device: torch.device,
        *,
        copy: Copy | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.plan = plan
        self.layers = [layers[layer] for layer in plan.layers]
        shared = _shared(model, layers)
        self._slots = torch.empty(plan.num_slots, plan.slot_bytes, dtype=torch.uint8, device=device)
        # Not touched before it is filled, while the layers' own memory is given up: at its peak the
        # host has the model and one layer.
        slabs = torch.empty(len(self.layers), plan.slot_bytes, dtype=torch.uint8)
        self._slabs = []
        for position, layer in enumerate(self.layers):
            slab, slot = slabs[position], self._slots[position % plan.num_slots]
            pieces, num_bytes = _layout(layer, shared)
            for piece in pieces:
                piece.view(slab).copy_(piece.tensor)
                _put(piece, slot)
            self._slabs.append(slab[:num_bytes])
            del pieces
            progress(position + 1)
        self._host = (
            host_memory.pinned(slabs)
            if device.type == "cuda"
            else host_memory.HostPages(slabs, "pageable")
        )
        self._lane = self._make_lane(copy)
        self._held: list[int | None] = [None] * plan.num_slots
        self._is_paused = False
        self._hooks = [
            hook
            for position, layer in enumerate(self.layers)
            for hook in (
                layer.register_forward_pre_hook(self._on_enter(position)),
                layer.register_forward_hook(self._on_leave(position)),
            )
        ]
        for position in range(min(plan.num_slots, len(self.layers))):
            self._start(position)

    @property
    def rung(self) -> str:
        """How the slabs' memory was had; see ``host_memory``."""
        return self._host.rung

    def acquire(self, position: int) -> None:
        """Let the work that follows wait until the slot of a streamed layer holds it.

        Raises:
            WeightCopyFailed: the copy failed; the next call tries again.
        """
        slot = position % self.plan.num_slots
        if self._held[slot] != position:
            self._start(position)
        try:
            self._lane.wait(slot)
        except Exception as exc:
            self._held[slot] = None
            layer = self.plan.layers[position]
            raise WeightCopyFailed(
                f"The weights of layer {layer} could not be copied to the device ({exc}); the step "
                "that needs them was given up."
            ) from exc

    def release(self, position: int) -> None:
        """Let a streamed layer's slot be filled with its next layer once the work so far ended."""
        following = position + self.plan.num_slots
        # The last layers are followed by the next step's first ones.
        self._start(following if following < len(self.layers) else position % self.plan.num_slots)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Copy nothing while modules are called: for passes that compute nothing."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def close(self) -> None:
        """End copies and the thread, and unpin; the layers must not be computed any more."""
        for hook in self._hooks:
            hook.remove()
        self._lane.close()
        self._host.close()

    def _make_lane(self, copy: Copy | None) -> _Lane:
        num_slots, device = self.plan.num_slots, self._slots.device
        copy_slab = copy or _copy
        if device.type != "cuda":
            return _ThreadLane(num_slots, lambda _, *pair: copy_slab(*pair))
        if self.rung != "pinned" and copy is None:
            with contextlib.suppress(RuntimeError):  # not even that much can be pinned
                return _BounceLane(num_slots, device)
        return _StreamLane(num_slots, device, copy_slab)

    def _start(self, position: int) -> None:
        slot = position % self.plan.num_slots
        if self._held[slot] == position:
            return
        self._held[slot] = None  # if the copy cannot even be started
        slab = self._slabs[position]
        self._lane.start(slot, slab, self._slots[slot][: len(slab)])
        self._held[slot] = position

    def _on_enter(self, position: int) -> Any:
        return lambda *_: None if self._is_paused else self.acquire(position)

    def _on_leave(self, position: int) -> Any:
        return lambda *_: None if self._is_paused else self.release(position)


def _put(piece: _Piece, slot: torch.Tensor) -> None:
    """Let a layer's tensor be the view of a slot; its own memory is given up."""
    view = piece.view(slot)
    tensor = piece.tensor
    if isinstance(tensor, nn.Parameter):
        tensor.data = view  # the same object, whoever else refers to it
        return
    for module, name in piece.owners:
        module._buffers[name] = view
