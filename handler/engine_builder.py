"""Builds an engine from its settings: loads the model, sizes the tiers, measures, and wires.

Owns the order of start-up and what depends on model and device together: how long sequences may
be, how many blocks each tier has, and what swapping costs. Knows nothing of serving.
"""

import dataclasses
import functools
import gc
import itertools
import logging
import time
from collections.abc import Callable

import torch

from pagetier.handler import quantised_linear, tier_sizes
from pagetier.handler.architecture import attention_dim
from pagetier.handler.compilation import Forward, NotTraceable, compile_forward
from pagetier.handler.config import EngineConfig
from pagetier.handler.cuda_graphs import graph_sizes
from pagetier.handler.engine import EngineCore
from pagetier.handler.errors import ConfigError
from pagetier.handler.gpu_memory import GpuMemory
from pagetier.handler.kv_cache_manager import KVCacheManager
from pagetier.handler.messages import AddRequest
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.handler.model_runner import ModelRunner
from pagetier.handler.packed_linear import pack
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.scheduler import Scheduler
from pagetier.handler.sequence import Sequence
from pagetier.handler.step import ScheduledSequence, StepPlan
from pagetier.handler.structured_output import Grammars
from pagetier.handler.tokenizer import Tokenizer
from pagetier.handler.units import format_bytes
from pagetier.handler.warm_up import warm_up
from pagetier.offload import host_memory
from pagetier.offload.calibrate import (
    measure_beside_copies,
    measure_link,
    measure_prefill,
)
from pagetier.offload.cost_model import CostModel
from pagetier.offload.tiers import KVLayout, LayerKV
from pagetier.offload.transfer import Link, make_link
from pagetier.offload.weights import WeightStream

logger = logging.getLogger(__name__)

_MAX_CALIBRATION_TOKENS = 1024
_KV_DTYPES = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}
_FP8_CAPABILITY = (8, 9)
# The kernel of a GPU reads values of 8 bits by words.
_VALUES_PER_WORD = 4


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the tiers and sequences may hold."""

    num_gpu_blocks: int
    max_model_len: int
    memory: GpuMemory | None = None


@dataclasses.dataclass(frozen=True)
class Execution:
    """How steps are run: by which forward pass, and decodes of which sizes in graphs."""

    forward: Forward | None = None
    graph_sizes: tuple[int, ...] = ()
    decode_forward: Forward | None = None  # within graphs; None is the same


def build_engine(config: EngineConfig, progress: Callable[[str], None] | None = None) -> EngineCore:
    """Load, size, measure, and return an engine that is ready to serve.

    Args:
        config: all settings.
        progress: called with a short line as each phase begins.

    Raises:
        ModelError: the model cannot be read or is not supported.
        ConfigError: a setting does not fit the model or the device.
    """
    say = progress or (lambda message: logger.info("%s", message))
    start = time.perf_counter()
    model = load_model(config, say)
    try:
        return _build(config, model, say, start)
    except BaseException:
        if model.stream is not None:
            model.stream.close()
        raise


def _build(
    config: EngineConfig, model: LoadedModel, say: Callable[[str], None], start: float
) -> EngineCore:
    """``build_engine`` with a loaded model; it began to be loaded at ``start``."""
    layout = choose_layout(config, model)
    execution = choose_execution(config, model, say)

    say("Sizing the KV cache")
    sizes = _size_first_tier(config, model, layout, execution)
    gpu_pages = layout.allocate(
        sizes.num_gpu_blocks, model.device, touch=model.device.type == "cuda"
    )
    num_cpu_blocks = tier_sizes.num_cpu_blocks(config, layout.block_bytes)
    host = host_memory.allocate_cpu_tier(layout, num_cpu_blocks, pin=gpu_pages.is_cuda)
    num_cpu_blocks = host.pages.shape[0]

    runner = ModelRunner(
        model,
        gpu_pages,
        layout,
        max_num_seqs=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        forward=execution.forward,
        decode_forward=execution.decode_forward,
        graph_sizes=execution.graph_sizes,
    )
    if runner.graphs is not None:
        done = itertools.count(1)
        count = len(runner.graphs.sizes)
        say(f"Capturing {count} CUDA graphs")
        _capture(runner, lambda size: say(f"Captured CUDA graph {next(done)} of {count} ({size})"))
    if gpu_pages.is_cuda:
        say("Compiling what requests may ask for")
        warm_up(gpu_pages, model.vocab_size, model.dtype)
        quantised_linear.warm_up(model.model, model.dtype)
    link = make_link(gpu_pages, host)
    say("Measuring what swapping and recomputing cost")
    cost_model = _calibrate(config, model, layout, sizes, runner, link, num_cpu_blocks)

    # Keys and values depend on the model, how they are stored, and nothing else but tokens.
    salt = f"{model.fingerprint}:{model.dtype}:{layout}".encode()
    manager = KVCacheManager(
        sizes.num_gpu_blocks,
        num_cpu_blocks,
        config.block_size,
        salt=salt,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    info = {
        "device": str(model.device),
        "dtype": _name_of(model.dtype),
        "max_model_len": sizes.max_model_len,
        "block_size": config.block_size,
        "kv_cache_dtype": _name_of(layout.dtype),
        "kv_block_bytes": layout.block_bytes,
        "kv_token_bytes": layout.token_bytes,
        "host_memory_rung": host.rung,
        "link_bytes_per_second": cost_model.link_bytes_per_second,
        "prefill_flops_per_second": cost_model.flops_per_second,
        "streamed_bytes_per_step": 0 if model.stream is None else model.stream.plan.streamed_bytes,
        "startup_seconds": time.perf_counter() - start,
    }
    say(
        f"KV cache: {sizes.num_gpu_blocks} blocks of {config.block_size} tokens on "
        f"{model.device.type} ({format_bytes(sizes.num_gpu_blocks * layout.block_bytes)}), "
        f"{num_cpu_blocks} in host memory ({format_bytes(num_cpu_blocks * layout.block_bytes)}, "
        f"{host.rung}); {layout.token_bytes} bytes a token ({_name_of(layout.dtype)}); sequences "
        f"of up to {sizes.max_model_len} tokens"
    )
    if sizes.memory is not None:
        say(f"GPU memory: {sizes.memory}")
    return EngineCore(
        Scheduler(config, manager, cost_model, sizes.max_model_len),
        runner,
        link,
        grammars=Grammars(
            functools.partial(Tokenizer.load, config),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        ),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        info=info,
        close_last=None if model.stream is None else model.stream.close,
    )


def build_serving_engine(
    config: EngineConfig, progress: Callable[[str], None] | None = None
) -> EngineCore:
    """``build_engine``, and do at start what would hold up running requests later."""
    core = build_engine(config, progress)
    core.prepare_grammars()
    return core


def kv_layout(config: EngineConfig, layers: tuple[LayerKV, ...], dtype: torch.dtype) -> KVLayout:
    """How a block keeps keys and values of a model that computes in ``dtype``, on any device."""
    return KVLayout(layers, config.block_size, _KV_DTYPES.get(config.kv_cache_dtype, dtype))


def choose_layout(config: EngineConfig, model: LoadedModel) -> KVLayout:
    """How a block keeps the model's keys and values.

    Raises:
        ConfigError: the device cannot compute with ``kv_cache_dtype``, or not with values of the
            model's sizes in it.
    """
    layout = kv_layout(config, model.kv_layers, model.dtype)
    dtype = layout.dtype
    if config.kv_cache_dtype == "auto" or model.device.type != "cuda":
        return layout
    if dtype == torch.float8_e4m3fn:
        major, minor = torch.cuda.get_device_capability(model.device)
        if (major, minor) < _FP8_CAPABILITY:
            raise ConfigError(
                f"The setting 'kv_cache_dtype' is {config.kv_cache_dtype!r}, but this GPU, of "
                f"compute capability {major}.{minor}, has no fp8, which came with 8.9; use int8.",
                param="kv_cache_dtype",
            )
    odd = next((x.value_dim for x in layout.layers if x.value_dim % _VALUES_PER_WORD), None)
    if odd is not None:
        raise ConfigError(
            f"The setting 'kv_cache_dtype' is {config.kv_cache_dtype!r}, but a GPU reads values "
            f"of 8 bits by fours, and this model's heads have {odd} of them; use auto.",
            param="kv_cache_dtype",
        )
    return layout


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_execution(
    config: EngineConfig, model: LoadedModel, say: Callable[[str], None]
) -> Execution:
    """Compile the model and choose sizes of graphs, as far as device and settings want that.

    On a CPU the model's linear layers are packed instead, in place.
    """
    if config.enforce_eager:
        return Execution()
    if model.device.type == "cpu":
        say("Packing the weights")
        pack(model.model, but=() if model.stream is None else model.stream.layers)
        return Execution()
    say("Compiling the model")
    if model.stream is not None:
        return _compile_streamed(model, model.stream, say)
    sizes = graph_sizes(config)
    try:
        forward = compile_forward(model.model)
        if config.projection_kernels == "torch":
            return Execution(forward, sizes)
        say("Compiling the model with our projections")
        decode_forward = compile_forward(model.model, by_kernels=True)
        return Execution(forward, sizes, decode_forward)
    except NotTraceable as exc:
        logger.warning(
            "Steps will be slow, run operator by operator: the model cannot be compiled as one "
            "graph (%s).",
            exc,
        )
        return Execution()
    except Exception as exc:  # a compiler's fault must not keep a model from being served
        logger.warning("Steps will be slower: compiling the model failed (%s).", exc, exc_info=exc)
        return Execution(graph_sizes=sizes)


def _compile_streamed(
    model: LoadedModel, stream: WeightStream, say: Callable[[str], None]
) -> Execution:
    """Compile a model whose layers are streamed: in pieces, and without graphs.

    Where weights come over the link, a step takes so long that launching it costs nothing.
    """
    say("Decodes run compiled, but without CUDA graphs, since weights are streamed")
    try:
        return Execution(compile_forward(model.model, stream=stream))
    except Exception as exc:  # not traceable, or a compiler's fault: the model can be served
        logger.warning("Steps run operator by operator: compiling the model failed (%s).", exc)
        return Execution()


def _size_first_tier(
    config: EngineConfig, model: LoadedModel, layout: KVLayout, execution: Execution
) -> _Sizes:
    """How many blocks the GPU tier has, and how long a sequence may be in them.

    Raises:
        ConfigError: ``max_model_len`` exceeds the model's, or does not fit into the memory.
    """
    max_model_len = tier_sizes.wanted_model_len(config, model.max_model_len)
    memory = None
    if model.device.type == "cuda" and config.num_gpu_blocks_override is None:
        memory = _measure_gpu_memory(config, model, layout, max_model_len, execution)
    tier = tier_sizes.size_first_tier(
        config, layout.block_bytes, max_model_len, memory or host_memory.available_bytes()
    )
    if tier.max_model_len < max_model_len:
        logger.warning(
            "Sequences may have %d tokens instead of the model's %d: that is what the KV cache "
            "holds.",
            tier.max_model_len,
            max_model_len,
        )
    return _Sizes(tier.num_blocks, tier.max_model_len, memory)


def _measure_gpu_memory(
    config: EngineConfig,
    model: LoadedModel,
    layout: KVLayout,
    max_model_len: int,
    execution: Execution,
) -> GpuMemory:
    """Run the largest step and capture the largest graphs, on one block, and see what they take.

    Raises:
        ConfigError: not even that fits.
    """
    try:
        runner = ModelRunner(
            model,
            layout.allocate(1, model.device),
            layout,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            forward=execution.forward,
            decode_forward=execution.decode_forward,
            graph_sizes=execution.graph_sizes[-2:],
        )
        step_bytes = runner.profile_peak_bytes(config.max_num_batched_tokens)
        torch.cuda.empty_cache()
        free_bytes = [torch.cuda.mem_get_info(model.device)[0]]
        _capture(runner, lambda _: free_bytes.append(torch.cuda.mem_get_info(model.device)[0]))
    except torch.OutOfMemoryError:
        half = max(config.max_num_batched_tokens // 2, config.max_num_seqs)
        raise ConfigError(
            f"A step of {config.max_num_batched_tokens} tokens does not fit into the GPU's memory "
            f"beside the weights; lower max_num_batched_tokens to {half} or less, and max_num_seqs "
            f"to {max(config.max_num_seqs // 2, 1)} if that does not suffice.",
            param="max_num_batched_tokens",
        ) from None
    taken = [before - after for before, after in itertools.pairwise(free_bytes)]
    graphs = tier_sizes.graph_bytes(
        sum(taken[:1]), sum(taken[1:]), execution.graph_sizes if taken else ()
    )
    runner.close()
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    # By storage: the tensors of streamed layers share slots.
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in itertools.chain(model.model.parameters(), model.model.buffers())
    }
    return GpuMemory(
        total=total,
        utilization=config.gpu_memory_utilization,
        weights=sum(storages.values()),
        used=total - free,
        steps=step_bytes,
        graphs=graphs,
    )


def _capture(runner: ModelRunner, progress: Callable[[int], None]) -> None:
    """Capture a runner's graphs; if that fails, let it do without."""
    if runner.graphs is None:
        return
    try:
        runner.graphs.capture(progress)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as exc:
        logger.warning("Steps will be slower: a CUDA graph cannot be captured (%s).", exc)
        runner.drop_graphs()


def _calibrate(
    config: EngineConfig,
    model: LoadedModel,
    layout: KVLayout,
    sizes: _Sizes,
    runner: ModelRunner,
    link: Link,
    num_cpu_blocks: int,
) -> CostModel:
    """Measure the link and a prefill. The first blocks of both tiers are overwritten."""
    step_ids = itertools.count()

    def run(num_tokens: int) -> None:
        request = AddRequest("calibration", [0] * num_tokens, SamplingParams(temperature=0.0))
        sequence = Sequence(request, arrival=0)
        sequence.block_tables = [list(range(-(-num_tokens // config.block_size)))]
        sequence.row = 0
        share = ScheduledSequence(sequence, 0, num_tokens, samples=True)
        runner.launch(StepPlan(next(step_ids), [share], [])).collect()

    max_tokens = min(
        sizes.max_model_len - 1, config.max_num_batched_tokens, _MAX_CALIBRATION_TOKENS
    )
    if model.stream is None:
        num_tokens, seconds = measure_prefill(run, max_tokens)
    else:
        num_tokens, seconds = max_tokens, measure_beside_copies(run, max_tokens)
    rate = 1.0  # without a CPU tier nothing is ever copied
    if num_cpu_blocks:
        rate = measure_link(link, layout.block_bytes, sizes.num_gpu_blocks, num_cpu_blocks)
    shape = CostModel(
        token_bytes=layout.token_bytes,
        block_bytes=layout.block_bytes,
        link_bytes_per_second=rate,
        flops_per_second=1.0,
        num_parameters=model.num_parameters,
        attention_dim=attention_dim(model.layers),
    )
    flops = shape.recompute_seconds(num_tokens)  # at one FLOP per second
    return dataclasses.replace(shape, flops_per_second=flops / seconds)
