"""What ``pagetier demo`` shows: concurrent streams through TorchServe, with too little KV memory.

Owns the demonstration: its prompts, how much memory it grants, and how the texts and figures are
shown. Everything it does goes through the archive, the server and REST, as a user's program would.
Imports no torch.
"""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pagetier.handler.archive import create_archive, local_model_folder
from pagetier.handler.client import ServedModel
from pagetier.handler.errors import EngineError, LaunchError, ModelError
from pagetier.handler.torchserve import TorchServe

PROMPTS = (
    "Return the",
    "This module provides",
    "Raise an exception if",
    "Read up to",
    "Convert a string",
    "Create a new",
    "The optional argument",
    "Write the given",
)
BLOCK_SIZE = 16
# Of the KV blocks that the requests would fill, the GPU tier gets this share; the CPU tier gets
# half as much, so that some of what is pushed out must be computed again.
_GPU_TIER_SHARE = 0.5
_CPU_TIER_SHARE = 0.25
# Tokens of the longest prompt, roughly: only the amount of memory granted depends on it.
_PROMPT_TOKENS = 8
_READY_TIMEOUT_S = 600.0


@dataclass
class Stream:
    """One request of the demonstration and what has arrived of it. Times in seconds."""

    prompt: str
    text: str = ""
    num_tokens: int = 0
    first_text_s: float | None = None
    error: str | None = None
    done: bool = False


@dataclass
class Peaks:
    """The highest use of each tier that was seen (0 to 1), and the last statistics."""

    gpu: float = 0.0
    cpu: float = 0.0
    stats: dict[str, Any] = field(default_factory=dict)

    def add(self, stats: dict[str, Any]) -> None:
        """Take one answer of the statistics route into account."""
        self.gpu = max(self.gpu, stats["kv_cache_usage_perc"])
        self.cpu = max(self.cpu, stats["cpu_cache_usage_perc"])
        self.stats = stats


def run_demo(model: str, *, num_requests: int, max_tokens: int, port: int | None = None) -> int:
    """Serve ``model``, stream ``num_requests`` completions at once, and return the exit code.

    Raises:
        EngineError: something could not be made or started.
    """
    console = Console(highlight=False)
    folder = local_model_folder(model)
    if folder is None:
        raise ModelError(f"The demonstration needs a local model folder, not '{model}'.")
    settings = demo_settings(folder, num_requests, max_tokens)
    archive = create_archive(
        str(folder), folder.parent / f"{folder.name}-demo.mar", settings=settings
    )
    num_needed = num_requests * _blocks_per_request(max_tokens)
    console.print(
        f"{num_requests} requests of {max_tokens} tokens would fill about {num_needed} KV blocks; "
        f"the GPU tier gets {settings['num_gpu_blocks_override']}. "
        "The texts run on past their ends, to fill it.",
        soft_wrap=True,
    )
    console.print("Starting TorchServe ...")
    start = time.monotonic()
    with TorchServe([archive], port=port or _free_ports()) as server:
        server.wait_ready(
            _READY_TIMEOUT_S,
            lambda line: console.print(f"  {line}", style="dim", soft_wrap=True),
        )
        console.print(f"Ready after {time.monotonic() - start:.1f} s.\n")
        streams, peaks, seconds = _stream_all(
            server, archive.stem, num_requests, max_tokens, console
        )
        _print_figures(console, streams, peaks, seconds)
        console.print("Stopping TorchServe ...")
    failed = [stream for stream in streams if stream.error is not None]
    if failed:
        raise EngineError(f"{len(failed)} of {num_requests} streams failed: {failed[0].error}")
    return 0


def demo_settings(folder: Path, num_requests: int, max_tokens: int) -> dict[str, Any]:
    """Engine settings that grant less KV memory than the requests need, but enough for any one.

    Raises:
        ModelError: ``folder`` holds no readable ``config.json``.
    """
    per_request = _blocks_per_request(max_tokens)
    num_needed = num_requests * per_request
    # One more than the longest request alone: with less, it could never run.
    num_gpu_blocks = max(per_request + 1, math.ceil(_GPU_TIER_SHARE * num_needed))
    num_cpu_blocks = max(1, math.ceil(_CPU_TIER_SHARE * num_needed))
    return {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": num_gpu_blocks,
        "swap_space": num_cpu_blocks * _block_bytes(folder) / 2**30,
        "preemption_mode": "swap",
        "max_num_seqs": max(num_requests, 8),
    }


def _blocks_per_request(max_tokens: int) -> int:
    return math.ceil((_PROMPT_TOKENS + max_tokens) / BLOCK_SIZE)


def _block_bytes(folder: Path) -> int:
    """Bytes of a float32 KV block, after the usual keys of ``config.json``."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        num_heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        return int(2 * config["num_hidden_layers"] * num_kv_heads * head_dim * 4 * BLOCK_SIZE)
    except (OSError, ValueError, KeyError):
        raise ModelError(
            f"'{folder}/config.json' cannot be read, or is not of a decoder-only model."
        ) from None


def _free_ports() -> int:
    """The first of five free neighbouring ports."""
    for first in range(8180, 9180, 10):
        try:
            for port in range(first, first + 5):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise LaunchError("No five free ports in a row were found from 8180 to 9180; use --port.")


def _stream_all(
    server: TorchServe, name: str, num_requests: int, max_tokens: int, console: Console
) -> tuple[list[Stream], Peaks, float]:
    streams = [Stream(PROMPTS[i % len(PROMPTS)]) for i in range(num_requests)]
    served = ServedModel(server.openai_base_url(name), server.inference_key)
    peaks = Peaks()
    start = time.monotonic()
    threads = []
    for index, stream in enumerate(streams):
        body = {
            "model": name,
            "prompt": stream.prompt,
            "max_tokens": max_tokens,
            "temperature": 0.6,
            "seed": index,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arguments = (stream, served, body, start)
        threads.append(threading.Thread(target=_follow, args=arguments, daemon=True))
    for thread in threads:
        thread.start()
    with _Display(console, streams) as refresh:
        while any(thread.is_alive() for thread in threads):
            peaks.add(served.stats())
            refresh()
            time.sleep(0.1)
        seconds = time.monotonic() - start
        peaks.add(served.stats())
        refresh()
    return streams, peaks, seconds


def _follow(stream: Stream, served: ServedModel, body: dict[str, Any], start: float) -> None:
    """Send one request and put into ``stream`` what arrives, as it arrives."""
    try:
        for chunk in served.stream("v1/completions", body):
            for choice in chunk["choices"]:
                if stream.first_text_s is None:
                    stream.first_text_s = time.monotonic() - start
                stream.text += choice["text"]
            if chunk.get("usage"):
                stream.num_tokens = chunk["usage"]["completion_tokens"]
        stream.done = True
    except EngineError as exc:
        stream.error = exc.message


class _Display:
    """Shows texts while they arrive: redrawn in place on a terminal, else line by line."""

    def __init__(self, console: Console, streams: Sequence[Stream]) -> None:
        self._console = console
        self._streams = streams
        self._num_shown = [0] * len(streams)  # 1: its first text was told, 2: its whole text
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Callable[[], None]:
        if self._live is not None:
            self._live.start()
            return self._redraw
        return self._print_arrived

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(_table(self._streams))

    def _redraw(self) -> None:
        assert self._live is not None
        # What is taller than the terminal cannot be redrawn: show the ends of long texts.
        num_lines = max(1, (self._console.height - 2) // len(self._streams))
        self._live.update(
            _table(self._streams, num_lines * (self._console.width - 6)), refresh=True
        )

    def _print_arrived(self) -> None:
        for index, stream in enumerate(self._streams):
            if self._num_shown[index] == 0 and stream.first_text_s is not None:
                self._num_shown[index] = 1
                print(f"[{index}] first text after {stream.first_text_s:.2f} s", flush=True)
            if self._num_shown[index] < 2 and (stream.done or stream.error is not None):
                self._num_shown[index] = 2
                print(f"[{index}] {stream.prompt}{_one_line(stream.text)}", flush=True)


def _table(streams: Sequence[Stream], max_characters: int | None = None) -> Table:
    """All prompts and texts, each cut in front to ``max_characters`` together."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    for index, stream in enumerate(streams):
        row = Text(stream.prompt, style="bold")
        text = _one_line(stream.text)
        if max_characters is not None and len(stream.prompt) + len(text) > max_characters:
            text = f" …{text[len(stream.prompt) + 2 - max_characters :]}"
        row.append(text, style="red" if stream.error else "not bold")
        table.add_row(str(index), row)
    return table


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return f" {words}" if text[:1].isspace() else words


def _print_figures(
    console: Console, streams: Sequence[Stream], peaks: Peaks, seconds: float
) -> None:
    num_tokens = sum(stream.num_tokens for stream in streams)
    console.print()
    console.print(f"{num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.0f} tokens/s")
    stats = peaks.stats
    console.print(
        f"KV blocks most in use: GPU tier {100 * peaks.gpu:.0f} % of {stats['num_gpu_blocks']}, "
        f"CPU tier {100 * peaks.cpu:.0f} % of {stats['num_cpu_blocks']}"
    )
    console.print(
        f"Preemptions: {stats['num_preemptions']}, of which {stats['num_preemptions_swap']} "
        f"swapped to the CPU tier and {stats['num_preemptions_recompute']} left to recomputation"
    )
    console.print(
        f"Copied out {stats['kv_offload_store_bytes'] / 2**20:.1f} MiB and in "
        f"{stats['kv_offload_load_bytes'] / 2**20:.1f} MiB; recomputed "
        f"{stats['num_recomputed_tokens']} tokens"
    )
