"""Random batches for paged attention on shuffled blocks, and attention that cannot be wrong."""

import dataclasses
import math

import numpy as np
import torch

from pagetier.kernels import AttentionMetadata
from pagetier.offload.tiers import KVLayout, LayerKV


@dataclasses.dataclass
class Batch:
    """A random batch on shuffled blocks; every slot that must not be read holds NaN."""

    q: torch.Tensor
    keys: list[torch.Tensor]  # per sequence (seq_len, kv_heads, head_dim)
    values: list[torch.Tensor]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata


def make_batch(
    lens: list[tuple[int, int]],
    *,
    block_size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    value_dim: int = 8,
    window: int = 0,
    num_padding_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """``lens``: (new tokens, tokens in all) of each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [math.ceil(seq_len / block_size) for _, seq_len in lens]
    num_blocks = sum(counts) + 3
    layout = KVLayout((LayerKV(1, 4, 4), LayerKV(kv_heads, head_dim, value_dim)), block_size, dtype)
    pages = layout.allocate(num_blocks, "cpu")
    pages.view(dtype).fill_(float("nan"))
    k_cache, v_cache = layout.views(pages)[1]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    # Entries past a sequence's length are never used: make them ids that do not exist.
    tables = np.full((len(lens), max([1, *counts])), 10**6, dtype=np.int32)
    keys, values, starts = [], [], [0]
    for row, (query_len, seq_len) in enumerate(lens):
        key, value = rand(seq_len, kv_heads, head_dim), rand(seq_len, kv_heads, value_dim)
        table = [free.pop() for _ in range(counts[row])]
        tables[row, : counts[row]] = table
        first_visible = max(0, seq_len - query_len - window + 1) if window else 0
        for position in range(first_visible, seq_len):
            block, offset = table[position // block_size], position % block_size
            k_cache[block, :, offset] = key[position]
            v_cache[block, :, offset] = value[position]
        keys.append(key)
        values.append(value)
        starts.append(starts[-1] + query_len)
    # As a projection of q, k and v in one leaves it: a slice with strides of its own.
    q = rand(starts[-1] + num_padding_tokens, heads, 2 * head_dim)[..., :head_dim]
    pages = pages.to(device)
    k_cache, v_cache = layout.views(pages)[1]
    metadata = AttentionMetadata.build(
        torch.tensor(tables, device=device),
        torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )
    return Batch(q.to(device), keys, values, k_cache, v_cache, metadata)


def naive(
    batch: Batch,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query, one head, one position at a time, in float64."""
    q = batch.q.double().cpu()
    num_tokens, heads, _ = q.shape
    out = torch.zeros(num_tokens, heads, batch.v_cache.shape[-1], dtype=torch.float64)
    token = 0
    query_lens = batch.metadata.host_query_lens
    for key, value, query_len in zip(batch.keys, batch.values, query_lens, strict=True):
        group = heads // key.shape[1]
        for index in range(query_len):
            position = len(key) - int(query_len) + index
            first = max(0, position - window + 1) if window else 0
            for head in range(heads):
                scores = []
                for seen in range(first, position + 1):
                    score = float(q[token, head] @ key[seen, head // group].double()) * scale
                    scores.append(softcap * math.tanh(score / softcap) if softcap else score)
                total = sum(math.exp(score) for score in scores)
                if sinks is not None:
                    total += math.exp(float(sinks[head]))
                for seen, score in zip(range(first, position + 1), scores, strict=True):
                    weight = math.exp(score) / total
                    out[token, head] += weight * value[seen, head // group].double()
            token += 1
    return out
