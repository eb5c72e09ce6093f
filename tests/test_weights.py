"""Streamed weights: bit for bit what resident ones compute, however late copies are."""

import dataclasses
import logging
import pathlib
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from support import tiny_models
from support.driver import GREEDY, NEW_TOKENS, Driver, generate, load, logits, prompts
from torch import nn

from pagetier.handler import compilation, packed_linear
from pagetier.handler.compilation import compile_forward, eager_forward
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_builder import build_engine
from pagetier.handler.errors import ConfigError, ModelError
from pagetier.handler.messages import AddRequest
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.handler.packed_linear import PackedLinear
from pagetier.handler.quantised_linear import QuantisedLinear
from pagetier.offload import host_memory, weight_plan, weights
from pagetier.offload.weight_plan import WeightPlan
from pagetier.offload.weights import (
    WeightCopyFailed,
    WeightStream,
    find_layers,
    packed_bytes,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

CPU = torch.device("cpu")
BATCHES = ([3, 5, 9], [1] * 5, [8, 3, 1, 1])
# Streamed layers of three, and slots. With fewer slots than `plan_weights` would take, each slot
# is overwritten in every step.
LAYOUTS = [((0, 1, 2), 1), ((0, 1, 2), 2), ((1, 2), 1), ((0, 2), 2), ((1,), 1), ((0, 1, 2), 3)]


class LateCopy:
    """A copy that first poisons the slot, and ends after a random time."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.num_copies = 0

    def __call__(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        destination.fill_(255)  # NaN in every floating-point type
        time.sleep(self.random.choice([0, 0, 0.001, 0.004]))
        destination.copy_(source)
        self.num_copies += 1


@pytest.fixture
def streams() -> Iterator[list[WeightStream]]:
    """Closed at the end of the test, after which no thread is left."""
    before = set(threading.enumerate())
    made: list[WeightStream] = []
    yield made
    for stream in made:
        stream.close()
    left = {t for t in set(threading.enumerate()) - before if t.name.startswith("pagetier-weights")}
    assert not left


def stream_of(
    model: nn.Module,
    layers: tuple[int, ...],
    num_slots: int,
    copy: object = None,
    num_layers: int = 3,
    device: torch.device = CPU,
) -> WeightStream:
    modules = find_layers(model, num_layers)
    sizes = [packed_bytes(model, modules)[layer] for layer in layers]
    plan = WeightPlan(layers, num_slots, sum(sizes), max(sizes))
    return WeightStream(model, modules, plan, device, copy=copy)  # type: ignore[arg-type]


def all_logits(model: LoadedModel) -> list[torch.Tensor]:
    return [logits(model, eager_forward(model.model), lens) for lens in BATCHES]


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_every_architecture_computes_the_same_with_all_layers_streamed(
    name: str, tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, name)
    expected = all_logits(model)
    copy = LateCopy()
    streams.append(stream_of(model.model, (0, 1, 2), 2, copy))
    for found, wanted in zip(all_logits(model), expected, strict=True):
        assert torch.equal(found, wanted)
    assert copy.num_copies >= 2 * len(BATCHES)


@pytest.mark.parametrize(("layers", "num_slots"), LAYOUTS)
def test_logits_do_not_depend_on_the_layout(
    layers: tuple[int, ...], num_slots: int, tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "qwen2")
    expected = Driver(model)
    expected_logits = expected.finish([expected.add(prompt) for prompt in prompts()])
    expected.runner.close()
    streams.append(stream_of(model.model, layers, num_slots, LateCopy()))
    driver = Driver(model)
    found = driver.finish([driver.add(prompt) for prompt in prompts()])
    driver.runner.close()
    for some, wanted in zip(found.values(), expected_logits.values(), strict=True):
        assert torch.equal(torch.stack(some), torch.stack(wanted))


def test_parameters_stay_where_they_are(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "mixtral")
    names = [name for name, _ in model.model.named_parameters()]
    streams.append(stream_of(model.model, (0, 1, 2), 2))
    addresses = {name: p.data_ptr() for name, p in model.model.named_parameters()}
    all_logits(model)
    assert {name: p.data_ptr() for name, p in model.model.named_parameters()} == addresses
    assert list(addresses) == names


def test_a_failed_copy_is_told_and_made_again(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "llama")
    expected = all_logits(model)
    calls = []

    def copy(source: torch.Tensor, destination: torch.Tensor) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise OSError("the link is down")
        LateCopy()(source, destination)

    streams.append(stream_of(model.model, (0, 1, 2), 2, copy))
    outcomes: list[str] = []
    for _ in range(4):
        try:
            for found, wanted in zip(all_logits(model), expected, strict=True):
                assert torch.equal(found, wanted)
            outcomes.append("equal")
        except WeightCopyFailed as exc:
            outcomes.append(str(exc))
    assert outcomes.count("equal") == 3
    (told,) = [outcome for outcome in outcomes if outcome != "equal"]
    assert told.startswith("The weights of layer ")
    assert "(the link is down)" in told


def test_a_step_that_fails_halfway_leaves_nothing_wrong(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "llama")
    expected = all_logits(model)
    streams.append(stream_of(model.model, (0, 1, 2), 2, LateCopy()))
    middle = find_layers(model.model, 3)[1]
    forward, middle.forward = middle.forward, lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        all_logits(model)
    middle.forward = forward
    for found, wanted in zip(all_logits(model), expected, strict=True):
        assert torch.equal(found, wanted)


class Layer(nn.Module):
    """With tensors of several kinds: tied to others', integers, transposed, under two names."""

    def __init__(self, seed: int, tied: nn.Parameter) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tied = tied
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator).t())
        self.again = self.weight
        self.scale = nn.Parameter(torch.randn((), generator=generator).bfloat16())
        self.register_buffer("codes", torch.randint(-9, 9, (7,), generator=generator).byte())
        self.register_buffer("kept", torch.randn(3, generator=generator), persistent=False)
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.tied + (x @ self.weight @ self.again.t()) * self.scale.float()
        codes = self.get_buffer("codes").float()
        return y / y.norm() + codes.sum() * 1e-3 + self.get_buffer("kept")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tied = nn.Parameter(torch.eye(3))
        self.blocks = nn.ModuleList(Layer(seed, tied) for seed in range(3))
        self.small = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.blocks:
            x = layer(x)
        return x


@torch.no_grad()
def test_tensors_of_any_kind_are_streamed_and_shared_ones_are_not(
    streams: list[WeightStream],
) -> None:
    model = Layers().requires_grad_(False)
    tied, x = model.blocks[0].tied, torch.ones(2, 3)
    before = {name: (t.clone(), t.stride()) for name, t in model.state_dict().items()}
    expected = model(x)
    streams.append(stream_of(model, (0, 2), 1, LateCopy()))
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert all(layer.tied is tied for layer in model.blocks)
    assert model.blocks[0].again is model.blocks[0].weight
    # Both streamed layers use the one slot.
    assert model.blocks[0].weight.data_ptr() == model.blocks[2].weight.data_ptr()
    offset = model.blocks[0].get_buffer("codes").data_ptr() - model.blocks[0].weight.data_ptr()
    assert offset % 256 == 0
    streams[0].acquire(0)
    now = model.state_dict()
    for name, (value, stride) in before.items():
        assert now[name].stride() == stride
        if not name.startswith("blocks.2"):
            assert torch.equal(now[name], value)
    assert "blocks.0.kept" not in now


# Values that pass from layer to layer, experts, biases.
@pytest.mark.parametrize("name", ["gemma4_text", "gpt_oss", "qwen2"])
def test_architectures_are_cut_into_pieces(
    name: str, tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    # Traced experts are multiplied by an operator that takes bfloat16 only.
    model = load(tmp_path, name, dtype="bfloat16" if name == "gpt_oss" else "float32")
    expected = all_logits(model)
    copy = LateCopy()
    streams.append(stream_of(model.model, (0, 2), 1, copy))
    forward = compile_forward(model.model, "graph", stream=streams[0])
    started = copy.num_copies
    for lens, wanted in zip(BATCHES, expected, strict=True):
        assert torch.equal(logits(model, forward, lens), wanted)
    assert started <= 1  # tracing copies nothing
    assert copy.num_copies >= 2 * len(BATCHES)


def test_quantised_layers_are_streamed_and_cut(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "llama", quantization="int4")
    expected = all_logits(model)
    quantised = [m for m in model.model.modules() if isinstance(m, QuantisedLinear)]
    assert quantised
    streams.append(stream_of(model.model, (0, 1, 2), 2, LateCopy()))
    forward = compile_forward(model.model, "graph", stream=streams[0])
    for lens, wanted in zip(BATCHES, expected, strict=True):
        assert torch.equal(logits(model, eager_forward(model.model), lens), wanted)
        assert torch.equal(logits(model, forward, lens), wanted)


def test_compiled_pieces_are_kept_and_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, streams: list[WeightStream]
) -> None:
    monkeypatch.setenv("PAGETIER_CACHE", str(tmp_path / "cache"))
    # As few layers as are streamed and resident: each piece takes a C++ compiler's seconds.
    tiny_models.save("llama", tmp_path / "model", num_hidden_layers=2)
    config = EngineConfig.create({"model": str(tmp_path / "model"), "device": "cpu"})
    model = load_model(config)
    expected = all_logits(model)
    streams.append(stream_of(model.model, (1,), 1, LateCopy(), num_layers=2))
    fresh = compile_forward(model.model, stream=streams[0])
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "_trace", None)  # neither traced nor compiled again
        loaded = compile_forward(model.model, stream=streams[0])
    for lens, wanted in zip(BATCHES, expected, strict=True):
        found = logits(model, fresh, lens)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(model, loaded, lens), found)
    # A damaged file is no reason not to start.
    (folder / "pieces.json").write_text("nonsense")
    monkeypatch.setattr(compilation, "_compile_graph", lambda graph, *_: graph)
    again = compile_forward(model.model, stream=streams[0])
    assert torch.equal(logits(model, again, BATCHES[0]), expected[0])


# --- as a setting --------------------------------------------------------------------------------

GIB = 2**30


def layer_bytes(model: LoadedModel, num_layers: int) -> int:
    return packed_bytes(model.model, find_layers(model.model, num_layers))[0]


def test_the_setting_streams_whole_layers_and_changes_no_fingerprint(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    tiny_models.save("qwen2", tmp_path, num_hidden_layers=7)

    def load_with(gib: float) -> tuple[LoadedModel, list[str]]:
        said: list[str] = []
        settings = {"model": str(tmp_path), "device": "cpu", "cpu_offload_gb": gib}
        return load_model(EngineConfig.create(settings), said.append), said

    resident, _ = load_with(0)
    size = layer_bytes(resident, 7)
    expected = all_logits(resident)
    for wanted, layers in ((size, (0, 1, 3, 5)), (3 * size, (0, 1, 2, 3, 4, 5))):
        model, said = load_with(wanted / GIB)
        assert model.stream is not None
        streams.append(model.stream)
        assert model.stream.plan.layers == layers
        assert model.fingerprint == resident.fingerprint
        assert model.num_parameters == resident.num_parameters
        assert f"streamed layer {len(layers)} of {len(layers)}" in "".join(said)
        assert "pageable), and 2 slots take" in said[-1]
        for found, logits_wanted in zip(all_logits(model), expected, strict=True):
            assert torch.equal(found, logits_wanted)


def test_what_cannot_be_freed_or_made_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, "llama", cpu_offload_gb=5).stream is None  # of three layers
    assert "Streaming frees 0 B, not the 5.0 GiB of cpu_offload_gb" in caplog.text
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    with pytest.raises(ModelError, match=r"of host memory .* but 1.0 KiB is available"):
        load(tmp_path, "llama", cpu_offload_gb=5)


def test_the_engine_serves_the_same_and_leaves_no_thread(tmp_path: pathlib.Path) -> None:
    reference = tiny_models.save("qwen2", tmp_path, num_hidden_layers=5)
    settings = {
        "device": "cpu", "swap_space": 0.01, "num_gpu_blocks_override": 64, "block_size": 4,
        "max_model_len": 64, "cpu_offload_gb": 1e-6,
    }  # fmt: skip
    before = set(threading.enumerate())
    core = build_engine(EngineConfig.create({"model": str(tmp_path), **settings}))
    assert core.stats()["streamed_bytes_per_step"] > 0
    for number, prompt in enumerate(prompts()):
        core.add_request(AddRequest(f"r{number}", prompt, GREEDY))
    core.add_request(AddRequest("aborted", prompts()[0], GREEDY))
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        core.abort(["aborted"])
    core.close()
    for number, prompt in enumerate(prompts()):
        expected = generate(reference, prompt, NEW_TOKENS)[0][len(prompt) :]
        assert tokens[f"r{number}"] == expected
    assert not {t for t in set(threading.enumerate()) - before if t.name.startswith("pagetier")}


def test_an_engine_that_cannot_be_built_leaves_no_thread(tmp_path: pathlib.Path) -> None:
    tiny_models.save("qwen2", tmp_path, num_hidden_layers=5)
    settings = {"device": "cpu", "cpu_offload_gb": 1e-6, "max_model_len": 10**6}
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="max_model_len"):
        build_engine(EngineConfig.create({"model": str(tmp_path), **settings}))
    assert set(threading.enumerate()) <= before


def test_streamed_layers_are_not_packed(
    tmp_path: pathlib.Path, streams: list[WeightStream]
) -> None:
    model = load(tmp_path, "llama")
    streams.append(stream_of(model.model, (0, 2), 1))
    layers = find_layers(model.model, 3)
    assert packed_linear.pack(model.model, but=streams[0].layers) > 0
    packed = [any(isinstance(m, PackedLinear) for m in layer.modules()) for layer in layers]
    assert packed == [False, True, False]


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device("cuda", torch.cuda.current_device())


def late_copy_on_gpu(source: torch.Tensor, destination: torch.Tensor) -> None:
    """As ``LateCopy``, on the current stream."""
    destination.fill_(255)
    torch.cuda._sleep(random.choice([0, 100_000, 3_000_000]))
    destination.copy_(source, non_blocking=True)


def streamed_on_gpu(
    model: LoadedModel,
    cuda: torch.device,
    layers: tuple[int, ...],
    num_slots: int,
    copy: object = late_copy_on_gpu,
) -> LoadedModel:
    """A model that was loaded on the host, with some layers streamed and all else on the GPU."""
    stream = stream_of(model.model, layers, num_slots, copy, device=cuda)
    model.model.to(cuda)
    return dataclasses.replace(model, device=cuda, stream=stream)


def logits_on_gpu(model: LoadedModel, **execution: object) -> torch.Tensor:
    """Behind all tokens of some sequences, in random batches; equal for equal models."""
    driver = Driver(model, **execution)
    found = driver.finish([driver.add(prompt) for prompt in prompts()])
    driver.runner.close()
    return torch.cat([row for rows in found.values() for row in rows])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_logits_do_not_depend_on_the_layout(
    name: str, dtype: str, tmp_path: pathlib.Path, cuda: torch.device
) -> None:
    expected = logits_on_gpu(load(tmp_path, name, "cuda", dtype))
    for layers, num_slots in LAYOUTS:
        model = streamed_on_gpu(load(tmp_path, name, dtype=dtype), cuda, layers, num_slots)
        assert model.stream is not None
        addresses = [p.data_ptr() for p in model.model.parameters()]
        assert torch.equal(logits_on_gpu(model), expected), (layers, num_slots)
        assert [p.data_ptr() for p in model.model.parameters()] == addresses
        model.stream.close()


@pytest.mark.gpu
def test_on_a_gpu_compiled_pieces_do_not_depend_on_the_number_of_slots(
    tmp_path: pathlib.Path, cuda: torch.device
) -> None:
    found = []
    for num_slots in (3, 2, 1):  # with three, nothing is ever overwritten
        model = streamed_on_gpu(
            load(tmp_path, "qwen2", dtype="bfloat16"), cuda, (0, 1, 2), num_slots
        )
        assert model.stream is not None
        forward = compile_forward(model.model, stream=model.stream)
        found.append(logits_on_gpu(model, forward=forward))
        model.stream.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    eager = logits_on_gpu(load(tmp_path, "qwen2", "cuda", "bfloat16"))
    torch.testing.assert_close(found[0], eager, atol=0.1, rtol=0.1)


@pytest.mark.gpu
def test_on_a_gpu_memory_that_is_not_pinned_is_bounced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, cuda: torch.device
) -> None:
    monkeypatch.setattr(host_memory, "_register", lambda _: ())
    monkeypatch.setattr(weights, "_BOUNCE_BYTES", 1000)  # several pieces to a layer
    expected = logits_on_gpu(load(tmp_path, "qwen2", "cuda"))
    model = streamed_on_gpu(load(tmp_path, "qwen2"), cuda, (0, 1, 2), 2, copy=None)
    assert model.stream is not None
    assert model.stream.rung == "pageable"
    assert torch.equal(logits_on_gpu(model), expected)
    model.stream.close()


class Products(nn.Module):
    """Layers of one square weight each."""

    def __init__(self, num_layers: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(num_layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_copies_run_while_layers_compute(cuda: torch.device) -> None:
    model = Products(6, 8192).requires_grad_(False)
    copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    products: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def note(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> torch.cuda.Event:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        events.append(pair)
        pair[0].record()
        return pair[1]

    def copy(source: torch.Tensor, destination: torch.Tensor) -> None:
        end = note(copies)
        destination.copy_(source, non_blocking=True)
        end.record()

    plan = weight_plan.spread(packed_bytes(model, model.layers), 6)
    stream = WeightStream(model, model.layers, plan, cuda, copy=copy)
    for layer in model.layers:  # their hooks come after those of the stream
        layer.register_forward_pre_hook(lambda *_: note(products) and None)
        layer.register_forward_hook(lambda *_: products[-1][1].record())
    x = torch.ones(32768, 8192, dtype=torch.bfloat16, device=cuda)  # about as long as a copy
    start = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(4):
        model(x)
    torch.cuda.synchronize()

    def spans(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[tuple[float, float]]:
        return [(start.elapsed_time(a), start.elapsed_time(b)) for a, b in events]

    shared = sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in spans(copies[2:])
        for other_begin, other_end in spans(products)
    )
    copied = sum(end - begin for begin, end in spans(copies[2:]))
    stream.close()
    assert shared > 0.5 * copied


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_a_pass_takes_what_its_copies_take(cuda: torch.device) -> None:
    model = Products(8, 8192).requires_grad_(False)  # 1 GiB
    plan = weight_plan.spread(packed_bytes(model, model.layers), 8)
    stream = WeightStream(model, model.layers, plan, cuda)
    x = torch.ones(16, 8192, dtype=torch.bfloat16, device=cuda)
    model(x)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        model(x)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / 10
    source = torch.empty(plan.slot_bytes, dtype=torch.uint8, pin_memory=True)
    room = torch.empty_like(source, device=cuda)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(8):
        room.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    bound = time.perf_counter() - begin
    stream.close()
    print(f"a pass {seconds * 1e3:.1f} ms, its copies alone {bound * 1e3:.1f} ms")
    assert bound > 0.9 * seconds
