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
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def caches(self) -> dict[str, torch.Tensor | None]:
        """Keywords of ``paged_attention`` that come from the cache."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}


def quantised(
    cache: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cache`` ``(blocks, kv_heads, block_size, dim)`` in ``dtype``, its scales, and its values.

    A slot of NaN stays unreadable: its scale is NaN, and what it holds means nothing.
    """
    largest = 127.0 if dtype == torch.int8 else 448.0
    scales = cache.float().abs().amax(-1) / largest
    scaled = (cache.float() / scales[..., None]).nan_to_num(77.0)
    stored = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return stored, scales, stored.float() * scales[..., None]


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
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """``lens``: (new tokens, tokens in all) of each sequence; ``kv_dtype``: int8 or fp8, if any."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [math.ceil(seq_len / block_size) for _, seq_len in lens]
    num_blocks = sum(counts) + 3
    layout = KVLayout((LayerKV(1, 4, 4), LayerKV(kv_heads, head_dim, value_dim)), block_size, dtype)
    pages = layout.allocate(num_blocks, "cpu")
    pages.view(dtype).fill_(float("nan"))
    k_cache, v_cache, _ = layout.views(pages)[1]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    # Entries past a sequence's length are never used: make them ids that do not exist.
    tables = np.full((len(lens), max([1, *counts])), 10**6, dtype=np.int32)
    keys, values, starts, slots = [], [], [0], []
    for row, (query_len, seq_len) in enumerate(lens):
        key, value = rand(seq_len, kv_heads, head_dim), rand(seq_len, kv_heads, value_dim)
        table = [free.pop() for _ in range(counts[row])]
        tables[row, : counts[row]] = table
        slots.append([(table[at // block_size], at % block_size) for at in range(seq_len)])
        first_visible = max(0, seq_len - query_len - window + 1) if window else 0
        for position in range(first_visible, seq_len):
            block, offset = slots[row][position]
            k_cache[block, :, offset] = key[position]
            v_cache[block, :, offset] = value[position]
        keys.append(key)
        values.append(value)
        starts.append(starts[-1] + query_len)
    # As a projection of q, k and v in one leaves it: a slice with strides of its own.
    q = rand(starts[-1] + num_padding_tokens, heads, 2 * head_dim)[..., :head_dim]
    if kv_dtype is not None:
        stored_k, k_scale, true_k = quantised(k_cache, kv_dtype)
        stored_v, v_scale, true_v = quantised(v_cache, kv_dtype)
        for own_slots, key, value in zip(slots, keys, values, strict=True):
            for position, (block, offset) in enumerate(own_slots):
                key[position] = true_k[block, :, offset]
                value[position] = true_v[block, :, offset]
        layout = KVLayout(layout.layers, block_size, kv_dtype)
        pages = layout.allocate(num_blocks, "cpu")
        k_cache, v_cache, scales = layout.views(pages)[1]
        k_cache.copy_(stored_k)
        v_cache.copy_(stored_v)
        scales["k_scale"].copy_(k_scale)
        scales["v_scale"].copy_(v_scale)
    k_cache, v_cache, scales = layout.views(pages.to(device))[1]
    metadata = AttentionMetadata.build(
        torch.tensor(tables, device=device),
        torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )
    return Batch(q.to(device), keys, values, k_cache, v_cache, metadata, **scales)


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
