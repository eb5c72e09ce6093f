"""The engine's own process: a loop around an ``EngineCore``, fed through a connection.

Owns the process's life: it is started by ``EngineClient`` as ``python -m
pagetier.handler.engine_process FD``, builds the core, steps it while it has work, sleeps while it
has none, and ends at once when its parent does. Knows nothing of models, text or HTTP.

Every message is one msgpack frame on a socket whose other end only the parent holds. A thread of
its own reads it, also while a model is loaded or a long step runs: the end of the file then means
that the parent is gone, and the process ends there and then.
"""

import importlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import msgspec

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import EngineError, QueueFull
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

DEFAULT_BUILDER = "pagetier.handler.engine_builder:build_serving_engine"


class StartEngine(msgspec.Struct, frozen=True, tag=True):
    """The first message to the process: what to build, and ``module:function`` that builds it."""

    config: EngineConfig
    builder: str = DEFAULT_BUILDER


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """A line about how far the start has come, for people."""

    message: str


class Core(Protocol):
    """What the process needs of an engine; ``EngineCore`` is one, tests have others."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    info: dict[str, Any]

    def add_request(self, request: AddRequest) -> None:
        """Queue a request; raises an ``EngineError`` if it is refused."""
        ...

    def abort(self, request_ids: list[str], outputs: Iterable[tuple[str, int]] = ()) -> None:
        """Stop these requests, and these single outputs; unknown ones are fine."""
        ...

    def step(self) -> list[RequestOutput]:
        """Do one step's worth of work and say what came of it."""
        ...

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        ...

    def stats(self) -> dict[str, Any]:
        """Gauges and totals."""
        ...

    def trace(self) -> list[dict[str, Any]]:
        """Recorded decisions."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class EngineLoop:
    """Steps ``core`` and carries messages: requests in, one message of outputs a step out."""

    def __init__(
        self,
        core: Core,
        inbox: "queue.SimpleQueue[ToEngine]",
        send: Callable[[FromEngine], None],
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._send = send
        self._refused: list[RequestOutput] = []

    def run(self) -> None:
        """Work until a ``Shutdown`` comes; raises what a step raises."""
        while self._take_messages():
            outputs, self._refused = self._refused, []
            if self._core.has_work():
                outputs += self._core.step()
            if outputs:
                self._send(StepOutputs(outputs))

    def _take_messages(self) -> bool:
        """Handle all messages that have come, waiting for one if there is nothing else to do."""
        while True:
            idle = not self._refused and not self._core.has_work()
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            match message:
                case AddRequest():
                    self._add(message)
                case AbortRequests():
                    self._core.abort(message.request_ids, message.outputs)
                case GetStats():
                    trace = self._core.trace() if message.include_trace else None
                    self._send(StatsReply(self._core.stats(), trace))
                case Shutdown():
                    return False

    def _add(self, request: AddRequest) -> None:
        try:
            self._core.add_request(request)
        except EngineError as exc:
            logger.info("request %s refused: %s", request.request_id, exc.message)
            self._refused.append(
                RequestOutput(
                    request.request_id,
                    [],
                    finish_reason="error",
                    error=exc.message,
                    error_status=exc.status,
                    retry_after=exc.retry_after if isinstance(exc, QueueFull) else None,
                )
            )


def main(fd: int) -> int:
    """Serve the parent through the socket ``fd``; returns the exit status."""
    # Processes that the engine starts must not keep the socket open after it.
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(ToEngine | StartEngine)

    def send(message: FromEngine | LoadProgress) -> None:
        connection.send_bytes(encoder.encode(message))

    try:
        start = decoder.decode(connection.recv_bytes())
    except (EOFError, OSError):
        return 1
    assert isinstance(start, StartEngine), type(start)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(
        target=_receive, args=(connection, decoder, inbox), name="receive", daemon=True
    ).start()
    try:
        core = _load_builder(start.builder)(
            start.config, lambda line: send(LoadProgress(str(line)))
        )
        send(EngineReady(core.max_model_len, core.vocab_size, core.eos_token_ids, core.info))
        EngineLoop(core, inbox, send).run()
        core.close()
    except EngineError as exc:
        logger.debug("the engine failed", exc_info=True)
        send(EngineFailed(exc.message))
        return 1
    except Exception as exc:
        logger.exception("the engine broke")
        # Clients are told this. The exception's own text, with paths perhaps, is in the log only.
        send(EngineFailed(f"The engine broke ({type(exc).__name__}); its log says how."))
        return 1
    return 0


def _load_builder(name: str) -> Callable[[EngineConfig, Callable[[str], None]], Core]:
    module, _, function = name.partition(":")
    builder: Callable[[EngineConfig, Callable[[str], None]], Core]
    builder = getattr(importlib.import_module(module), function)
    return builder


def _receive(
    connection: Connection,
    decoder: "msgspec.msgpack.Decoder[Any]",
    inbox: "queue.SimpleQueue[ToEngine]",
) -> None:
    while True:
        try:
            message = decoder.decode(connection.recv_bytes())
        except (EOFError, OSError):
            # Nobody is left to work for, and a step or a load that runs now may take long.
            os._exit(1)
        inbox.put(message)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
    status = main(int(sys.argv[1]))
    # The receiving thread never ends by itself, and device libraries are slow to leave.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
