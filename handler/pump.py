"""The books of the pump: which requests are open, what each has gained, and how each is answered.

TorchServe's frontend calls again and again with every request in flight; each call is an
*exchange*: new requests are admitted, those whose client has left are aborted, and what the others
have gained since the last call is handed over. The engine runs on its own meanwhile.

Owns admission (routes, the bound of the queue) and the state of each open request. What an exchange
carries is in ``exchange``. Knows nothing of ``ts``, of processes, or of the shapes of bodies. An
exchange and the watch for silence may come from two threads.

The status of a response leaves with its first piece. So every new request is answered in the
exchange that brings it: an error, or anything known at once, as a complete reply; an accepted
request by an opening piece (which also keeps the frontend from sending its body again). Without a
first piece are left, until it is known what to say:

- statistics and drains;
- bodies so large that a thread of their own reads them, while the others' tokens go on;
- requests with a grammar, until the engine has compiled it;
- requests with a timeout of their own, which is answered with a status if it passes before their
  first piece.
"""

import dataclasses
import heapq
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import msgspec

from pagetier.handler.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    EngineError,
    InvalidRequest,
    NotFound,
    QueueFull,
)
from pagetier.handler.exchange import (
    CLIENT_ID_HEADER,
    EVENT_STREAM,
    JSON,
    Inbox,
    Incoming,
    Reply,
    body_of,
    json_reply,
    num_characters,
    own_fault,
    refusal,
)
from pagetier.handler.messages import AddRequest, RequestOutput, StatsReply
from pagetier.handler.openai_api import OpenAIApi, is_client_id
from pagetier.handler.openai_responses import Response, error_body, error_event
from pagetier.handler.openai_schemas import DrainBody, read_body
from pagetier.handler.request_log import RequestLog

logger = logging.getLogger(__name__)

# How long an exchange may wait for something to happen, while new requests wait to be seen.
WAIT_SECONDS = 0.02
# With requests open, the frontend calls again at once; if it does not, their clients have left.
# Counted in ticks and not in seconds: on a machine that is short of processor time, the ticks come
# as late as the frontend does. It also needs time for each request that it carries. Together with
# the time between touches it must leave some of the second in which blocks are to be free again.
TICK_SECONDS = 0.1
MAX_QUIET_TICKS = 4
REQUESTS_PER_QUIET_TICK = 100
STATS_SECONDS = 5.0
# The frontend looks whether a client has left only when it has a piece for it. So those that have
# gained nothing get an empty piece from time to time, of which no byte reaches the client.
TOUCH_SECONDS = 0.2

# A body with more text or token ids than this takes more than some milliseconds to read.
LARGE_BODY_CHARACTERS = 16384


class Engine(Protocol):
    """What the pump needs of ``EngineClient``."""

    def add(self, request: AddRequest) -> None:
        """Queue a request; raises ``EngineDead``."""
        ...

    def abort(self, request_ids: Sequence[str], outputs: Sequence[tuple[str, int]] = ()) -> None:
        """Stop these requests, and single ``outputs``: pairs of a request id and an index."""
        ...

    def request_stats(self, *, include_trace: bool = False) -> None:
        """Ask for a ``StatsReply``; raises ``EngineDead``."""
        ...


@dataclasses.dataclass(slots=True, eq=False)
class _Open:
    """A request between its arrival and its last reply.

    ``has_head``: its first piece, and with it its status, has left. ``is_accepted``: the engine has
    taken its grammar, so that the first piece may leave. ``left_open``: it is left for the frontend
    to break off.
    """

    request_id: str
    response: Response
    has_head: bool
    is_accepted: bool = False
    deadline: float | None = None
    error: EngineError | None = None
    left_open: bool = False

    @property
    def engine_ids(self) -> list[str]:
        """Names of its requests to the engine."""
        return [request.request_id for request in self.response.requests]

    @property
    def client_id(self) -> str:
        """What its client calls it; empty if it does not."""
        response_id = self.response.response_id
        return "" if response_id == self.request_id else response_id

    @property
    def headers(self) -> dict[str, str]:
        """Headers of its response."""
        return {CLIENT_ID_HEADER: self.client_id} if self.client_id else {}


class _Reading(NamedTuple):
    """A large body that is being read: to its response, or to all of the answer."""

    result: "Future[Response | bytes]"
    client_id: str


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
        max_num_queued_tokens: int | None = None,
        enable_drain: bool = True,
        log: RequestLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve ``api`` from ``engine``, whose messages come to ``inbox``.

        Args:
            engine: takes requests.
            api: parses and formats them.
            inbox: brings what comes of them.
            max_num_queued_reqs: so many may wait for their first token; more are refused.
            max_num_queued_tokens: likewise of their prompts' tokens; None for no bound.
            enable_drain: serve the routes ``drain`` and ``resume``.
            log: is told when requests begin and end.
            clock: seconds that never go back.
        """
        self._engine = engine
        self._log = log or RequestLog(clock)
        self._api = api
        self._inbox = inbox
        self._max_waiting = max_num_queued_reqs
        self._max_waiting_tokens = max_num_queued_tokens
        self._enable_drain = enable_drain
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._asked: dict[str, _Asked] = {}
        # One thread, so that those who send large bodies wait for each other and for nobody else.
        self._reader = ThreadPoolExecutor(1, "read-bodies")
        self._reading: dict[str, _Reading] = {}
        self._is_draining = False
        self._drains: dict[str, float] = {}  # deadlines of the requests that wait for the end
        # Whose an engine's request is; and the tokens of the prompts that wait for a first output.
        self._owners: dict[str, _Open] = {}
        self._waiting: dict[str, int] = {}
        self._num_waiting_tokens = 0
        self._deadlines: list[tuple[float, str]] = []  # a heap; may hold ids that are gone
        # Those that have something to be told, in the order in which they got it.
        self._ready: dict[str, _Open] = {}
        self._num_quiet_ticks = 0
        self._last_touch = clock()
        self._routes: dict[str, Callable[[str, Any, str | None], Response]] = {
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
            new = [r for r in ids if r not in self._open and not self._knows(r)]
            may_wait = not new and not self._ready
            replies: list[Reply | None] = []
            for message in self._inbox.take(WAIT_SECONDS if may_wait else 0.0):
                if isinstance(message, StatsReply):
                    replies.append(self._stats_reply(message, index_of))
                else:
                    self._take(message)
            self._expire()
            ready, self._ready = self._ready, {}
            replies += [self._reply(request, index_of[r]) for r, request in ready.items()]
            if self._clock() - self._last_touch >= TOUCH_SECONDS:
                self._last_touch = self._clock()
                replies += self._touches(index_of, {r.index for r in replies if r is not None})
            if self._asked:
                replies += self._late_stats_replies(index_of)
            if self._reading:
                replies += self._read_replies(index_of)
            # New ones come last: their opening piece must go out before anything they gain.
            replies += [self._admit(r, index_of[r], fetch) for r in new]
            if self._drains:
                replies += self._drain_replies(index_of)
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
            self._abort([i for r in going for i in r.engine_ids], "abort")
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
                "is_draining": self._is_draining,
            }
        )

    # --- requests come and go ----------------------------------------------------------------

    def _knows(self, request_id: str) -> bool:
        books = (self._open, self._reading, self._asked, self._drains)
        return any(request_id in book for book in books)

    def _admit(self, request_id: str, index: int, fetch: Callable[[int], Incoming]) -> Reply | None:
        client_id = ""
        try:
            incoming = fetch(index)
            client_id = incoming.client_id if is_client_id(incoming.client_id) else ""
            return self._route(request_id, index, incoming, client_id)
        except EngineError as exc:
            logger.info("request %s refused: %s", request_id, type(exc).__name__)
            return refusal(index, exc, client_id)
        except Exception:
            # Raised from here, it would fail every request in flight.
            logger.exception("request %s broke while it was admitted", request_id)
            return refusal(index, own_fault(), client_id)

    def _route(
        self, request_id: str, index: int, incoming: Incoming, client_id: str
    ) -> Reply | None:
        route = incoming.route.strip("/")
        if route in self._routes:
            return self._start(request_id, index, incoming, client_id)
        if route == "health":
            self._check_engine()
            return json_reply(index, {"status": "draining" if self._is_draining else "ok"})
        if route == "v1/models":
            return Reply(index, self._api.models(), None, content_type=JSON)
        if route.startswith("v1/models/"):
            body = self._api.model(route.removeprefix("v1/models/"))
            return Reply(index, body, None, content_type=JSON)
        if route in ("tokenize", "detokenize"):
            answer = self._api.tokenize if route == "tokenize" else self._api.detokenize
            body = body_of(incoming)
            return self._read(request_id, index, client_id, body, lambda: answer(body))
        if route in ("stats", "stats/trace"):
            with_trace = route == "stats/trace"
            self._engine.request_stats(include_trace=with_trace)
            self._asked[request_id] = _Asked(with_trace, self._clock() + STATS_SECONDS)
            return None
        if route == "drain" and self._enable_drain:
            self._drain(request_id, incoming)
            return None
        if route == "resume" and self._enable_drain:
            self._is_draining = False
            logger.info("requests are taken again")
            return json_reply(index, {"status": "ok"})
        raise NotFound(
            f"Unknown route {route[:100]!r}; there are v1/completions, v1/chat/completions, "
            "v1/models, tokenize, detokenize, health, stats, stats/trace, drain and resume."
        )

    def _start(
        self, request_id: str, index: int, incoming: Incoming, client_id: str
    ) -> Reply | None:
        """Read a request's body, and hand it to the engine, if there is room for it."""
        self._check_engine()
        if self._is_draining:
            raise Draining("This server takes no new requests, since it is about to be stopped.")
        # Before the work of reading it, and after, when it is known how many it makes.
        self._check_queue(1)
        route = incoming.route.strip("/")
        body = body_of(incoming, is_plain=not route)
        parse = self._routes[route]
        return self._read(
            request_id, index, client_id, body, lambda: parse(request_id, body, client_id or None)
        )

    def _read(
        self,
        request_id: str,
        index: int,
        client_id: str,
        body: Any,
        read: Callable[[], Response | bytes],
    ) -> Reply | None:
        """Call ``read``, which reads ``body``: at once, or, if it takes long, in the thread."""
        if num_characters(body) <= LARGE_BODY_CHARACTERS:
            return self._take_read(request_id, index, read())
        self._reading[request_id] = _Reading(self._reader.submit(read), client_id)
        return None

    def _read_replies(self, index_of: Mapping[str, int]) -> list[Reply | None]:
        replies = []
        for request_id in [r for r, reading in self._reading.items() if reading.result.done()]:
            reading, index = self._reading.pop(request_id), index_of[request_id]
            try:
                replies.append(self._take_read(request_id, index, reading.result.result()))
            except EngineError as exc:
                logger.info("request %s refused: %s", request_id, type(exc).__name__)
                replies.append(refusal(index, exc, reading.client_id))
            except Exception:
                logger.exception("request %s broke while it was read", request_id)
                replies.append(refusal(index, own_fault(), reading.client_id))
        return replies

    def _take_read(self, request_id: str, index: int, read: Response | bytes) -> Reply | None:
        if isinstance(read, bytes):
            return Reply(index, read, None, content_type=JSON)
        return self._accept(request_id, index, read)

    def _accept(self, request_id: str, index: int, response: Response) -> Reply | None:
        """Hand a request to the engine, if there is room for it."""
        num_tokens = [len(r.prompt_token_ids) for r in response.requests]
        self._check_queue(len(num_tokens), sum(num_tokens))
        # Whether a grammar can be followed is found by the engine; else the status would be gone.
        has_grammar = response.requests[0].params.structured_outputs is not None
        has_head = response.timeout is None and not has_grammar
        opened = _Open(request_id, response, has_head)
        for request in response.requests:
            self._log.started(request, opened.client_id)
            self._engine.add(request)
        self._open[request_id] = opened
        self._owners |= dict.fromkeys(opened.engine_ids, opened)
        self._waiting |= dict(zip(opened.engine_ids, num_tokens, strict=True))
        self._num_waiting_tokens += sum(num_tokens)
        if response.timeout is not None:
            opened.deadline = self._clock() + response.timeout
            heapq.heappush(self._deadlines, (opened.deadline, request_id))
        if not has_head:
            return None
        content_type = EVENT_STREAM if response.stream else JSON
        opening = response.opening() if response.stream else b""
        return Reply(index, opening, False, content_type=content_type, headers=opened.headers)

    def _check_queue(self, num_requests: int, num_tokens: int = 0) -> None:
        num_waiting = len(self._waiting) + len(self._reading)
        if num_waiting + num_requests > self._max_waiting:
            raise QueueFull(
                f"{num_waiting} requests are waiting, and {self._max_waiting} may; try again in a "
                "moment."
            )
        limit = self._max_waiting_tokens
        if limit is not None and num_waiting and self._num_waiting_tokens + num_tokens > limit:
            raise QueueFull(
                f"Prompts of {self._num_waiting_tokens} tokens are waiting, and {limit} may; try "
                "again in a moment."
            )

    def _check_engine(self) -> None:
        if self._inbox.death is not None:
            raise EngineDead(f"{self._inbox.death} Try again in a moment.")

    def _drop_unless(self, ids: Mapping[str, int]) -> None:
        """Forget requests that are not among ``ids``: their clients have left."""
        for request_id in [r for r in self._reading if r not in ids]:
            self._reading.pop(request_id).result.cancel()
        for told_later in (self._asked, self._drains):
            for request_id in [r for r in told_later if r not in ids]:
                del told_later[request_id]
        gone = [request for r, request in self._open.items() if r not in ids]
        if gone:
            logger.info("aborting %d requests whose clients have left", len(gone))
            for request in gone:
                self._close(request)
            self._abort([i for request in gone for i in request.engine_ids], "abort")

    def _close(self, request: _Open) -> None:
        """Forget a request."""
        self._open.pop(request.request_id, None)
        self._ready.pop(request.request_id, None)
        for engine_id in request.engine_ids:
            self._owners.pop(engine_id, None)
            self._wait_no_longer(engine_id)

    def _wait_no_longer(self, engine_id: str) -> None:
        self._num_waiting_tokens -= self._waiting.pop(engine_id, 0)

    def _abort(self, engine_ids: list[str], reason: str) -> None:
        self._log.ended(engine_ids, reason)
        self._engine.abort(engine_ids)

    def _fail(self, request: _Open, error: EngineError) -> None:
        """Stop a request; its client is told why in this exchange."""
        request.error = error
        self._ready[request.request_id] = request
        reason = "abort" if isinstance(error, DeadlineExceeded) else "error"
        self._abort(request.engine_ids, reason)

    def _expire(self) -> None:
        """Fail the requests whose own time is over."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            request = self._open.get(request_id)
            if request is None or request.error is not None or request.response.finished:
                continue
            error = DeadlineExceeded(
                f"The request's timeout of {request.response.timeout:g} s has passed; allow more "
                "time, or ask for fewer tokens.",
                param="timeout",
            )
            self._fail(request, error)

    # --- stopping in peace -------------------------------------------------------------------

    def _drain(self, request_id: str, incoming: Incoming) -> None:
        """Take no more requests; the answer comes when the last of them is gone."""
        timeout = None
        if incoming.body:
            timeout = read_body(body_of(incoming), DrainBody).timeout
        if timeout is not None and not timeout >= 0:
            raise InvalidRequest(
                f"timeout must be 0 seconds or more, not {timeout}.", param="timeout"
            )
        if not self._is_draining:
            logger.info("no more requests are taken; %d are open", self.num_open)
        self._is_draining = True
        self._drains[request_id] = float("inf") if timeout is None else self._clock() + timeout

    def _drain_replies(self, index_of: Mapping[str, int]) -> list[Reply | None]:
        replies: list[Reply | None] = []
        for request_id, deadline in list(self._drains.items()):
            index = index_of[request_id]
            if not self._is_draining:
                replies.append(json_reply(index, {"status": "resumed"}))
            elif not self._open and not self._reading:
                replies.append(json_reply(index, {"status": "drained"}))
            elif self._clock() >= deadline:
                error = DeadlineExceeded(
                    f"{self.num_open} requests are still open; no new ones are taken. Drain again "
                    "to wait longer."
                )
                replies.append(refusal(index, error))
            else:
                continue
            del self._drains[request_id]
        return replies

    # --- what the engine says ----------------------------------------------------------------

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request = self._owners.get(output.request_id)
            if request is None or request.error is not None:
                continue
            if output.is_notice:
                if request.response.timeout is None and not request.has_head:
                    request.is_accepted = True
                    self._ready[request.request_id] = request
                continue
            if output.request_id in self._waiting:
                self._wait_no_longer(output.request_id)
            self._ready[request.request_id] = request
            if output.finish_reason == "error":
                self._fail(request, _error(output))
                continue
            try:
                if request.response.add(output):
                    self._stop_output(request, output)
                if request.response.finished:
                    # Outputs that stop strings ended are not reported of again.
                    self._log.ended(request.engine_ids, "stop")
            except Exception:
                logger.exception("request %s broke while it was answered", output.request_id)
                self._fail(request, own_fault())

    def _stop_output(self, request: _Open, output: RequestOutput) -> None:
        """Of an output that a stop string has ended, the engine does not know that it has."""
        if request.response.num_choices_each == 1:
            self._abort([output.request_id], "stop")
        else:
            self._engine.abort([], [(output.request_id, output.index)])

    # --- replies -----------------------------------------------------------------------------

    def _reply(self, request: _Open, index: int) -> Reply | None:
        try:
            return self._tell(request, index)
        except Exception:
            logger.exception("request %s broke while it was answered", request.request_id)
            self._abort(request.engine_ids, "error")
            self._close(request)
            error = own_fault()
            if not request.has_head:
                return refusal(index, error)
            as_end = error_event if request.response.stream else error_body
            return Reply(index, as_end(error), True)

    def _tell(self, request: _Open, index: int) -> Reply | None:
        response = request.response
        if request.error is not None:
            return self._tell_error(request, request.error, index)
        if response.finished:
            self._close(request)
            body = response.take_events() if response.stream else response.whole()
            if request.has_head:
                return Reply(index, body, True)
            content_type = EVENT_STREAM if response.stream else JSON
            if response.stream:
                body = response.opening() + body
            return Reply(index, body, None, content_type=content_type, headers=request.headers)
        events = response.take_events() if response.stream else b""
        if request.has_head:
            return Reply(index, events, False) if events else None
        if not events and not request.is_accepted:
            return None
        request.has_head = True
        content_type = EVENT_STREAM if response.stream else JSON
        body = response.opening() + events if response.stream else b""
        return Reply(index, body, False, content_type=content_type, headers=request.headers)

    def _tell_error(self, request: _Open, error: EngineError, index: int) -> Reply | None:
        response = request.response
        if not request.has_head:
            self._close(request)
            return refusal(index, error, request.client_id)
        # Too late for a status: it left with the opening piece. A client that awaits a whole
        # response would take any body for a good one. So if the worker is about to end anyway,
        # leave it to the frontend to break the connection: that is an error to every client.
        if isinstance(error, EngineDead) and not response.stream:
            request.left_open = True
            return None
        self._close(request)
        body = response.error_events(error) if response.stream else error_body(error)
        return Reply(index, body, True)

    def _touches(self, index_of: Mapping[str, int], replied: set[int]) -> list[Reply | None]:
        """Empty pieces for those that get none otherwise."""
        return [
            Reply(index_of[r], b"", False)
            for r, request in self._open.items()
            if request.has_head and not request.left_open and index_of[r] not in replied
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
            "is_draining": self._is_draining,
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
        return [refusal(index_of[request_id], error) for request_id in late]


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
