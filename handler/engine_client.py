"""The parent's side of the engine process: starts it, talks to it, and sees it die.

Owns the process and the connection to it. Knows nothing of text or HTTP, and does not look into
what it carries, but for which requests are in flight: if the engine dies, each of them is failed
at once, so that nobody waits for a process that is gone.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_process import DEFAULT_BUILDER, LoadProgress, StartEngine
from pagetier.handler.errors import EngineDead, EngineError
from pagetier.handler.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineReady,
    FromEngine,
    GetStats,
    RequestOutput,
    Shutdown,
    StatsReply,
    StepOutputs,
    ToEngine,
)

logger = logging.getLogger(__name__)

# How long a process that was asked to end may take.
_CLOSE_SECONDS = 0.5


class EngineClient:
    """A running engine process.

    ``on_outputs``, ``on_stats`` and ``on_death`` are called from the client's own threads, one
    call at a time, and must be quick. When the engine dies, ``on_outputs`` first gets an error for
    each request in flight, then ``on_death`` its reason; neither happens after ``close``.

    Attributes:
        ready: what the engine said of itself at start.
        pid: the engine's process id.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_outputs: Callable[[list[RequestOutput]], None],
        on_stats: Callable[[StatsReply], None] | None = None,
        on_death: Callable[[str], None] | None = None,
        on_progress: Callable[[str], None] | None = None,
        builder: str = DEFAULT_BUILDER,
    ) -> None:
        """Start the process and wait until the engine can take requests.

        Args:
            config: the engine's settings.
            on_outputs: takes what came of a step.
            on_stats: takes the answers to ``request_stats``.
            on_death: takes the reason why the engine died.
            on_progress: takes lines about the start; they are logged if it is None.
            builder: ``module:function`` that builds the engine in its process.

        Raises:
            EngineError: the engine could not start; the message is its own.
        """
        self._on_outputs = on_outputs
        self._on_stats = on_stats
        self._on_death = on_death
        self._on_progress = on_progress or (lambda line: logger.info("%s", line))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine | LoadProgress)
        self._send_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._stats_lock = threading.Lock()
        self._stats_came = threading.Event()
        self._last_stats: StatsReply | None = None
        self._in_flight: dict[str, int] = {}  # outputs of each request that are still to end
        self._failure: str | None = None
        self._dead: str | None = None
        self._closed = False

        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagetier.handler.engine_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Else a folder named like one of our dependencies would be imported from here.
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
            self._connection = Connection(ours.detach())
        self.pid = self._process.pid
        try:
            self._send(StartEngine(config, builder))
            self.ready = self._wait_until_ready()
        except BaseException:
            self._kill()
            raise
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()
        self._waiter = threading.Thread(target=self._wait, name="engine-waiter", daemon=True)
        self._waiter.start()

    @property
    def alive(self) -> bool:
        """Whether the engine can take requests."""
        return self._dead is None and not self._closed

    def add(self, request: AddRequest) -> None:
        """Hand a request to the engine; what comes of it arrives at ``on_outputs``.

        Raises:
            EngineDead: the engine is gone.
        """
        with self._state_lock:
            self._check_alive()
            self._in_flight[request.request_id] = request.params.n
        # If the engine dies from here on, the request is failed with all others in flight.
        with contextlib.suppress(OSError):
            self._send(request)

    def abort(self, request_ids: Iterable[str], outputs: Iterable[tuple[str, int]] = ()) -> None:
        """Stop these requests; nothing more is reported of them. Unknown ids are fine.

        ``outputs`` stops single ones of their outputs: pairs of a request id and an index. What is
        under way of such an output may still be reported.
        """
        with self._state_lock:
            ids = [r for r in request_ids if self._in_flight.pop(r, None) is not None]
            single = [(r, index) for r, index in outputs if r in self._in_flight]
            for request_id, _ in single:
                self._count_ended(request_id)
        if (ids or single) and self.alive:
            with contextlib.suppress(OSError):
                self._send(AbortRequests(ids, single))

    def request_stats(self, *, include_trace: bool = False) -> None:
        """Ask for statistics, which arrive at ``on_stats``.

        Raises:
            EngineDead: the engine is gone.
        """
        with self._state_lock:
            self._check_alive()
        with contextlib.suppress(OSError):
            self._send(GetStats(include_trace))

    def stats(self, timeout: float = 5.0, *, include_trace: bool = False) -> StatsReply:
        """Ask for statistics and wait for them, ``timeout`` seconds at most.

        Raises:
            EngineDead: the engine is gone, or does not answer in time.
        """
        with self._stats_lock:
            self._stats_came.clear()
            self._last_stats = None
            self.request_stats(include_trace=include_trace)
            came = self._stats_came.wait(timeout)
            with self._state_lock:
                self._check_alive()
            if not came or self._last_stats is None:
                raise EngineDead(f"The engine did not answer within {timeout:g} s; try again.")
            return self._last_stats

    def close(self) -> None:
        """End the process, by force if it takes longer than half a second."""
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
        # Sending must not block on a process that does not listen.
        with contextlib.suppress(OSError):
            os.set_blocking(self._connection.fileno(), False)
        if self._send_lock.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._connection.send_bytes(self._encoder.encode(Shutdown()))
            except OSError:
                pass  # dead, or deaf
            finally:
                self._send_lock.release()
        self._waiter.join(_CLOSE_SECONDS)
        self._process.kill()
        self._reader.join(_CLOSE_SECONDS)
        self._kill()

    # --- the rest is private -----------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if self._closed:
            raise EngineDead("The engine was closed.")

    def _send(self, message: ToEngine | StartEngine) -> None:
        data = self._encoder.encode(message)
        with self._send_lock:
            self._connection.send_bytes(data)

    def _receive(self) -> Any:
        return self._decoder.decode(self._connection.recv_bytes())

    def _wait_until_ready(self) -> EngineReady:
        while True:
            try:
                message = self._receive()
            except (EOFError, OSError):
                raise EngineError(
                    f"The engine process {self._how_it_ended()} while starting; its log is above."
                ) from None
            if isinstance(message, EngineReady):
                return message
            if isinstance(message, EngineFailed):
                raise EngineError(message.message)
            assert isinstance(message, LoadProgress), type(message)
            self._on_progress(message.message)

    def _read(self) -> None:
        """Hand on what the engine sends, until it is gone."""
        while True:
            try:
                message = self._receive()
            except (EOFError, OSError):
                break
            if self._closed:
                break
            if isinstance(message, StepOutputs):
                self._hand_on(message.outputs)
            elif isinstance(message, StatsReply):
                self._last_stats = message
                self._stats_came.set()
                if self._on_stats is not None:
                    self._on_stats(message)
            elif isinstance(message, EngineFailed):
                self._failure = message.message
        # An engine that has closed its socket is of no use, whatever it does now.
        if not self._closed:
            self._process.kill()

    def _hand_on(self, outputs: list[RequestOutput]) -> None:
        with self._state_lock:
            # A request that was just aborted may still be reported of.
            outputs = [o for o in outputs if o.request_id in self._in_flight]
            for output in outputs:
                if output.finish_reason == "error":
                    self._in_flight.pop(output.request_id, None)
                elif output.finish_reason is not None:
                    self._count_ended(output.request_id)
        if outputs:
            self._on_outputs(outputs)

    def _count_ended(self, request_id: str) -> None:
        """One more output of the request has ended; after the last one it is forgotten."""
        num_left = self._in_flight.get(request_id, 0) - 1
        if num_left > 0:
            self._in_flight[request_id] = num_left
        else:
            self._in_flight.pop(request_id, None)

    def _wait(self) -> None:
        """Wait for the end of the process, then fail what is in flight."""
        ended = self._how_it_ended()
        # What it sent before it died is still to be read.
        self._reader.join(_CLOSE_SECONDS)
        with self._state_lock:
            if self._closed:
                return
            reason = self._failure or f"The engine process {ended}."
            self._dead = reason
            lost = [
                RequestOutput(
                    request_id,
                    [],
                    finish_reason="error",
                    error=f"{reason} Try again in a moment.",
                    error_status=EngineDead.status,
                )
                for request_id in sorted(self._in_flight)
            ]
            self._in_flight.clear()
        logger.error("engine process %d is dead: %s", self.pid, reason)
        self._stats_came.set()
        if lost:
            self._on_outputs(lost)
        if self._on_death is not None:
            self._on_death(reason)

    def _how_it_ended(self) -> str:
        """Wait for the process's end and say how it came about."""
        code = self._process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
