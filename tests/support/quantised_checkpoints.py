"""Checkpoints of quantised weights, written as their formats' descriptions say, word by word.

Owns a writer for each format, on purpose in plain Python integers: nothing here is shared with what
reads them. Each gives the tensors of a layer, and the weight in float64 that they stand for.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Layer = tuple[dict[str, torch.Tensor], torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(rows: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers of each row in words of 32 bits, the first, or ``order``'s first, lowest."""
    per_word = 32 // bits
    packed = []
    for row in rows:
        line = []
        for start in range(0, len(row), per_word):
            part = row[start : start + per_word] + [0] * (start + per_word - len(row))
            value = 0
            for place in range(per_word):
                value |= part[order[place] if order else place] << (bits * place)
            line.append(value - 2**32 if value >= 2**31 else value)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def rounded(
    weight: torch.Tensor, bits: int, group_of: list[int], symmetric: bool
) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Numbers ``[out][in]``, zeros ``[out][group]`` and scales ``(out, groups)`` in float16."""
    most = 2**bits - 1
    index = torch.tensor(group_of)
    numbers = torch.zeros_like(weight, dtype=torch.int64)
    zeros, scales = [], []
    for group in range(max(group_of) + 1):
        part = weight[:, index == group].double()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = (2 * torch.maximum(-low, high) if symmetric else high - low) / most
        scale = scale.clamp(min=1e-4).half().double()
        middle = torch.full_like(low, 2 ** (bits - 1))
        zero = middle if symmetric else (-low / scale).round().clamp(1, most)
        found = (part / scale[:, None]).round() + zero[:, None]
        numbers[:, index == group] = found.clamp(0, most).long()
        zeros.append(zero.long())
        scales.append(scale.half())
    return numbers.tolist(), torch.stack(zeros, 1).tolist(), torch.stack(scales, 1)


def meaning(
    numbers: list[list[int]], zeros: list[list[int]], scales: torch.Tensor, group_of: list[int]
) -> torch.Tensor:
    """The weight: each number less its group's zero, times its group's scale."""
    zero, scale = torch.tensor(zeros)[:, group_of], scales.double()[:, group_of]
    return (torch.tensor(numbers) - zero).double() * scale


def transposed(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def groups_in_order(in_size: int, group_size: int) -> list[int]:
    return [column // group_size for column in range(in_size)]


def gptq(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, shuffle: bool, v2: bool
) -> Layer:
    group_of = groups_in_order(weight.shape[1], group_size)
    if shuffle:
        order = torch.randperm(len(group_of), generator=torch.Generator().manual_seed(1)).tolist()
        group_of = [group_of[column] for column in order]
    numbers, zeros, scales = rounded(weight, bits, group_of, symmetric)
    stored = zeros if v2 else [[zero - 1 for zero in row] for row in zeros]
    tensors = {
        "qweight": words(numbers, bits).t().contiguous(),
        "qzeros": words(transposed(stored), bits),
        "scales": scales.t().contiguous(),
        "g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    return tensors, meaning(numbers, zeros, scales, group_of)


def awq(weight: torch.Tensor, *, group_size: int) -> Layer:
    group_of = groups_in_order(weight.shape[1], group_size)
    numbers, zeros, scales = rounded(weight, 4, group_of, False)
    tensors = {
        "qweight": words(transposed(numbers), 4, AWQ_ORDER),
        "qzeros": words(transposed(zeros), 4, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, meaning(numbers, zeros, scales, group_of)


def compressed_tensors(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, shuffle: bool = False
) -> Layer:
    group_of = groups_in_order(weight.shape[1], group_size or weight.shape[1])
    if shuffle:
        group_of.reverse()
    numbers, zeros, scales = rounded(weight, bits, group_of, symmetric)
    # Signed numbers with half of their range added are these very ones.
    tensors = {
        "weight_packed": words(numbers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(transposed(zeros), bits).t().contiguous()
    if shuffle:
        tensors["weight_g_idx"] = torch.tensor(group_of, dtype=torch.int32)
    return tensors, meaning(numbers, zeros, scales, group_of)


@torch.no_grad()
def rewrite(
    folder: pathlib.Path,
    model: Any,
    settings: dict[str, Any],
    quantise: Callable[[torch.Tensor], Layer],
    skip: Callable[[str], bool] = lambda name: False,
) -> None:
    """Quantise the linear layers of a saved model, and ``model``'s own to what they stand for."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head" and not skip(name):
            layer, weight = quantise(tensors.pop(f"{name}.weight"))
            tensors |= {f"{name}.{key}": value for key, value in layer.items()}
            module.weight.copy_(weight)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
