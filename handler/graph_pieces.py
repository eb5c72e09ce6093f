"""A traced graph cut into pieces where streamed layers begin and end, and run one after another.

Owns the marks that a trace leaves there, the cut, and the order in which pieces run. Knows nothing
of how a piece is compiled, nor of how a layer's weights come and go: it calls ``acquire`` before
the piece that is the layer, and ``release`` after it.

Within one compiled graph the waiting would have to be an operator, and a compiler may move whatever
reads weights and nothing else, as the unpacking of quantised ones, to before it. Pieces are
launched one after another: what a piece reads has arrived, and is left alone until it has ended.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

Function = Callable[..., Any]


class Stream(Protocol):
    """What brings the weights of streamed layers; see ``offload.weights.WeightStream``."""

    layers: list[nn.Module]

    def acquire(self, position: int) -> None:
        """Let the work that follows wait for a streamed layer's weights."""
        ...

    def release(self, position: int) -> None:
        """Let the weights go once the work so far has ended."""
        ...

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Bring nothing meanwhile, though the layers' modules are called."""
        ...


_library: Any = torch.library.Library("pagetier", "FRAGMENT")  # type: ignore[no-untyped-call]
# Said to write what it is given, so that no pass takes it for dead.
_library.define("layer_edge(Tensor(a!) hidden, int position, bool begins) -> ()")
_library.impl("layer_edge", lambda *_: None, "CompositeExplicitAutograd")
torch.library.register_fake("pagetier::layer_edge", lambda *_: None, lib=_library)


@contextlib.contextmanager
def marks(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let traces made meanwhile show where each of these layers begins and ends."""

    def begin(position: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            torch.ops.pagetier.layer_edge(_first_tensor((args, kwargs)), position, True)

        return hook

    def end(position: int) -> Any:
        def hook(_: nn.Module, args: object, output: object) -> None:
            torch.ops.pagetier.layer_edge(_first_tensor(output), position, False)

        return hook

    hooks = []
    for position, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(begin(position), with_kwargs=True))
        hooks.append(layer.register_forward_hook(end(position)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(values: Any) -> torch.Tensor:
    leaves = torch.utils._pytree.tree_leaves(values)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a graph; values of the whole are numbered.

    Attributes:
        inputs: numbers of the values it takes, in order.
        outputs: numbers of the values it gives.
        last_uses: values that nobody needs after it.
        layer: the position of the streamed layer that it is, or None.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last_uses: tuple[int, ...]
    layer: int | None


def cut(graph: fx.GraphModule) -> tuple[list[Piece], list[Any]]:
    """Cut a graph with ``marks`` and one result into pieces, of which each gives a tuple.

    Returns:
        The pieces, and a graph module of each. The whole graph's inputs have the first numbers,
        and its result is the last piece's only output.
    """
    placeholders, segments, result = _segments(graph)
    numbers = {node: number for number, node in enumerate(placeholders)}
    last_user: dict[fx.Node, int] = {}
    for index, (_, nodes) in enumerate(segments):
        for node in nodes:
            last_user |= dict.fromkeys(node.all_input_nodes, index)
    last_user[result] = len(segments)
    pieces, modules = [], []
    for index, (layer, nodes) in enumerate(segments):
        own = set(nodes)
        needed = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        # Constants are no values: each piece has a reference of its own.
        constants = [node for node in needed if node.op == "get_attr"]
        inputs = [node for node in needed if node not in own and node.op != "get_attr"]
        outputs = [node for node in nodes if last_user.get(node, -1) > index]
        numbers |= {node: len(numbers) + at for at, node in enumerate(outputs)}
        done = [node for node in inputs if last_user[node] == index]
        pieces.append(
            Piece(
                tuple(numbers[node] for node in inputs),
                tuple(numbers[node] for node in outputs),
                tuple(numbers[node] for node in done),
                layer,
            )
        )
        modules.append(_extract(graph, inputs, constants, nodes, outputs))
    return pieces, modules


def _segments(
    graph: fx.GraphModule,
) -> tuple[list[fx.Node], list[tuple[int | None, list[fx.Node]]], fx.Node]:
    """The inputs, the nodes between marks with the layer that they are, and the result."""
    placeholders: list[fx.Node] = []
    segments: list[tuple[int | None, list[fx.Node]]] = [(None, [])]
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            placeholders.append(node)
        elif node.op == "output":
            (result,) = node.all_input_nodes
        elif node.target is torch.ops.pagetier.layer_edge.default:
            _, position, begins = node.args
            segments.append((position if begins else None, []))
        elif node.op != "get_attr":
            segments[-1][1].append(node)
    return placeholders, [(layer, nodes) for layer, nodes in segments if nodes], result


def _extract(
    graph: fx.GraphModule,
    inputs: list[fx.Node],
    constants: list[fx.Node],
    nodes: list[fx.Node],
    outputs: list[fx.Node],
) -> fx.GraphModule:
    """A graph of these nodes alone."""
    piece = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = piece.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in (*constants, *nodes):
        copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(graph, piece)


def run_pieces(pieces: Sequence[Piece], functions: Sequence[Function], stream: Stream) -> Function:
    """A function of the graph's inputs that runs its pieces; gives the graph's result."""
    num_values = 1 + max(max(piece.inputs + piece.outputs) for piece in pieces)
    steps = list(zip(pieces, functions, strict=True))

    def run(*inputs: Any) -> Any:
        values: list[Any] = [*inputs, *[None] * (num_values - len(inputs))]
        for piece, function in steps:
            if piece.layer is not None:
                stream.acquire(piece.layer)
            results = function(*[values[number] for number in piece.inputs])
            if piece.layer is not None:
                stream.release(piece.layer)
            for number, value in zip(piece.outputs, results, strict=True):
                values[number] = value
            for number in piece.last_uses:
                values[number] = None
        return values[pieces[-1].outputs[0]]

    return run
