"""How a transformers model reaches the paged KV cache: the attention function plugged into it.

Owns the name under which transformers knows our attention, and the place where a forward pass finds
its keys and values. Knows nothing of how models are loaded, compiled or scheduled.

To a compiler attention is one opaque operator, ``pagetier::attention``, that only writes ``out``:
it sees neither the caches nor the context.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from pagetier import kernels
from pagetier.offload.tiers import LayerCaches

# No mask is registered under this name, so transformers builds none.
ATTENTION = "pagetier"


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """Where the keys and values of the batch in a forward pass are.

    Attributes:
        caches: each layer's keys and values, and their scales if they are quantised.
        slots: slot of each new token, int64 ``(tokens,)``; -1 is written nowhere.
        metadata: block tables and lengths.
    """

    caches: Sequence[LayerCaches]
    slots: torch.Tensor
    metadata: kernels.AttentionMetadata


class _Current(threading.local):
    context: ForwardContext | None = None


_current = _Current()


@contextlib.contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Let the models that this thread calls find their keys and values.

    A module-level place rather than an argument of the model's, since some architectures drop
    arguments that they do not know on the way to their attention.
    """
    previous, _current.context = _current.context, context
    try:
        yield
    finally:
        _current.context = previous


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Write a layer's new keys and values, then its attention over all of them to ``out``.

    ``query``, ``key``, ``value`` and ``out`` are ``(tokens, heads, dim)``.
    """
    context = _current.context
    assert context is not None, "the model was called outside forward_context"
    k_cache, v_cache, scales = context.caches[layer]
    kernels.write_kv(key, value, k_cache, v_cache, context.slots, **scales)
    kernels.paged_attention(
        query,
        k_cache,
        v_cache,
        context.metadata,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out=out,
        **scales,
    )


_library: Any = torch.library.Library("pagetier", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor(a!) out, int layer, "
    "float scale, int window, float softcap) -> ()"
)
# Directly, and not by torch.library.custom_op, whose wrappers cost more than a launch.
_library.impl("attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("pagetier::attention", lambda *_: None, lib=_library)


def _paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of all layers; takes and returns what transformers defines.

    ``query``, ``key`` and ``value`` are ``(1, heads, tokens, head_dim)``, a flat batch; the result
    is ``(1, tokens, heads, v_dim)``. Other keywords are those that the gate found harmless.
    """
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    torch.ops.pagetier.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        s_aux,
        out,
        module.layer_idx,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out[None], None


AttentionInterface.register(ATTENTION, _paged_attention)
