"""Writing new keys and values into their slots in plain torch, without waiting for the device.

Owns how they are quantised and rotated on their way. Knows nothing of which sequence a slot belongs
to, nor of how a model makes its cosines and sines.

Quantised caches, of int8 or float8_e4m3fn, have a scale for each token and head: the largest
absolute number of a key or value, divided by the largest that the type holds. Multiplying by the
scale gives the number back, within half a step. Of zeros the scale is 0.
"""

import torch

# The largest number that each type of quantised cache holds.
QUANTISED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write new keys and values into their slots, in place, and touch nothing else.

    Args:
        key: ``(tokens, kv_heads, head_dim)``, any strides.
        value: ``(tokens, kv_heads, v_dim)``, any strides.
        k_cache: ``(blocks, kv_heads, block_size, head_dim)``, any strides; of a floating-point type
            that keys are converted to, or of int8 or float8_e4m3fn, which they are quantised to.
        v_cache: ``(blocks, kv_heads, block_size, v_dim)``, likewise.
        slots: integers ``(tokens,)``, all different; -1 skips a token.
        k_scale: scales of a quantised ``k_cache``, float32 ``(blocks, kv_heads, block_size)``, any
            strides; written in place.
        v_scale: of ``v_cache``, likewise.
    """
    if slots.shape[0] == 0:
        return
    if slots.device.type == "cpu" and k_scale is None and v_scale is None:
        if bool(slots.min() < 0):
            kept = (slots >= 0).nonzero().flatten()
            key, value, slots = key[kept], value[kept], slots[kept]
        _put_vectors(key, k_cache, slots)
        _put_vectors(value, v_cache, slots)
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
    places = (slots // block_size, slice(None), slots % block_size)

    def put(new: torch.Tensor, target: torch.Tensor) -> None:
        """``new`` has a token first, ``target`` blocks, heads and slots."""
        raw = target.view(torch.uint8) if target.dtype == torch.float8_e4m3fn else target
        by_token = raw[places[0], :, places[2]]
        # torch indexes bytes, but not numbers of 8 bits.
        bits = new.view(torch.uint8) if raw is not target else new
        shape = (-1, *[1] * (bits.dim() - 1))
        raw[places[0], :, places[2]] = torch.where(any_written.view(shape), bits, by_token)

    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        new = new.index_select(0, stand_in)
        if scale is None:
            put(new.to(cache.dtype), cache)
        else:
            quantised, scales = quantise(new, cache.dtype)
            put(quantised, cache)
            put(scales, scale)


def _put_vectors(new: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write ``new`` ``(tokens, kv_heads, dim)`` into its slots, in few operators.

    A CPU can be told which they are, and spends more time on an operator than on what it copies.
    """
    num_blocks, kv_heads, block_size, dim = cache.shape
    new = new.to(cache.dtype)
    if cache.stride()[1:] != (block_size * dim, dim, 1) or cache.stride(0) % dim:
        cache[slots // block_size, :, slots % block_size] = new
        return
    # Pages are whole vectors of ``dim`` numbers, those of a head one after the other.
    vectors_per_page = cache.stride(0) // dim
    num_vectors = (num_blocks - 1) * vectors_per_page + kv_heads * block_size
    firsts = torch.add(slots, slots // block_size, alpha=vectors_per_page - block_size)
    heads = torch.arange(0, kv_heads * block_size, block_size)
    places = (firsts[:, None] + heads).view(-1)
    vectors = cache.as_strided((num_vectors, dim), (dim, 1))
    vectors.index_copy_(0, places, new.reshape(-1, dim))


def quantise(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of ``dtype`` and their scales, one for each row of the last dimension, float32.

    Raises:
        KeyError: there are no quantised caches of ``dtype``.
    """
    values = values.float()
    largest = values.abs().amax(-1)
    most = QUANTISED_MAX[dtype]
    # With a number on either side torch would multiply by a rounded reciprocal, on a GPU at least.
    most_of_each = torch.full_like(largest, most)
    inverse = torch.where(largest > 0, most_of_each / largest, 0.0)
    scaled = (values * inverse[..., None]).clamp(-most, most)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), largest / most_of_each


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of the first dimensions of each head.

    The same as transformers' ``apply_rotary_pos_emb``, computed in float32 and rounded once.

    Args:
        x: ``(tokens, heads, dim)``.
        cos: ``(tokens, rotary_dim)``; dimensions of a head beyond ``rotary_dim`` stay as they are.
        sin: likewise.
        interleaved: whether neighbouring dimensions are a pair (GPT-J, Cohere), instead of those
            half of ``rotary_dim`` apart (Llama, GPT-NeoX).
    """
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if interleaved:
        partner = torch.stack([-rotated[..., 1::2], rotated[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    rotated = rotated * cos.float()[:, None] + partner * sin.float()[:, None]
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def write_rotated_kv(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into their slots; see ``write_kv``.

    Args:
        q: ``(tokens, heads, head_dim)``, any strides.
        key: ``(tokens, kv_heads, head_dim)``, not rotated yet.
        value: see ``write_kv``.
        cos: ``(tokens, rotary_dim)``, see ``rotate``.
        sin: likewise.
        k_cache: see ``write_kv``.
        v_cache: see ``write_kv``.
        slots: see ``write_kv``; queries of skipped tokens are rotated too.
        interleaved: see ``rotate``.
        k_scale: see ``write_kv``.
        v_scale: see ``write_kv``.
        out: where to write the queries, of the shape of ``q`` and perhaps ``q`` itself; None
            allocates it.

    Returns:
        The rotated queries, ``out``.
    """
    rotated = rotate(key.float(), cos, sin, interleaved=interleaved)
    write_kv(rotated, value, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    queries = rotate(q, cos, sin, interleaved=interleaved)
    return queries if out is None else out.copy_(queries)
