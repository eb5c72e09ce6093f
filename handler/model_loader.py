"""A Hugging Face model, checked, loaded, and with its attention on the paged KV cache.

Owns the reading of configurations and weights, and what is done to weights before they serve. Knows
nothing of requests, blocks or steps, and leaves to ``architecture`` which models are served, and to
``paged_model`` their attention.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pagetier.handler import fusion, paged_model, projections, quantisation
from pagetier.handler.architecture import (
    Architecture,
    AttentionLayer,
    check_architecture,
    count_parameters,
    pin_longrope,
    quiet_transformers,
)
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.units import format_bytes
from pagetier.offload import host_memory
from pagetier.offload.tiers import LayerKV
from pagetier.offload.weight_plan import plan_weights
from pagetier.offload.weights import WeightStream, find_layers, packed_bytes

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        num_parameters = count_parameters(model)
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
        pin_longrope(model, config.max_model_len or max_model_len)
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
        with quiet_transformers(), quantisation.errors_as_they_were():
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
    with torch.random.fork_rng(devices), quiet_transformers():
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
