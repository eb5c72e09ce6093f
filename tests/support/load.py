"""Clients that ask a server again and again, and say of each answer what became of it.

Owns what is asked, how an answer is judged, and the threads that ask. Knows nothing of what is done
to the server meanwhile.
"""

import contextlib
import dataclasses
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx

from support.live import NAME, LiveServer, complete

# A client gives up after this, which must never happen.
PATIENCE_S = 120.0
PROMPTS = ["Return the", "Read up to", "If the", "Write the given", "A list of", "Raised when"]
MAX_TOKENS = 48

FULL = "full"
REFUSED = "refused with a reason"
TOLD = "told of an error in the stream"
BROKEN = "connection broken"
UNREACHABLE = "connection refused"
# Ends that leave no client in doubt; there must be no others.
CLEAR_ENDS = frozenset({FULL, REFUSED, TOLD, BROKEN, UNREACHABLE})
LATE = "no end in time"
INCOMPLETE = "ended without its end"
WRONG = "another text than alone"
UNCLEAR = "refused without a reason"

_EVENT = re.compile(rb"^data: (\{.*\})$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One of the ends above, when its request began and it ended, and for people how it ended."""

    end: str
    began: float
    ended: float
    detail: str


class Client:
    """Asks for completions whose texts are known; may be used by many threads.

    Args:
        live: the server, which is asked for the texts now.
    """

    def __init__(self, live: LiveServer) -> None:
        self._url = f"{live.base_url}/completions"
        self._texts = {
            prompt: complete(live.client, prompt, max_tokens=MAX_TOKENS).choices[0].text
            for prompt in PROMPTS
        }
        self._http = httpx.Client(headers=live.headers, timeout=PATIENCE_S)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, prompt: str, *, stream: bool) -> Answer:
        """Ask once, and judge the answer."""
        body = {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        began, status, content = time.monotonic(), 0, b""
        try:
            with self._http.stream("POST", self._url, json=body) as response:
                status = response.status_code
                for piece in response.iter_raw():
                    content += piece
                    if time.monotonic() - began > PATIENCE_S:
                        raise httpx.ReadTimeout("it has begun, but does not end")
            end = self._judge(status, content, prompt, stream=stream)
        except httpx.TimeoutException:
            end = LATE
        except httpx.ConnectError:
            end = UNREACHABLE
        except httpx.TransportError:
            end = BROKEN
        return Answer(end, began, time.monotonic(), f"status {status}, {content[-300:]!r}")

    def _judge(self, status: int, content: bytes, prompt: str, *, stream: bool) -> str:
        if status != 200:
            return REFUSED if _has_reason(content) else UNCLEAR
        if not stream:
            with contextlib.suppress(ValueError, KeyError):
                text = json.loads(content)["choices"][0]["text"]
                return FULL if text == self._texts[prompt] else WRONG
            return INCOMPLETE
        events = [json.loads(found) for found in _EVENT.findall(content)]
        if any("error" in event for event in events):
            return TOLD
        choices = [event["choices"][0] for event in events]
        if not content.endswith(b"data: [DONE]\n\n") or choices[-1]["finish_reason"] != "length":
            return INCOMPLETE
        return FULL if "".join(c["text"] for c in choices) == self._texts[prompt] else WRONG


def _has_reason(content: bytes) -> bool:
    """Whether a body is an error of OpenAI's shape, or of the frontend's."""
    with contextlib.suppress(ValueError, AttributeError):
        body = json.loads(content)
        return bool(body.get("error", body).get("message"))
    return False


class Load:
    """Threads that ask all the time.

    Attributes:
        num_open: requests under way.
    """

    def __init__(self, client: Client, num_threads: int) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._counts: Counter[str] = Counter()
        self._unclear: list[Answer] = []
        self._last_full_began = 0.0
        self.num_open = 0
        self._threads = [
            threading.Thread(target=self._ask, args=(random.Random(number),), daemon=True)
            for number in range(num_threads)
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        """Asks until the end of the block, then waits for the answers that are due."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join(2 * PATIENCE_S)
            self._client.close()

    def has_answered_since(self, when: float) -> bool:
        """Whether a request that began after ``when`` got a full answer."""
        return self._last_full_began > when

    @property
    def counts(self) -> dict[str, int]:
        """How many answers ended how."""
        return dict(self._counts)

    def check(self) -> None:
        """Assert that every client was answered."""
        assert not any(thread.is_alive() for thread in self._threads), "a client still waits"
        assert not self._unclear, self._unclear[:5]

    def _ask(self, rng: random.Random) -> None:
        while not self._is_over.is_set():
            with self._lock:
                self.num_open += 1
            answer = self._client.ask(rng.choice(PROMPTS), stream=rng.random() < 0.5)
            with self._lock:
                self.num_open -= 1
                self._counts[answer.end] += 1
                if answer.end == FULL:
                    self._last_full_began = max(self._last_full_began, answer.began)
                elif answer.end not in CLEAR_ENDS:
                    self._unclear.append(answer)
            if answer.end != FULL:
                self._is_over.wait(0.1)  # as a client does that is told to try again


class Leaver:
    """A client that sends a request, reads the beginning of the answer and leaves.

    Args:
        live: the server.
        stream: whether it asks for a stream.
    """

    def __init__(self, live: LiveServer, *, stream: bool) -> None:
        host, _, path = live.base_url.removeprefix("http://").partition("/")
        address, _, port = host.partition(":")
        body = {"model": NAME, "prompt": "Return the", "max_tokens": 400, "stream": stream}
        content = json.dumps({**body, "ignore_eos": True}).encode()
        head = (
            f"POST /{path}/completions HTTP/1.1\r\nHost: {host}\r\n"
            f"Authorization: {live.headers['Authorization']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._socket = socket.create_connection((address, int(port)), timeout=PATIENCE_S)
        self._socket.sendall(head.encode() + content)

    def read_beginning(self) -> None:
        """Wait for the status of the answer."""
        assert self._socket.recv(65536).startswith(b"HTTP/1.1 200"), "it was refused"

    def leave(self, *, abruptly: bool) -> None:
        """Close the connection; ``abruptly`` as when a process is killed with unread data."""
        if abruptly:
            no_linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self._socket.close()
