"""Which layers of a model are quantised, and when: while transformers reads the weights.

Owns the plan (what the setting ``quantization`` and the checkpoint ask for), its errors, and the
hook by which transformers lets a loader take over weights. Knows nothing of numbers: rounding is
``quantised_linear``'s.

Plain ``nn.Linear`` layers are quantised, except the output embedding. What is no such layer stays
as it is: embeddings, norms, experts that are one tensor for all, GPT-2's transposed layers. Each
weight is read, rounded and dropped before the next one is read, so the peak is the quantised model,
the layer at hand, and what its rounding takes, part by part.
"""

import dataclasses
import logging
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ModelError
from pagetier.handler.quantised_linear import QuantisedLinear

logger = logging.getLogger(__name__)

_NAME = "pagetier"  # by which transformers knows the hook


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How the weights of a checkpoint that is not quantised are rounded.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; 0 is all of a row.
        symmetric: whether zero is in the middle; else each group has a zero of its own.
    """

    bits: int
    group_size: int
    symmetric: bool


_ROUNDINGS = {"int8": Rounding(8, 0, True), "int4": Rounding(4, 128, False)}


def plan(config: EngineConfig) -> Rounding | None:
    """How the model's weights are to be quantised; None is not at all."""
    if config.quantization is None:
        return None
    rounding = _ROUNDINGS[config.quantization]
    if config.quantization_group_size is not None:
        rounding = dataclasses.replace(rounding, group_size=config.quantization_group_size)
    return rounding


def layers_to_quantise(model: Any) -> list[str]:
    """Names of the plain linear layers of a model, without its output embedding."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    ]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module of that name, while a model is loaded."""
    layer._is_hf_initialized = True  # type: ignore[assignment]
    # Some models look for the weights of their layers when transformers initialises what was not
    # in the checkpoint; it leaves alone what bears this mark.
    layer.weight = torch.empty(0)
    layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def round_layer(model: nn.Module, name: str, weight: torch.Tensor, rounding: Rounding) -> None:
    """Put a layer with the rounded ``weight`` in the place of the linear layer of that name."""
    bias: Any = model.get_submodule(name).bias
    rounded = QuantisedLinear.rounded(
        weight, rounding.bits, rounding.group_size, symmetric=rounding.symmetric, bias=bias
    )
    replace(model, name, rounded)


@torch.no_grad()
def make_random(model: Any, rounding: Rounding, device: torch.device) -> None:
    """Give a model on the ``meta`` device random weights on ``device``, quantised one by one."""
    for name in layers_to_quantise(model):
        shape, dtype = model.get_submodule(name).weight.shape, model.dtype
        weight = torch.randn(shape, dtype=dtype, device=device) * shape[1] ** -0.5
        round_layer(model, name, weight, rounding)
    for module in model.modules():
        # What was marked was initialised on the meta device, that is, not at all.
        module._is_hf_initialized = False
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.zeros_like(tensor, device=device)
                    own[name] = nn.Parameter(empty) if own is module._parameters else empty
    model.tie_weights()
    model.initialize_weights()
    _finish(model, rounding)


def as_transformers(rounding: Rounding) -> Any:
    """The argument ``quantization_config`` of ``from_pretrained``."""
    return _Config(rounding)


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, rounding: Rounding) -> None:
        self.quant_method = _NAME
        self.rounding = rounding


@register_quantizer(_NAME)
class _Hook(HfQuantizer):  # type: ignore[misc]
    """Takes over each weight as transformers reads it."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self._weights = {f"{name}.weight" for name in layers_to_quantise(model)}
        if not self._weights:
            raise ModelError(
                f"The model type '{model.config.model_type}' has no plain linear layer that could "
                "be quantised; remove the setting 'quantization'."
            )
        self._shapes = {name: weight.shape for name, weight in model.named_parameters()}
        self._num_weights = 0

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self._weights

    def get_quantize_ops(self) -> "_Take":
        return _Take(self)

    def take(self, model: Any, name: str, weight: torch.Tensor) -> None:
        """Quantise the weight of that name, which may be freed afterwards."""
        if weight.shape != self._shapes[name]:
            raise ValueError(f"'{name}' is {tuple(weight.shape)}, not {tuple(self._shapes[name])}.")
        round_layer(model, name.removesuffix(".weight"), weight, self.quantization_config.rounding)
        self._num_weights += weight.numel()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # With a hook, transformers does not compare all shapes itself.
        for name, weight in model.named_parameters():
            if weight.shape != self._shapes[name]:
                raise ValueError(f"'{name}' is {tuple(weight.shape)}, not as its config.json says.")
        _finish(model, self.quantization_config.rounding)
        return model


class _Take(ConversionOps):  # type: ignore[misc]
    """What transformers does with a weight that the hook wants."""

    def __init__(self, hook: _Hook) -> None:
        self._hook = hook

    def convert(
        self,
        input_dict: dict[str, Any],
        *_: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **__: Any,
    ) -> dict[str, Any]:
        """Quantise what the hook wants, and give back the rest."""
        rest = {}
        for name, value in input_dict.items():
            if not self._hook.param_needs_quantization(model, name):
                rest[name] = value
                continue
            self._hook.take(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest


def _finish(model: Any, rounding: Rounding) -> None:
    """Let the model's configuration tell how it is quantised, and the log how much of it is."""
    model.config.quantization_config = {"quant_method": _NAME, **dataclasses.asdict(rounding)}
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    for layer in layers:
        del layer.weight
    quantised = sum(layer.num_weights for layer in layers)
    others = sum(p.numel() for p in model.parameters())
    logger.info(
        "%d of %d weights are quantised, to %d bits; embeddings, norms and whatever is no plain "
        "linear layer stay in %s.",
        quantised,
        quantised + others,
        rounding.bits,
        str(model.dtype).removeprefix("torch."),
    )
