"""Which layers of a model are quantised, and when: while transformers reads the weights.

Owns the plan (what the setting ``quantization`` and the checkpoint ask for), its errors, and the
hook by which transformers lets a loader take over weights. Knows nothing of numbers: rounding is
``quantised_linear``'s.

A checkpoint that is quantised already (``checkpoint_formats``) says by the names of its tensors
which layers are; each is converted once all are read. Of any other, plain ``nn.Linear`` layers are
quantised, except the output embedding. What is no such layer stays
as it is: embeddings, norms, experts that are one tensor for all, GPT-2's transposed layers. Each
weight is read, rounded and dropped before the next one is read. So the peak is the quantised model,
and a layer in full with what its rounding takes, part by part; or a layer's numbers, unpacked.
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pagetier.handler import checkpoint_formats
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
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


@dataclasses.dataclass(frozen=True)
class Stored:
    """The ``quantization_config`` of a checkpoint that is quantised already."""

    settings: Mapping[str, Any]


Plan = Rounding | Stored


def settings_of(hf_config: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model's configuration, or None."""
    for part in (hf_config, hf_config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return dict(settings if isinstance(settings, dict) else settings.to_dict())
    return None


def plan(config: EngineConfig, hf_config: Any) -> Plan | None:
    """How the model's weights are to be quantised, or are; None is not at all.

    Raises:
        ConfigError: the settings and the checkpoint do not agree.
    """
    wanted, settings = config.quantization, settings_of(hf_config)
    method = None if settings is None else settings["quant_method"]
    problem = None
    if settings is not None and wanted not in (None, method):
        problem = f"is '{wanted}', but the weights are quantised already, by '{method}'; remove it"
    elif settings is not None and config.load_format == "dummy":
        problem = f"cannot be '{method}' for random weights; take a model that is not quantised"
    elif settings is None and wanted is not None and wanted not in _ROUNDINGS:
        problem = (
            f"is '{wanted}', but the weights are not quantised; remove it, or set 'int8' or 'int4'"
        )
    if problem is not None:
        raise ConfigError(f"The setting 'quantization' {problem}.", param="quantization")
    if settings is not None:
        return Stored(settings)
    if wanted is None:
        return None
    rounding = _ROUNDINGS[wanted]
    if config.quantization_group_size is not None:
        rounding = dataclasses.replace(rounding, group_size=config.quantization_group_size)
    return rounding


def bytes_per_weight(plan: Plan | None) -> float | None:
    """Of a quantised layer's weights, without scales; None if they are not, or do not say."""
    bits: int | None = None
    if isinstance(plan, Rounding):
        bits = plan.bits
    elif isinstance(plan, Stored):
        bits = plan.settings.get("bits")
    return None if bits is None else bits / 8


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


def layer_bytes(shape: tuple[int, int], rounding: Rounding, dtype: torch.dtype) -> int:
    """Bytes of a quantised layer of that shape, without its bias; nothing is allocated."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    layer = QuantisedLinear.rounded(
        weight, rounding.bits, rounding.group_size, symmetric=rounding.symmetric
    )
    return sum(buffer.nbytes for buffer in layer.buffers())


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


def arguments(hf_config: Any, plan: Plan | None) -> dict[str, Any]:
    """The arguments ``config`` and ``quantization_config`` of ``from_pretrained``."""
    if plan is None:
        return {"config": hf_config}
    hf_config = copy.deepcopy(hf_config)
    for part in (hf_config, hf_config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # or transformers would ask for the format's package
    return {"config": hf_config, "quantization_config": _Config(plan)}


class _Interrupted(BaseException):
    """Carries an error past transformers, which only notes an ``Exception`` and reads on."""

    def __init__(self, reason: Exception) -> None:
        super().__init__()
        self.reason = reason


@contextlib.contextmanager
def errors_as_they_were() -> Iterator[None]:
    """Raise what goes wrong in quantising, while transformers reads weights, as it was raised."""
    try:
        yield
    except _Interrupted as interrupted:
        raise interrupted.reason from None


@register_quantization_config(_NAME)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, plan: Plan) -> None:
        self.quant_method = _NAME
        self.plan = plan


class _Held(nn.Module):
    """A layer's tensors as they are in a checkpoint, on the ``meta`` device until they are read."""

    def __init__(self, layer: nn.Linear, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@register_quantizer(_NAME)
class _Hook(HfQuantizer):  # type: ignore[misc]
    """Takes over each weight as transformers reads it."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self._plan: Plan = self.quantization_config.plan
        self._weights: set[str] = set()
        if isinstance(self._plan, Stored):
            _hold(model, self._plan, checkpoint_files or [])
        else:
            self._weights = {f"{name}.weight" for name in layers_to_quantise(model)}
            if not self._weights:
                raise ModelError(
                    f"The model type '{model.config.model_type}' has no plain linear layer that "
                    "could be quantised; remove the setting 'quantization'."
                )
        self._shapes = {name: weight.shape for name, weight in model.named_parameters()}

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self._weights

    def get_quantize_ops(self) -> "_Take":
        return _Take(self)

    def take(self, model: Any, name: str, weight: torch.Tensor) -> None:
        """Quantise the weight of that name, which may be freed afterwards."""
        assert isinstance(self._plan, Rounding)
        try:
            _check_shape(name, weight, self._shapes)
            round_layer(model, name.removesuffix(".weight"), weight, self._plan)
        except Exception as exc:
            raise _Interrupted(exc) from None

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # With a hook, transformers does not compare all shapes itself.
        for name, weight in model.named_parameters():
            _check_shape(name, weight, self._shapes)
        if isinstance(self._plan, Stored):
            _convert(model, self._plan)
        _finish(model, self._plan)
        return model


def _check_shape(name: str, weight: torch.Tensor, shapes: Mapping[str, torch.Size]) -> None:
    if weight.shape != shapes[name]:
        raise ValueError(f"'{name}' is {tuple(weight.shape)}, not {tuple(shapes[name])}.")


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


def _hold(model: Any, plan: Stored, files: list[str]) -> None:
    """Make room for the quantised layers' tensors, under their names in the checkpoint.

    Raises:
        ModelError: other than plain linear layers are quantised, or none is.
    """
    method = plan.settings["quant_method"]
    names = checkpoint_formats.TENSORS[method]
    if not all(str(file).endswith(".safetensors") for file in files):
        raise ModelError("Quantised weights are read from safetensors files only; convert them.")
    stored = {key: tensor for file in files for key, tensor in _headers(file).items()}
    prefixes = {key.removesuffix(f".{names[0]}") for key in stored if key.endswith(f".{names[0]}")}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name in prefixes:
            tensors = {n: stored[f"{name}.{n}"] for n in names if f"{name}.{n}" in stored}
            replace(model, name, _Held(module, tensors))
            prefixes.remove(name)
    if prefixes:
        raise ModelError(
            f"Of the weights quantised by '{method}', {len(prefixes)} are not those of plain "
            f"linear layers, the only ones that are read; the first is '{min(prefixes)}'."
        )
    if not any(isinstance(module, _Held) for module in model.modules()):
        raise ModelError(
            f"The config.json says that weights are quantised by '{method}', but none is."
        )


def _headers(file: str) -> dict[str, torch.Tensor]:
    """What tensors a safetensors file has, of their shapes and dtypes, on the ``meta`` device."""
    with safetensors.safe_open(file, framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {
            key: torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
            for key, part in slices.items()
            if part.get_dtype() in _DTYPES
        }


_DTYPES = {
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip


def _convert(model: Any, plan: Stored) -> None:
    """Put layers of our layout in the places of those that hold a checkpoint's tensors."""
    held = [(name, module) for name, module in model.named_modules() if isinstance(module, _Held)]
    while held:
        name, module = held.pop()
        try:
            layer = checkpoint_formats.read_layer(
                plan.settings,
                dict(module.named_buffers()),
                module.in_features,
                module.out_features,
                module.bias,
            )
        except checkpoint_formats.Unreadable as exc:
            raise ModelError(f"The quantised layer '{name}' cannot be read: {exc}.") from None
        replace(model, name, layer)


def _finish(model: Any, plan: Plan) -> None:
    """Let the model's configuration tell how it is quantised, and the log how much of it is."""
    settings: Mapping[str, Any] = (
        plan.settings
        if isinstance(plan, Stored)
        else {"quant_method": _NAME, **dataclasses.asdict(plan)}
    )
    model.config.quantization_config = dict(settings)
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    for layer in layers:
        del layer.weight
    quantised = sum(layer.num_weights for layer in layers)
    others = sum(p.numel() for p in model.parameters())
    logger.info(
        "%d of %d weights are quantised, to %s bits; embeddings, norms and whatever is no plain "
        "linear layer stay in %s.",
        quantised,
        quantised + others,
        " and ".join(str(bits) for bits in sorted({layer.bits for layer in layers})),
        str(model.dtype).removeprefix("torch."),
    )
