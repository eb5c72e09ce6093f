"""Keys and values of 8 bits under real (tiny) models: what is stored, and what logits become."""

import pathlib
import types
from collections.abc import Callable

import pytest
import torch
from support.driver import Driver, load, prompts

from pagetier import kernels
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_builder import choose_layout
from pagetier.handler.errors import ConfigError
from pagetier.handler.model_loader import LoadedModel
from pagetier.offload.tiers import KVLayout, LayerKV

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.int8, torch.float8_e4m3fn]
# Plain; a sliding window and a cap; sinks and a window; values of another size than keys.
ARCHITECTURES = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]
KNOWN_TOKENS = 8
NUM_NOISES = 3


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


def skip_without_fp8(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" or dtype != torch.float8_e4m3fn:
        return
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9")


def half_steps(new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most that rounding moves each number of ``(tokens, heads, dim)``, as scales are chosen.

    A row's largest number becomes the type's largest, ``M``: in units of ``largest / M``, numbers
    of int8 are 1 apart. Those of e4m3 have three bits after the first: from ``2^e`` on they are
    ``2^(e - 3)`` apart, and no closer than ``2^-9``. Rounding to the nearest moves by half of that.
    """
    most = 127.0 if dtype == torch.int8 else 448.0
    unit = new.abs().amax(-1, keepdim=True) / most
    if dtype == torch.int8:
        return (unit / 2).expand_as(new)
    exponents = torch.where(unit > 0, new.abs() / unit, 1.0).log2().floor().clamp_min(-6)
    return unit * 2 ** (exponents - 3) / 2


def forced_logits(
    model: LoadedModel, kv_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Driver]:
    """Logits behind prompts and known tokens, ``(steps, sequences, vocabulary)``; the driver."""
    driver = Driver(model, kv_dtype=kv_dtype)
    known = prompts((KNOWN_TOKENS,) * 4)
    sequences = [driver.add(prompt) for prompt in prompts()]
    steps = []
    for step in range(KNOWN_TOKENS):
        plan = driver.plan([driver.share(s, s.num_uncomputed_tokens) for s in sequences])
        steps.append(driver.runner.logits(plan))
        for sequence, tokens in zip(sequences, known, strict=True):
            sequence.token_ids.append(tokens[step])
    driver.runner.close()
    return torch.stack(steps), driver


def with_noise(dtype: torch.dtype, seed: int) -> Callable[..., None]:
    """A ``write_kv`` that moves each number by a random part of what rounding moves it at most."""
    write_kv = kernels.write_kv
    generator = torch.Generator().manual_seed(seed)

    def move(new: torch.Tensor) -> torch.Tensor:
        parts = torch.rand(new.shape, generator=generator) * 2 - 1
        return new + parts.to(new.device) * half_steps(new, dtype)

    return lambda key, value, *args, **scales: write_kv(move(key), move(value), *args, **scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_off_by_what_rounding_makes_of_them(
    name: str,
    dtype: torch.dtype,
    tmp_path: pathlib.Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing but rounding may separate a quantised cache from an exact one.

    Rounding moves each number by up to half a step, about evenly and independently of the others.
    So a run on an exact cache, whose numbers are moved at random by as much as they are written,
    is off by what a quantised run must be off by: not by more, and not by much less, which would
    mean that nothing was quantised. Medians, since a few tokens may reach other experts.
    """
    skip_without_fp8(dtype, device)
    model = load(tmp_path, name, device)
    exact, exact_driver = forced_logits(model)
    quantised, driver = forced_logits(model, dtype)
    # What the first layer is given does not depend on any cache.
    first, exact_first = driver.caches[0], exact_driver.caches[0]
    for numbers, scale, expected in (
        (first.k_cache, first.scales["k_scale"], exact_first.k_cache),
        (first.v_cache, first.scales["v_scale"], exact_first.v_cache),
    ):
        assert numbers.dtype == dtype
        written = ~expected.isnan().any(-1)
        assert torch.equal(written, ~scale.isnan())
        stored, expected = (numbers.float() * scale[..., None])[written], expected[written]
        assert ((stored - expected).abs() <= 1.001 * half_steps(expected, dtype)).all()
    noises = []
    for seed in range(NUM_NOISES):
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "write_kv", with_noise(dtype, seed))
            noises.append(float((forced_logits(model)[0] - exact).abs().median()))
    error = float((quantised - exact).abs().median())
    assert 0.5 * min(noises) < error < 1.5 * max(noises)


def layout_of(setting: str, device: str = "cuda", value_dim: int = 64) -> KVLayout:
    model = types.SimpleNamespace(
        kv_layers=(LayerKV(8, 64, value_dim),), dtype=torch.bfloat16, device=torch.device(device)
    )
    config = EngineConfig.create({"model": "some", "kv_cache_dtype": setting})
    return choose_layout(config, model)


def test_the_setting_names_the_dtype_of_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for setting, dtype in (
        ("auto", torch.bfloat16),
        ("int8", torch.int8),
        ("fp8", torch.float8_e4m3fn),
        ("fp8_e4m3", torch.float8_e4m3fn),
    ):
        for device in ("cpu", "cuda"):
            assert layout_of(setting, device).dtype == dtype
    # 64 numbers each of a key and a value, and two scales, for 8 heads.
    assert layout_of("auto").token_bytes == 8 * 2 * 64 * 2
    assert layout_of("int8").token_bytes == 8 * 2 * (64 + 4)


def test_what_a_gpu_cannot_do_is_refused_with_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert layout_of("int8").dtype == torch.int8
    assert layout_of("fp8", "cpu").dtype == torch.float8_e4m3fn
    with pytest.raises(
        ConfigError, match=r"'fp8', but .* 8\.6, has no fp8, .*; use int8\."
    ) as caught:
        layout_of("fp8")
    assert caught.value.param == "kv_cache_dtype"
    assert layout_of("auto", value_dim=10).dtype == torch.bfloat16
    with pytest.raises(
        ConfigError, match=r"by fours, and this model's heads have 10 .*; use auto\."
    ):
        layout_of("int8", value_dim=10)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'kv_cache_dtype' has the impossible value 'fp8_e5m2'"):
        layout_of("fp8_e5m2")
