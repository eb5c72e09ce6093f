"""What ``pagetier plan`` prints: the plan as tables and sentences, or as JSON.

Owns the picture, and how the command's words become a machine, a workload and settings. Knows
nothing of how anything is estimated.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError
from pagetier.handler.planner import DEFAULT_CONTEXT_BYTES, Machine, Plan, Workload, make_plan
from pagetier.handler.top import plain_table
from pagetier.handler.units import format_bytes, format_seconds, parse_bytes
from pagetier.offload.host_memory import available_bytes

_LEAST_WIDTH = 100  # of the tables; a narrower terminal breaks their lines itself


def run_plan(
    settings: Mapping[str, Any],
    *,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    context: str | None = None,
    link: float | None = None,
    tflops: float | None = None,
    memory_bandwidth: float | None = None,
    num_input_tokens: int | None = None,
    num_output_tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Print a plan; the arguments are the command's, rates in GB/s and TFLOP/s.

    Raises:
        EngineError: an argument or setting is wrong, or the model is not supported.
        ConfigError: there is too little memory; this is told after the plan was printed.
    """
    rates = {"--link": link, "--tflops": tflops, "--memory-bandwidth": memory_bandwidth}
    for name, rate in rates.items():
        if rate is not None and not 0 < rate < float("inf"):
            raise ConfigError(f"{name} must be a number above 0, not {rate}.")
    settings = dict(settings)
    if isinstance(settings.get("swap_space"), str):  # with a unit, as sizes have here
        settings["swap_space"] = _size("--swap-space", settings["swap_space"]) / 2**30
    config = EngineConfig.create(settings)
    machine = Machine(
        gpu_bytes=_gpu_bytes(config, gpu_memory),
        host_bytes=_host_bytes(host_memory),
        context_bytes=DEFAULT_CONTEXT_BYTES if context is None else _size("--context", context),
        link_bytes_per_second=None if link is None else link * 1e9,
        flops_per_second=None if tflops is None else tflops * 1e12,
        memory_bytes_per_second=None if memory_bandwidth is None else memory_bandwidth * 1e9,
    )
    plan = make_plan(config, machine, _workload(num_input_tokens, num_output_tokens))
    if as_json:
        print(json.dumps(as_dict(plan), indent=2))
    else:
        width = Console().width
        Console(highlight=False, width=max(width, _LEAST_WIDTH)).print(picture(plan))
    if plan.problem is not None:
        raise ConfigError(plan.problem)
    return 0


def _workload(num_input_tokens: int | None, num_output_tokens: int | None) -> Workload | None:
    counts = {"--input-tokens": num_input_tokens, "--output-tokens": num_output_tokens}
    if set(counts.values()) == {None}:
        return None
    for name, count in counts.items():
        if count is None or count < 1:
            told = "missing" if count is None else count
            raise ConfigError(f"{name} must be 1 or more, not {told}; give both, or none of them.")
    assert num_input_tokens is not None
    assert num_output_tokens is not None
    return Workload(num_input_tokens, num_output_tokens)


def _size(name: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as exc:
        raise ConfigError(f"{name}: {exc}") from None


def _gpu_bytes(config: EngineConfig, text: str | None) -> int | None:
    if config.device == "cpu":
        if text is not None:
            raise ConfigError(
                "--gpu-memory says nothing about --device cpu; leave one of them out."
            )
        return None
    if text is not None:
        num_bytes = _size("--gpu-memory", text)
        if num_bytes == 0:
            raise ConfigError("--gpu-memory is 0; plan with --device cpu for no GPU.")
        return num_bytes
    if not torch.cuda.is_available():
        raise ConfigError(
            "This machine has no usable GPU to plan for; say how much memory it has, as "
            "--gpu-memory 12GiB, or plan with --device cpu."
        )
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _host_bytes(text: str | None) -> int:
    return available_bytes() if text is None else _size("--host-memory", text)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it: all attributes, and what follows from them."""
    values = dataclasses.asdict(plan)
    if plan.gpu is not None:
        values["gpu"] |= {
            "others": plan.gpu.others,
            "for_kv_cache": plan.gpu.for_kv_cache,
            "kv_blocks": plan.num_gpu_blocks * plan.block_bytes,
        }
    values["host"]["left"] = plan.host.left
    values["fits"] = plan.problem is None
    values["num_running"] = plan.num_running
    values["preemption_begins_at"] = plan.preemption_begins_at
    return values


def picture(plan: Plan) -> RenderableType:
    """All that is shown of a plan."""
    title = Text.assemble(
        (plan.model, "bold"), f"   {plan.model_type}, {plan.num_weights:,} weights in {plan.dtype}"
    )
    if plan.kv_cache_dtype != plan.dtype:
        title.append(f", keys and values in {plan.kv_cache_dtype}")
    parts: list[RenderableType] = [title]
    if plan.checkpoint is not None:
        parts.append(Text(f"{plan.checkpoint} of weights, whose headers agree with config.json"))
    parts.append(Text())
    if plan.gpu is not None:
        parts += [_gpu(plan), Text()]
    parts.append(_host(plan))
    if plan.problem is not None:
        return Group(*parts)
    parts += [Text(), _lengths(plan), Text(), Text("\n".join(_sentences(plan)))]
    if plan.bounds:
        parts += [Text(), _bounds(plan)]
    return Group(*parts)


def _gpu(plan: Plan) -> Table:
    gpu = plan.gpu
    assert gpu is not None
    tier = plan.num_gpu_blocks * plan.block_bytes
    spare = gpu.total - gpu.used - gpu.steps - gpu.graphs - tier
    table = plain_table("GPU memory", format_bytes(gpu.total), "")
    for name, size, remark in (
        ("weights", gpu.weights, ""),
        ("CUDA context and others", gpu.others, "assumed"),
        ("largest step", gpu.steps, "estimated; measured at start"),
        ("CUDA graphs", gpu.graphs, "estimated; measured at start" if gpu.graphs else "none"),
        ("KV blocks", tier, _blocks(plan, plan.num_gpu_blocks)),
    ):
        table.add_row(f"  {name}", format_bytes(size), remark)
    if spare >= 0:
        share = f"gpu_memory_utilization {gpu.utilization:g}"
        table.add_row("  not used", format_bytes(spare), share)
    else:
        table.add_row("  missing", format_bytes(-spare), "")
    return table


def _host(plan: Plan) -> Table:
    host = plan.host
    table = plain_table("host memory", format_bytes(host.total), "")
    rows = [("processes", host.processes, "assumed")]
    if plan.gpu is None:
        rows.append(("weights", host.weights, ""))
        rows.append(("first tier", host.first_tier, _blocks(plan, plan.num_gpu_blocks)))
    remark = _blocks(plan, plan.num_cpu_blocks)
    if plan.num_cpu_blocks < plan.num_wanted_cpu_blocks and plan.problem is None:
        remark += f", of {plan.num_wanted_cpu_blocks} asked for: at most 80 % of what is free"
    rows.append(("CPU tier", host.cpu_tier, remark))
    for name, size, remark in rows:
        table.add_row(f"  {name}", format_bytes(size), remark)
    name = "left" if host.left >= 0 else "missing"
    loading = ""
    if plan.gpu is not None and host.loading:
        loading = f"files of {format_bytes(host.loading)} pass through it while they load"
    table.add_row(f"  {name}", format_bytes(abs(host.left)), loading)
    return table


def _blocks(plan: Plan, count: int) -> str:
    if count == 0:
        return "none"
    size = plan.block_size
    return f"{count:,} blocks of {size} tokens ({format_bytes(plan.block_bytes)}): " + (
        f"{count * size:,} tokens"
    )


def _lengths(plan: Plan) -> Table:
    table = plain_table(
        "sequences of", "fit the GPU tier", "both tiers", "swap out", "and in", "or recompute"
    )
    for row in plan.lengths:
        times = (row.swap_out_seconds, row.swap_in_seconds, row.recompute_seconds)
        table.add_row(
            f"{row.num_tokens:,} tokens",
            f"{row.num_in_gpu_tier:,}",
            f"{row.num_in_both_tiers:,}",
            *(format_seconds(seconds) for seconds in times),
        )
    return table


def _sentences(plan: Plan) -> list[str]:
    model, work = plan.cost_model, plan.workload
    words = {
        "link_bytes_per_second": f"a link of {model.link_bytes_per_second / 1e9:g} GB/s",
        "flops_per_second": f"{model.flops_per_second / 1e12:g} TFLOP/s",
    }
    rates = [text + " (assumed)" * (name in plan.assumed) for name, text in words.items()]
    lines = [
        f"Costs are of {' and '.join(rates)}; the engine measures both.",
        f"Sequences may have up to {plan.max_model_len:,} tokens.",
        f"Of requests with {work.num_input_tokens:,} tokens in and {work.num_output_tokens:,} out, "
        f"{plan.num_running:,} run together to their end without a preemption.",
    ]
    if work.num_tokens > plan.max_model_len:
        lines[-1] = f"Requests of {work.num_tokens:,} tokens are longer than that: refused."
    average = plan.preemption_begins_at
    if average >= plan.max_model_len:
        lines.append(
            f"With max_num_seqs, {plan.max_num_seqs}, running, nothing is ever preempted: that "
            "many of the greatest length fit."
        )
    else:
        lines.append(
            f"With max_num_seqs, {plan.max_num_seqs}, running, preemption begins when they have "
            f"{average:,.0f} tokens on average."
        )
    return lines


def _bounds(plan: Plan) -> Table:
    table = plain_table("decoding together", "read a step", "at least", "at most")
    for bound in plan.bounds:
        table.add_row(
            f"{bound.num_sequences:,} sequences",
            format_bytes(bound.num_bytes),
            f"{format_seconds(bound.seconds)} a step",
            f"{bound.tokens_per_second:,.0f} tokens/s",
        )
    return table
