"""A model's forward pass as one graph, compiled for any number of tokens, and kept on disk.

Owns tracing, the call of torch's compiler, and the cache of what it made. Knows nothing of batches,
CUDA graphs or KV memory.

The model is traced with fake tensors (``make_fx``): its Python runs once, and what it asks of torch
becomes one graph in which the numbers of tokens and of rows of logits are symbols. Python need not
be understood for that, as ``torch.compile`` does: the gate has shown that nothing a model does
depends on values, and attention is one opaque operator (``paged_model``). So there are no graph
breaks and no guards to check at each call, and tracing takes a fraction of the time. A model whose
code asks how many tokens there are would be traced for that number alone; that is refused.

Compiled graphs are kept under ``PAGETIER_CACHE`` (``~/.cache/pagetier``), named by all that they
depend on: the next start loads one in a second or two, and traces nothing.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import torch
import transformers
import triton
from torch import nn

from pagetier.handler import (
    fusion,
    graph_pieces,
    paged_model,
    projections,
    quantised_linear,
)
from pagetier.handler.graph_pieces import Piece, Stream

logger = logging.getLogger(__name__)

Backend = Literal["inductor", "graph"]
"""Who runs the traced graph: torch's compiler, or torch operator by operator (for tests)."""

# Takes token ids and positions, int64 ``(1, tokens)``, and the tokens whose logits are wanted,
# int64 ``(rows,)``; gives logits ``(1, rows, vocabulary)``.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Sizes that the graph is traced with. They decide nothing but what the compiler takes for typical;
# different, so that no relation between them is inferred.
_TYPICAL_TOKENS, _TYPICAL_ROWS = 256, 128


class NotTraceable(Exception):
    """A model cannot be one graph for any number of tokens; the message is the reason."""


def eager_forward(model: Any) -> Forward:
    """The model as it is, run operator by operator."""

    def forward(
        token_ids: torch.Tensor, positions: torch.Tensor, kept_tokens: torch.Tensor
    ) -> torch.Tensor:
        output = model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=kept_tokens,
        )
        logits: torch.Tensor = output.logits
        return logits

    return forward


def compile_forward(
    model: Any,
    backend: Backend = "inductor",
    *,
    by_kernels: bool = False,
    stream: Stream | None = None,
) -> Forward:
    """Make the model's forward pass one compiled graph, from the cache if it is there.

    Args:
        model: a transformers model with our attention, on its device; its weights are read anew
            at each call, but must stay the same tensors.
        backend: see ``Backend``.
        by_kernels: whether layers that ``projections`` swapped use our kernels.
        stream: of layers whose weights come and go; the graph is cut where they begin and end.

    Returns:
        A function of any number of tokens and rows but none.

    Raises:
        NotTraceable: the model cannot be one graph.
    """
    names, weights = _weights(model)
    with projections.by_kernels() if by_kernels else contextlib.nullcontext():
        if stream is not None:
            return _compile_pieces(model, backend, names, weights, by_kernels, stream)
        if backend == "graph":
            graph = _trace(model, names, weights)[0]
            return lambda *inputs: _first(graph(*weights, *inputs))
        path = _cache_path(model, names, weights, by_kernels)
        compiled = _load(path) if path.exists() else None
        if compiled is None:
            compiled = _compile(model, names, weights)
            _save(compiled, path)
    return lambda *inputs: _first(compiled(*weights, *inputs))


def _first(result: Any) -> torch.Tensor:
    """The graph's one result, which a compiled graph gives in a list."""
    tensor: torch.Tensor = result[0] if isinstance(result, list | tuple) else result
    return tensor


def _weights(model: nn.Module) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of all that the graph is not to hold itself: parameters and buffers."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return list(tensors), list(tensors.values())


@torch.no_grad()
def _trace(
    model: Any, names: list[str], weights: list[torch.Tensor]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The graph, and the fake inputs that it was traced with.

    The graph takes all weights, then the inputs of a ``Forward``.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        *weights, token_ids, positions, kept_tokens = tensors
        output: Any = torch.func.functional_call(
            model,
            dict(zip(names, weights, strict=True)),
            kwargs={
                "input_ids": token_ids,
                "position_ids": positions,
                "use_cache": False,
                "logits_to_keep": kept_tokens,
            },
        )
        logits: torch.Tensor = output.logits
        return logits

    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes)
    device = weights[0].device

    def symbolic(name: str, *shape: int) -> Any:
        dynamic = [DimDynamic.STATIC if n == 1 else DimDynamic.DYNAMIC for n in shape]
        return mode.from_tensor(
            torch.zeros(shape, dtype=torch.int64, device=device),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
        )

    fake_weights = [mode.from_tensor(weight, static_shapes=True) for weight in weights]
    token_ids = symbolic("token_ids", 1, _TYPICAL_TOKENS)
    kept_tokens = symbolic("kept_tokens", _TYPICAL_ROWS)
    # The dispatcher in Python, since some operators' parts in C++ take no symbols.
    with enable_python_dispatcher(), mode:
        positions = torch.empty_like(token_ids)  # of the same symbolic length
        inputs = [*fake_weights, token_ids, positions, kept_tokens]
        try:
            graph = make_fx(forward)(*inputs)
        except Exception as exc:
            raise NotTraceable(f"{type(exc).__name__}: {str(exc).strip()}") from exc
    if shapes.guards:
        raise NotTraceable(f"it depends on the batch's size: {shapes.guards[0].expr}")
    return graph, inputs


def _compile(model: Any, names: list[str], weights: list[torch.Tensor]) -> Any:
    """The graph, compiled by inductor."""
    return _compile_graph(*_trace(model, names, weights))


def _compile_graph(graph: torch.fx.GraphModule, inputs: list[Any], mode: Any = None) -> Any:
    """A graph for these fake inputs, compiled by inductor."""
    from torch._inductor import standalone_compile

    mode = inputs[-1].fake_mode if mode is None else mode
    context = torch._guards.TracingContext(mode)
    # Shapes were checked when the batch was made: not again for each of hundreds of weights.
    options = {"config_patches": {"size_asserts": False, "alignment_asserts": False}}
    with torch._guards.tracing(context), torch.no_grad():
        return standalone_compile(
            graph, inputs, dynamic_shapes="from_tracing_context", options=options
        )


def _compile_pieces(
    model: Any,
    backend: Backend,
    names: list[str],
    weights: list[torch.Tensor],
    by_kernels: bool,
    stream: Stream,
) -> Forward:
    """The forward pass of a model with streamed layers, from the cache if it is there."""
    path = _cache_path(model, names, weights, by_kernels, _places(model, stream.layers))
    kept = _load_pieces(path) if backend == "inductor" and path.is_dir() else None
    if kept is not None:
        pieces, functions = kept
    else:
        with graph_pieces.marks(stream.layers), stream.paused():
            graph, inputs = _trace(model, names, weights)
        pieces, graphs = graph_pieces.cut(graph)
        functions = graphs
        if backend == "inductor":
            mode = inputs[-1].fake_mode
            functions = [_compile_graph(some, _fake_inputs(some), mode) for some in graphs]
            _save_pieces(pieces, functions, path)
    run = graph_pieces.run_pieces(pieces, functions, stream)
    return lambda *inputs: _first(run(*weights, *inputs))


def _fake_inputs(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _places(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in layers]


# --- the cache -----------------------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """Where compiled graphs are kept: ``PAGETIER_CACHE``, or ``pagetier`` in the user's cache."""
    own = os.environ.get("PAGETIER_CACHE")
    if own:
        return pathlib.Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "pagetier"


def _cache_path(
    model: Any,
    names: list[str],
    weights: list[torch.Tensor],
    by_kernels: bool = False,
    layers: list[str] | None = None,
) -> pathlib.Path:
    """The file of the graph that this model, on this device, with these versions compiles to.

    ``layers`` are those that are pieces of their own; a folder then.
    """
    device = weights[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    settings = model.config.to_dict()
    settings.pop("_name_or_path", None)
    modules = (fusion, graph_pieces, paged_model, projections, quantised_linear)
    facts = [
        torch.__version__,
        triton.__version__,
        transformers.__version__,
        name,
        [pathlib.Path(m.__file__ or "").read_text() for m in modules],
        pathlib.Path(__file__).read_text(),
        type(model).__name__,
        by_kernels,
        layers,
        settings,
        [type(m).__name__ for m in model.modules()],
        [(n, str(w.dtype), tuple(w.shape)) for n, w in zip(names, weights, strict=True)],
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "compiled" / f"{digest[:32]}.{'bin' if layers is None else 'pieces'}"


def _load(path: pathlib.Path) -> Any:
    """A kept graph; None, and the file removed, if it cannot be used."""
    from torch._inductor.standalone_compile import CompiledArtifact

    try:
        return CompiledArtifact.load(path=str(path), format="binary")
    except Exception as exc:  # whatever torch finds wrong with it, compiling anew is right
        logger.warning(
            "A kept compiled graph cannot be used and is made anew (%s).", type(exc).__name__
        )
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _save(compiled: Any, path: pathlib.Path) -> None:
    """Keep a graph for the next start; what hinders that is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compiled.save(path=str(path), format="binary")
    except Exception as exc:  # as above: the graph itself is good
        logger.warning(
            "The compiled graph cannot be kept; the next start compiles again (%s).", exc
        )


def _save_pieces(pieces: list[Piece], compiled: list[Any], path: pathlib.Path) -> None:
    """Keep pieces as a folder, complete or not at all; what hinders that is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = pathlib.Path(folder) / "made"
            made.mkdir()
            for number, some in enumerate(compiled):
                some.save(path=str(made / f"{number}.bin"), format="binary")
            (made / "pieces.json").write_bytes(msgspec.json.encode(pieces))
            shutil.rmtree(path, ignore_errors=True)
            made.rename(path)
    except Exception as exc:  # as above
        logger.warning(
            "The compiled pieces cannot be kept; the next start compiles again (%s).", exc
        )


def _load_pieces(path: pathlib.Path) -> tuple[list[Piece], list[Any]] | None:
    """Kept pieces; None if they cannot be used."""
    try:
        pieces = msgspec.json.decode((path / "pieces.json").read_bytes(), type=list[Piece])
    except Exception:
        return None
    compiled = [_load(path / f"{number}.bin") for number in range(len(pieces))]
    return None if None in compiled else (pieces, compiled)
