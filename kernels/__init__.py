"""What a step does on a GPU beside the model's own operators, each with a plain torch reference.

Owns the choice of what serves an operation: its Triton kernel, for tensors on a CUDA device and for
all tensors under ``TRITON_INTERPRET=1``, else its reference, which runs on any device. Knows
nothing of models or requests: operations take tensors, slots, block ids and settings of rows.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from pagetier.kernels import reference
from pagetier.kernels.metadata import AttentionMetadata

__all__ = [
    "AttentionMetadata",
    "advance_rows",
    "allow_tokens",
    "change_rows",
    "copy_blocks",
    "gather_blocks",
    "greedy_tokens",
    "linear",
    "paged_attention",
    "penalise_rows",
    "quantised_linear",
    "read_rows",
    "sample_tokens",
    "scatter_blocks",
    "transfer_blocks",
    "write_kv",
    "write_rotated_kv",
]

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _operation(of_reference: Callable[_P, _R]) -> Callable[_P, _R]:
    """What serves ``of_reference``: a launcher of the same name and arguments, where it can.

    The launcher is in the file that is named like the reference's.
    """
    name: str = of_reference.__name__
    file = of_reference.__module__.rsplit(".", 1)[1]

    @functools.cache
    def serving(on_gpu: bool) -> Callable[_P, _R]:
        has_triton = importlib.util.find_spec("triton") is not None
        if on_gpu and not has_triton:
            logger.warning("Triton is not installed: %s on a GPU will be slow.", name)
        serves = has_triton and (on_gpu or _INTERPRETED)
        logger.info(
            "%s on %s is served by %s.",
            name,
            "a GPU" if on_gpu else "the CPU",
            "its Triton kernel" if serves else "plain torch",
        )
        if not serves:
            return of_reference
        kernels = importlib.import_module(f"pagetier.kernels.{file}")
        return cast("Callable[_P, _R]", getattr(kernels, name))

    @functools.wraps(of_reference)
    def operation(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return serving(_on_gpu(args) or _on_gpu(kwargs.values()))(*args, **kwargs)

    return operation


def _on_gpu(values: Any) -> bool:
    # Pinned pages of the host may come before the tensor on the GPU that they are read into.
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


advance_rows = _operation(reference.advance_rows)
allow_tokens = _operation(reference.allow_tokens)
change_rows = _operation(reference.change_rows)
copy_blocks = _operation(reference.copy_blocks)
gather_blocks = _operation(reference.gather_blocks)
greedy_tokens = _operation(reference.greedy_tokens)
linear = _operation(reference.linear)
paged_attention = _operation(reference.paged_attention)
penalise_rows = _operation(reference.penalise_rows)
quantised_linear = _operation(reference.quantised_linear)
read_rows = _operation(reference.read_rows)
sample_tokens = _operation(reference.sample_tokens)
scatter_blocks = _operation(reference.scatter_blocks)
transfer_blocks = _operation(reference.transfer_blocks)
write_kv = _operation(reference.write_kv)
write_rotated_kv = _operation(reference.write_rotated_kv)
