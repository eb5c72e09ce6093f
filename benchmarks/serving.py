"""A TorchServe to measure, and a load for it: streams, all at once or by Poisson arrivals.

Owns the served archive and the client. The client is open-loop: a request is sent when its time
has come, whether or not others have been answered. It looks at what arrives only after the end, so
that on a small machine it takes little from the server.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import select
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any

from benchmarks import tables
from benchmarks.workloads import Request
from pagetier.handler.archive import create_archive
from pagetier.handler.torchserve import TorchServe

_NAME = "bench"
_READY_TIMEOUT_S = 300.0
_RUN_TIMEOUT_S = 300.0
_HERE = pathlib.Path(__file__).resolve().parent
_NULL_HANDLER = """
from pagetier.handler.service import PagetierHandler as _Base


class PagetierHandler(_Base):
    engine_builder = "benchmarks.null_engine:build"
"""
_LAST_CHUNK = b"0\r\n\r\n"
_PIECE_BYTES = 1 << 16
_NUM_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclasses.dataclass(frozen=True)
class Load:
    """What came of a load.

    Attributes:
        seconds: from the first request's time to the end of the last answer.
        num_tokens: generated in all, as the answers themselves say.
        first_ms: from each request's time to its first text.
        gaps_ms: between texts of a stream; one piece may carry several tokens.
    """

    seconds: float
    num_tokens: int
    first_ms: list[float]
    gaps_ms: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Over all streams."""
        return self.num_tokens / self.seconds

    def latencies(self) -> dict[str, float | None]:
        """Percentiles for a table."""
        figures: dict[str, float | None] = {}
        for name, values in (("first text", self.first_ms), ("gap", self.gaps_ms)):
            for share in (0.5, 0.9, 0.99):
                value = tables.percentile(values, share) if values else None
                figures[f"{name} {100 * share:.0f} %, ms"] = value
        return figures


@contextlib.contextmanager
def server(
    model: pathlib.Path, settings: dict[str, Any], *, null_engine: bool = False
) -> Iterator[TorchServe]:
    """Serve a model of random weights, or an engine that computes nothing, under a free port."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        served = folder / "model"
        shutil.copytree(model, served)
        _write_tokenizer(served)
        archive = create_archive(
            str(served), folder / f"{_NAME}.mar", settings={**settings, "load_format": "dummy"}
        )
        if null_engine:
            _replace_handler(archive)
            # The engine's process finds this package here, without the rest of the repository.
            (folder / "path").mkdir()
            (folder / "path" / "benchmarks").symlink_to(_HERE)
            stack.enter_context(_environment("PYTHONPATH", str(folder / "path")))
        running = stack.enter_context(TorchServe([archive], port=_free_port()))
        running.wait_ready(_READY_TIMEOUT_S)
        yield running


def _write_tokenizer(folder: pathlib.Path) -> None:
    """A byte-level tokenizer with a text for every id, which random weights will all generate."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for index in range(len(vocabulary), vocab_size):
        letters = "".join(chr(ord("a") + index // 26**place % 26) for place in range(4))
        vocabulary[f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}{letters}"] = index
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _replace_handler(archive: pathlib.Path) -> None:
    """Put the engine that computes nothing into an archive."""
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist() if not name.endswith("/")}
    members["pagetier_handler.py"] = _NULL_HANDLER.encode()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _free_port() -> int:
    """The first of five free neighbouring ports."""
    for first in range(9180, 9980, 10):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 5):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no five free ports in a row from 9180 to 9980")


def run(
    server: TorchServe, requests: list[Request], *, requests_per_second: float | None = None
) -> Load:
    """Stream all requests and wait for the last answer.

    Args:
        server: a running server of ``server``.
        requests: each generates exactly ``num_new`` tokens.
        requests_per_second: the rate of a Poisson process of arrivals; None sends all at once.

    Raises:
        RuntimeError: an answer is an error or incomplete.
    """
    delays = [0.0] * len(requests)
    if requests_per_second is not None:
        rng = random.Random(len(requests))
        for index in range(1, len(requests)):
            delays[index] = delays[index - 1] + rng.expovariate(requests_per_second)
    streams = [
        _Stream(server, request, delay) for request, delay in zip(requests, delays, strict=True)
    ]
    start = _stream_all(streams)
    num_tokens, first_ms, gaps_ms, last = 0, [], [], start
    for request, delay, stream in zip(requests, delays, streams, strict=True):
        body = b"".join(data for _, data in stream.pieces)
        found = _NUM_TOKENS.findall(body)
        if not found or int(found[-1]) != request.num_new:
            raise RuntimeError(
                f"An answer of {request.num_new} tokens was incomplete or an error; it ended with "
                f"{body[-400:]!r}."
            )
        num_tokens += request.num_new
        times = [when for when, data in stream.pieces if b'"text"' in data]
        first_ms.append((times[0] - start - delay) * 1e3)
        gaps_ms += [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
        last = max(last, stream.pieces[-1][0])
    return Load(last - start, num_tokens, first_ms, gaps_ms)


class _Stream:
    """A request to be sent after ``delay`` seconds; what arrives for it, with the times."""

    def __init__(self, server: TorchServe, request: Request, delay: float) -> None:
        body = json.dumps({
            "model": _NAME,
            "prompt": request.prompt,
            "max_tokens": request.num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        base = server.openai_base_url(_NAME)
        host, path = base.removeprefix("http://").split("/", 1)
        head = (
            f"POST /{path}/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Authorization: Bearer {server.inference_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.delay = delay
        self.pieces: list[tuple[float, bytes]] = []
        self._message = head.encode() + body
        address, _, port = host.partition(":")
        self._address = (address, int(port))

    def open(self) -> socket.socket:
        """Connect and send the request; on one machine neither waits for long."""
        connection = socket.create_connection(self._address, timeout=_RUN_TIMEOUT_S)
        connection.sendall(self._message)
        return connection


def _stream_all(streams: list[_Stream]) -> float:
    """Send each request in its time and take what arrives; returns when the first delay began.

    One loop around ``epoll``: with hundreds of streams, asyncio would take as much of a small
    machine as the server.
    """
    coming = sorted(streams, key=lambda stream: stream.delay, reverse=True)
    going: dict[int, tuple[socket.socket, _Stream]] = {}
    start = time.perf_counter()
    with select.epoll() as poll:
        while coming or going:
            now = time.perf_counter()
            while coming and start + coming[-1].delay <= now:
                stream = coming.pop()
                connection = stream.open()
                going[connection.fileno()] = (connection, stream)
                poll.register(connection, select.EPOLLIN)
            wait = start + coming[-1].delay - now if coming else _RUN_TIMEOUT_S
            events = poll.poll(wait)
            if not events and not coming:
                raise RuntimeError(f"{len(going)} streams stood still for {_RUN_TIMEOUT_S:.0f} s.")
            now = time.perf_counter()
            for number, _ in events:
                connection, stream = going[number]
                data = connection.recv(_PIECE_BYTES)
                if data:
                    stream.pieces.append((now, data))
                if not data or data.endswith(_LAST_CHUNK):
                    poll.unregister(number)
                    del going[number]
                    connection.close()
    return start
