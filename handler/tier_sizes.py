"""How many blocks each tier gets, and how long sequences may be in them: the arithmetic.

Owns these sums, which the engine and its planner share, so that a plan and the engine that follows
it cannot differ but in what one measures and the other estimates. Knows nothing of how memory is
measured or estimated, and imports no torch.
"""

import dataclasses
from collections.abc import Sequence

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError
from pagetier.handler.gpu_memory import GpuMemory

# On a machine without a GPU the first tier lies in host memory too, and takes at most this share.
_HOST_SHARE_OF_FIRST_TIER = 0.4
_LEAST_GRAPH_BYTES = 2 << 20  # CUDA hands out memory in pieces of this size


@dataclasses.dataclass(frozen=True)
class FirstTier:
    """The GPU tier, or what stands for it: its blocks, and the longest sequence in tokens."""

    num_blocks: int
    max_model_len: int


def wanted_model_len(config: EngineConfig, model_len: int) -> int:
    """The longest sequence that is asked for; ``model_len`` is what the model was made for.

    Raises:
        ConfigError: more than that is asked for.
    """
    if config.max_model_len is not None and config.max_model_len > model_len:
        raise ConfigError(
            f"The setting 'max_model_len' is {config.max_model_len}, but the model was made for "
            f"{model_len} tokens; lower it.",
            param="max_model_len",
        )
    return config.max_model_len or model_len


def size_first_tier(
    config: EngineConfig, block_bytes: int, max_model_len: int, memory: GpuMemory | int
) -> FirstTier:
    """How many blocks the first tier has, and how long a sequence may be in them.

    Args:
        config: of the engine.
        block_bytes: of one block.
        max_model_len: ``wanted_model_len``.
        memory: of the GPU, or without one the bytes of host memory that are free to take; does not
            matter with ``num_gpu_blocks_override``.

    Raises:
        ConfigError: it does not suffice; says what to lower or raise.
    """
    blocks_per_sequence = num_blocks_of(max_model_len, config.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    elif isinstance(memory, GpuMemory):
        # Without a wish for a length, any that one can work with is enough.
        wanted = max_model_len if config.max_model_len is not None else max(config.block_size, 2)
        needed = num_blocks_of(wanted, config.block_size) * block_bytes
        memory.check(needed, wanted, config.max_num_batched_tokens)
        num_blocks = memory.for_kv_cache // block_bytes
    else:
        affordable = int(memory * _HOST_SHARE_OF_FIRST_TIER)
        num_blocks = min(blocks_per_sequence * config.max_num_seqs, affordable // block_bytes)
    capacity = num_blocks * config.block_size
    if capacity < max_model_len and (config.max_model_len is not None or capacity < 2):
        raise ConfigError(
            f"The KV cache has room for {max(capacity, 0)} tokens, but one sequence of "
            f"max_model_len takes {max_model_len}; lower max_model_len, or raise "
            "gpu_memory_utilization or num_gpu_blocks_override.",
            param="max_model_len",
        )
    return FirstTier(num_blocks, min(max_model_len, capacity))


def num_cpu_blocks(config: EngineConfig, block_bytes: int) -> int:
    """Blocks of the CPU tier that ``swap_space`` asks for; host memory may allow fewer."""
    return int(config.swap_space * 2**30) // block_bytes


def num_blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks that so many tokens of one sequence fill or begin."""
    return -(-num_tokens // block_size)


def graph_bytes(largest: int, second: int, sizes: Sequence[int]) -> int:
    """What CUDA graphs of these sizes of batches, ascending, are taken to keep.

    The largest takes the pool that all share. Each other one keeps its logits, which are as many
    as its batch: ``second`` is what the one of the second size took.
    """
    others = sizes[:-1]
    return largest + sum(
        max(-(-second * size // others[-1]), _LEAST_GRAPH_BYTES) for size in others
    )
