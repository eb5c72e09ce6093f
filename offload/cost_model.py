"""Swap or recompute: what each would cost, from rates measured at start.

Owns the two formulas and the choice. Knows nothing of blocks, queues or devices; the rates come
from ``calibrate``.

With ``T`` tokens of context, ``b`` bytes of KV per token, ``W`` link bytes per second, ``P``
parameters without embeddings, ``L`` layers, ``H`` heads of size ``d`` and ``F`` achieved FLOP per
second::

    swap      = bytes_out / W + b * T / W        bytes_out: blocks without a copy in the CPU tier
    recompute = (2 * P * T + 2 * L * H * d * T^2) / F
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Rates and sizes of one engine.

    Attributes:
        token_bytes: KV bytes of one token over all layers.
        block_bytes: bytes of a block.
        link_bytes_per_second: of copies between the tiers, one way.
        flops_per_second: achieved in prefill.
        num_parameters: without embeddings.
        attention_dim: layers * heads * head size.
    """

    token_bytes: int
    block_bytes: int
    link_bytes_per_second: float
    flops_per_second: float
    num_parameters: int
    attention_dim: int

    def swap_seconds(self, num_tokens: int, num_blocks_out: int) -> float:
        """Copying ``num_blocks_out`` blocks out now and ``num_tokens`` back in later."""
        num_bytes = num_blocks_out * self.block_bytes + num_tokens * self.token_bytes
        return num_bytes / self.link_bytes_per_second

    def load_seconds(self, num_tokens: int) -> float:
        """Copying ``num_tokens`` in."""
        return num_tokens * self.token_bytes / self.link_bytes_per_second

    def recompute_seconds(self, num_tokens: int, num_cached_tokens: int = 0) -> float:
        """Computing tokens ``num_cached_tokens .. num_tokens`` of a context again."""
        return (self._flops(num_tokens) - self._flops(num_cached_tokens)) / self.flops_per_second

    def _flops(self, num_tokens: int) -> float:
        linear = 2.0 * self.num_parameters * num_tokens
        return linear + 2.0 * self.attention_dim * num_tokens**2
