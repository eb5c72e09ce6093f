"""What every result says of itself: machine, versions, flags, time; and where it is kept."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import psutil
import torch

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "torchserve", "pagetier")


def machine() -> dict[str, Any]:
    """The machine and the versions of what matters, and nothing that names a person or host."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "num_cpus": os.cpu_count(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def busy_percent() -> float:
    """How busy all processors are with whatever else runs, over the next second, in percent."""
    return psutil.cpu_percent(1.0)


def save(name: str, result: dict[str, Any], folder: pathlib.Path | None = None) -> pathlib.Path:
    """Write ``result`` as ``NAME.json`` and return where; ``folder`` instead of ``results/``."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"benchmark": name, "date": date, "machine": machine(), **result}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def load(name: str, folder: pathlib.Path | None = None) -> dict[str, Any] | None:
    """What ``save`` wrote last under that name, or None."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
