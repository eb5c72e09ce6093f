"""A small client of a served model, for the commands that look at one: ``top``, ``chat``, ``demo``.

Owns addresses, the key, JSON over HTTP and server-sent events. Every failure is an ``EngineError``
whose message is a sentence. Knows nothing of how answers are shown. Imports no torch.
"""

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from pagetier.handler.errors import EngineError

# A long prompt may wait long for its first token.
_STREAM_TIMEOUT_S = 300.0
_TIMEOUT_S = 10.0


class ServedModel:
    """One model on one server.

    Attributes:
        url: ``http://HOST:PORT/predictions/NAME/VERSION``.
    """

    def __init__(self, url: str, key: str = "") -> None:
        """Talk to the model at ``url``, with or without ``/v1``, sending ``key`` as bearer token.

        Raises:
            EngineError: ``url`` is not the address of a model.
        """
        parts = urllib.parse.urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # the port is no number
            usable = False
        if not usable or len(path.split("/")) < 4 or "/predictions/" not in path:
            raise EngineError(
                "The address must look like http://127.0.0.1:8080/predictions/NAME/1.0, "
                f"not '{url}'."
            )
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self._parts = parts
        self._path = path
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def stats(self) -> dict[str, Any]:
        """The engine's gauges and totals; raises ``EngineError``."""
        with self._answer("GET", "stats", None, _TIMEOUT_S) as response:
            stats = self._json(response)
        if not isinstance(stats, dict) or "num_requests_running" not in stats:
            raise EngineError(f"'{self.url}' answers, but not as a model of pagetier.")
        return stats

    def name(self) -> str:
        """What requests call the model; raises ``EngineError``."""
        with self._answer("GET", "v1/models", None, _TIMEOUT_S) as response:
            answer = self._json(response)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"'{self.url}' answers, but not as a model of pagetier.") from None

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """POST ``body`` and yield each event of the answer; closing the iterator hangs up.

        Raises:
            EngineError: the request is refused, an event is an error, or the stream breaks off.
        """
        with self._answer("POST", route, body, _STREAM_TIMEOUT_S) as response:
            done = False
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    done = done or data == b"[DONE]"
                    if not data or done:
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise EngineError(event["error"]["message"])
                    yield event
            except (OSError, http.client.HTTPException, ValueError) as exc:
                raise EngineError(f"The stream broke off: {_reason(exc)}.") from None
            if not done:
                raise EngineError("The stream broke off; the server's log may say why.")

    @contextlib.contextmanager
    def _answer(
        self, method: str, route: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=timeout_s)
        try:
            try:
                content = None if body is None else json.dumps(body)
                connection.request(method, f"{self._path}/{route}", content, self._headers)
                response = connection.getresponse()
                refusal = None if response.status == 200 else response.read()
            except (OSError, http.client.HTTPException) as exc:
                raise EngineError(
                    f"Nobody answers at '{self.url}': {_reason(exc)}; is the server running?"
                ) from None
            if refusal is not None:
                raise EngineError(_refusal(response.status, refusal))
            yield response
        finally:
            connection.close()

    def _json(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            raise EngineError(f"'{self.url}' does not answer with JSON.") from None


def _refusal(status: int, content: bytes) -> str:
    """What the server said, in OpenAI's shape or the frontend's own."""
    try:
        answer = json.loads(content)
        said = answer["error"]["message"] if "error" in answer else answer["message"]
    except (ValueError, KeyError, TypeError):
        said = content.decode(errors="replace").strip()[:200] or "no reason given"
    hint = ""
    if "token" in said.lower() and status in (400, 401):
        hint = " Give the key that the server printed, with --key or in PAGETIER_API_KEY."
    return f"The server answers {status}: {said.rstrip('.')}.{hint}"


def _reason(exc: Exception) -> str:
    strerror = getattr(exc, "strerror", None)
    return str(strerror or exc or type(exc).__name__).rstrip(".")
