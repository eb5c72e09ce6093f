"""What ``pagetier top`` shows: both tiers, the requests, and the rates of a served model.

Owns the picture and how rates come from two answers of the statistics route. On a terminal the
picture is redrawn until Ctrl-C; anywhere else, or if asked, it is printed once. Imports no torch.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pagetier.handler.client import ServedModel
from pagetier.handler.errors import EngineError
from pagetier.handler.units import format_bytes, format_seconds

_BAR_WIDTH = 30
_LATENCIES = (
    ("first token", "time_to_first_token_seconds"),
    ("between tokens", "inter_token_latency_seconds"),
    ("whole request", "e2e_request_latency_seconds"),
    ("in the queue", "request_queue_time_seconds"),
)


@dataclass(frozen=True)
class Snapshot:
    """The statistics at one time, in seconds of a clock that never goes back."""

    stats: Mapping[str, Any]
    time: float

    def rate(self, before: "Snapshot | None", name: str) -> float | None:
        """How much the total ``name`` has grown a second; None if that cannot be told.

        It cannot without an earlier snapshot, nor when the engine was started anew since.
        """
        if before is None or self.time <= before.time:
            return None
        growth = float(self.stats[name]) - float(before.stats[name])
        return growth / (self.time - before.time) if growth >= 0 else None


def run_top(url: str, key: str, *, interval_s: float, once: bool) -> int:
    """Show the model at ``url`` every ``interval_s`` seconds, or once; returns the exit code.

    Raises:
        EngineError: the model does not answer at the beginning. Later it is waited for.
    """
    model = ServedModel(url, key)
    console = Console(highlight=False)
    snapshot = Snapshot(model.stats(), time.monotonic())
    name = model.name()
    if once or not console.is_terminal:
        time.sleep(interval_s)
        later = Snapshot(model.stats(), time.monotonic())
        console.print(picture(name, later, snapshot))
        return 0
    with Live(
        picture(name, snapshot, None), console=console, screen=True, auto_refresh=False
    ) as live:
        try:
            while True:
                time.sleep(interval_s)
                try:
                    later = Snapshot(model.stats(), time.monotonic())
                except EngineError as exc:
                    shown: RenderableType = Group(
                        Text(exc.message, style="red"), picture(name, snapshot, None)
                    )
                else:
                    shown, snapshot = picture(name, later, snapshot), later
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return 0


def picture(name: str, now: Snapshot, before: Snapshot | None) -> RenderableType:
    """All that is shown of ``now``, with rates since ``before``."""
    stats = now.stats
    title = Text.assemble(
        (name, "bold"),
        f"   {stats['dtype']} on {stats['device']}, up to {stats['max_model_len']} tokens",
    )
    return Group(
        title,
        Text(),
        _tiers(stats),
        Text(),
        _requests(stats),
        Text(),
        _rates(now, before),
        Text(),
        _latencies(stats),
    )


def _tiers(stats: Mapping[str, Any]) -> Table:
    """Use of both tiers: blocks that requests hold, and in the CPU tier also what is cached."""
    table = plain_table("tier", "", "used", "blocks", "free or evictable", "size")
    for title, tier, usage in (
        ("GPU", "gpu", stats["kv_cache_usage_perc"]),
        ("CPU", "cpu", stats["cpu_cache_usage_perc"]),
    ):
        num_blocks = stats[f"num_{tier}_blocks"]
        table.add_row(
            title,
            ProgressBar(total=1.0, completed=usage, width=_BAR_WIDTH) if num_blocks else "none",
            f"{100 * usage:.0f} %",
            str(num_blocks),
            str(stats[f"num_{tier}_blocks_free"]),
            format_bytes(num_blocks * stats["kv_block_bytes"]),
        )
    return table


def _requests(stats: Mapping[str, Any]) -> Table:
    table = plain_table(
        "requests", "running", "waiting", "swapped", "preempted", "loading", "ended"
    )
    names = ("running", "waiting", "swapped", "preempted", "loading")
    table.add_row(
        "now",
        *(str(stats[f"num_requests_{name}"]) for name in names),
        ", ".join(f"{count} {how}" for how, count in stats["request_success"].items() if count)
        or "none",
    )
    return table


def _rates(now: Snapshot, before: Snapshot | None) -> Table:
    stats = now.stats
    table = plain_table("", "a second", "total")
    for title, name in (
        ("tokens generated", "generation_tokens"),
        ("prompt tokens", "prompt_tokens"),
        ("preemptions", "num_preemptions"),
        ("tokens recomputed", "num_recomputed_tokens"),
        ("copied out", "kv_offload_store_bytes"),
        ("copied in", "kv_offload_load_bytes"),
    ):
        rate = now.rate(before, name)
        if name.endswith("_bytes"):
            shown = "-" if rate is None else format_bytes(rate)
            table.add_row(title, shown, format_bytes(stats[name]))
        else:
            table.add_row(title, "-" if rate is None else f"{rate:.1f}", str(stats[name]))
    queries = stats["prefix_cache_queries"]
    share = stats["prefix_cache_hits"] / queries if queries else 0.0
    table.add_row("prompt tokens found cached", "", f"{100 * share:.0f} %")
    return table


def _latencies(stats: Mapping[str, Any]) -> Table:
    table = plain_table("latency, since start", "p50", "p90", "p99")
    for title, name in _LATENCIES:
        summary = stats[name]
        cells = (
            [format_seconds(summary[p]) for p in ("p50", "p90", "p99")] if summary["count"] else []
        )
        table.add_row(title, *(cells or ["-"] * 3))
    return table


def plain_table(*columns: str) -> Table:
    """A table without lines, whose columns but the first are to the right if they have a name."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(columns[0], min_width=6)
    for column in columns[1:]:
        table.add_column(column, justify="left" if column == "" else "right")
    return table
