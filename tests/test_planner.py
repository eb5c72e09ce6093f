"""The planner: its arithmetic against cases worked out by hand, and against engines."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_models
from transformers import AutoConfig, LlamaConfig

from pagetier import LLM, SamplingParams
from pagetier.handler import quantisation
from pagetier.handler.architecture import check_architecture, step_bytes
from pagetier.handler.checkpoint import read_headers
from pagetier.handler.cli import main
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_builder import build_engine
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.live_bytes import LiveBytes
from pagetier.handler.model_loader import load_model
from pagetier.handler.planner import Machine, Plan, Workload, make_plan
from pagetier.handler.tier_sizes import graph_bytes
from pagetier.offload import host_memory

GIB, MIB = 2**30, 2**20
SHORT = Workload(8, 16)
LLAMA_8B_WEIGHTS = 8_030_261_248


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("shapes")
    common = {
        "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 4096, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None, "dtype": None,
    }  # fmt: skip
    sizes = {
        "llama-1b": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
        "llama-8b": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "tie_word_embeddings": False,
        },
    }  # fmt: skip
    for name, some in sizes.items():
        LlamaConfig(**common, **some).save_pretrained(root / name)
    return {name: root / name for name in sizes}


def plan(
    model: pathlib.Path,
    machine: Machine | int,
    workload: Workload | None = SHORT,
    **settings: Any,
) -> Plan:
    config = EngineConfig.create({"model": str(model), **settings})
    if isinstance(machine, int):
        machine = Machine(machine * GIB, 64 * GIB)
    return make_plan(config, machine, workload)


# --- arithmetic ----------------------------------------------------------------------------------


def test_llama_8b_is_as_worked_out_by_hand(shapes: dict[str, pathlib.Path]) -> None:
    found = plan(shapes["llama-8b"], 24, dtype="bfloat16")
    halved = plan(shapes["llama-8b"], 24, dtype="bfloat16", kv_cache_dtype="int8")
    assert halved.token_bytes == 2 * 32 * 8 * (128 + 4)  # and a scale for each head
    assert found.num_weights == LLAMA_8B_WEIGHTS
    assert found.token_bytes == 2 * 32 * 8 * 128 * 2 == 131_072
    assert found.block_bytes == 2 * MIB
    gpu = found.gpu
    assert gpu is not None
    inverse_frequencies = 2 * 64 * 4  # the rotary embedding keeps them twice
    assert gpu.weights == 2 * LLAMA_8B_WEIGHTS + inverse_frequencies
    assert gpu.others == GIB // 2
    left = int(24 * GIB * 0.9) - gpu.weights - GIB // 2 - gpu.steps - gpu.graphs
    assert found.num_gpu_blocks == left // (2 * MIB)
    assert found.num_cpu_blocks == 4 * GIB // (2 * MIB)
    assert found.host.left == 64 * GIB - 2 * GIB - 4 * GIB


def test_graphs_of_llama_8b_keep_the_logits_of_each_size(shapes: dict[str, pathlib.Path]) -> None:
    settings = {"dtype": "bfloat16", "max_num_seqs": 64, "cudagraph_capture_sizes": [16, 32, 64]}
    with_graphs = plan(shapes["llama-8b"], 24, **settings).gpu
    without = plan(shapes["llama-8b"], 24, **settings, enforce_eager=True).gpu
    assert with_graphs is not None
    assert without is not None
    assert without.graphs == 0
    logits = 128_256 * 2
    others = 8 * MIB + 4 * MIB  # 32 x and 16 x ``logits``, in pieces of 2 MiB
    assert 64 * logits + others <= with_graphs.graphs <= 80 * logits + others


def test_graphs_between_are_taken_to_keep_as_much_as_their_batch_says() -> None:
    assert graph_bytes(100 * MIB, 0, ()) == 100 * MIB
    assert graph_bytes(100 * MIB, 0, (8,)) == 100 * MIB
    assert graph_bytes(100 * MIB, 40 * MIB, (4, 8)) == 140 * MIB
    assert graph_bytes(100 * MIB, 40 * MIB, (1, 10, 40, 80)) == (100 + 40 + 10 + 2) * MIB


def test_the_largest_step_of_llama_8b_is_that_of_its_mlp(shapes: dict[str, pathlib.Path]) -> None:
    config = transformers_config(shapes["llama-8b"])
    tokens = 4096
    peak = step_bytes(config, torch.bfloat16, tokens, 1)
    # Gate, up and their product, beside the residual stream and its normalised copy.
    expected = tokens * 2 * (3 * 14_336 + 2 * 4096)
    assert expected <= peak <= 1.2 * expected
    assert step_bytes(config, torch.float32, tokens, 1) == 2 * peak
    assert step_bytes(config, torch.bfloat16, 2 * tokens, 1) == pytest.approx(2 * peak, rel=0.01)
    # Many rows of logits are more than all of that.
    assert step_bytes(config, torch.bfloat16, 64, 64 * 1024) >= 64 * 1024 * 128_256 * 2


def transformers_config(folder: pathlib.Path) -> Any:
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_every_architecture_can_be_planned(name: str) -> None:
    config = tiny_models.configuration(name)
    small = step_bytes(config, torch.bfloat16, 16, 1)
    assert 0 < small < step_bytes(config, torch.bfloat16, 128, 1) < 200 * small


def test_live_bytes_counts_storages_while_they_live() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        first = given + 1
        view = first[10:].view(2, -1)
        del first
        assert live.live == 4000
        second = view * 2
        assert live.peak == 4000 + 3960
        del view, second
        assert live.live == 0
        given.add_(1)
        given[:5].t()
        _ = torch.empty(10, device="meta")
    assert live.live <= 40
    assert live.peak == 7960


def test_tied_embeddings_count_once(shapes: dict[str, pathlib.Path]) -> None:
    found = plan(shapes["llama-1b"], 12, dtype="bfloat16")
    assert found.num_weights == 1_235_814_400
    architecture = check_architecture(transformers_config(shapes["llama-1b"]))
    assert architecture.is_tied
    assert architecture.num_head_weights == 128_256 * 2048
    assert architecture.num_weights - architecture.num_parameters == 128_256 * 2048
    apart = check_architecture(transformers_config(shapes["llama-8b"]))
    assert not apart.is_tied
    assert apart.num_weights - apart.num_parameters == 2 * 128_256 * 4096


def test_layers_of_different_geometry_are_each_counted(tmp_path: pathlib.Path) -> None:
    tiny_models.configuration("gemma4_text").save_pretrained(tmp_path)
    found = plan(tmp_path, 1, dtype="bfloat16")
    # Keys and values of two heads: 8 wide in the first layer, 16 in the others.
    assert found.token_bytes == 2 * 2 * 2 * (8 + 16 + 16)


def test_costs_are_those_of_the_cost_model(shapes: dict[str, pathlib.Path]) -> None:
    machine = Machine(24 * GIB, 64 * GIB, link_bytes_per_second=50e9, flops_per_second=100e12)
    found = plan(shapes["llama-8b"], machine, Workload(900, 100), dtype="bfloat16")
    assert found.assumed == ()
    row = next(row for row in found.lengths if row.num_tokens == 1000)
    assert row.num_blocks == 63
    assert row.swap_out_seconds == pytest.approx(63 * 2 * MIB / 50e9)
    assert row.swap_in_seconds == pytest.approx(1000 * 131_072 / 50e9)
    linear = 2 * (LLAMA_8B_WEIGHTS - 2 * 128_256 * 4096) * 1000
    assert row.recompute_seconds == pytest.approx((linear + 2 * 32 * 4096 * 1000**2) / 100e12)
    assert row.num_in_gpu_tier == found.num_gpu_blocks // 63
    assert row.num_in_both_tiers == row.num_in_gpu_tier + found.num_cpu_blocks // 63
    assert plan(shapes["llama-8b"], 24).assumed == ("link_bytes_per_second", "flops_per_second")


def test_bounds_follow_from_what_a_step_must_read(
    shapes: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    machine = Machine(24 * GIB, 64 * GIB, memory_bytes_per_second=1e12)
    found = plan(shapes["llama-8b"], machine, Workload(500, 200), dtype="bfloat16")
    one, four = found.bounds[:2]
    weights = 2 * (LLAMA_8B_WEIGHTS - 128_256 * 4096)  # of the input embedding, single rows
    assert one.num_bytes == weights + 600 * 131_072
    assert four.num_bytes == weights + 4 * 600 * 131_072
    assert four.seconds == pytest.approx(four.num_bytes / 1e12)
    assert four.tokens_per_second == pytest.approx(4 / four.seconds)
    assert plan(shapes["llama-8b"], 24).bounds == ()
    # Outside of its window a layer reads nothing, and a token reads two of four experts.
    config = tiny_models.configuration("gpt_oss")
    config.save_pretrained(tmp_path)
    architecture = check_architecture(config)
    found = plan(tmp_path, dataclasses.replace(machine, gpu_bytes=GIB), Workload(40, 40))
    windows = [min(60, layer.window or 60) for layer in architecture.layers]
    assert sorted(windows) == [6, 6, 60]
    assert architecture.num_expert_weights > 0
    read = (
        architecture.num_parameters
        + architecture.num_head_weights
        - architecture.num_expert_weights // 2
    )
    itemsize = getattr(torch, found.dtype).itemsize
    kv_bytes = sum(windows) * 2 * 2 * 8 * itemsize
    assert found.bounds[0].num_bytes == read * itemsize + kv_bytes


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_take_what_they_take_when_loaded(
    quantization: str, tmp_path: pathlib.Path
) -> None:
    tiny_models.configuration("llama").save_pretrained(tmp_path)
    settings = {"dtype": "float32", "quantization": quantization, "load_format": "dummy"}
    found = plan(tmp_path, 1, **settings).gpu
    assert found is not None
    config = EngineConfig.create({"model": str(tmp_path), "device": "cpu", **settings})
    model = load_model(config).model
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    rounding = quantisation.plan(config, tiny_models.configuration("llama"))
    assert isinstance(rounding, quantisation.Rounding)
    large = quantisation.layer_bytes((4096, 4096), rounding, torch.bfloat16)
    bits = {"int8": 8 + 16 / 4096, "int4": 4 + 24 / 128}[quantization]
    assert large == pytest.approx(4096 * 4096 * bits / 8, rel=0.05)


# --- too little memory ---------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_one_sentence_whose_numbers_suffice(
    shapes: dict[str, pathlib.Path],
) -> None:
    model = shapes["llama-8b"]
    found = plan(model, 12, dtype="bfloat16")
    assert found.num_gpu_blocks == found.num_cpu_blocks == 0
    assert found.lengths == ()
    assert found.problem is not None
    assert "15.0 GiB" in found.problem
    advised = re.search(r"GPU of ([\d.]+) GiB", found.problem)
    assert advised
    gpu_bytes = int((float(advised[1]) + 0.05) * GIB)  # it is told with one decimal
    assert plan(model, Machine(gpu_bytes, 64 * GIB), dtype="bfloat16").problem is None
    assert plan(model, Machine(gpu_bytes - GIB // 4, 64 * GIB), dtype="bfloat16").problem


def test_a_length_that_does_not_fit_is_lowered_by_the_advice(
    shapes: dict[str, pathlib.Path],
) -> None:
    settings = {"dtype": "bfloat16", "max_num_seqs": 16}
    ample = plan(shapes["llama-1b"], 12, **settings)
    # A GPU on which half a sequence of the greatest length fits.
    assert ample.gpu is not None
    total = int((int(12 * GIB * 0.9) - ample.gpu.for_kv_cache + 2048 * 32_768) / 0.9)
    machine = Machine(total, 64 * GIB)
    problem = plan(shapes["llama-1b"], machine, **settings, max_model_len=4096).problem
    assert problem is not None
    advised = re.search(r"lower max_model_len to (\d+)", problem)
    assert advised
    assert int(advised[1]) == pytest.approx(2048, abs=16)
    fits = plan(shapes["llama-1b"], machine, **settings, max_model_len=int(advised[1]) // 16 * 16)
    assert fits.problem is None
    # Without a wish, the engine takes what it gets, and so does the plan.
    assert plan(shapes["llama-1b"], machine, **settings).max_model_len == fits.max_model_len


def test_blocks_that_the_user_asks_for_must_fit(shapes: dict[str, pathlib.Path]) -> None:
    settings = {"dtype": "bfloat16", "max_model_len": 64}
    found = plan(shapes["llama-1b"], 12, **settings, num_gpu_blocks_override=99999)
    assert found.problem is not None
    advised = re.search(r"lower it to (\d+) or less", found.problem)
    assert advised
    most = int(advised[1])
    assert plan(
        shapes["llama-1b"], 12, **settings, num_gpu_blocks_override=most
    ).problem is None  # fmt: skip
    assert plan(shapes["llama-1b"], 12, **settings, num_gpu_blocks_override=most + 1).problem


def test_wishes_beyond_the_model_are_refused(shapes: dict[str, pathlib.Path]) -> None:
    with pytest.raises(ConfigError, match="made for 4096 tokens"):
        plan(shapes["llama-1b"], 12, max_model_len=5000)
    with pytest.raises(ConfigError, match="4000 tokens in and 200 out are longer"):
        plan(shapes["llama-1b"], 12, Workload(4000, 200))
    with pytest.raises(ConfigError, match="streamed from host memory cannot be planned yet"):
        plan(shapes["llama-1b"], 12, cpu_offload_gb=1)
    assert plan(shapes["llama-1b"], 12, None).workload == Workload(512, 128)
    assert plan(shapes["llama-1b"], 12, None, max_model_len=100).workload == Workload(80, 20)


# --- files ---------------------------------------------------------------------------------------


def test_headers_of_whole_files_agree_with_the_configuration(tmp_path: pathlib.Path) -> None:
    model = tiny_models.save("llama", tmp_path, max_shard_size="20KB")
    files = read_headers(tmp_path)
    assert files is not None
    assert files.num_files > 1
    assert files.num_elements == {"F32": sum(p.numel() for p in model.parameters())}
    assert files.num_bytes == 4 * files.num_weights
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(tmp_path, 1)
    assert found.checkpoint == files
    assert found.dtype == "float32", "the files' own, since the configuration does not say"
    next(tmp_path.glob("model-0*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"which the model's index names, is missing"):
        plan(tmp_path, 1)
    assert plan(tmp_path, 1, load_format="dummy").problem is None


def test_files_of_another_model_or_cut_off_are_refused(tmp_path: pathlib.Path) -> None:
    tiny_models.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is no whole safetensors file"):
        plan(tmp_path, 1)
    save_file({"a": torch.zeros(7)}, file)
    with pytest.raises(ModelError, match=r"hold 7 weights, .* fewer than"):
        plan(tmp_path, 1)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        plan(tmp_path, 1)


# --- engines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "host_bytes"),
    [
        ("llama", {}, 4 * GIB),  # all that max_num_seqs can fill
        ("llama", {"block_size": 5, "dtype": "bfloat16", "max_num_seqs": 3}, 4 * GIB),
        ("llama_tied", {"max_num_seqs": 256}, 2 * GIB + 5 * MIB),  # what host memory holds
        ("gemma4_text", {"num_gpu_blocks_override": 40, "swap_space": 0}, 4 * GIB),
        ("opt", {"max_model_len": 64, "swap_space": 0.002}, 2 * GIB + 2 * MIB),
        ("qwen3_moe", {"quantization": "int8"}, 2 * GIB + MIB),
        ("llama", {"kv_cache_dtype": "int8", "block_size": 7}, 2 * GIB + MIB),
    ],
)
def test_an_engine_on_a_cpu_has_exactly_the_planned_blocks(
    name: str,
    settings: dict[str, Any],
    host_bytes: int,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_models.configuration(name).save_pretrained(tmp_path)
    settings = {
        "model": str(tmp_path), "device": "cpu", "load_format": "dummy", "max_num_seqs": 8,
        "swap_space": 0.01, **settings,
    }  # fmt: skip
    config = EngineConfig.create(settings)
    found = make_plan(config, Machine(None, host_bytes), SHORT)
    assert found.problem is None
    model = load_model(config).model
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight and found.dtype == "float32":
        weights += head.nbytes  # the engine packs it beside the embedding
    assert found.host.weights == weights

    left = host_bytes - found.host.processes - weights
    monkeypatch.setattr(host_memory, "available_bytes", lambda: left)
    core = build_engine(config, lambda _: None)
    try:
        stats = core.stats()
    finally:
        core.close()
    assert stats["num_gpu_blocks"] == found.num_gpu_blocks
    assert stats["num_cpu_blocks"] == found.num_cpu_blocks
    assert stats["max_model_len"] == found.max_model_len
    assert stats["kv_block_bytes"] == found.block_bytes
    assert stats["kv_token_bytes"] == found.token_bytes


def test_an_engine_preempts_from_where_the_plan_says(tmp_path: pathlib.Path) -> None:
    tiny_models.configuration("llama").save_pretrained(tmp_path)
    settings = {
        "model": str(tmp_path), "device": "cpu", "load_format": "dummy", "block_size": 4,
        "num_gpu_blocks_override": 24, "swap_space": 0.001, "enable_prefix_caching": False,
    }  # fmt: skip
    found = make_plan(EngineConfig.create(settings), Machine(None, 8 * GIB), SHORT)
    assert found.num_running == 4
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    with LLM(**settings) as llm:
        prompts = [[1 + i] * 8 for i in range(5)]
        llm.generate(prompts[:4], params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] == 0
        llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [8, None], ids=["8 GiB", "nine tenths"])
def test_a_gpu_holds_what_the_plan_says_within_3_percent(
    budget: int | None, shapes: dict[str, pathlib.Path]
) -> None:
    """Of the memory that may be used; the context is measured, as it depends on the driver."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    allowed = 0.9 * total if budget is None else budget * GIB
    settings = {
        "model": str(shapes["llama-1b"]), "dtype": "bfloat16", "load_format": "dummy",
        "gpu_memory_utilization": allowed / total, "swap_space": 1,
    }  # fmt: skip
    machine = Machine(total, host_memory.available_bytes(), total - free)
    found = make_plan(EngineConfig.create(settings), machine, Workload(512, 128))
    gpu = found.gpu
    assert gpu is not None
    with LLM(**settings) as llm:
        params = SamplingParams(
            max_tokens=64, ignore_eos=True, temperature=1.0, top_k=50, top_p=0.9, logprobs=20
        )
        llm.generate([[7 + i] * 512 for i in range(256)], params, use_tqdm=False)
        free, _ = torch.cuda.mem_get_info()
        stats = llm.stats()
    planned = gpu.used + gpu.steps + gpu.graphs + found.num_gpu_blocks * found.block_bytes
    print(
        f"planned {planned / MIB:.0f} MiB, found {(total - free) / MIB:.0f}; planned "
        f"{found.num_gpu_blocks} blocks, found {stats['num_gpu_blocks']}; planned steps "
        f"{gpu.steps / MIB:.0f} MiB, graphs {gpu.graphs / MIB:.0f} MiB"
    )
    assert abs(total - free - planned) <= 0.03 * allowed
    difference = stats["num_gpu_blocks"] - found.num_gpu_blocks
    assert abs(difference) * found.block_bytes <= 0.03 * allowed


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_plan(
    shapes: dict[str, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpu-memory", "12GiB", "--host-memory", "32", "--memory-bandwidth", "360"]
    arguments = ["plan", str(shapes["llama-1b"]), *flags, "--dtype", "bfloat16"]
    assert main([*arguments, "--swap-space", "2GiB", "--set", "max_num_seqs=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "1,235,814,400 weights in bfloat16" in text
    assert "weights 2.3 GiB" in text
    assert "CPU tier 2.0 GiB 4,096 blocks of 16 tokens (512 KiB): 65,536 tokens" in text
    assert "a link of 25 GB/s (assumed)" in text
    assert "With max_num_seqs, 64, running," in text
    assert "64 sequences" in text


def test_the_command_prints_json(
    shapes: dict[str, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpu-memory", "24GiB", "--host-memory", "32GiB", "--dtype", "bfloat16", "--json"]
    assert main(["plan", str(shapes["llama-8b"]), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    gpu = told["gpu"]
    assert told["fits"] is True
    assert told["token_bytes"] == 131_072
    assert gpu["kv_blocks"] == told["num_gpu_blocks"] * told["block_bytes"]
    assert 0 <= gpu["for_kv_cache"] - gpu["kv_blocks"] < told["block_bytes"]


def test_what_does_not_fit_is_shown_and_told_in_a_sentence(
    shapes: dict[str, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpu-memory", "12GiB", "--host-memory", "32GiB", "--dtype", "bfloat16"]
    assert main(["plan", str(shapes["llama-8b"]), *flags]) == 1
    printed = capsys.readouterr()
    assert re.search(r"missing +\d", printed.out)
    assert printed.err.startswith("pagetier: ")
    assert printed.err.count("\n") == 1
    assert "take a smaller model" in printed.err
    assert main(["plan", str(shapes["llama-8b"]), *flags, "--quantization", "int4"]) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu-memory", "12GX"], "'12GX' is no size"),
        (["--gpu-memory", "0"], "--gpu-memory is 0"),
        (["--gpu-memory", "12", "--host-memory", "-3"], "--host-memory: '-3' is no size"),
        (["--gpu-memory", "12", "--device", "cpu"], "leave one of them out"),
        (["--gpu-memory", "12", "--link", "0"], "--link must be a number above 0"),
        (["--gpu-memory", "12", "--input-tokens", "0"], "--input-tokens must be 1 or more"),
        (["--gpu-memory", "12", "--input-tokens", "9"], "--output-tokens must be 1 or more"),
        (["--gpu-memory", "12", "--block-size", "0"], "'block_size' must be 1 to 1024"),
        (["--gpu-memory", "12", "--dtype", "int3"], "'dtype' has the impossible value 'int3'"),
        (["--gpu-memory", "12", "--swap-space", "much"], "'much' is no size"),
        (["--gpu-memory", "12", "--block-size", "8", "--set", "block_size=4"], "given twice"),
    ],
)
def test_wrong_words_are_one_sentence(
    flags: list[str],
    says: str,
    shapes: dict[str, pathlib.Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    joined = [f"{flag}={value}" for flag, value in zip(flags[::2], flags[1::2], strict=True)]
    assert main(["plan", str(shapes["llama-1b"]), *joined]) == 1
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_weights_that_are_stored_quantised_are_refused(tmp_path: pathlib.Path) -> None:
    config = tiny_models.configuration("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantised in the checkpoint cannot be planned yet"):
        plan(tmp_path, 1)


def test_a_folder_without_a_configuration_is_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tmp_path), "--gpu-memory", "8"]) == 1
    assert "has no config.json" in capsys.readouterr().err
