"""The gate, and loading: what is refused and how it is said, and what comes out of files."""

import json
import logging
import pathlib
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models

from pagetier.handler import architecture, model_loader
from pagetier.handler.architecture import check_architecture
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.offload.tiers import LayerKV

# transformers 5.17 compiles a function of GPT-BigCode in a way that torch 2.13 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


ARCHITECTURE = architecture.Architecture(
    layers=(),
    fusible=[],
    num_weights=1000,
    num_parameters=1000,
    num_head_weights=0,
    is_tied=False,
    num_expert_weights=0,
    quantisable={},
    buffer_bytes=0,
    num_cast_buffers=0,
)


def load(folder: pathlib.Path, *, fuse: bool = False, **settings: Any) -> LoadedModel:
    config = EngineConfig.create({"model": str(folder), "device": "cpu", **settings})
    return load_model(config, fuse=fuse)


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.REFUSED)
def test_architectures_that_would_be_wrong_are_refused_with_a_reason(name: str) -> None:
    model_type, _, reason = tiny_models.REFUSED[name]
    with pytest.raises(ModelError) as caught:
        check_architecture(tiny_models.configuration(name))
    message = caught.value.message
    assert message.startswith(f"The architecture '{model_type}' is not supported: ")
    assert reason in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_served_architectures_pass_the_gate_without_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    layers = check_architecture(tiny_models.configuration(name)).layers
    assert len(layers) == 3
    assert not [r for r in caplog.records if r.name == architecture.__name__]


def test_geometry_is_what_each_layer_calls_attention_with() -> None:
    gemma = check_architecture(tiny_models.configuration("gemma2")).layers
    assert [layer.window for layer in gemma] == [6, 0, 6]
    assert {(layer.heads, layer.softcap, layer.sinks) for layer in gemma} == {(4, 5.0, False)}
    deepseek = check_architecture(tiny_models.configuration("deepseek_v3")).layers
    assert {layer.kv for layer in deepseek} == {LayerKV(4, 16, 8)}
    gemma4 = check_architecture(tiny_models.configuration("gemma4_text")).layers
    assert [layer.kv.key_dim for layer in gemma4] == [8, 16, 16]
    assert all(
        layer.sinks for layer in check_architecture(tiny_models.configuration("gpt_oss")).layers
    )
    assert check_architecture(tiny_models.configuration("opt")).layers[0].scale == 1.0
    assert check_architecture(tiny_models.configuration("gpt_bigcode")).layers[0].kv.kv_heads == 1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised ('fp8'); read are"),
        ("llama", {"is_causal": False}, "not causal"),
        ("llama", {"attention_chunk_size": 16}, "chunked"),
        ("llama", {"sliding_window": 6}, "hides its sliding window"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "with a window of 0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_settings_that_change_attention_are_refused(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    config = tiny_models.configuration(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ModelError) as caught:
        check_architecture(config)
    assert reason in caught.value.message


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="'vit' is not supported: transformers has no causal"):
        check_architecture(transformers.ViTConfig())


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention mask of its own"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"key": torch.zeros(1, 2, 9, 8)}, "not one of each"),
        ({"layer_idx": None}, "not numbered"),
        ({"twice": True}, "more than once"),
    ],
)
def test_the_probe_refuses_what_paged_attention_would_leave_out(
    call: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {name: torch.zeros(1, 2, 3, 8) for name in ("query", "key", "value")}
    arguments |= {"attention_mask": None, **call}
    module = torch.nn.Module()
    module.layer_idx = arguments.pop("layer_idx", 0)
    monkeypatch.setattr(architecture._probe, "layers", {})
    if arguments.pop("twice", False):
        architecture._probe_attention(module, **arguments)
    with pytest.raises(architecture._Refused, match=reason):
        architecture._probe_attention(module, **arguments)


def test_the_gate_reads_no_weight_and_leaves_the_configuration_alone() -> None:
    # 70 billion parameters: on any other device than meta this would not end well.
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, pad_token_id=3,
    )  # fmt: skip
    before = config.to_dict()
    layers = check_architecture(config).layers
    assert len(layers) == 80
    assert layers[79].kv == LayerKV(8, 128, 128)
    assert config.to_dict() == before


def test_an_untested_architecture_is_served_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = transformers.OlmoConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger=architecture.__name__):
        assert len(check_architecture(config).layers) == 2
    assert "'olmo' passed all checks but is not among those tested" in caplog.text


# --- what cannot be read -------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named_as_the_user_wrote_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(pathlib.Path("models/deep/llama"))
    assert "'models/deep/llama' does not exist" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nto load this file")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", unreachable)
    with pytest.raises(ModelError) as caught:
        load(pathlib.Path("nobody/nothing"))
    assert "'nobody/nothing' is neither a local folder nor" in caught.value.message
    assert "\n" not in caught.value.message


def break_no_config(folder: pathlib.Path) -> None:
    (folder / "config.json").unlink()


def break_json(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text("{not json")


def break_type(folder: pathlib.Path) -> None:
    edit_config(folder, model_type="llamma")


def break_settings(folder: pathlib.Path) -> None:
    edit_config(folder, hidden_size="large")


def break_no_weights(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()


def break_cut_weights(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_garbage_weights(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def break_shapes(folder: pathlib.Path) -> None:
    edit_config(folder, intermediate_size=64)


def break_missing_tensor(folder: pathlib.Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_no_config, "has no config.json"),
        (break_json, "not valid JSON"),
        (break_type, "'llamma', which transformers"),
        (break_settings, "not a valid configuration of the type 'llama'"),
        (break_no_weights, "missing, damaged, or do not fit"),
        (break_cut_weights, "missing, damaged, or do not fit"),
        (break_garbage_weights, "missing, damaged, or do not fit"),
        (break_shapes, "missing, damaged, or do not fit"),
        (break_missing_tensor, "incomplete: 1 are missing, the first of them 'model.layers.1.mlp"),
    ],
)
def test_an_unreadable_model_is_one_sentence_with_no_path_but_the_users(
    damage: Any, sentence: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "mine" / "llama"
    tiny_models.save("llama", folder)
    capfd.readouterr()
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(pathlib.Path("mine/llama"))
    message = caught.value.message
    assert sentence in message
    assert "'mine/llama'" in message
    assert str(tmp_path) not in message
    assert "\n" not in message
    # Nothing else is said: no reports, no progress bars.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 GiB"),
    ],
)
def test_weights_that_do_not_fit_are_said_to_be_too_large(
    error: Exception, load_format: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("llama", tmp_path)
    monkeypatch.setattr(model_loader, "check_architecture", lambda *_, **__: ARCHITECTURE)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for method in ("from_pretrained", "from_config"):
        monkeypatch.setattr(transformers.AutoModelForCausalLM, method, fail)
    with pytest.raises(
        ModelError,
        match=r"3.9 KiB, do not fit into this machine's memory, of which .* was free; choose",
    ):
        load(tmp_path, load_format=load_format)


def test_tensors_that_nobody_uses_are_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_models.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger=model_loader.__name__):
        load(tmp_path)
    assert "no use for 1 of the tensors" in caplog.text
    assert "'model.layers.0.mlp.up_proj.bias'" in caplog.text


def test_a_device_that_is_not_here_is_a_setting_that_is_wrong(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, device="cuda")
    assert caught.value.param == "device"


def test_code_that_comes_with_a_model_is_not_run_unless_trusted(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match="set trust_remote_code if"):
        load(tmp_path)


# --- what can be read ----------------------------------------------------------------------------


def assert_same_weights(loaded: LoadedModel, original: Any) -> None:
    expected = dict(original.named_parameters())
    actual = dict(loaded.model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(actual[name], parameter), name
        assert not actual[name].requires_grad


def test_loaded_weights_and_facts_are_those_of_the_folder(tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama", tmp_path, eos_token_id=[7, 9])
    stages: list[str] = []
    config = EngineConfig.create({"model": str(tmp_path), "device": "cpu"})
    loaded = load_model(config, stages.append, fuse=False)
    assert_same_weights(loaded, original)
    assert loaded.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert (loaded.max_model_len, loaded.vocab_size) == (128, 120)
    assert loaded.eos_token_ids == (7, 9)
    assert loaded.kv_layers == (LayerKV(2, 8, 8),) * 3
    embeddings = 2 * 120 * 32
    assert loaded.num_parameters == sum(p.numel() for p in original.parameters()) - embeddings
    assert not loaded.model.training
    assert stages == ["checking the architecture", "reading the weights", "hashing the weights"]


def test_a_single_eos_and_none_are_tuples_too(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path / "one", eos_token_id=7)
    tiny_models.save("llama", tmp_path / "none")
    assert load(tmp_path / "one").eos_token_ids == (7,)
    assert load(tmp_path / "none").eos_token_ids == ()


def test_the_generation_configuration_has_the_last_word_on_eos(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load(tmp_path).eos_token_ids == (5, 6)
    assert load(tmp_path, load_format="dummy").eos_token_ids == (5, 6)


def test_shards_are_read_through_their_index(tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load(tmp_path, load_format="safetensors"), original)


def test_a_missing_shard_is_an_error(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path, max_shard_size="20KB")
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="missing, damaged"):
        load(tmp_path)


def test_tied_embeddings_stay_one_tensor(tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama_tied", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert_same_weights(loaded, original)
    model: Any = loaded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    separate = tiny_models.build("llama")
    assert loaded.num_parameters == sum(p.numel() for p in separate.parameters()) - 2 * 120 * 32


def test_dtype_is_the_checkpoints_own_except_on_a_cpu(tmp_path: pathlib.Path) -> None:
    tiny_models.build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load(tmp_path, dtype="float16").dtype == torch.float16
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    gpu = torch.device("cuda", 0)
    assert model_loader.resolve_dtype("auto", config, gpu) == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_tables_stay_exact_in_any_dtype(dtype: str, tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama", tmp_path)
    for load_format in ("auto", "dummy"):
        model: Any = load(tmp_path, dtype=dtype, load_format=load_format).model
        assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


def test_dummy_weights_need_nothing_but_a_configuration(tmp_path: pathlib.Path) -> None:
    tiny_models.configuration("llama", eos_token_id=3, initializer_range=0.02).save_pretrained(
        tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same = (load(tmp_path, load_format="dummy", seed=1) for _ in range(2))
    other = load(tmp_path, load_format="dummy", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(same, first.model)
    weight: Any = first.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weight, other.model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert first.eos_token_ids == (3,)
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_a_missing_weight_file_is_no_matter_for_dummy_weights_only(tmp_path: pathlib.Path) -> None:
    tiny_models.configuration("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="missing, damaged"):
        load(tmp_path)
    assert load(tmp_path, load_format="dummy", dtype="bfloat16").dtype == torch.bfloat16


def test_safetensors_only_means_no_pickles(tmp_path: pathlib.Path) -> None:
    original = tiny_models.save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="missing, damaged"):
        load(tmp_path, load_format="safetensors")
    assert_same_weights(load(tmp_path), original)


def test_the_fingerprint_changes_with_weights_dtype_and_settings(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    seen = {load(tmp_path).fingerprint}
    assert load(tmp_path).fingerprint in seen
    seen.add(load(tmp_path, dtype="float16").fingerprint)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][3, 4] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    seen.add(load(tmp_path).fingerprint)
    edit_config(tmp_path, rms_norm_eps=1e-3)
    seen.add(load(tmp_path).fingerprint)
    assert len(seen) == 4


def test_padding_tokens_are_forgotten_so_that_no_input_is_read_back(tmp_path: pathlib.Path) -> None:
    tiny_models.save("gpt2", tmp_path)
    model: Any = load(tmp_path).model
    assert model.config.pad_token_id is None


def test_a_model_of_unknown_length_needs_max_model_len(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The architectures that do not say are refused for other reasons, so far.
    tiny_models.configuration("bloom").save_pretrained(tmp_path)
    monkeypatch.setattr(model_loader, "check_architecture", lambda *_, **__: ARCHITECTURE)
    with pytest.raises(ModelError, match="set max_model_len"):
        load(tmp_path)
