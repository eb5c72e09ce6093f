"""What meets in an exchange with the frontend: new requests, the engine's messages, and replies.

Owns their shapes, how a body that came in any of several ways is read, and how a refusal looks.
Knows nothing of which requests are open, nor of ``ts``.
"""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from pagetier.handler.errors import EngineError, InvalidRequest
from pagetier.handler.messages import RequestOutput, StatsReply
from pagetier.handler.openai_responses import error_body
from pagetier.handler.openai_schemas import parse_json

# The frontend sets ``X-Request-Id`` of responses itself.
CLIENT_ID_HEADER = "X-Client-Request-Id"

JSON = "application/json"
EVENT_STREAM = "text/event-stream"


class Incoming(NamedTuple):
    """A new request as it came: ``body`` is parsed JSON, text, raw bytes, or None.

    ``client_id`` is what the client calls it, in a header; empty if it does not.
    """

    route: str
    body: Any
    content_type: str = ""
    client_id: str = ""


class Reply(msgspec.Struct, frozen=True, gc=False):
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
    headers: Mapping[str, str] = {}


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


def num_characters(value: Any, depth: int = 6) -> int:
    """About how much there is to encode in a body: characters of texts, token ids of lists."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list) or depth == 0:
        return 0
    if value and isinstance(value[0], int):
        return len(value)
    return sum([num_characters(item, depth - 1) for item in value])


def json_reply(index: int, body: Any) -> Reply:
    """A whole response of JSON."""
    return Reply(index, msgspec.json.encode(body), None, content_type=JSON)


def refusal(index: int, error: EngineError, client_id: str = "") -> Reply:
    """The whole response that ``error`` is; ``client_id`` names the request, if its client did."""
    headers = {CLIENT_ID_HEADER: client_id} if client_id else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return Reply(index, error_body(error), None, error.status, JSON, headers)


def own_fault() -> EngineError:
    """What clients are told of an exception that nobody has foreseen."""
    return EngineError("An error of the server's own; see its log.")


def body_of(incoming: Incoming, *, is_plain: bool = False) -> Any:
    """The body as parsed JSON, or, on the plain route, perhaps as text.

    Raises:
        InvalidRequest: there is none, or it cannot be read.
    """
    body = incoming.body
    is_json = incoming.content_type.startswith(JSON)
    if body is None or body == b"":
        raise InvalidRequest(
            "The request has no body that can be read; send JSON with the header "
            "'Content-Type: application/json'."
        )
    if not isinstance(body, bytes | bytearray | str) or (is_json and isinstance(body, str)):
        return body  # parsed by the frontend's side
    if is_plain and not is_json:
        try:
            return body if isinstance(body, str) else bytes(body).decode()
        except UnicodeDecodeError:
            raise InvalidRequest("The body is neither JSON nor UTF-8 text.") from None
    return parse_json(body if isinstance(body, str) else bytes(body))
