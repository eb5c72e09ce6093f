"""TorchServe's side of a worker, in process: real ``ts`` code around a handler, a fake frontend.

Behaves as the frontend of TorchServe 0.12 was seen to behave under ``continuousBatching``: each
call carries every request in flight; the payload of one that was answered once is not sent again;
a client that has left is only noticed when there is a piece for it.
"""

import itertools
import json
import struct
from typing import Any

from ts.service import Service


class Client:
    """One HTTP request and what came back for it."""

    def __init__(self, request_id: str, message: dict[str, Any]) -> None:
        self.request_id = request_id
        self.message = message
        self.connected = True
        self.in_flight = True
        self.cached = False
        self.num_pieces = 0
        self.status: int | None = None
        self.phrase = ""
        self.content_type = ""
        self.headers: dict[str, str] = {}
        self.body = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The server-sent events, ``[DONE]`` as None."""
        texts = [e.removeprefix("data: ") for e in self.body.decode().split("\n\n") if e]
        return [None if t == "[DONE]" else json.loads(t) for t in texts]

    @property
    def text(self) -> str:
        """The text of a streamed completion."""
        chunks = [e for e in self.events if e is not None and e.get("choices")]
        return "".join(c["choices"][0]["text"] for c in chunks)


class Frontend:
    """Calls ``handler`` as a worker of TorchServe does."""

    def __init__(self, handler: Any, settings: dict[str, Any], model_dir: str) -> None:
        self.service = Service("tiny", model_dir, None, handler.handle, None, 64)
        self.service.set_cl_socket(None)
        self.service.context.metrics = _NoMetrics()
        self.service.context.model_yaml_config = {"handler": settings}
        self.jobs: dict[str, Client] = {}
        self._numbers = itertools.count()

    def send(
        self,
        route: str,
        body: Any = None,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> Client:
        """Put a request in flight; it is carried by the next ``call``."""
        headers = {**(headers or {}), "url_path": route} if route else dict(headers or {})
        parameters = []
        if body is not None:
            parameters = [{"name": "body", "contentType": content_type, "value": body}]
        return self._send(headers, parameters)

    def describe(self) -> Client:
        return self._send({"describe": "True"}, [])

    def _send(self, headers: dict[str, str], parameters: list[dict[str, Any]]) -> Client:
        request_id = f"request-{next(self._numbers)}"
        message = {
            "requestId": request_id.encode(),
            "headers": [{"name": k.encode(), "value": v.encode()} for k, v in headers.items()],
            "parameters": parameters,
        }
        client = self.jobs[request_id] = Client(request_id, message)
        return client

    def call(self) -> int:
        """One call of the handler; how many requests it answered."""
        batch = []
        for client in self.jobs.values():
            message = dict(client.message)
            if client.cached:
                message = {"requestId": message["requestId"], "headers": [], "parameters": []}
            batch.append(message)
        predictions = _decode(bytes(self.service.predict(batch)))
        for request_id, prediction in predictions:
            self._answer(self.jobs[request_id], *prediction)
        return len(predictions)

    def _answer(
        self,
        client: Client,
        status: int,
        phrase: str,
        content_type: str,
        headers: dict[str, str],
        body: bytes,
    ) -> None:
        more = headers.pop("ts_stream_next", None)
        assert not (more == "false" and client.num_pieces == 0), "a last piece without a head"
        assert not (more is None and client.num_pieces > 0), "a whole response after a piece"
        client.num_pieces += 1
        if client.num_pieces == 1:
            client.status, client.phrase, client.content_type = status, phrase, content_type
            client.headers = headers
        if client.connected:
            client.body += body
        client.cached = True
        if more != "true" or not client.connected:
            client.in_flight = False
            del self.jobs[client.request_id]

    def finish(self, *clients: Client, max_calls: int = 3000) -> None:
        """Call until these clients have their responses."""
        for _ in range(max_calls):
            if not any(c.in_flight for c in clients):
                return
            self.call()
        raise AssertionError(f"still in flight after {max_calls} calls: {list(self.jobs)}")


class _NoMetrics:
    request_ids: Any = None

    def add_time(self, *args: Any, **kwargs: Any) -> None:
        pass


def _decode(message: bytes) -> list[tuple[str, tuple[int, str, str, dict[str, str], bytes]]]:
    """The worker's reply, as the frontend reads it."""
    offset = 0

    def number() -> int:
        nonlocal offset
        (value,) = struct.unpack_from("!i", message, offset)
        offset += 4
        return int(value)

    def data() -> bytes:
        nonlocal offset
        length = number()
        offset += length
        return message[offset - length : offset]

    code = number()
    text = data()
    assert code == 200, f"every request in flight failed: {code} {text!r}"
    predictions = []
    while (length := number()) != -1:
        offset += length
        request_id = message[offset - length : offset].decode()
        content_type = data().decode()
        status = number()
        phrase = data().decode()
        headers = {data().decode(): data().decode() for _ in range(number())}
        predictions.append((request_id, (status, phrase, content_type, headers, data())))
    assert offset == len(message)
    return predictions
