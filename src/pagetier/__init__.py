"""pagetier: language models on TorchServe with a two-tier paged KV cache.

The public face is ``LLM`` (offline generation), ``SamplingParams``, ``StructuredOutputsParams`` and
``__version__``. Classes are loaded on first use, so that importing one part of the package does not
import torch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagetier.handler.llm import LLM
    from pagetier.handler.sampling_params import SamplingParams, StructuredOutputsParams

try:
    __version__ = version("pagetier")
except PackageNotFoundError:  # a bare working tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from pagetier.handler.llm import LLM

        return LLM
    if name in ("SamplingParams", "StructuredOutputsParams"):
        from pagetier.handler import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module 'pagetier' has no attribute {name!r}")
