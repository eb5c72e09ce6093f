"""Other implementations of attention, timed on the same batch: FlashAttention-3 and torch's SDPA.

Owns how they are called. FlashAttention-3 is measured where ``flash_attn_interface`` can be
imported and has the low-level ``_fwd`` that takes block tables and a number of splits.
"""

import functools
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.bench import Bench, Figures

logger = logging.getLogger(__name__)

_SPLITS = (0, 1, 2, 4, 8, 16, 32)  # 0 lets it choose


@functools.cache
def flash3() -> ModuleType | None:
    """FlashAttention-3, or None if it is not installed."""
    try:
        import flash_attn_interface
    except ImportError as error:
        logger.info("FlashAttention-3 is not measured: %s", error)
        return None
    if not hasattr(flash_attn_interface, "_fwd"):
        logger.info("FlashAttention-3 is not measured: this build has no _fwd.")
        return None
    module: ModuleType = flash_attn_interface
    return module


def flash3_paged(
    bench: Bench,
    q: torch.Tensor,
    lens: Sequence[tuple[int, int]],
    kv_heads: int,
    block_size: int,
    num_sets: int,
) -> Figures:
    """Seconds of one call over paged keys and values, the best of several numbers of splits.

    ``lens`` are (new tokens, tokens in all) of each sequence; ``q`` is ``(tokens, heads, dim)``.
    """
    module = flash3()
    if module is None:
        return {}
    device, head_dim = q.device, q.shape[2]
    longest_query = max(query_len for query_len, _ in lens)
    longest = max(seq_len for _, seq_len in lens)
    blocks_each = -(-longest // block_size)
    counts = torch.tensor([-(-seq_len // block_size) for _, seq_len in lens])
    num_blocks = int(counts.sum())
    used = torch.tensor([n for _, n in lens], dtype=torch.int32, device=device)
    query_lens = torch.tensor([0] + [n for n, _ in lens], dtype=torch.int32, device=device)
    starts = query_lens.cumsum(0, dtype=torch.int32)
    out = torch.empty_like(q)
    sets = []
    for _ in range(num_sets):
        shape = (num_blocks, block_size, kv_heads, head_dim)
        keys, values = (torch.randn(shape, dtype=q.dtype, device=device) for _ in range(2))
        ids = torch.randperm(num_blocks, dtype=torch.int32)
        table = torch.zeros(len(lens), blocks_each, dtype=torch.int32)
        for row, part in enumerate(ids.split(counts.tolist())):
            table[row, : len(part)] = part
        sets.append((keys, values, table.to(device)))
    best: Figures = {}
    for splits in _SPLITS if longest_query == 1 else _SPLITS[:2]:

        def launch(
            keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, splits: int = splits
        ) -> None:
            module._fwd(
                q, keys, values, out, starts, None, used, longest_query, longest, table,
                head_dim**-0.5, True, (-1, -1), splits,
            )  # fmt: skip

        try:
            seconds = bench.seconds([functools.partial(launch, *data) for data in sets], replays=7)
        except Exception as error:
            logger.warning("FlashAttention-3 with %d splits failed: %s", splits, error)
            continue
        if not best or seconds * 1e6 < best["FA3 us"]:
            best = {"FA3 us": seconds * 1e6, "FA3 splits": splits}
    return best


def sdpa(
    bench: Bench, query_len: int, heads: int, kv_heads: int, head_dim: int, num_sequences: int = 1
) -> Figures:
    """Microseconds of torch's attention of fresh prompts, by backend."""
    shape = (num_sequences, query_len)
    q = torch.randn(*shape, heads, head_dim, dtype=bench.dtype, device=bench.device)
    k, v = (
        torch.randn(*shape, kv_heads, head_dim, dtype=bench.dtype, device=bench.device)
        for _ in range(2)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if bench.device.type != "cuda":
        backends = {"math": SDPBackend.MATH}
    figures: Figures = {}
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                seconds = bench.seconds(
                    [
                        lambda: functional.scaled_dot_product_attention(
                            q, k, v, is_causal=True, enable_gqa=True
                        )
                    ],
                    replays=7,
                )
        except RuntimeError as error:
            logger.warning("SDPA %s failed: %s", name, error)
            continue
        figures[f"SDPA {name} us"] = seconds * 1e6
    return figures
