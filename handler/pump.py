"""The books of the pump: which requests are open, what each has gained, and how each is answered.

TorchServe's frontend calls again and again with every request in flight; each call is an
*exchange*: new requests are admitted, those whose client has left are aborted, and what the others
have gained since the last call is handed over. The engine runs on its own meanwhile.

Owns admission (routes, the bound of the queue) and the state of each open request. Knows nothing
of ``ts``, of processes, or of the shapes of bodies. An exchange and the watch for silence may come
from two threads.

The status of a response leaves with its first piece. So every new request is answered in the
exchange that brings it: an error, or anything known at once, as a complete reply; an accepted
request by an opening piece (which also keeps the frontend from sending its body again). Only
statistics are left without a first piece until the engine has told them.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from pagetier.handler.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    NotFound,
    QueueFull,
)
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.openai_responses import Response, error_body, error_event
from pagetier.handler.openai_schemas import parse_json
from pagetier.handler.request import AddRequest, RequestOutput, StatsReply
from pagetier.handler.request_log import RequestLog

logger = logging.getLogger(__name__)

# How long an exchange may wait for something to happen, while new requests wait to be seen.
WAIT_SECONDS = 0.02
# With requests open, the frontend calls again at once; if it does not, their clients have left.
# Counted in ticks and not in seconds: on a machine that is short of processor time, the ticks come
# as late as the frontend does. It also needs time for each request that it carries.
TICK_SECONDS = 0.1
MAX_QUIET_TICKS = 8
REQUESTS_PER_QUIET_TICK = 20
STATS_SECONDS = 5.0
# The frontend looks whether a client has left only when it has a piece for it. So those that have
# gained nothing get an empty piece from time to time, of which no byte reaches the client.
TOUCH_SECONDS = 0.25

JSON = "application/json"
EVENT_STREAM = "text/event-stream"


class Engine(Protocol):
    """What the pump needs of ``EngineClient``."""

    def add(self, request: AddRequest) -> None:
        """Queue a request; raises ``EngineDead``."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these requests."""
        ...

    def request_stats(self, *, include_trace: bool = False) -> None:
        """Ask for a ``StatsReply``; raises ``EngineDead``."""
        ...


class Incoming(NamedTuple):
    """A new request as it came: ``body`` is parsed JSON, text, raw bytes, or None."""

    route: str
    body: Any
    content_type: str = ""


@dataclasses.dataclass(slots=True)
class Reply:
    """What to send for the request at ``index`` of an exchange.

    ``last``: True ends a response that was opened before, False leaves it open, None says that
    this is a whole response. ``status``, ``content_type`` and ``headers`` count in the first reply
    to a request only.
    """

    index: int
    body: bytes
    last: bool | None
    status: int = 200
    content_type: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Inbox:
    """Where the engine's messages wait for the next exchange."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: list[list[RequestOutput] | StatsReply] = []
        self._death: str | None = None

    def put(self, message: list[RequestOutput] | StatsReply) -> None:
        """Leave a message."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def put_death(self, reason: str) -> None:
        """Say that the engine is dead; no more messages come."""
        with self._changed:
            self._death = reason
            self._changed.notify_all()

    @property
    def death(self) -> str | None:
        """Why the engine is dead, or None."""
        return self._death

    def take(self, wait_seconds: float) -> list[list[RequestOutput] | StatsReply]:
        """All messages there are; if there are none, wait for one, but not for long."""
        with self._changed:
            if not self._messages and wait_seconds > 0.0 and self._death is None:
                self._changed.wait(wait_seconds)
            messages, self._messages = self._messages, []
            return messages


@dataclasses.dataclass(slots=True, eq=False)
class _Open:
    """A request between its opening and its last reply."""

    request_id: str
    response: Response
    has_output: bool = False
    error: EngineError | None = None
    left_open: bool = False


class _Asked(NamedTuple):
    """A request for statistics that the engine has not answered yet."""

    with_trace: bool
    deadline: float


class Pump:
    """Exchanges requests for replies.

    Attributes:
        num_open: requests that are open.
    """

    def __init__(
        self,
        engine: Engine,
        api: OpenAIApi,
        inbox: Inbox,
        *,
        max_num_queued_reqs: int,
        log: RequestLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve ``api`` from ``engine``, whose messages come to ``inbox``.

        Args:
            engine: takes requests.
            api: parses and formats them.
            inbox: brings what comes of them.
            max_num_queued_reqs: so many may wait for their first token; more are refused.
            log: is told when requests begin and end.
            clock: seconds that never go back.
        """
        self._engine = engine
        self._log = log or RequestLog(clock)
        self._api = api
        self._inbox = inbox
        self._max_waiting = max_num_queued_reqs
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._asked: dict[str, _Asked] = {}
        # Those that have something to be told, in the order in which they got it.
        self._ready: dict[str, _Open] = {}
        self._num_waiting = 0
        self._num_quiet_ticks = 0
        self._last_touch = clock()
        self._routes: dict[str, Callable[[str, Any], Response]] = {
            "v1/completions": api.completion,
            "v1/chat/completions": api.chat,
            "": api.prediction,
        }

    @property
    def num_open(self) -> int:
        """Requests that are open."""
        return len(self._open)

    @property
    def num_untold(self) -> int:
        """Open requests that have yet to be told how they end."""
        return sum(not request.left_open for request in list(self._open.values()))

    def exchange(self, ids: Sequence[str], fetch: Callable[[int], Incoming]) -> list[Reply]:
        """One call of the frontend.

        Args:
            ids: of all requests in flight.
            fetch: the request at an index; called once for each new one.

        Returns:
            Replies, one at most for each index. Requests without one stay open.
        """
        with self._lock:
            index_of = {request_id: index for index, request_id in enumerate(ids)}
            self._drop_unless(index_of)
            new = [r for r in ids if r not in self._open and r not in self._asked]
            may_wait = not new and not self._ready
            replies: list[Reply | None] = []
            for message in self._inbox.take(WAIT_SECONDS if may_wait else 0.0):
                if isinstance(message, StatsReply):
                    replies.append(self._stats_reply(message, index_of))
                else:
                    self._take(message)
            replies += [self._reply(request, index_of[r]) for r, request in self._ready.items()]
            self._ready.clear()
            if self._clock() - self._last_touch >= TOUCH_SECONDS:
                self._last_touch = self._clock()
                replies += self._touches(index_of, {r.index for r in replies if r is not None})
            if self._asked:
                replies += self._late_stats_replies(index_of)
            # New ones come last: their opening piece must go out before anything they gain.
            replies += [self._admit(r, index_of[r], fetch) for r in new]
            self._num_quiet_ticks = 0
            return [r for r in replies if r is not None]

    def tick(self) -> None:
        """Abort all that is open if the frontend has stopped calling.

        To be called every ``TICK_SECONDS``.
        """
        if not self._lock.acquire(blocking=False):
            return  # an exchange is going on
        try:
            self._num_quiet_ticks += 1
            going = [r for r in self._open.values() if r.error is None]
            patience = MAX_QUIET_TICKS + len(going) // REQUESTS_PER_QUIET_TICK
            if not going or self._num_quiet_ticks <= patience:
                return
            logger.info("the frontend is silent: aborting %d open requests", len(going))
            self._abort([r.request_id for r in going], "abort")
            # Should it call for them again after all, they are told.
            for request in going:
                request.error = EngineError("The server was interrupted; send this again.")
                self._ready[request.request_id] = request
        finally:
            self._lock.release()

    def describe(self) -> bytes:
        """A body for the frontend's description of the model."""
        return msgspec.json.encode(
            {
                "model": self._api.model_name,
                "max_model_len": self._api.max_model_len,
                "num_requests_open": self.num_open,
            }
        )

    # --- requests come and go ----------------------------------------------------------------

    def _admit(self, request_id: str, index: int, fetch: Callable[[int], Incoming]) -> Reply | None:
        try:
            return self._route(request_id, index, fetch(index))
        except EngineError as exc:
            logger.info("request %s refused: %s", request_id, type(exc).__name__)
            return _refusal(index, exc)
        except Exception:
            # Raised from here, it would fail every request in flight.
            logger.exception("request %s broke while it was admitted", request_id)
            return _refusal(index, _own_fault())

    def _route(self, request_id: str, index: int, incoming: Incoming) -> Reply | None:
        route = incoming.route.strip("/")
        if route == "health":
            self._check_engine()
            return Reply(index, b'{"status":"ok"}', None, content_type=JSON)
        if route == "v1/models":
            return Reply(index, self._api.models(), None, content_type=JSON)
        if route.startswith("v1/models/"):
            body = self._api.model(route.removeprefix("v1/models/"))
            return Reply(index, body, None, content_type=JSON)
        if route in ("stats", "stats/trace"):
            with_trace = route == "stats/trace"
            self._engine.request_stats(include_trace=with_trace)
            self._asked[request_id] = _Asked(with_trace, self._clock() + STATS_SECONDS)
            return None
        if route not in self._routes:
            raise NotFound(
                f"Unknown route {route[:100]!r}; there are v1/completions, v1/chat/completions, "
                "v1/models, stats, stats/trace and health."
            )
        self._check_engine()
        if self._num_waiting >= self._max_waiting:
            raise QueueFull(
                f"{self._num_waiting} requests are waiting, as many as may; try again in a moment."
            )
        response = self._routes[route](request_id, _body(incoming, is_plain=not route))
        self._log.started(response.request)
        self._engine.add(response.request)
        self._open[request_id] = _Open(request_id, response)
        self._num_waiting += 1
        content_type = EVENT_STREAM if response.stream else JSON
        opening = response.opening() if response.stream else b""
        return Reply(index, opening, False, content_type=content_type)

    def _check_engine(self) -> None:
        if self._inbox.death is not None:
            raise EngineDead(f"{self._inbox.death} Try again in a moment.")

    def _drop_unless(self, ids: Mapping[str, int]) -> None:
        """Forget requests that are not among ``ids``: their clients have left."""
        for request_id in [r for r in self._asked if r not in ids]:
            del self._asked[request_id]
        gone = [r for r in self._open if r not in ids]
        if gone:
            logger.info("aborting %d requests whose clients have left", len(gone))
            for request_id in gone:
                self._forget(request_id)
            self._abort(gone, "abort")

    def _forget(self, request_id: str) -> None:
        request = self._open.pop(request_id)
        self._ready.pop(request_id, None)
        if not request.has_output:
            self._num_waiting -= 1

    def _abort(self, request_ids: list[str], reason: str) -> None:
        self._log.ended(request_ids, reason)
        self._engine.abort(request_ids)

    # --- what the engine says ----------------------------------------------------------------

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None or request.error is not None:
                continue
            if not request.has_output:
                request.has_output = True
                self._num_waiting -= 1
            self._ready[output.request_id] = request
            if output.finish_reason == "error":
                request.error = _error(output)
                continue
            try:
                if request.response.add(output):
                    self._abort([output.request_id], "stop")
            except Exception:
                logger.exception("request %s broke while it was answered", output.request_id)
                self._abort([output.request_id], "error")
                request.error = _own_fault()

    # --- replies -----------------------------------------------------------------------------

    def _reply(self, request: _Open, index: int) -> Reply | None:
        try:
            return self._tell(request, index)
        except Exception:
            logger.exception("request %s broke while it was answered", request.request_id)
            self._abort([request.request_id], "error")
            self._open.pop(request.request_id, None)
            as_end = error_event if request.response.stream else error_body
            return Reply(index, as_end(_own_fault()), True)

    def _tell(self, request: _Open, index: int) -> Reply | None:
        response = request.response
        if request.error is not None:
            # Too late for a status: it left with the opening piece. A client that awaits a whole
            # response would take any body for a good one. So if the worker is about to end anyway,
            # leave it to the frontend to break the connection: that is an error to every client.
            if isinstance(request.error, EngineDead) and not response.stream:
                request.left_open = True
                return None
            del self._open[request.request_id]
            if not request.has_output:
                self._num_waiting -= 1
            error = request.error
            body = response.error_events(error) if response.stream else error_body(error)
            return Reply(index, body, True)
        if response.finished:
            del self._open[request.request_id]
            body = response.take_events() if response.stream else response.whole()
            return Reply(index, body, True)
        events = response.take_events() if response.stream else b""
        return Reply(index, events, False) if events else None

    def _touches(self, index_of: Mapping[str, int], replied: set[int]) -> list[Reply | None]:
        """Empty pieces for those that get none otherwise."""
        return [
            Reply(index_of[r], b"", False)
            for r, request in self._open.items()
            if index_of[r] not in replied and not request.left_open
        ]

    def _stats_reply(self, reply: StatsReply, index_of: Mapping[str, int]) -> Reply | None:
        with_trace = reply.trace is not None
        asking = [r for r, asked in self._asked.items() if asked.with_trace == with_trace]
        if not asking:
            return None  # who asked has left
        request_id = asking[0]
        del self._asked[request_id]
        body: dict[str, Any] = {
            **reply.stats,
            **self._log.stats(),
            "num_requests_open": self.num_open,
        }
        if with_trace:
            body["trace"] = reply.trace
        return Reply(index_of[request_id], msgspec.json.encode(body), None, content_type=JSON)

    def _late_stats_replies(self, index_of: Mapping[str, int]) -> list[Reply | None]:
        now, dead = self._clock(), self._inbox.death is not None
        late = [r for r, asked in self._asked.items() if dead or now > asked.deadline]
        for request_id in late:
            del self._asked[request_id]
        error = EngineDead("The engine does not answer; try again in a moment.")
        return [_refusal(index_of[request_id], error) for request_id in late]


def _refusal(index: int, error: EngineError) -> Reply:
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    return Reply(index, error_body(error), None, error.status, JSON, headers)


def _own_fault() -> EngineError:
    return EngineError("An error of the server's own; see its log.")


def _error(output: RequestOutput) -> EngineError:
    """The exception that the engine's report stands for."""
    message = output.error or "The request failed."
    if output.error_status == QueueFull.status:
        return QueueFull(message, retry_after=output.retry_after or 1)
    kinds: tuple[type[EngineError], ...] = (InvalidRequest, DeadlineExceeded, EngineDead)
    for kind in kinds:
        if output.error_status == kind.status:
            return kind(message)
    return EngineError(message)


def _body(incoming: Incoming, *, is_plain: bool) -> Any:
    """The body as parsed JSON, or, on the plain route, perhaps as text."""
    body = incoming.body
    if body is None:
        raise InvalidRequest(
            "The request has no body that can be read; send JSON with the header "
            "'Content-Type: application/json'."
        )
    if not isinstance(body, bytes | bytearray | str):
        return body
    if is_plain and not incoming.content_type.startswith(JSON):
        try:
            return body if isinstance(body, str) else bytes(body).decode()
        except UnicodeDecodeError:
            raise InvalidRequest("The body is neither JSON nor UTF-8 text.") from None
    return parse_json(body if isinstance(body, str) else bytes(body))
