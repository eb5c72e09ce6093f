"""GPTQ, AWQ and compressed-tensors, read without their packages, beside what the formats mean."""

import pathlib
from functools import partial
from typing import Any

import pytest
import torch
from support import quantised_checkpoints as write
from support import tiny_models
from support.driver import NEW_TOKENS, Driver, generate, prompts
from torch import nn

from pagetier.handler import checkpoint_formats, quantisation
from pagetier.handler.architecture import check_architecture
from pagetier.handler.checkpoint_formats import Unreadable, read_layer, refusal
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.model_loader import load_model
from pagetier.handler.quantised_linear import QuantisedLinear

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
GPTQ_V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
gptq = partial(write.gptq, bits=4, group_size=32, symmetric=True, shuffle=False, v2=False)
packed = partial(write.compressed_tensors, bits=4, group_size=32, symmetric=True)


def weight(out_size: int = 24, in_size: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_size)
    return torch.randn(out_size, in_size, generator=generator) * 0.3 + 0.05


LAYERS = {
    "gptq": (GPTQ, gptq),
    "gptq 8 bits": (GPTQ, partial(gptq, bits=8)),
    "gptq, zeros of their own": (GPTQ, partial(gptq, symmetric=False)),
    "gptq, in the order of activations": (GPTQ, partial(gptq, symmetric=False, shuffle=True)),
    "gptq v2": (GPTQ_V2, partial(gptq, symmetric=False, v2=True)),
    "gptq, a shorter last group": (GPTQ, partial(gptq, group_size=64, shuffle=True)),
    "gptq, one group": (GPTQ, partial(gptq, group_size=96)),
    "awq": (AWQ, partial(write.awq, group_size=32)),
    "compressed-tensors": (PACKED, packed),
    "compressed-tensors 8 bits": (PACKED, partial(packed, bits=8)),
    "compressed-tensors by channel": (PACKED, partial(packed, bits=8, group_size=0)),
    "compressed-tensors, zeros of their own": (PACKED, partial(packed, symmetric=False)),
    "compressed-tensors by activation": (PACKED, partial(packed, symmetric=False, shuffle=True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exactly_what_its_format_means(name: str) -> None:
    settings, quantise = LAYERS[name]
    tensors, expected = quantise(weight())
    bias = nn.Parameter(torch.randn(24))
    layer = read_layer(settings, tensors, 96, 24, bias)
    assert torch.equal(layer.dequantised().double(), expected)
    assert layer.bits == (8 if "8 bits" in name or "by channel" in name else 4)
    assert layer.scales.dtype == torch.float16  # as they are in the checkpoint
    assert (layer.zeros is None) == ("zeros" not in name and "activation" not in name
                                     and name not in ("gptq v2", "awq"))  # fmt: skip
    assert (layer.permutation is not None) == ("activation" in name or "shorter" in name)
    x = torch.randn(3, 96)
    with torch.no_grad():
        found = layer(x)
    exact = x.double() @ expected.t() + bias.detach().double()
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_words_are_read_as_the_formats_say() -> None:
    """Numbers by hand, so that writer and reader cannot be wrong in the same way."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert checkpoint_formats.unpack_words(word, 4, 0).flatten().tolist() == list(range(8))
    assert checkpoint_formats.unpack_words(word, 8, 1).flatten().tolist() == [
        0x10, 0x32, 0x54, 0x76,
    ]  # fmt: skip
    # AWQ: the lowest bits are output 0's, the next ones output 2's.
    ones = torch.ones(1, 8)
    awq = {"qweight": word, "qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": ones}
    layer = read_layer(AWQ, awq, 1, 8, None)
    assert layer.dequantised().flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    # GPTQ: a zero of 7 in the file is one of 8.
    zeros = torch.tensor([[0x77777777]], dtype=torch.int32)
    gptq = {"qweight": word.expand(1, 8), "qzeros": zeros, "scales": ones}
    layer = read_layer(GPTQ, gptq, 8, 8, None)
    assert layer.zeros is None
    assert layer.dequantised()[0].tolist() == list(range(-8, 0))


CHECKPOINTS = {
    "gptq": (GPTQ, partial(gptq, symmetric=False, shuffle=True)),
    "awq": (AWQ, partial(write.awq, group_size=32)),
    "compressed-tensors": (PACKED, partial(packed, symmetric=False)),
}


def load(folder: pathlib.Path, **settings: Any) -> Any:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", **settings}
    return load_model(EngineConfig.create(settings))


def save(folder: pathlib.Path, name: str = "llama", **more: Any) -> Any:
    """A tiny model whose inputs are whole groups, quantised; gives the dequantised one."""
    settings, quantise = CHECKPOINTS[more.pop("method", "gptq")]
    model = tiny_models.save(name, folder, intermediate_size=64, **more.pop("changes", {}))
    write.rewrite(folder, model, more.pop("settings", settings), quantise, **more)
    return model


@pytest.mark.parametrize("method", CHECKPOINTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_checkpoints_generate_what_their_dequantised_weights_do(
    method: str, name: str, tmp_path: pathlib.Path
) -> None:
    # What is skipped is found by what the checkpoint has, whatever its lists of names say.
    reference = save(tmp_path, name, method=method, skip=lambda n: n.endswith("1.mlp.down_proj"))
    loaded = load(tmp_path, quantization=method)
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(layers) == 3 * 4 - 1  # q, k and v are one, gate and up are one
    assert type(loaded.model.model.layers[1].mlp.down_proj) is nn.Linear
    driver = Driver(loaded)
    sequences = [driver.add(prompt) for prompt in prompts()]
    driver.finish(sequences)
    for sequence, prompt in zip(sequences, prompts(), strict=True):
        assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]
    assert load(tmp_path).fingerprint == loaded.fingerprint


def test_a_quantised_output_layer_is_read_too(tmp_path: pathlib.Path) -> None:
    model = tiny_models.save("llama", tmp_path, intermediate_size=64)
    plain = load(tmp_path).num_parameters
    write.rewrite(tmp_path, model, {**GPTQ, "lm_head": True}, gptq)
    head = model.lm_head
    tensors = write.load_file(tmp_path / "model.safetensors")
    layer, found = gptq(tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{key}": value for key, value in layer.items()}
    write.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert loaded.num_parameters == plain
    assert torch.equal(loaded.model.lm_head.dequantised().double(), found)
    assert found.shape == head.weight.shape


# --- what is refused -----------------------------------------------------------------------------


def packed_with(**changes: Any) -> dict[str, Any]:
    """``PACKED`` with changes of its group, or of the group's weights."""
    of_weights = {k: v for k, v in changes.items() if k in {*WEIGHTS, "dynamic"}}
    rest = {k: v for k, v in changes.items() if k not in of_weights}
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **of_weights}, **rest}
    return {**PACKED, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'); read are awq, compressed-tensors, gp"),
        ({**GPTQ, "bits": 3}, "its weights have 3 bits; read are 4 and 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "in the format 'marlin'"),
        ({**AWQ, "version": "GEMV"}, "in the version 'gemv'; only 'gemm' is read"),
        ({**AWQ, "zero_point": False}, "have no zero points"),
        ({**AWQ, "bits": 8}, "its weights have 8 bits; of AWQ's only 4 are read"),
        ({**PACKED, "format": "nvfp4-pack-quantized"}, "only 'pack-quantized' is read"),
        (packed_with(num_bits=2), "its weights have 2 bits"),
        (packed_with(type="float"), "only 'pack-quantized' is read"),
        (packed_with(strategy="block"), "quantised by 'block'"),
        (packed_with(input_activations={"num_bits": 8}), "its activations are quantised too"),
        ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "are sparse"),
        ({**PACKED, "transform_config": {"config_groups": {"R1": {}}}}, "are rotated"),
    ],
)
def test_variants_that_are_not_read_are_refused_at_the_gate(
    settings: dict[str, Any], reason: str
) -> None:
    config = tiny_models.configuration("llama")
    config.quantization_config = settings
    with pytest.raises(ModelError) as caught:
        check_architecture(config)
    assert caught.value.message.startswith("The architecture 'llama' is not supported: its ")
    assert reason in caught.value.message


def test_variants_that_are_read_pass_the_gate() -> None:
    for settings in (GPTQ, GPTQ_V2, AWQ, PACKED, packed_with(strategy="channel", num_bits=8)):
        assert refusal(settings) is None
        config = tiny_models.configuration("llama")
        config.quantization_config = settings
        assert len(check_architecture(config).layers) == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("scales"), "it has no 'scales'"),
        (lambda t: t.update(qweight=t["qweight"][:7]), "96 numbers lie in 7 words"),
        (lambda t: t.update(scales=t["scales"][:2]), "zeros for (2, 24) scales"),
        (lambda t: t.update(scales=t["scales"][:, :8]), "(3, 8) scales are not those of 24"),
        (lambda t: t["g_idx"].fill_(0), "its 96 inputs are in 3 groups; read are groups of 32"),
    ],
)
def test_layers_whose_tensors_do_not_belong_together_are_unreadable(
    change: Any, sentence: str
) -> None:
    tensors, _ = gptq(weight())
    change(tensors)
    with pytest.raises(Unreadable) as caught:
        read_layer(GPTQ, tensors, 96, 24, None)
    assert sentence in str(caught.value)


def test_only_the_last_group_may_be_smaller() -> None:
    def of(*sizes: int) -> torch.Tensor:
        return torch.cat([torch.full((size,), group) for group, size in enumerate(sizes)])

    assert checkpoint_formats._groups(3, 160, of(64, 64, 32)) == (64, None)
    with pytest.raises(Unreadable, match="its groups do not all have 64 inputs"):
        checkpoint_formats._groups(3, 160, of(64, 32, 64))


@pytest.mark.parametrize("group_size", [16, 48])
def test_groups_of_other_sizes_are_unreadable(group_size: int) -> None:
    tensors, _ = gptq(weight(), group_size=group_size)
    with pytest.raises(Unreadable, match="read are groups of 32, 64, 128 or a larger"):
        read_layer(GPTQ, tensors, 96, 24, None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "int8"}, "'int8', but the weights are quantised already, by 'gptq'"),
        ({"quantization": "awq"}, "'awq', but the weights are quantised already, by 'gptq'"),
        ({"load_format": "dummy"}, "cannot be 'gptq' for random weights"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_one_sentence(
    settings: dict[str, Any], sentence: str, tmp_path: pathlib.Path
) -> None:
    save(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **settings)
    assert caught.value.param == "quantization"
    assert sentence in caught.value.message


def test_a_checkpoint_that_is_not_quantised_is_not_read_as_one(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    with pytest.raises(ConfigError, match="is 'gptq', but the weights are not quantised"):
        load(tmp_path, quantization="gptq")


def test_weights_that_are_not_as_the_configuration_says_are_one_sentence(
    tmp_path: pathlib.Path,
) -> None:
    save(tmp_path / "none", skip=lambda _: True)
    with pytest.raises(ModelError, match="are quantised by 'gptq', but none is"):
        load(tmp_path / "none")
    save(tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = write.load_file(path)
    layer, _ = gptq(weight())
    tensors |= {f"model.layers.0.mlp.experts.0.w1.{key}": value for key, value in layer.items()}
    write.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 are not those of .* 'model.layers.0.mlp.experts.0.w1'"
    ):
        load(tmp_path / "other")
    save(tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = write.load_file(path)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    write.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer 'model.layers.0.mlp.up_proj' cannot be read: it"):
        load(tmp_path / "damaged")


def test_the_size_of_weights_that_do_not_fit_is_that_of_their_bits() -> None:
    assert quantisation.bytes_per_weight(None) is None
    assert quantisation.bytes_per_weight(quantisation.Rounding(4, 128, False)) == 0.5
    assert quantisation.bytes_per_weight(quantisation.Stored(GPTQ)) == 0.5
    assert quantisation.bytes_per_weight(quantisation.Stored(PACKED)) is None
