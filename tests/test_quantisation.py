"""Models whose weights are quantised as they are read: which layers, and what comes out."""

import logging
import pathlib
import random
import weakref
from typing import Any

import pytest
import torch
from support import tiny_models
from support.driver import NEW_TOKENS, Driver, generate, prompts
from torch import nn

from pagetier import LLM, SamplingParams
from pagetier.handler import compilation, quantisation
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.handler.packed_linear import pack
from pagetier.handler.quantised_linear import QuantisedLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

INT4, INT8 = {"quantization": "int4"}, {"quantization": "int8"}


def load(folder: pathlib.Path, *, fuse: bool = True, **settings: Any) -> LoadedModel:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", **settings}
    return load_model(EngineConfig.create(settings), fuse=fuse)


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}


@torch.no_grad()
def dequantised_reference(original: Any, loaded: LoadedModel) -> Any:
    """transformers' own model with the weights, in float32, that quantised layers stand for."""
    for name, layer in quantised_layers(loaded.model).items():
        weight = original.get_submodule(name).weight
        assert weight.shape == (layer.out_features, layer.in_features)
        assert not torch.equal(weight, layer.dequantised())
        weight.copy_(layer.dequantised())
    return original


def logits(model: Any) -> torch.Tensor:
    """Of nine tokens, with transformers' own attention."""
    model.set_attn_implementation("eager")
    ids = torch.arange(9)[None] * 7 % tiny_models.VOCABULARY
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", INT4),
        ("llama_tied", {**INT8, "quantization_group_size": 32}),
        ("gpt_bigcode", INT4),
        ("opt_350m", INT8),
        ("deepseek_v3", INT4),
        ("qwen3_moe", INT8),
        ("gemma3_text", {**INT4, "quantization_group_size": 32}),
    ],
)
def test_logits_equal_those_of_the_dequantised_weights(
    name: str, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    original = tiny_models.save(name, tmp_path)
    plain = load(tmp_path, **settings, fuse=False)
    layers = quantised_layers(plain.model)
    linear = {n for n, m in original.named_modules() if type(m) is nn.Linear}
    assert layers.keys() == linear - {"lm_head"}
    for layer_name, layer in layers.items():
        weight = original.get_submodule(layer_name).weight.detach()
        group = layer.group_size or layer.in_features
        half = layer.scales.t()[:, torch.arange(layer.in_features) // group] / 2
        assert ((layer.dequantised() - weight).abs() <= half * (1 + 1e-5)).all()
    reference = dequantised_reference(original, plain)
    expected = logits(reference)
    for loaded in (plain, load(tmp_path, **settings)):
        torch.testing.assert_close(logits(loaded.model), expected, atol=1e-4, rtol=1e-4)
        # As many parameters as before, for whoever counts floating-point operations.
        counted = sum(p.numel() for p in reference.parameters())
        outer = {id(p): p.numel() for m in reference.modules() if isinstance(m, nn.Embedding)
                 for p in m.parameters()}  # fmt: skip
        head = reference.get_output_embeddings().weight
        outer[id(head)] = head.numel()
        assert loaded.num_parameters == counted - sum(outer.values())


def open_llm(folder: pathlib.Path, **settings: Any) -> LLM:
    return LLM(
        model=str(folder), device="cpu", dtype="float32", max_model_len=48, max_num_seqs=6,
        max_num_batched_tokens=16, swap_space=0.01, block_size=4, num_gpu_blocks_override=24,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    [("llama", "swap", INT4), ("opt", "recompute", INT8), ("mixtral", "auto", INT8)],
)
def test_tokens_equal_transformers_on_dequantised_weights_under_preemption(
    name: str, mode: str, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    original = tiny_models.save(name, tmp_path)
    reference = dequantised_reference(original, load(tmp_path, **settings, fuse=False))
    rng = random.Random(13)
    asked = [
        [rng.randrange(2, tiny_models.VOCABULARY) for _ in range(rng.randint(3, 24))]
        for _ in range(7)
    ]
    with open_llm(tmp_path, preemption_mode=mode, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=20)
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] > 0
    for prompt, output in zip(asked, outputs, strict=True):
        assert output.outputs[0].token_ids == generate(reference, prompt, 20)[0][len(prompt) :]


def test_a_quantised_model_is_one_graph_for_any_batch(tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama", tmp_path)
    reference = dequantised_reference(original, load(tmp_path, **INT4, fuse=False))
    model = load(tmp_path, **INT4)
    graph, _ = compilation._trace(model.model, *compilation._weights(model.model))
    assert graph.code.count("pagetier.quantised_linear") == 3 * 4  # qkv, o, gate and up, down
    forward = compilation.compile_forward(model.model, "graph")
    driver = Driver(model, forward=forward, decode_forward=forward, graph_sizes=(1, 4))
    sequences = [driver.add(prompt) for prompt in prompts()]
    driver.finish(sequences)
    for sequence, prompt in zip(sequences, prompts(), strict=True):
        assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]


def test_packing_for_a_cpu_leaves_quantised_layers_alone(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    model = load(tmp_path, **INT8)
    before = logits(model.model)
    assert pack(model.model) == 1  # the head
    torch.testing.assert_close(logits(model.model), before, atol=1e-4, rtol=1e-4)


def test_what_depends_on_weights_tells_quantisations_apart(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    kinds = ({}, INT8, INT4, {**INT8, "quantization_group_size": 32})
    models = [load(tmp_path, **kind) for kind in (*kinds, INT4)]
    assert models[2].fingerprint == models[4].fingerprint
    assert len({model.fingerprint for model in models}) == 4
    graphs = {
        compilation._cache_path(model.model, *compilation._weights(model.model)) for model in models
    }
    assert len(graphs) == 4


def test_no_two_weights_are_there_in_full_at_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("llama", tmp_path, max_shard_size="20KB")
    rounded = quantisation.round_layer
    last: list[weakref.ref[Any]] = []

    def watch(model: nn.Module, name: str, weight: torch.Tensor, rounding: Any) -> None:
        assert all(ref() is None for ref in last), f"a weight still lives while {name} is read"
        last[:] = [weakref.ref(weight.untyped_storage())]
        full = [p for n, p in model.named_parameters() if "proj" in n and not p.is_meta]
        assert not full
        rounded(model, name, weight, rounding)

    monkeypatch.setattr(quantisation, "round_layer", watch)
    model = load(tmp_path, dtype="float16", **INT4)
    assert last
    assert all(m.scales.dtype == torch.float16 for m in quantised_layers(model.model).values())


@pytest.mark.parametrize("name", ["llama_rope3", "gemma3_text", "opt"])
def test_random_weights_are_quantised_without_ever_being_whole(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save(name, tmp_path)
    plain = load(tmp_path, load_format="dummy").model
    model = load(tmp_path, load_format="dummy", **INT4).model
    assert quantised_layers(model)
    assert not [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    buffers = dict(model.named_buffers())
    for key, buffer in plain.named_buffers():  # tables of positions and the like
        assert torch.equal(buffers[key], buffer), key
    assert logits(model).isfinite().all()
    assert logits(model).std() > 0.01


def test_models_without_plain_linear_layers_are_refused(tmp_path: pathlib.Path) -> None:
    tiny_models.save("gpt2", tmp_path)
    with pytest.raises(ModelError, match="'gpt2' has no plain linear layer that could be quant"):
        load(tmp_path, **INT8)


def test_weights_that_do_not_fit_their_configuration_are_found(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    with pytest.raises(ModelError, match="missing, damaged, or do not fit"):
        load(tmp_path, **INT8)


def test_rounding_that_takes_too_much_memory_is_said_to(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    tiny_models.save("llama", tmp_path)
    monkeypatch.setattr(QuantisedLinear, "rounded", fail)
    # 30,944 weights of half a byte.
    with pytest.raises(ModelError, match=r"15.1 KiB, do not fit into this machine's memory"):
        load(tmp_path, **INT4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "int3"}, "'quantization' has the impossible value 'int3'"),
        ({**INT4, "quantization_group_size": 48}, "a power of two of at least 32, or 0"),
        ({**INT4, "quantization_group_size": 16}, "a power of two of at least 32, or 0"),
        ({"quantization_group_size": 32}, "left out unless quantization is int8 or int4"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.create({"model": "m", **settings})
    assert sentence in caught.value.message


def test_the_log_says_how_much_is_quantised(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = tiny_models.save("llama", tmp_path)
    with caplog.at_level(logging.INFO, logger=quantisation.__name__):
        load(tmp_path, **INT4)
    total = sum(p.numel() for p in original.parameters())
    assert f"23040 of {total} weights are quantised, to 4 bits" in caplog.text
