"""A Hugging Face model, checked, loaded, and with its attention on the paged KV cache.

Owns the gate (which architectures are served, and the geometry of their layers) and the reading of
weights. Knows nothing of requests, blocks or steps, and leaves attention to ``paged_model``.

The gate runs before any weight is read. It builds the model without memory, on the ``meta``
device, runs three tokens through it with a probe in place of attention, and refuses what the paged
attention would compute wrongly without anybody noticing.
"""

import collections
import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pagetier.handler import (
    checkpoint_formats,
    fusion,
    paged_model,
    projections,
    quantisation,
)
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.live_bytes import LiveBytes
from pagetier.handler.quantised_linear import QuantisedLinear
from pagetier.handler.units import format_bytes
from pagetier.offload import host_memory
from pagetier.offload.tiers import LayerKV
from pagetier.offload.weight_plan import plan_weights
from pagetier.offload.weights import WeightStream, find_layers, packed_bytes

logger = logging.getLogger(__name__)

_PROBE = "pagetier_probe"
_PROBE_TOKENS = 3
_TRIAL_DTYPE = torch.bfloat16

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what others must know of it.

    Attributes:
        model: the transformers model, on its device, in evaluation mode.
        layers: the geometry of its attention layers.
        dtype: of weights, activations and KV cache.
        device: where it is.
        max_model_len: longest sequence that the model was made for, in tokens.
        vocab_size: number of token ids.
        eos_token_ids: tokens that end a sequence.
        fingerprint: a hash of architecture, dtype and weights; equal only if keys and values are.
        num_parameters: without the embeddings at either end.
        stream: of the layers whose weights lie in host memory; None if all are on the device.
    """

    model: nn.Module
    layers: tuple[AttentionLayer, ...]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    num_parameters: int
    stream: WeightStream | None = None

    @property
    def kv_layers(self) -> tuple[LayerKV, ...]:
        """What each layer keeps per token."""
        return tuple(layer.kv for layer in self.layers)


# --- the gate ------------------------------------------------------------------------------------


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
        num_parameters=_num_parameters(model),
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
        with _quiet_transformers(), torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                hf_config,
                attn_implementation=_PROBE,
                dtype=_TRIAL_DTYPE,
                trust_remote_code=trust_remote_code,
            ).eval()
            _pin_longrope(model, 1)
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


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is known of a model before any weight is read.

    Attributes:
        hf_config: its transformers configuration.
        architecture: what the gate saw.
        max_model_len: longest sequence that it was made for, in tokens.
    """

    hf_config: Any
    architecture: Architecture
    max_model_len: int


def read_outline(config: EngineConfig) -> Outline:
    """Check the model that ``config`` names, by its configuration alone.

    Raises:
        ModelError: the configuration cannot be read, or the model is not supported.
    """
    hf_config = _read_config(config)
    architecture = check_architecture(hf_config, trust_remote_code=config.trust_remote_code)
    text_config = hf_config.get_text_config()
    max_model_len = getattr(text_config, "max_position_embeddings", None) or config.max_model_len
    if max_model_len is None:
        raise ModelError(
            f"The model '{config.model}' does not say how long its sequences may be; set "
            "max_model_len."
        )
    return Outline(hf_config, architecture, int(max_model_len))


# --- loading -------------------------------------------------------------------------------------


def load_model(
    config: EngineConfig, progress: Callable[[str], None] | None = None, *, fuse: bool = True
) -> LoadedModel:
    """Check and load the model that ``config`` names, ready to run on the paged KV cache.

    Args:
        config: ``model``, ``dtype``, ``quantization``, ``device``, ``load_format``,
            ``max_model_len``, ``seed``, ``cpu_offload_gb`` and ``trust_remote_code`` are used.
        progress: called with a few words at the start of each stage.
        fuse: make linear layers that read the same tensor one.

    Raises:
        ModelError: the model cannot be read, is not supported, or does not fit.
        ConfigError: the device does not exist here.
    """
    say = progress or (lambda stage: None)
    device = _resolve_device(config.device)
    say("checking the architecture")
    outline = read_outline(config)
    hf_config, architecture = outline.hf_config, outline.architecture
    text_config = hf_config.get_text_config()
    max_model_len = outline.max_model_len
    dtype = resolve_dtype(config.dtype, hf_config, device)
    plan = quantisation.plan(config, hf_config)
    free_bytes = {"cpu": host_memory.available_bytes()}
    if device.type == "cuda":
        free_bytes["cuda"] = torch.cuda.mem_get_info(device)[0]
    itemsize = quantisation.bytes_per_weight(plan) or _itemsize(dtype)
    weight_bytes = int(architecture.num_weights * itemsize)
    # Weights that are streamed stay on the host, where all else is done to them, too.
    streams = config.cpu_offload_gb > 0
    if streams:
        _check_host_memory(config.model, weight_bytes, len(architecture.layers))
    home = torch.device("cpu") if streams else device
    say("making random weights" if config.load_format == "dummy" else "reading the weights")
    stream = None
    try:
        if config.load_format == "dummy":
            model = _make_dummy(config, hf_config, dtype, home, plan)
        else:
            model = _read_weights(config, hf_config, dtype, home, plan)
        model.eval().requires_grad_(False)
        num_parameters = _num_parameters(model)
        if fuse:
            say("fusing projections")
            fusion.fuse(model, architecture.fusible)
            if config.projection_kernels == "triton" and not streams:
                projections.swap(model)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the weights that were copied
        # With a padding token, some models read their input back to warn of unmasked padding.
        model.config.pad_token_id = None
        model.config.get_text_config().pad_token_id = None
        _pin_longrope(model, config.max_model_len or max_model_len)
        say("hashing the weights")
        fingerprint = _fingerprint(model)
        if streams:
            num_layers = text_config.num_hidden_layers
            stream = _stream_weights(model, config.cpu_offload_gb, num_layers, device, say)
            # Not the model's own, which refuses some that are quantised.
            nn.Module.to(model, device)
    except RuntimeError as exc:
        if not _is_out_of_memory(exc):
            raise
        if stream is not None:
            stream.close()
        is_on_host = device.type == "cpu" or "DefaultCPUAllocator" in str(exc)
        where, free, advice = (
            ("this machine's memory", free_bytes["cpu"], "")
            if is_on_host
            else ("the GPU's memory", free_bytes["cuda"], ", or raise cpu_offload_gb")
        )
        raise ModelError(
            f"The weights of '{config.model}', {format_bytes(weight_bytes)}, do not fit into "
            f"{where}, of which {format_bytes(free)} was free; choose a smaller model or "
            f"a 16-bit dtype{advice}."
        ) from None
    return LoadedModel(
        model=model,
        layers=architecture.layers,
        dtype=model.dtype,
        device=device,
        max_model_len=max_model_len,
        vocab_size=text_config.vocab_size,
        eos_token_ids=_eos_token_ids(model, text_config),
        fingerprint=fingerprint,
        num_parameters=num_parameters,
        stream=stream,
    )


def _check_host_memory(name: str, model_bytes: int, num_layers: int) -> None:
    """Raise unless a model whose weights are streamed can be made in host memory.

    Raises:
        ModelError: it cannot; the sentence has the numbers.
    """
    # Not all weights of a quantised model are, so it takes somewhat more.
    needed = model_bytes + model_bytes // num_layers
    available = host_memory.available_bytes()
    if needed > available:
        raise ModelError(
            f"Streaming the weights of '{name}' takes {format_bytes(needed)} of host "
            f"memory while it starts, the model and one layer, but {format_bytes(available)} is "
            "available; free host memory, raise the container's limit, or set cpu_offload_gb to 0."
        )


def _stream_weights(
    model: nn.Module,
    cpu_offload_gb: float,
    num_layers: int,
    device: torch.device,
    say: Callable[[str], None],
) -> WeightStream | None:
    """Take the weights of as many layers as is wanted off the device.

    Raises:
        ConfigError: the model's layers are not one list of modules.
    """
    layers = find_layers(model, num_layers)
    if not layers:
        raise ConfigError(
            "The setting 'cpu_offload_gb' cannot be used with this model, whose layers are not one "
            "list of modules; set it to 0.",
            param="cpu_offload_gb",
        )
    wanted = int(cpu_offload_gb * 2**30)
    plan = plan_weights(packed_bytes(model, layers), wanted)
    if plan.freed_bytes < wanted:
        logger.warning(
            "Streaming frees %s, not the %s of cpu_offload_gb: that is all of the model's %d "
            "layers can free.",
            format_bytes(plan.freed_bytes),
            format_bytes(wanted),
            num_layers,
        )
    if not plan.layers:
        return None
    count = len(plan.layers)
    stream = WeightStream(
        model,
        layers,
        plan,
        device,
        progress=lambda done: say(f"packing the weights of streamed layer {done} of {count}"),
    )
    say(
        f"{count} of {num_layers} layers are streamed: {format_bytes(plan.streamed_bytes)} stay in "
        f"host memory ({stream.rung}), and {plan.num_slots} slots take "
        f"{format_bytes(plan.num_slots * plan.slot_bytes)}"
    )
    return stream


def _resolve_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "The setting 'device' is 'cuda', but this machine has no usable CUDA device; set it "
            "to 'cpu' or leave it out.",
            param="device",
        )
    if name == "cuda" or (name == "auto" and available):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_dtype(name: str, hf_config: Any, device: torch.device) -> torch.dtype | None:
    """The dtype asked for; None leaves it to the weights, whose configuration does not say."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own: torch.dtype | None = hf_config.dtype or hf_config.get_text_config().dtype
    return own


def _itemsize(dtype: torch.dtype | None) -> int:
    return (dtype or torch.bfloat16).itemsize


def _read_config(config: EngineConfig) -> Any:
    """The model's transformers configuration.

    Raises:
        ModelError: there is none, or it cannot be understood. Names no path but the user's own.
    """
    name = config.model
    local = os.path.isdir(name)
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise ModelError(
            f"The model folder '{name}' has no config.json; name a folder that "
            "transformers' save_pretrained made."
        )
    if not local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(
            f"The model folder '{name}' does not exist; name a local Hugging Face folder or a "
            "hub id."
        )
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(name)
    except Exception as exc:
        logger.debug("Reading the configuration of %s failed.", name, exc_info=exc)
        raise ModelError(
            f"The config.json of '{name}' cannot be read, or is not valid JSON."
            if local
            else f"The model '{name}' is neither a local folder nor to be had from the hub "
            f"({type(exc).__name__}); check the name and the network."
        ) from None
    model_type = settings.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING and not config.trust_remote_code:
        raise ModelError(
            f"The model '{name}' is of the type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; update transformers, or set "
            "trust_remote_code if the model brings its own code and you trust it."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except Exception as exc:
        logger.debug("The configuration of %s is not accepted.", name, exc_info=exc)
        raise ModelError(
            f"The config.json of '{name}' is not a valid configuration of the type "
            f"{model_type!r} ({type(exc).__name__})."
        ) from None


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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


def _read_weights(
    config: EngineConfig,
    hf_config: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    plan: quantisation.Plan | None,
) -> Any:
    """The model with its weights, read straight to ``device``.

    transformers does this: it maps the safetensors files and makes each parameter once, and knows
    the names that older checkpoints use and the experts that are to be merged.
    """
    name = config.model
    try:
        with _quiet_transformers(), quantisation.errors_as_they_were():
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=paged_model.ATTENTION,
                device_map={"": device},
                use_safetensors=True if config.load_format == "safetensors" else None,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **quantisation.arguments(hf_config, plan),
            )
    except ModelError:
        raise
    except Exception as exc:
        if _is_out_of_memory(exc):
            raise
        logger.debug("Reading the weights of %s failed.", name, exc_info=exc)
        raise ModelError(
            f"The weights of '{name}' are missing, damaged, or do not fit its config.json "
            f"({type(exc).__name__})."
        ) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights of '{name}' are incomplete: {len(missing)} are missing, the first of "
            f"them '{missing[0]}'."
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        logger.warning(
            "The model has no use for %d of the tensors in its weights, the first of them '%s'.",
            len(unused),
            unused[0],
        )
    return model


def _is_out_of_memory(exc: Exception) -> bool:
    # For the CPU's allocator torch has no exception of its own.
    return isinstance(exc, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(exc)


def _make_dummy(
    config: EngineConfig,
    hf_config: Any,
    dtype: torch.dtype | None,
    device: torch.device,
    plan: quantisation.Plan | None,
) -> Any:
    """The model with random weights, made in place on ``device`` by its own initialisation."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _quiet_transformers():
        torch.manual_seed(config.seed)
        with device if plan is None else torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config),
                attn_implementation=paged_model.ATTENTION,
                dtype=dtype or torch.float32,
                trust_remote_code=config.trust_remote_code,
            )
        if isinstance(plan, quantisation.Rounding):
            quantisation.make_random(model, plan, device)
    # Without files beside config.json there may be nothing but its defaults.
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(config.model)
    return model


def _pin_longrope(model: nn.Module, max_model_len: int) -> None:
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


def _eos_token_ids(model: Any, text_config: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(text_config, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _fingerprint(model: Any) -> str:
    """A hash of everything that keys and values depend on: settings, dtypes, weights, buffers."""
    settings = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        settings.pop(key, None)
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    names, sums = [], []
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
        names.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        sums.append(_bit_sum(tensor))
    digest.update("\n".join(names).encode())
    digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's elements, their bits read as integers, as one int64 on its device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.dtype.itemsize]).sum(dtype=torch.int64)


def _num_parameters(model: Any) -> int:
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
