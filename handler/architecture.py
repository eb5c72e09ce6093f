"""The gate: which architectures are served, and what a trial run shows of one.

Owns the geometry of attention layers and the checks that run before any weight is read. Knows
nothing of files or weights. The model is built without memory, on the ``meta`` device, and runs
three tokens with a probe in place of attention; what the paged attention would compute wrongly
without anybody noticing is refused.
"""

import collections
import contextlib
import copy
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagetier.handler import checkpoint_formats, fusion, quantisation
from pagetier.handler.errors import ModelError
from pagetier.handler.live_bytes import LiveBytes
from pagetier.handler.quantised_linear import QuantisedLinear
from pagetier.offload.tiers import LayerKV

logger = logging.getLogger(__name__)

_PROBE = "pagetier_probe"
_PROBE_TOKENS = 3
_TRIAL_DTYPE = torch.bfloat16

# Architectures whose tokens are tested to equal those of transformers' own `generate`.
TESTED_MODEL_TYPES = frozenset({
    "biogpt", "cohere", "cohere2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3_text",
    "gemma4_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "llama",
    "mistral", "mixtral", "nemotron", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """What one layer's attention is, as the model itself calls it.

    ``window`` 0 is full attention; ``softcap`` 0 is none; ``sinks`` says whether it has them.
    """

    heads: int
    kv: LayerKV
    scale: float
    window: int
    softcap: float
    sinks: bool


def attention_dim(layers: Sequence[AttentionLayer]) -> int:
    """Heads times their size, over all layers: what attention's products cost by."""
    return sum(layer.heads * layer.kv.key_dim for layer in layers)


class _Refused(Exception):
    """A reason why an architecture is not supported, as the end of a sentence."""


class _Probe(threading.local):
    layers: dict[int, AttentionLayer] | None = None
    num_tokens: int = _PROBE_TOKENS


_probe = _Probe()

# What models pass to attention and may be ignored: training only, or already in our metadata.
_HARMLESS_KEYWORDS = frozenset({
    "dropout", "is_causal", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "cache_position", "logits_to_keep",
    "num_items_in_batch",
})  # fmt: skip


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record a layer's geometry; refuse what the paged attention would leave out."""
    layers = _probe.layers
    assert layers is not None, "the probe was called outside the gate"
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise _Refused("its attention layers are not numbered")
    if index in layers:
        raise _Refused(f"its layer {index} computes attention more than once")
    if attention_mask is not None:
        raise _Refused("it builds an attention mask of its own")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _Refused("its attention is not causal")
    for name, extra in kwargs.items():
        if name not in _HARMLESS_KEYWORDS and extra is not None:
            raise _Refused(f"its attention takes '{name}', which paged attention does not have")
    heads, kv_heads = query.shape[1], key.shape[1]
    if key.shape[2] != _probe.num_tokens or value.shape[1:3] != key.shape[1:3] or heads % kv_heads:
        raise _Refused("its keys and values are not one of each per token and head")
    layers[index] = AttentionLayer(
        heads=heads,
        kv=LayerKV(kv_heads, key.shape[-1], value.shape[-1]),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux is not None,
    )
    return query.new_empty(1, query.shape[2], heads, value.shape[-1]), None


AttentionInterface.register(_PROBE, _probe_attention)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a trial run shows of a model: its attention layers, what may be fused, its size.

    Attributes:
        layers: in order.
        fusible: linear layers that read the same tensor.
        num_weights: parameters; those that several layers share count once.
        num_parameters: without the embeddings at either end.
        num_head_weights: of the output embedding.
        is_tied: whether that is the input embedding, too.
        num_expert_weights: of all experts among which a router chooses.
        quantisable: shapes of the linear layers' weights that could be quantised, and how many are
            of each.
        buffer_bytes: of what belongs to the model but is no parameter, and has a dtype of its own.
        num_cast_buffers: elements of other buffers, which have the dtype of the weights.
    """

    layers: tuple[AttentionLayer, ...]
    fusible: list[fusion.Group]
    num_weights: int
    num_parameters: int
    num_head_weights: int
    is_tied: bool
    num_expert_weights: int
    quantisable: dict[tuple[int, int], int]
    buffer_bytes: int
    num_cast_buffers: int

    @property
    def kv_layers(self) -> tuple[LayerKV, ...]:
        """What each layer keeps per token."""
        return tuple(layer.kv for layer in self.layers)


def check_architecture(hf_config: Any, *, trust_remote_code: bool = False) -> Architecture:
    """Find out, without reading a weight, whether a model can be served, and how it is made.

    Args:
        hf_config: the model's transformers configuration; it is not changed.
        trust_remote_code: whether the model may be built by code of its own.

    Raises:
        ModelError: it would be computed wrongly or not at all; the sentence names the reason.
    """
    text_config = hf_config.get_text_config()
    model_type = text_config.model_type
    try:
        _check_settings(hf_config, text_config)
        model, layers, fusible = _trial_run(hf_config, trust_remote_code)
        _check_layers(layers, text_config)
    except _Refused as refused:
        raise ModelError(f"The architecture '{model_type}' is not supported: {refused}.") from None
    if model_type not in TESTED_MODEL_TYPES:
        logger.warning(
            "The architecture '%s' passed all checks but is not among those tested against "
            "transformers' own output.",
            model_type,
        )
    head = model.get_output_embeddings()
    return Architecture(
        layers=tuple(layers[index] for index in range(len(layers))),
        fusible=fusible,
        num_weights=sum(p.numel() for p in model.parameters()),
        num_parameters=count_parameters(model),
        num_head_weights=0 if head is None else head.weight.numel(),
        is_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        num_expert_weights=sum(
            p.numel() for name, p in model.named_parameters() if "experts" in name.split(".")
        ),
        quantisable=collections.Counter(
            tuple(model.get_submodule(name).weight.shape)
            for name in quantisation.layers_to_quantise(model)
        ),
        buffer_bytes=sum(b.nbytes for b in model.buffers() if b.dtype != _TRIAL_DTYPE),
        num_cast_buffers=sum(b.numel() for b in model.buffers() if b.dtype == _TRIAL_DTYPE),
    )


def step_bytes(
    hf_config: Any,
    dtype: torch.dtype,
    num_tokens: int,
    num_logits: int,
    *,
    trust_remote_code: bool = False,
) -> int:
    """How much memory a forward pass of that many tokens needs beside the weights, at its peak.

    Seen in a trial run without memory, operator by operator in 16 bits, since some operators know
    no other dtype there; attention itself needs next to none. For float32 it is scaled, which
    counts what the model computes in float32 anyway as too large.

    Args:
        hf_config: of a model that ``check_architecture`` has accepted.
        dtype: of weights and activations.
        num_tokens: of the batch.
        num_logits: rows of logits that are computed.

    Raises:
        ModelError: the trial run failed.
    """
    live = LiveBytes()
    try:
        _trial_run(hf_config, trust_remote_code, num_tokens, num_logits, live=live)
    except _Refused as refused:
        raise ModelError(f"The memory of a step cannot be estimated: {refused}.") from None
    return live.peak * dtype.itemsize // _TRIAL_DTYPE.itemsize


def _check_settings(hf_config: Any, text_config: Any) -> None:
    if hf_config.is_encoder_decoder:
        raise _Refused("it is an encoder-decoder; only decoders are served")
    settings = quantisation.settings_of(hf_config)
    refused = settings and checkpoint_formats.refusal(settings)
    if refused:
        raise _Refused(refused)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    foreign = sorted(kinds - {"full_attention", "sliding_attention"})
    if foreign:
        raise _Refused(
            f"it has layers of the type '{foreign[0]}'; only full and sliding attention are served"
        )
    if getattr(text_config, "attention_chunk_size", None):
        raise _Refused("its attention is chunked; only full and sliding attention are served")
    if not getattr(text_config, "is_causal", True):
        raise _Refused("its attention is not causal")
    rope = getattr(text_config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    if any(r.get("rope_type") == "dynamic" for r in (by_layer_type or [rope])):
        raise _Refused(
            "its rotary embedding is of the type 'dynamic', which depends on the longest sequence "
            "of the batch"
        )


def _trial_run(
    hf_config: Any,
    trust_remote_code: bool,
    num_tokens: int = _PROBE_TOKENS,
    num_logits: int = 1,
    live: LiveBytes | None = None,
) -> tuple[Any, dict[int, AttentionLayer], list[fusion.Group]]:
    """Run a few tokens through a model without weights; returns it and what was seen.

    What may be fused is not looked for while memory is counted: looking keeps inputs alive.
    """
    hf_config = copy.deepcopy(hf_config)
    # With a padding token some models look for it in the input, which has no values here.
    hf_config.pad_token_id = None
    _probe.layers, _probe.num_tokens = {}, num_tokens
    try:
        with quiet_transformers(), torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                hf_config,
                attn_implementation=_PROBE,
                dtype=_TRIAL_DTYPE,
                trust_remote_code=trust_remote_code,
            ).eval()
            pin_longrope(model, 1)
            tokens = torch.zeros(1, num_tokens, dtype=torch.long)
            fusible: list[fusion.Group] = []
            with contextlib.ExitStack() as watching:
                if live is None:
                    fusible = watching.enter_context(fusion.watch(model))
                else:
                    watching.enter_context(live)
                model(
                    input_ids=tokens,
                    position_ids=tokens,
                    use_cache=False,
                    logits_to_keep=torch.zeros(num_logits, dtype=torch.long),
                )
        return model, _probe.layers, fusible
    except _Refused:
        raise
    except Exception as exc:
        if isinstance(exc, KeyError) and exc.args == (_PROBE,):
            # The model picks its attention class from a table of its own.
            raise _Refused("it does not use transformers' attention interface") from exc
        if isinstance(exc, ValueError) and "Unrecognized configuration class" in str(exc):
            raise _Refused("transformers has no causal language model for it") from exc
        reason = str(exc).strip().partition("\n")[0].rstrip(".")
        raise _Refused(
            f"a trial run of {num_tokens} tokens failed ({type(exc).__name__}: {reason})"
        ) from exc
    finally:
        _probe.layers, _probe.num_tokens = None, _PROBE_TOKENS


def _check_layers(layers: dict[int, AttentionLayer], text_config: Any) -> None:
    num_layers = text_config.num_hidden_layers
    missing = num_layers - len(layers.keys() & set(range(num_layers)))
    if missing or len(layers) != num_layers:
        raise _Refused(
            f"{missing} of its {num_layers} layers do not use transformers' attention interface"
        )
    # The window must come with the call: the mask that would hold it otherwise is not built.
    kinds = getattr(text_config, "layer_types", None)
    if kinds:
        for index, kind in enumerate(kinds[:num_layers]):
            if (kind == "sliding_attention") != bool(layers[index].window):
                raise _Refused(
                    f"its layer {index} is of the type '{kind}' but calls attention with a window "
                    f"of {layers[index].window}"
                )
    elif (
        getattr(text_config, "sliding_window", None)
        and getattr(text_config, "use_sliding_window", True)
        and not any(layer.window for layer in layers.values())
    ):
        raise _Refused("it hides its sliding window from attention")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports on stderr meanwhile; what matters is raised or logged here."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def pin_longrope(model: nn.Module, max_model_len: int) -> None:
    """Choose LongRoPE's table once, for the longest sequence that will be served.

    transformers chooses it in each pass, by the longest sequence of the batch: a sequence's keys
    would depend on what shares its batch, and reading that length waits for the device.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        by_layer_type = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        pinned = [key for key, value in by_layer_type.items() if value == "longrope"]
        for layer_type in pinned:
            prefix = "" if layer_type is None else f"{layer_type}_"
            buffer = getattr(module, f"{prefix}inv_freq")
            keywords = {} if layer_type is None else {"layer_type": layer_type}
            inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](
                module.config, buffer.device, seq_len=max_model_len, **keywords
            )
            buffer.copy_(inv_freq)
        if pinned:
            settled = {k: "default" if k in pinned else v for k, v in by_layer_type.items()}
            module.rope_type = settled if isinstance(rope_type, dict) else "default"  # type: ignore[assignment]


def count_parameters(model: Any) -> int:
    """Parameters without the embeddings at either end; those of quantised layers count too."""
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    if head is not None:
        outer |= {id(p) for p in head.parameters()}
    quantised = sum(
        m.num_weights for m in model.modules() if isinstance(m, QuantisedLinear) and m is not head
    )
    plain = sum(p.numel() for p in model.parameters() if id(p) not in outer)
    return int(quantised + plain)
