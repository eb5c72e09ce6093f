"""Writing new keys and values into their slots, as one Triton kernel.

Owns the kernel and its launch. Knows nothing of which sequence a slot belongs to. The reference is
``reference.write_kv``. Grid ``(tokens, kv_heads)``: a program copies one token's key and value of
one head. A slot of -1 is skipped.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _write_kv_kernel(
    key_ptr, value_ptr, k_ptr, v_ptr, slots_ptr,
    key_stride_token, key_stride_head, value_stride_token, value_stride_head,
    k_stride_block, k_stride_head, k_stride_slot,
    v_stride_block, v_stride_head, v_stride_slot,
    KEY_DIM: tl.constexpr, KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        key_dim = tl.arange(0, KEY_DIM_PADDED)
        key = tl.load(
            key_ptr + token * key_stride_token + head * key_stride_head + key_dim,
            mask=key_dim < KEY_DIM,
        )
        tl.store(
            k_ptr
            + block * k_stride_block
            + head * k_stride_head
            + offset * k_stride_slot
            + key_dim,
            key,
            mask=key_dim < KEY_DIM,
        )
        value_dim = tl.arange(0, VALUE_DIM_PADDED)
        value = tl.load(
            value_ptr + token * value_stride_token + head * value_stride_head + value_dim,
            mask=value_dim < VALUE_DIM,
        )
        tl.store(
            v_ptr
            + block * v_stride_block
            + head * v_stride_head
            + offset * v_stride_slot
            + value_dim,
            value,
            mask=value_dim < VALUE_DIM,
        )


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write each token's keys and values into its slot; takes what ``reference.write_kv`` does.

    Raises:
        ValueError: shapes do not belong together, or a cache's last dimension has gaps.
    """
    num_tokens, kv_heads, key_dim = key.shape
    _, cache_heads, block_size, value_dim = v_cache.shape
    if (
        cache_heads != kv_heads
        or value.shape != (num_tokens, kv_heads, value_dim)
        or k_cache.shape[1:] != (kv_heads, block_size, key_dim)
        or slots.shape != (num_tokens,)
    ):
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)}, k_cache {tuple(k_cache.shape)}, "
            f"v_cache {tuple(v_cache.shape)} and slots {tuple(slots.shape)} do not belong together."
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("The last dimension of k_cache and v_cache must be dense.")
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    if num_tokens == 0:
        return
    _write_kv_kernel[(num_tokens, kv_heads)](
        key, value, k_cache, v_cache, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        KEY_DIM=key_dim, KEY_DIM_PADDED=triton.next_power_of_2(key_dim),
        VALUE_DIM=value_dim, VALUE_DIM_PADDED=triton.next_power_of_2(value_dim),
        BLOCK_SIZE=block_size, num_warps=1,
    )  # fmt: skip
