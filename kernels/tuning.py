"""Launch settings of kernels, by operation, device and shape, from tables that were measured.

Owns the tables (``tuned/*.json``), which of them serve a device, and looking a shape up. Knows
nothing of kernels: what settings mean is between an operation's launcher and its entries. Nothing
is ever measured here: ``python -m benchmarks.kernels --tune`` makes a table for the present device.

A table is named after what it was measured for: a chip (``h200``, ``rtx_4090``), a compute
capability (``cc90``), or ``default``, which serves every device and must fit the smallest. They are
asked in this order, after the file that the variable ``PAGETIER_TUNED`` names, if it is set. In a
table, an operation's first entry that matches counts::

    {"operations": {"linear": [
        {"when": {"dtype": "bfloat16", "tokens": [1, 4]}, "use": {"tile": 16, "num_warps": 4}}
    ]}}

``when`` holds the value that a part of the shape must have, or the lowest and highest; parts that
it leaves out may be anything.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

_FOLDER = pathlib.Path(__file__).parent / "tuned"
_VARIABLE = "PAGETIER_TUNED"
# A table that is asked before all others for a while; see `using`.
_overriding: list["Table"] = []

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Settings, and the shapes that they are for."""

    when: Mapping[str, Any]
    use: Settings

    def matches(self, shape: Mapping[str, Any]) -> bool:
        """Whether these settings are for ``shape``.

        Raises:
            KeyError: ``when`` names what the operation's shapes do not have.
        """
        for name, wanted in self.when.items():
            value = shape[name]
            if isinstance(wanted, Sequence) and not isinstance(wanted, str):
                low, high = wanted
                if not low <= value <= high:
                    return False
            elif value != wanted:
                return False
        return True


Table = Mapping[str, Sequence[Entry]]


def settings(
    operation: str, device: torch.device, otherwise: Settings | None = None, /, **shape: Any
) -> Settings:
    """The settings of an operation on ``device`` for a shape; the same read-only mapping each time.

    Args:
        operation: its name in the tables.
        device: where it runs; all but CUDA devices get the defaults.
        otherwise: what to return if no table has an entry for this shape.
        **shape: what entries may choose by: integers and strings.

    Raises:
        LookupError: no table has an entry for this shape, and there is no ``otherwise``.
    """
    tables = families(device)
    found = _find(operation, tables, tuple(shape.items())) or otherwise
    if found is None:
        raise LookupError(f"No table of {tables} has settings of {operation} for {shape}.")
    return found


@functools.lru_cache(maxsize=4096)
def _find(
    operation: str, tables: tuple[str, ...], shape: tuple[tuple[str, Any], ...]
) -> Settings | None:
    by_name = dict(shape)
    for table in (*_overriding, *_of_user(), *map(packaged, tables)):
        for entry in table.get(operation, ()):
            if entry.matches(by_name):
                return entry.use
    return None


def families(device: torch.device) -> tuple[str, ...]:
    """Names of the tables that serve ``device``, the closest first; not all need to exist."""
    if device.type != "cuda":
        return ("default",)
    return _families_of_gpu(device.index if device.index is not None else -1)


@functools.cache
def _families_of_gpu(index: int) -> tuple[str, ...]:
    properties = torch.cuda.get_device_properties(None if index < 0 else index)
    return (slug(properties.name), f"cc{properties.major}{properties.minor}", "default")


def slug(name: str) -> str:
    """A device's name as a table's: ``NVIDIA GeForce RTX 4090`` is ``rtx_4090``."""
    words = name.lower().replace("-", " ").split()
    # A board's memory and socket say nothing of the chip: "NVIDIA H100 80GB HBM3", "H100 PCIe".
    left_out = {"nvidia", "geforce", "hbm3", "hbm3e", "pcie", "sxm", "nvl"}
    return "_".join(w for w in words if w not in left_out and not w.endswith("gb"))


@functools.cache
def packaged(name: str) -> Table:
    """The table of that name that comes with the package; empty if there is none."""
    path = _FOLDER / f"{name}.json"
    return load(path) if path.exists() else {}


def packaged_names() -> list[str]:
    """Names of all tables that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@functools.cache
def _of_user() -> tuple[Table, ...]:
    path = os.environ.get(_VARIABLE)
    return (load(pathlib.Path(path)),) if path else ()


def load(path: pathlib.Path) -> Table:
    """Read a table.

    Raises:
        ValueError: the file is none; the message says why.
    """
    try:
        operations = json.loads(path.read_text(encoding="utf-8"))["operations"]
        return {
            operation: [
                Entry(MappingProxyType(entry["when"]), MappingProxyType(entry["use"]))
                for entry in entries
            ]
            for operation, entries in operations.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of kernel settings ({type(error).__name__}: {error}); "
            f"make one with `python -m benchmarks.kernels --tune`, or unset {_VARIABLE}."
        ) from error


def dumps(table: Table, **about: Any) -> str:
    """A table as the text of its file, one entry a line; ``about`` says where it comes from."""
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in about.items()]
    operations = []
    for operation, entries in table.items():
        each = [
            "      " + json.dumps({"when": dict(entry.when), "use": dict(entry.use)})
            for entry in entries
        ]
        operations.append(f'    "{operation}": [\n' + ",\n".join(each) + "\n    ]")
    body = ",\n".join(operations)
    return "\n".join(["{", *lines, '  "operations": {', body, "  }", "}", ""])


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Ask ``table`` before all others: for trying settings out. Not for several threads."""
    _overriding.insert(0, table)
    _find.cache_clear()
    try:
        yield
    finally:
        _overriding.remove(table)
        _find.cache_clear()
