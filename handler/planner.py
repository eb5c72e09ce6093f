"""Where memory will go, what will fit, and what it will cost: an engine's plan before it exists.

Owns the estimates of what an engine measures at its start, and the plan that follows from them.
What both only work out (weights, blocks, sequences, costs) comes from the functions the engine
itself uses: ``tier_sizes``, ``gpu_memory``, ``tiers``, ``cost_model``. Reads the model's
configuration and the headers of its files, no weight, and needs no GPU. Knows nothing of how a plan
is shown.

What is estimated, where the engine measures:

- a step: the most that live tensors take in a trial run of the largest batch without memory
  (``architecture.step_bytes``), or if that is more, its logits and what choosing tokens from them
  takes; and cuBLAS's workspaces. A compiled step keeps fewer tensors than the trial run, operator
  by operator, does, and CUDA's allocator rounds up: neither is counted.
- CUDA graphs: the largest takes its trial run's peak, and each other one keeps its logits; they are
  added up as the engine does. What the driver keeps for each graph is not counted.
- quantised weights: what making them floats again takes in a step, where no kernel computes with
  them as they are, is not counted.
- the CUDA context: 0.5 GiB, assumed; it depends on driver, GPU and the kernels in use.
- processes: 2 GiB of host memory, assumed, for frontend, handler and engine.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pagetier.handler import checkpoint, quantisation, tier_sizes
from pagetier.handler.architecture import (
    Architecture,
    AttentionLayer,
    attention_dim,
    step_bytes,
)
from pagetier.handler.config import EngineConfig
from pagetier.handler.cuda_graphs import graph_sizes
from pagetier.handler.engine_builder import kv_layout
from pagetier.handler.errors import ConfigError
from pagetier.handler.gpu_memory import GpuMemory
from pagetier.handler.model_loader import Outline, read_outline, resolve_dtype
from pagetier.handler.sampler import score_bytes
from pagetier.handler.step import MAX_PROMPT_LOGPROBS_PER_STEP
from pagetier.handler.units import format_bytes
from pagetier.kernels.sampling import scratch_bytes
from pagetier.offload import host_memory
from pagetier.offload.cost_model import CostModel
from pagetier.offload.tiers import KVLayout

DEFAULT_CONTEXT_BYTES = 1 << 29
_PROCESS_BYTES = 2 << 30
# PyTorch gives cuBLAS 32 MiB for each stream on GPUs of compute capability 9.0 (8.1 on others), and
# cuBLASLt as much or less; steps run on one stream. (pytorch, CublasHandlePool.cpp, pull 120925)
_CUBLAS_BYTES = 2 * (32 << 20)
_ALLOCATION_BYTES = 2 << 20  # CUDA hands out memory in pieces of this size
# What an RTX 4090 or an L4 has between it and the host: PCIe 4.0 x16, as far as copies reach it.
_ASSUMED_LINK = 25e9
_ASSUMED_FLOPS = 50e12
_SHORTEST_LENGTH = 512
_MAX_LENGTHS = 7
_BATCHES = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is known of the machine; rates of None are assumed, or left out of the plan.

    Attributes:
        gpu_bytes: all memory of the GPU; None plans for a CPU.
        host_bytes: host memory that is free before the server starts.
        context_bytes: of the GPU: the CUDA context, and other processes.
        link_bytes_per_second: between the tiers, one way.
        flops_per_second: that prompts are computed with.
        memory_bytes_per_second: at which the GPU reads its memory.
    """

    gpu_bytes: int | None
    host_bytes: int
    context_bytes: int = DEFAULT_CONTEXT_BYTES
    link_bytes_per_second: float | None = None
    flops_per_second: float | None = None
    memory_bytes_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Host:
    """Host memory in bytes; ``left`` is below 0 if all else is too much.

    Attributes:
        total: free before the server starts.
        processes: of the server itself.
        weights: of a model that is served from host memory.
        first_tier: what stands for the GPU tier, without a GPU.
        cpu_tier: of the CPU tier.
        loading: of the files, while they are read; the CPU tier is taken afterwards.
    """

    total: int
    processes: int
    weights: int
    first_tier: int
    cpu_tier: int
    loading: int

    @property
    def left(self) -> int:
        """What nobody takes once the server runs."""
        return self.total - self.processes - self.weights - self.first_tier - self.cpu_tier


@dataclasses.dataclass(frozen=True)
class Length:
    """Sequences of one length.

    Attributes:
        num_tokens: of prompt and output together.
        num_blocks: that each fills.
        num_in_gpu_tier: how many fit the GPU tier; no more than ``max_num_seqs`` run at once.
        num_in_both_tiers: how many keep their blocks in one of the tiers, each in one of them.
        swap_out_seconds: copying all its blocks out.
        swap_in_seconds: copying them back.
        recompute_seconds: computing it again instead.
    """

    num_tokens: int
    num_blocks: int
    num_in_gpu_tier: int
    num_in_both_tiers: int
    swap_out_seconds: float
    swap_in_seconds: float
    recompute_seconds: float


@dataclasses.dataclass(frozen=True)
class Bound:
    """A decode step of a batch cannot be faster than memory is read.

    Attributes:
        num_sequences: of the batch.
        num_bytes: that the step reads at least: weights, keys and values.
        seconds: of the step, at least.
        tokens_per_second: of the batch, at most.
    """

    num_sequences: int
    num_bytes: int
    seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests that are expected: tokens of each prompt, and of each output."""

    num_input_tokens: int
    num_output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of a sequence at its end."""
        return self.num_input_tokens + self.num_output_tokens

    @classmethod
    def typical(cls, max_model_len: int) -> "Workload":
        """512 tokens in and 128 out, or as many in this proportion as a sequence may have."""
        num_tokens = min(640, max_model_len)
        num_output_tokens = max(num_tokens // 5, 1)
        return cls(num_tokens - num_output_tokens, num_output_tokens)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is planned. What depends on tiers is empty where ``problem`` says what is wrong.

    Attributes:
        model: as the user named it.
        model_type: of its configuration.
        dtype: of weights and activations.
        kv_cache_dtype: of keys and values.
        num_weights: parameters, tied ones counted once.
        checkpoint: the files' headers; None without files.
        gpu: where the GPU's memory goes; None without one.
        host: where the host's goes.
        max_model_len: the longest sequence; what is asked for, if there is a problem.
        max_num_seqs: most sequences that run at once.
        block_size: tokens in a block.
        block_bytes: of one block, over all layers.
        token_bytes: of one token's keys and values, over all layers.
        num_gpu_blocks: of the GPU tier, or of what stands for it.
        num_cpu_blocks: of the CPU tier.
        num_wanted_cpu_blocks: what ``swap_space`` asks for.
        cost_model: with the rates that are given or assumed.
        assumed: names of the rates that are assumed.
        workload: what is expected.
        lengths: sequences of some lengths, that of the workload included.
        bounds: of some batches of the workload; empty without the memory's rate.
        problem: why the engine would not start, and what to do; None if it would.
    """

    model: str
    model_type: str
    dtype: str
    kv_cache_dtype: str
    num_weights: int
    checkpoint: checkpoint.Checkpoint | None
    gpu: GpuMemory | None
    host: Host
    max_model_len: int
    max_num_seqs: int
    block_size: int
    block_bytes: int
    token_bytes: int
    num_gpu_blocks: int
    num_cpu_blocks: int
    num_wanted_cpu_blocks: int
    cost_model: CostModel
    assumed: tuple[str, ...]
    workload: Workload
    lengths: tuple[Length, ...]
    bounds: tuple[Bound, ...]
    problem: str | None

    @property
    def num_running(self) -> int:
        """Sequences of the workload that run to their end together without a preemption."""
        blocks = tier_sizes.num_blocks_of(self.workload.num_tokens, self.block_size)
        return min(self.num_gpu_blocks // blocks, self.max_num_seqs)

    @property
    def preemption_begins_at(self) -> float:
        """Mean tokens of each of ``max_num_seqs`` running sequences when blocks run out."""
        return self.num_gpu_blocks * self.block_size / self.max_num_seqs


def make_plan(config: EngineConfig, machine: Machine, workload: Workload | None = None) -> Plan:
    """What an engine with these settings would do on that machine, with a typical workload if None.

    Raises:
        ModelError: the model is not supported, or its files do not fit its configuration.
        ConfigError: a setting or the workload does not fit the model. Too little memory is not an
            error but the plan's ``problem``.
    """
    if config.cpu_offload_gb:
        raise ConfigError(
            "Weights that are streamed from host memory cannot be planned yet; set cpu_offload_gb "
            "to 0, and take what it frees of the weights off by hand.",
            param="cpu_offload_gb",
        )
    outline = read_outline(config)
    architecture = outline.architecture
    files = None
    if config.load_format != "dummy" and Path(config.model).is_dir():
        files = checkpoint.read_headers(Path(config.model))
    dtype = _dtype(config, outline, files, machine)
    weights = _Weights.of(config, outline, dtype)
    if files is not None:
        files.check(architecture.num_weights)
    layout = kv_layout(config, architecture.kv_layers, dtype)
    max_model_len = tier_sizes.wanted_model_len(config, outline.max_model_len)
    workload = workload or Workload.typical(max_model_len)
    if workload.num_tokens > max_model_len:
        raise ConfigError(
            f"Sequences of {workload.num_input_tokens} tokens in and "
            f"{workload.num_output_tokens} out are longer than max_model_len, {max_model_len}; "
            "expect shorter ones."
        )

    gpu = None
    host_weights = 0
    if machine.gpu_bytes is not None:
        gpu = _gpu_memory(
            config,
            outline,
            dtype,
            weights=weights.resident,
            total=machine.gpu_bytes,
            context=machine.context_bytes,
            max_model_len=max_model_len,
        )
    else:
        host_weights = weights.resident + _packed_twice(config, architecture, dtype)
    available = max(machine.host_bytes - _PROCESS_BYTES - host_weights, 0)

    problem, num_gpu_blocks, num_cpu_blocks = None, 0, 0
    wanted = tier_sizes.num_cpu_blocks(config, layout.block_bytes)
    try:
        tier = tier_sizes.size_first_tier(
            config, layout.block_bytes, max_model_len, available if gpu is None else gpu
        )
        if gpu is not None:
            _check_override(gpu, tier.num_blocks, layout.block_bytes)
        num_gpu_blocks, max_model_len = tier.num_blocks, tier.max_model_len
        # Without a GPU the first tier is not touched yet when the second is sized.
        num_cpu_blocks = min(wanted, host_memory.budget_of(available) // layout.block_bytes)
    except ConfigError as exc:
        problem = exc.message
    host = Host(
        total=machine.host_bytes,
        processes=_PROCESS_BYTES,
        weights=host_weights,
        first_tier=0 if gpu is not None else num_gpu_blocks * layout.block_bytes,
        cpu_tier=num_cpu_blocks * layout.block_bytes,
        loading=0 if files is None else files.num_bytes,
    )
    assumed = [
        name for name in ("link_bytes_per_second", "flops_per_second") if not getattr(machine, name)
    ]
    cost_model = CostModel(
        token_bytes=layout.token_bytes,
        block_bytes=layout.block_bytes,
        link_bytes_per_second=machine.link_bytes_per_second or _ASSUMED_LINK,
        flops_per_second=machine.flops_per_second or _ASSUMED_FLOPS,
        num_parameters=architecture.num_parameters,
        attention_dim=attention_dim(architecture.layers),
    )
    plan = Plan(
        model=config.model,
        model_type=outline.hf_config.get_text_config().model_type,
        dtype=str(dtype).removeprefix("torch."),
        kv_cache_dtype=str(layout.dtype).removeprefix("torch."),
        num_weights=architecture.num_weights,
        checkpoint=files,
        gpu=gpu,
        host=host,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        block_bytes=layout.block_bytes,
        token_bytes=layout.token_bytes,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        num_wanted_cpu_blocks=wanted,
        cost_model=cost_model,
        assumed=tuple(assumed),
        workload=workload,
        lengths=(),
        bounds=(),
        problem=problem,
    )
    if problem is not None:
        return plan
    bounds: list[Bound] = []
    if machine.memory_bytes_per_second is not None:
        bounds = _bounds(
            plan, architecture.layers, layout, weights.read, machine.memory_bytes_per_second
        )
    return dataclasses.replace(plan, lengths=tuple(_lengths(plan)), bounds=tuple(bounds))


def _dtype(
    config: EngineConfig,
    outline: Outline,
    files: checkpoint.Checkpoint | None,
    machine: Machine,
) -> torch.dtype:
    device = torch.device("cpu" if machine.gpu_bytes is None else "cuda")
    dtype = resolve_dtype(config.dtype, outline.hf_config, device)
    if dtype is None:  # transformers then takes the files' own, or float32
        dtype = getattr(torch, (files and files.dtype) or "float32")
    return dtype


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of a model's weights where it runs, and those that any step reads at least."""

    resident: int
    read: int

    @classmethod
    def of(cls, config: EngineConfig, outline: Outline, dtype: torch.dtype) -> "_Weights":
        architecture = outline.architecture
        rounding = quantisation.plan(config, outline.hf_config)
        saved = 0
        if isinstance(rounding, quantisation.Stored):
            raise ConfigError(
                "Weights that are quantised in the checkpoint cannot be planned yet; plan the "
                "model they were made from, with quantization int4 or int8.",
                param="quantization",
            )
        if rounding is not None:
            saved = sum(
                count
                * (
                    math.prod(shape) * dtype.itemsize
                    - quantisation.layer_bytes(shape, rounding, dtype)
                )
                for shape, count in architecture.quantisable.items()
            )
        num_elements = architecture.num_weights + architecture.num_cast_buffers
        read = _num_read_weights(architecture, outline.hf_config.get_text_config())
        return cls(
            num_elements * dtype.itemsize + architecture.buffer_bytes - saved,
            max(read * dtype.itemsize - saved, 0),
        )


def _packed_twice(config: EngineConfig, architecture: Architecture, dtype: torch.dtype) -> int:
    """Bytes of what a CPU keeps packed beside the original: the weight of tied embeddings."""
    is_packed = dtype == torch.float32 and not config.enforce_eager
    return architecture.num_head_weights * dtype.itemsize * (is_packed and architecture.is_tied)


def _gpu_memory(
    config: EngineConfig,
    outline: Outline,
    dtype: torch.dtype,
    *,
    weights: int,
    total: int,
    context: int,
    max_model_len: int,
) -> GpuMemory:
    """Where a GPU's memory goes, estimated; see the module."""
    vocabulary = outline.hf_config.get_text_config().vocab_size
    trust = config.trust_remote_code

    # The largest step, as ``ModelRunner.profile_peak_bytes`` makes it.
    num_samples = min(config.max_num_seqs, config.max_num_batched_tokens)
    longest = min(config.max_num_batched_tokens - num_samples + 1, max_model_len)
    num_rows = num_samples + min(longest - 1, MAX_PROMPT_LOGPROBS_PER_STEP)
    num_tokens = min(config.max_num_batched_tokens, num_samples * max_model_len)
    forward = step_bytes(outline.hf_config, dtype, num_tokens, num_rows, trust_remote_code=trust)
    choosing = num_rows * vocabulary * dtype.itemsize + max(
        score_bytes(num_rows, vocabulary, dtype), scratch_bytes(num_samples, vocabulary)
    )

    sizes = () if config.enforce_eager else graph_sizes(config)
    taken = [
        # Hidden behind the peak of the largest, a smaller one keeps nothing but its logits.
        _rounded(
            step_bytes(outline.hf_config, dtype, size, size, trust_remote_code=trust)
            if size == sizes[-1]
            else size * vocabulary * dtype.itemsize
        )
        for size in sizes[:-3:-1]
    ]
    return GpuMemory(
        total=total,
        utilization=config.gpu_memory_utilization,
        weights=weights,
        used=weights + context,
        steps=max(forward, choosing) + _CUBLAS_BYTES,
        graphs=tier_sizes.graph_bytes(sum(taken[:1]), sum(taken[1:]), sizes),
    )


def _check_override(gpu: GpuMemory, num_blocks: int, block_bytes: int) -> None:
    """Raise unless so many blocks, as the user may have set them, fit into all of the GPU."""
    room = gpu.total - gpu.used - gpu.steps - gpu.graphs
    if num_blocks * block_bytes > room:
        raise ConfigError(
            f"The {num_blocks} blocks of num_gpu_blocks_override take "
            f"{format_bytes(num_blocks * block_bytes)}, of which the GPU has "
            f"{format_bytes(max(room, 0))} left; lower it to "
            f"{max(room, 0) // block_bytes} or less.",
            param="num_gpu_blocks_override",
        )


def _rounded(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALLOCATION_BYTES) * _ALLOCATION_BYTES


def _lengths(plan: Plan) -> list[Length]:
    lengths = {plan.workload.num_tokens, plan.max_model_len}
    length = _SHORTEST_LENGTH
    while length < plan.max_model_len and len(lengths) < _MAX_LENGTHS:
        lengths.add(length)
        length *= 2 if plan.max_model_len <= 32768 else 4
    model = plan.cost_model
    rows = []
    for num_tokens in sorted(x for x in lengths if x <= plan.max_model_len):
        num_blocks = tier_sizes.num_blocks_of(num_tokens, plan.block_size)
        in_gpu_tier = plan.num_gpu_blocks // num_blocks
        rows.append(
            Length(
                num_tokens=num_tokens,
                num_blocks=num_blocks,
                num_in_gpu_tier=in_gpu_tier,
                num_in_both_tiers=in_gpu_tier + plan.num_cpu_blocks // num_blocks,
                swap_out_seconds=num_blocks * model.block_bytes / model.link_bytes_per_second,
                swap_in_seconds=model.load_seconds(num_tokens),
                recompute_seconds=model.recompute_seconds(num_tokens),
            )
        )
    return rows


def _bounds(
    plan: Plan, layers: Sequence[AttentionLayer], layout: KVLayout, weights: int, rate: float
) -> list[Bound]:
    """Bounds for batches in the middle of their outputs."""
    context = plan.workload.num_input_tokens + plan.workload.num_output_tokens // 2
    kv_bytes = sum(
        min(context, layer.window or context)
        * dataclasses.replace(layout, layers=(layer.kv,)).token_bytes
        for layer in layers
    )
    batches = {x for x in _BATCHES if x < plan.num_running} | {max(plan.num_running, 1)}
    bounds = []
    for batch in sorted(batches):
        num_bytes = weights + batch * kv_bytes
        bounds.append(Bound(batch, num_bytes, num_bytes / rate, batch * rate / num_bytes))
    return bounds


def _num_read_weights(architecture: Architecture, text_config: Any) -> int:
    """Weights that any step reads at least: of the experts, those of a single token."""
    num_experts_weights = architecture.num_expert_weights
    always = architecture.num_parameters + architecture.num_head_weights - num_experts_weights
    num_chosen = getattr(text_config, "num_experts_per_tok", None) or 1
    num_experts = next(
        (
            count
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (count := getattr(text_config, name, None))
        ),
        num_chosen,
    )
    return always + num_experts_weights * num_chosen // num_experts
