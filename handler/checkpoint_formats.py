"""Checkpoints whose weights are quantised already, read into the one layout of ``kernels.packing``.

Owns three formats: GPTQ (``gptq``, and ``gptq_v2``), AWQ (``gemm``) and compressed-tensors
(``pack-quantized``): which tensors a layer has, how numbers lie in them, and which variants are not
served. Knows nothing of models or of reading files. No package of theirs is needed.

In all of them a weight is ``(number - zero) * scale``, with groups of neighbouring inputs. Numbers
of ``bits`` bits lie in words of int32, the first in the lowest bits:

- *GPTQ*: ``qweight`` ``(in / n, out)``, ``n`` numbers a word along the inputs; ``qzeros``
  ``(groups, out / n)`` along the outputs, each one less than the zero, but in ``gptq_v2``;
  ``scales`` ``(groups, out)``; ``g_idx`` ``(in,)``, the group of each input, in any order if the
  inputs were quantised in the order of their activations (``desc_act``).
- *AWQ*: ``qweight`` ``(in, out / 8)`` and ``qzeros`` ``(groups, out / 8)`` along the outputs, those
  of a word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` ``(groups, out)``.
- *compressed-tensors*: ``weight_packed`` ``(out, in / n)`` along the inputs, ``weight_scale``
  ``(out, groups)``, ``weight_zero_point`` ``(out / n, groups)`` along the outputs unless symmetric,
  ``weight_g_idx`` as above. Numbers and zeros are signed, stored with half of their range added.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pagetier.handler.quantised_linear import QuantisedLinear
from pagetier.kernels import packing

Tensors = Mapping[str, torch.Tensor]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = (4, 8)


class Unreadable(Exception):
    """Why a layer or a checkpoint cannot be read, as the end of a sentence."""


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The numbers, uint8, that lie along ``dim`` of a matrix of int32, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    apart = words[:, None, :] if dim == 0 else words[:, :, None]
    shifted = apart >> (shifts[:, None] if dim == 0 else shifts)
    numbers: torch.Tensor = shifted & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(dim, dim + 1)


# --- what a checkpoint says of itself ------------------------------------------------------------


def refusal(settings: Mapping[str, Any]) -> str | None:
    """Why weights with this ``quantization_config`` cannot be read, or None."""
    method = str(settings.get("quant_method"))
    check = _CHECKS.get(method)
    if check is None:
        return f"its weights are quantised ('{method}'); read are {', '.join(sorted(_CHECKS))}"
    return check(settings)


def _refuse_gptq(settings: Mapping[str, Any]) -> str | None:
    form = settings.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        return f"its GPTQ weights are in the format '{form}'; read are 'gptq' and 'gptq_v2'"
    return _refuse_bits(settings.get("bits"))


def _refuse_awq(settings: Mapping[str, Any]) -> str | None:
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        return f"its AWQ weights are in the version '{version}'; only 'gemm' is read"
    if not settings.get("zero_point", True):
        return "its AWQ weights have no zero points, which is not read"
    bits = settings.get("bits", settings.get("w_bit"))
    return None if bits == 4 else f"its weights have {bits} bits; of AWQ's only 4 are read"


def _refuse_compressed_tensors(settings: Mapping[str, Any]) -> str | None:
    for group in settings.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        form = group.get("format") or settings.get("format")
        if form != "pack-quantized" or weights.get("type", "int") != "int":
            return f"its weights are in the format '{form}'; only 'pack-quantized' is read"
        if group.get("input_activations") or group.get("output_activations"):
            return "its activations are quantised too, which is not read"
        strategy = weights.get("strategy")
        if strategy not in ("group", "channel"):
            return f"its weights are quantised by '{strategy}'; read are 'group' and 'channel'"
        refused = _refuse_bits(weights.get("num_bits"))
        if refused:
            return refused
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "its weights are sparse, which is not read"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "its weights are rotated, which is not read"
    return None


def _refuse_bits(bits: Any) -> str | None:
    return None if bits in _BITS else f"its weights have {bits} bits; read are 4 and 8"


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "gptq": _refuse_gptq,
    "awq": _refuse_awq,
    "compressed-tensors": _refuse_compressed_tensors,
}

# What a layer's tensors are called behind the layer's name, the numbers first.
TENSORS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    ),
}  # fmt: skip


# --- a layer -------------------------------------------------------------------------------------


def read_layer(
    settings: Mapping[str, Any],
    tensors: Tensors,
    in_size: int,
    out_size: int,
    bias: nn.Parameter | None,
) -> QuantisedLinear:
    """A layer of the model from its tensors in the checkpoint.

    Args:
        settings: the checkpoint's ``quantization_config``, for which ``refusal`` gave None.
        tensors: by the names of ``TENSORS``, on the device that the layer shall be on.
        in_size: inputs of the layer.
        out_size: outputs of the layer.
        bias: of the layer.

    Raises:
        Unreadable: tensors are missing, or do not belong together.
    """
    try:
        bits, numbers, scales, zeros, group_of = _READERS[settings["quant_method"]](
            settings, tensors, in_size, out_size
        )
    except KeyError as exc:
        raise Unreadable(f"it has no {exc}") from None
    num_groups = scales.shape[0]
    if numbers.shape != (out_size, in_size) or scales.shape[1] != out_size:
        raise Unreadable(
            f"its {tuple(numbers.shape)} numbers and {tuple(scales.shape)} scales are not those of "
            f"{out_size} outputs and {in_size} inputs"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise Unreadable(f"it has {tuple(zeros.shape)} zeros for {tuple(scales.shape)} scales")
    if zeros is not None and int(zeros.max()) > 255:
        raise Unreadable("it has a zero of 256, and read are those of 8 bits")
    group_size, permutation = _groups(num_groups, in_size, group_of)
    if permutation is not None:
        numbers = numbers[:, permutation]
    if zeros is not None:
        zeros = None if (zeros == 2 ** (bits - 1)).all() else zeros.to(torch.uint8).contiguous()
    packed = packing.pack(numbers, bits)
    return QuantisedLinear(
        in_size, bits, group_size, packed, scales.contiguous(), zeros, permutation, bias
    )


def _groups(
    num_groups: int, in_size: int, group_of: torch.Tensor | None
) -> tuple[int, torch.Tensor | None]:
    """Columns of a group, and the order of columns in which groups lie together."""
    if num_groups == 1:
        return 0, None
    size = -(-in_size // num_groups)
    if group_of is not None:  # then the last group may be smaller than the others
        size = int(group_of.bincount().max())
    if size < packing.WORDS or size.bit_count() != 1 or -(-in_size // size) != num_groups:
        raise Unreadable(
            f"its {in_size} inputs are in {num_groups} groups; read are groups of 32, 64, 128 or a "
            "larger power of two"
        )
    if group_of is None:
        return size, None
    expected = torch.arange(in_size, device=group_of.device) // size
    if torch.equal(group_of.long(), expected):
        return size, None
    permutation = group_of.argsort(stable=True)
    if not torch.equal(group_of[permutation].long(), expected):
        raise Unreadable(f"its groups do not all have {size} inputs")
    return size, permutation


# Bits, numbers (out, in), scales and zeros (groups, out), and the group of each input.
_Parts = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _read_gptq(settings: Mapping[str, Any], tensors: Tensors, in_size: int, _: int) -> _Parts:
    # By shape, since some layers may have other bits than the configuration's.
    bits = _bits(tensors["qweight"].shape[0], in_size)
    numbers = unpack_words(tensors["qweight"], bits, 0)[:in_size].t()
    zeros = unpack_words(tensors["qzeros"], bits, 1).short()
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros += 1
    return bits, numbers, tensors["scales"], zeros, tensors.get("g_idx")


def _read_awq(_: Mapping[str, Any], tensors: Tensors, _in: int, out_size: int) -> _Parts:
    bits = _bits(tensors["qweight"].shape[1], out_size)
    # Where in a word each of its outputs lies.
    place = torch.tensor(_AWQ_ORDER, device=tensors["qweight"].device).argsort()

    def ordered(words: torch.Tensor) -> torch.Tensor:
        numbers = unpack_words(words, bits, 1)
        return numbers.view(len(numbers), -1, len(place))[:, :, place].flatten(1)

    numbers, zeros = ordered(tensors["qweight"]), ordered(tensors["qzeros"])
    return bits, numbers.t(), tensors["scales"], zeros, None


def _read_compressed_tensors(
    _: Mapping[str, Any], tensors: Tensors, in_size: int, out_size: int
) -> _Parts:
    bits = _bits(tensors["weight_packed"].shape[1], in_size)
    numbers = unpack_words(tensors["weight_packed"], bits, 1)[:, :in_size]
    zeros = None
    if "weight_zero_point" in tensors:
        zeros = unpack_words(tensors["weight_zero_point"], bits, 0)[:out_size].t()
    group_of = tensors.get("weight_g_idx")
    if group_of is not None and (group_of < 0).all():  # as it is before any order is known
        group_of = None
    return bits, numbers, tensors["weight_scale"].t(), zeros, group_of


def _bits(num_words: int, num_numbers: int) -> int:
    """Bits of each of so many numbers in so many words."""
    for bits in _BITS:
        if num_words == -(-num_numbers * bits // 32):
            return bits
    raise Unreadable(f"its {num_numbers} numbers lie in {num_words} words, not as 4 or 8 bits")


_READERS: dict[str, Callable[[Mapping[str, Any], Tensors, int, int], _Parts]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
}
