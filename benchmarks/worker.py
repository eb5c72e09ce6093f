"""One engine in a process of its own, driven by messages: ``python -m benchmarks.worker``.

Owns both ends of the connection: ``Worker`` starts the process and asks it for runs, ``main`` is
the process. Engines that are compared are all kept alive, and run one at a time. A message is one
line of JSON on a pipe of its own, so that whatever an engine prints cannot get in between.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks import engines
from benchmarks.engines import Result
from benchmarks.workloads import Request

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Start(msgspec.Struct, frozen=True):
    """What to load."""

    engine: str
    model: str
    options: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """What came of a message: a run's result, or the reason why there is none.

    Memory is that of the whole process, resident: now, and at its peak since the last message.
    """

    result: Result | None = None
    error: str | None = None
    memory_bytes: int = 0
    peak_memory_bytes: int = 0


class WorkerError(Exception):
    """An engine could not start or run; the message says why."""


class Worker:
    """A process with one engine.

    Args:
        engine: one of ``engines.NAMES``.
        model: folder of the model.
        options: of the engine.
        num_threads: of torch; 0 leaves it to torch.
        started: called with this object once the process runs, before the model is loaded.

    Attributes:
        loaded: the memory it takes with the model loaded.
        last: the last reply.

    Raises:
        WorkerError: the engine is not installed or could not start.
    """

    def __init__(
        self,
        engine: str,
        model: pathlib.Path,
        options: dict[str, Any],
        num_threads: int = 0,
        *,
        started: Callable[["Worker"], None] | None = None,
    ) -> None:
        ours, theirs = os.pipe()
        self._engine = engine
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        if num_threads:
            environment["OMP_NUM_THREADS"] = str(num_threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(theirs)],
            pass_fds=[theirs],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
        os.close(theirs)
        self._replies = os.fdopen(ours, "rb")
        if started is not None:
            started(self)
        try:
            self.loaded = self._ask(Start(engine, str(model), options))
        except BaseException:
            self.close()
            raise
        self.last = self.loaded

    def run(self, requests: list[Request]) -> Result:
        """Let the engine generate; every request got exactly the tokens it asked for.

        Raises:
            WorkerError: it did not.
        """
        self.last = self._ask(requests)
        result = self.last.result
        assert result is not None
        wrong = [
            (len(made), r.num_new)
            for made, r in zip(result.token_ids, requests, strict=True)
            if len(made) != r.num_new
        ]
        if wrong:
            raise WorkerError(
                f"{self._engine} generated {wrong[0][0]} tokens where {wrong[0][1]} were asked for."
            )
        return result

    def kill(self) -> None:
        """End the process by force, from any thread; whoever waits for it gets a WorkerError."""
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._end()
        self._replies.close()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, message: Start | list[Request]) -> Reply:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._end()  # its traceback is written after the pipe has closed
            self._log.seek(0)
            tail = self._log.read()[-2000:].decode(errors="replace")
            raise WorkerError(f"The process of {self._engine} has ended. Its last words:\n{tail}")
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error is not None:
            raise WorkerError(reply.error)
        return reply


def _memory(name: str) -> int:
    """A line of this process's status, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def main(fd: int) -> None:
    """Load the engine that the first message names, then run what the others ask for."""
    with os.fdopen(fd, "wb") as replies:

        def reply(result: Result | None = None, error: str | None = None) -> None:
            answer = Reply(result, error, _memory("VmRSS"), _memory("VmHWM"))
            replies.write(msgspec.json.encode(answer) + b"\n")
            replies.flush()
            # The peak starts again from here, where the kernel allows it.
            with contextlib.suppress(OSError):
                pathlib.Path("/proc/self/clear_refs").write_text("5")

        start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
        try:
            engine = engines.build(start.engine, pathlib.Path(start.model), start.options)
        except engines.MissingEngine as exc:
            reply(error=str(exc))
            return
        reply()
        for line in sys.stdin.buffer:
            reply(engine.run(msgspec.json.decode(line, type=list[Request])))
        engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
