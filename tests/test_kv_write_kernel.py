"""Writing keys and values, rotated and quantised on the way: the kernel and its reference."""

import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from pagetier.kernels import kv_write, reference
from pagetier.kernels.reference.kv_write import quantise, rotate

SLOTS = [5, -1, 60, 0, 17, -1, 33]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=30)


def skip_without_fp8(dtype: torch.dtype, device: str) -> None:
    if dtype != torch.float8_e4m3fn:
        return
    if device == "cpu":
        pytest.skip("Triton's interpreter halves what rounds up to the next power of two in fp8")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9")


class Case:
    """New keys and values, and pages of random bytes that caches and scales are views of."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        *,
        kv_heads: int = 3,
        block_size: int = 16,
        key_dim: int = 24,
        value_dim: int = 10,
        num_tokens: int = len(SLOTS),
    ) -> None:
        generator = torch.Generator().manual_seed(kv_heads * block_size)
        sizes = [
            *(kv_heads * block_size * dim * cache_dtype.itemsize for dim in (key_dim, value_dim)),
            *(kv_heads * block_size * 4,) * 2,
        ]
        self.sizes = [-(-size // 16) * 16 for size in sizes]
        num_blocks = 80 // block_size
        self.pages = torch.randint(
            0, 100, (num_blocks, 16 + sum(self.sizes)), generator=generator, dtype=torch.uint8
        ).to(device)
        self.shape = (num_blocks, kv_heads, block_size)
        self.dims, self.cache_dtype = (key_dim, value_dim), cache_dtype
        # Slices with strides of their own, as a fused projection leaves them.
        fused = torch.randn(num_tokens, 2 * kv_heads, key_dim + value_dim, generator=generator)
        fused[:1, 0] = 0.0  # zeros have no scale
        fused = fused.to(device, dtype)
        self.q = fused[..., :key_dim]
        self.key = fused[:, :kv_heads, :key_dim]
        self.value = fused[:, kv_heads:, key_dim:]
        self.slots = torch.tensor(SLOTS[:num_tokens], device=device)

    def views(self, pages: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Caches and, if they are quantised, scales, behind 16 bytes of something else."""
        views, start = [], 16
        shapes = [*((*self.shape, dim) for dim in self.dims), self.shape, self.shape]
        dtypes = [self.cache_dtype, self.cache_dtype, torch.float32, torch.float32]
        for size, shape, dtype in zip(self.sizes, shapes, dtypes, strict=True):
            count = torch.Size(shape[1:]).numel()
            piece = pages[:, start : start + count * dtype.itemsize].view(dtype)
            views.append(piece.view(shape))
            start += size
        is_quantised = self.cache_dtype.itemsize == 1
        return views[:2], {"k_scale": views[2], "v_scale": views[3]} if is_quantised else {}

    def read(self, pages: torch.Tensor, token: int, *, of_value: bool) -> torch.Tensor:
        """What a token's slot holds, in float64 ``(kv_heads, dim)``."""
        caches, scales = self.views(pages)
        block_size = self.shape[2]
        block, offset = divmod(SLOTS[token], block_size)
        stored = caches[of_value][block, :, offset].double()
        if scales:
            stored *= scales["v_scale" if of_value else "k_scale"][block, :, offset, None].double()
        return stored


CACHES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "key_dim", "value_dim"),
    [(3, 16, 24, 10), (1, 1, 64, 64), (5, 4, 80, 96), (20, 16, 128, 128)],
)
def test_write_kv_equals_the_reference_and_touches_nothing_else(
    cache_dtype, kv_heads, block_size, key_dim, value_dim, device
):
    skip_without_fp8(cache_dtype, device)
    dtype = torch.bfloat16 if cache_dtype == torch.bfloat16 else torch.float16
    case = Case(device, dtype, cache_dtype, kv_heads=kv_heads, block_size=block_size,
                key_dim=key_dim, value_dim=value_dim)  # fmt: skip
    expected = case.pages.clone()
    caches, scales = case.views(expected)
    reference.write_kv(case.key, case.value, *caches, case.slots, **scales)
    caches, scales = case.views(case.pages)
    kv_write.write_kv(case.key, case.value, *caches, case.slots, **scales)
    assert torch.equal(case.pages, expected)


# Half a step of the largest number: of int8 1/254, of e4m3's 3 bits after the first 1/32 of each.
@pytest.mark.parametrize(
    ("cache_dtype", "absolute", "relative"),
    [(torch.int8, 1 / 253, 0.0), (torch.float8_e4m3fn, 1e-3, 1 / 16)],
)
def test_quantised_slots_hold_what_was_written(cache_dtype, absolute, relative, device):
    skip_without_fp8(cache_dtype, device)
    case = Case(device, torch.float32, cache_dtype)
    caches, scales = case.views(case.pages)
    kv_write.write_kv(case.key, case.value, *caches, case.slots, **scales)
    for token in [index for index, slot in enumerate(SLOTS) if slot >= 0]:
        for new, of_value in ((case.key, False), (case.value, True)):
            expected = new[token].double()
            stored = case.read(case.pages, token, of_value=of_value)
            bound = absolute * expected.abs().amax(-1, keepdim=True) + relative * expected.abs()
            assert ((stored - expected).abs() <= bound).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [24, 8])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_rotated_writes_equal_the_reference(interleaved, rotary_dim, in_place, cache_dtype, device):
    case = Case(device, torch.float32, cache_dtype)
    cos, sin = angles(len(SLOTS), rotary_dim, device, interleaved=interleaved)
    expected = case.pages.clone()
    caches, scales = case.views(expected)
    arguments = (case.q, case.key, case.value, cos, sin)
    rotated = reference.write_rotated_kv(
        *arguments, *caches, case.slots, **scales, interleaved=interleaved
    )
    caches, scales = case.views(case.pages)
    # Beside q lie numbers that are not its own.
    q = torch.full((len(SLOTS), 6, 40), 9.0, device=device)
    q[..., :24] = case.q
    out = kv_write.write_rotated_kv(
        q[..., :24], *arguments[1:], *caches, case.slots, **scales, interleaved=interleaved,
        out=q[..., :24] if in_place else None,
    )  # fmt: skip
    torch.testing.assert_close(out, rotated, atol=1e-6, rtol=1e-6)
    assert (q[..., 24:] == 9.0).all()
    assert torch.equal(q[..., :24], out if in_place else case.q)
    # A sum may be rounded once or twice: numbers may differ by it, whole numbers by one.
    for (caches, scales), (other_caches, other_scales) in [
        (case.views(case.pages), case.views(expected))
    ]:
        for cache, other in zip(caches, other_caches, strict=True):
            difference = (cache.double() - other.double()).abs()
            assert difference.max() <= (1 if cache_dtype == torch.int8 else 1e-5)
        for name in scales:
            torch.testing.assert_close(scales[name], other_scales[name], rtol=1e-6, atol=0)
    assert torch.equal(case.pages[:, :16], expected[:, :16])


def angles(
    num_tokens: int, rotary_dim: int, device: str, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as models make them, of positions that are not neighbours."""
    positions = torch.arange(num_tokens) * 37.0
    frequencies = positions[:, None] / 100.0 ** (torch.arange(rotary_dim // 2) / rotary_dim)
    both = (
        frequencies.repeat_interleave(2, dim=-1)
        if interleaved
        else torch.cat([frequencies, frequencies], dim=-1)
    )
    return both.cos().to(device), both.sin().to(device)


@pytest.mark.parametrize("model", [modeling_llama, modeling_cohere])
def test_rotation_is_that_of_transformers(model):
    interleaved = model is modeling_cohere
    cos, sin = angles(5, 16, "cpu", interleaved=interleaved)
    q, key = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    expected = model.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None]
    )
    for x, rotated in zip((q, key), expected, strict=True):
        torch.testing.assert_close(
            rotate(x, cos, sin, interleaved=interleaved), rotated[0].transpose(0, 1)
        )


def test_quantising_rounds_to_the_nearest_and_keeps_zeros():
    values = torch.tensor([[0.0, 0.0], [-2.0, 0.5], [1e-30, -3e-30]])
    quantised, scales = quantise(values, torch.int8)
    assert quantised.tolist() == [[0, 0], [-127, 32], [42, -127]]
    assert scales[0] == 0
    torch.testing.assert_close(quantised[1:] * scales[1:, None], values[1:], rtol=1e-2, atol=0)


def test_tensors_that_do_not_belong_together_are_refused(device):
    case = Case(device, torch.float32, torch.int8)
    caches, scales = case.views(case.pages)
    with pytest.raises(ValueError, match="do not belong together"):
        kv_write.write_kv(case.key[:, :2], case.value, *caches, case.slots, **scales)
    with pytest.raises(ValueError, match=r"int8 .* needs float32 scales .* not None"):
        kv_write.write_kv(case.key, case.value, *caches, case.slots)
    wide = [cache.float() for cache in caches]
    with pytest.raises(ValueError, match="float32 has no scales"):
        kv_write.write_kv(case.key, case.value, *wide, case.slots, **scales)
    cos, sin = angles(len(SLOTS), 32, device)
    with pytest.raises(ValueError, match="do not belong together"):
        kv_write.write_rotated_kv(
            case.q, case.key, case.value, cos, sin, *caches, case.slots, **scales
        )


def test_no_tokens_are_fine(device):
    case = Case(device, torch.float32, torch.float32, num_tokens=0)
    before = case.pages.clone()
    caches, _ = case.views(case.pages)
    kv_write.write_kv(case.key, case.value, *caches, case.slots)
    assert torch.equal(case.pages, before)
