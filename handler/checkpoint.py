"""What a model's safetensors files hold, by their headers alone.

Owns the reading of headers and the comparison with what ``config.json`` describes. Reads no weight,
and knows nothing of how weights are loaded or used.
"""

import collections
import dataclasses
import json
import math
from pathlib import Path

import safetensors

from pagetier.handler.errors import ModelError
from pagetier.handler.units import format_bytes

# Bytes of an element, by the names of the format; whatever else there is takes one.
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Files of weights, by their headers.

    Attributes:
        num_files: of them.
        num_elements: of all tensors, by the format's name of their dtype, most of them first.
    """

    num_files: int
    num_elements: dict[str, int]

    @property
    def num_weights(self) -> int:
        """Elements of any dtype."""
        return sum(self.num_elements.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(count * _ITEM_BYTES.get(name, 1) for name, count in self.num_elements.items())

    @property
    def dtype(self) -> str | None:
        """The dtype of most weights, as ``EngineConfig`` names it; None for any other."""
        return _TORCH_NAMES.get(next(iter(self.num_elements), ""))

    def check(self, num_weights: int) -> None:
        """Raise unless the files can hold the ``num_weights`` of the model.

        They may hold more: tied embeddings twice, or buffers.

        Raises:
            ModelError: they hold fewer.
        """
        missing = num_weights - self.num_weights
        if missing > 0:
            raise ModelError(
                f"The safetensors files hold {self.num_weights:,} weights, {missing:,} fewer than "
                f"the {num_weights:,} that config.json describes; the download is incomplete, or "
                "the two do not belong together."
            )

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        dtypes = ", ".join(f"{count:,} {name}" for name, count in self.num_elements.items())
        return f"{files}, {format_bytes(self.num_bytes)} ({dtypes})"


def read_headers(folder: Path) -> Checkpoint | None:
    """What the safetensors files of a model's folder hold; None if there are none.

    Raises:
        ModelError: a file is missing, cut off or damaged.
    """
    names = _file_names(folder)
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        try:
            with safetensors.safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dictionary
                    piece = file.get_slice(key)
                    counts[str(piece.get_dtype())] += math.prod(piece.get_shape())
        except FileNotFoundError:
            raise ModelError(
                f"The file '{name}', which the model's index names, is missing; download it."
            ) from None
        except (safetensors.SafetensorError, OSError) as exc:
            raise ModelError(
                f"The file '{name}' is no whole safetensors file ({exc}); download it again."
            ) from None
    return Checkpoint(len(names), dict(counts.most_common())) if names else None


def _file_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single.name] if single.is_file() else []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ModelError(
            f"The file '{index.name}' cannot be read as an index of weights; download it again."
        ) from None
