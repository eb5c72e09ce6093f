"""Writing new keys and values into their slots in plain torch, without waiting for the device.

Knows nothing of which sequence a slot belongs to.
"""

import torch


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write new keys and values into their slots, in place, and touch nothing else.

    Args:
        key: ``(tokens, kv_heads, head_dim)``, any strides.
        value: ``(tokens, kv_heads, v_dim)``, any strides.
        k_cache: ``(blocks, kv_heads, block_size, head_dim)``, any strides.
        v_cache: ``(blocks, kv_heads, block_size, v_dim)``, any strides.
        slots: integers ``(tokens,)``, all different; -1 skips a token.
    """
    if slots.shape[0] == 0:
        return
    block_size = k_cache.shape[2]
    # Dropping skipped tokens would need their number, which only the device knows. So a skipped
    # token repeats the write of one that is not skipped; if there is none, slot 0 keeps its value.
    written = slots >= 0
    source = written.int().argmax()
    stand_in = torch.where(written, torch.arange(slots.shape[0], device=slots.device), source)
    slots = slots.index_select(0, stand_in).long()
    any_written = slots >= 0
    slots = slots.clamp_min(0)
    blocks, offsets = slots // block_size, slots % block_size
    for new, cache in ((key, k_cache), (value, v_cache)):
        new = new.index_select(0, stand_in).to(cache.dtype)
        by_slot = cache.transpose(1, 2)
        by_slot[blocks, offsets] = torch.where(
            any_written[:, None, None], new, by_slot[blocks, offsets]
        )
