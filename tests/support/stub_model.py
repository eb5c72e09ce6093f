"""A served model as a client sees it, without one: canned statistics and answers over HTTP."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pagetier.handler.metrics_export import COUNTERS, GAUGES
from pagetier.handler.request_log import RequestLog

KEY = "secret"
STATS: dict[str, Any] = {
    **dict.fromkeys((*GAUGES, *COUNTERS), 0),
    **RequestLog().stats(),
    "num_requests_running": 3,
    "num_requests_waiting": 5,
    "num_requests_swapped": 2,
    "num_requests_preempted": 4,
    "num_requests_loading": 1,
    "kv_cache_usage_perc": 0.75,
    "cpu_cache_usage_perc": 0.5,
    "num_gpu_blocks": 96,
    "num_gpu_blocks_free": 24,
    "num_cpu_blocks": 128,
    "num_cpu_blocks_free": 64,
    "kv_block_bytes": 2**20,
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 1024,
}


class StubModel:
    """What the server answers, and what it was asked.

    Attributes:
        stats: the answer of the statistics route.
        pieces: of each answer of the chat; None in their place breaks the stream off.
        bodies: of the requests to the chat.
        hangs: whether an answer's end never comes.
        hung_up: set when a client has left such an answer.
    """

    def __init__(self) -> None:
        self.stats = dict(STATS)
        self.pieces: list[str | None] = ["Hel", "lo."]
        self.bodies: list[dict[str, Any]] = []
        self.hangs = False
        self.hung_up = threading.Event()
        self.url = ""


@contextlib.contextmanager
def stub_model() -> Iterator[StubModel]:
    """Serve a ``StubModel`` on a port of its own."""
    model = StubModel()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._refused():
                return
            if self.path.endswith("/stats"):
                self._answer(200, model.stats)
            else:
                self._answer(200, {"object": "list", "data": [{"id": "stub"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._refused():
                return
            model.bodies.append(body)
            if body["messages"][-1]["content"] == "refuse":
                error = {"message": "Too long.", "type": "", "param": None, "code": None}
                self._answer(400, {"error": error})
                return
            self.send_response(200)
            self.end_headers()
            for piece in model.pieces:
                if piece is None:
                    return
                self._event(piece)
            if model.hangs:
                with contextlib.suppress(OSError):
                    while not model.hung_up.wait(0.02):
                        self._event("")
                model.hung_up.set()
                return
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, piece: str) -> None:
            event = json.dumps({"choices": [{"delta": {"content": piece}}]})
            self.wfile.write(f"data: {event}\n\n".encode())

        def _refused(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {KEY}":
                return False
            self._answer(400, {"code": 400, "type": "", "message": "Token Authorization failed."})
            return True

        def _answer(self, status: int, body: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        model.url = f"http://127.0.0.1:{server.server_port}/predictions/stub/1.0"
        try:
            yield model
        finally:
            model.hung_up.set()
            server.shutdown()
            thread.join()
