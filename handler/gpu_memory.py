"""Where a GPU's memory goes, and what to lower when it does not suffice.

Owns the sum: what is allowed, what weights, steps and graphs take, and what is left for the KV
cache. Knows nothing of how any of it is measured, and imports no torch.
"""

import dataclasses
import math

from pagetier.handler.errors import ConfigError
from pagetier.handler.units import format_bytes


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes.

    Attributes:
        total: all of it.
        utilization: the share that may be used, by everybody on this GPU.
        weights: parameters and buffers of the model.
        used: in use before the KV cache is allocated: weights, the CUDA context, other processes.
        steps: what the largest step needs for a moment.
        graphs: what CUDA graphs keep.
    """

    total: int
    utilization: float
    weights: int
    used: int
    steps: int
    graphs: int

    @property
    def for_kv_cache(self) -> int:
        """What is left; below 0 if all else is too much already."""
        return int(self.total * self.utilization) - self.used - self.steps - self.graphs

    def check(self, needed: int, max_model_len: int, max_num_batched_tokens: int) -> None:
        """Raise unless ``needed`` bytes are left for the KV cache.

        Args:
            needed: of the blocks of one sequence of ``max_model_len`` tokens.
            max_model_len: the longest sequence.
            max_num_batched_tokens: what ``steps`` was measured with.

        Raises:
            ConfigError: they are not; says which settings would help, and by how much.
        """
        missing = needed - self.for_kv_cache
        if missing <= 0:
            return
        wanted = self.utilization + missing / self.total
        advice = []
        if wanted <= 1.0:
            # Rounded up, so that the advice suffices.
            advice.append(f"raise gpu_memory_utilization to {-int(-wanted * 1000 // 1) / 1000:g}")
        if self.for_kv_cache > 0:
            fitting = max_model_len * self.for_kv_cache // needed
            advice.append(f"lower max_model_len to {fitting}")
        if self.steps > missing:
            fitting = int(max_num_batched_tokens * (1 - missing / self.steps))
            advice.append(f"lower max_num_batched_tokens to about {fitting}")
        if self.graphs > missing:
            advice.append(f"set enforce_eager, which spares {format_bytes(self.graphs)} of graphs")
        if not advice:
            larger = self.total + math.ceil(missing / self.utilization)
            advice.append(
                f"take a smaller model, whose weights are at most "
                f"{format_bytes(max(self.weights - missing, 0))}, or a GPU of "
                f"{format_bytes(larger)}, or free memory that others use on this GPU"
            )
        raise ConfigError(
            f"The KV cache of one sequence of {max_model_len} tokens takes {format_bytes(needed)}, "
            f"which is {format_bytes(missing)} more than is left: {self}. To start, "
            f"{', or '.join(advice)}.",
            param="gpu_memory_utilization",
        )

    @property
    def others(self) -> int:
        """What the CUDA context and other processes take."""
        return max(self.used - self.weights, 0)

    def __str__(self) -> str:
        return (
            f"of {format_bytes(self.total)}, {self.utilization:.0%} may be used; weights take "
            f"{format_bytes(self.weights)}, CUDA and other processes "
            f"{format_bytes(self.others)}, the largest step {format_bytes(self.steps)}, CUDA "
            f"graphs {format_bytes(self.graphs)}, "
            f"and {format_bytes(max(self.for_kv_cache, 0))} is left for the KV cache"
        )
