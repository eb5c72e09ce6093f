"""Random and mutated requests: no 5xx, no hang, and not a character's change for their neighbours.

Everything runs in this process: real ``ts`` code with a fake frontend, the pump, and a fake engine
that makes one token a step. PAGETIER_FUZZ_REQUESTS says how many requests there are. A part of them
is made from ``docs/openapi.json`` alone, and all that it names must have been sent in the end.
"""

import json
import os
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.described import Described
from support.fake_core import VOCAB_SIZE, FakeCore
from support.frontend import Frontend
from support.tokenizers import byte_level_tokenizer

from pagetier.handler import pump
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_builder import build_engine
from pagetier.handler.errors import EngineError
from pagetier.handler.exchange import Inbox
from pagetier.handler.messages import RequestOutput, StatsReply
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.openai_schemas import (
    HARMLESS,
    NOT_SUPPORTED_YET,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    DrainBody,
    TokenizeBody,
)
from pagetier.handler.pump import Pump
from pagetier.handler.service import PagetierHandler
from pagetier.handler.tokenizer import Tokenizer

DESCRIPTION = json.loads(
    (Path(__file__).parent.parent / "docs" / "openapi.json").read_text(encoding="utf-8")
)
COMPONENTS = DESCRIPTION["components"]["schemas"]
NUM_REQUESTS = int(os.environ.get("PAGETIER_FUZZ_REQUESTS", "2000"))
REQUESTS_PER_EXAMPLE = 10
# So short that a request can hardly take longer than its neighbour.
MAX_MODEL_LEN = 40
MAX_CALLS = 2000
# Short, so that chats with tools fit.
CHAT_TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | length }}{% endif %}"
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
NEIGHBOURS = [
    {"prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True, "stream": True}
    for prompt in ("the quick brown", "jumps", "日本")
]


class Engine:
    """A core that makes its steps when it is told to, in this thread."""

    def __init__(self, core, inbox):
        self.core = core
        self.inbox = inbox

    def add(self, request):
        # As it would come out at the other end of the engine's socket.
        data = msgspec.msgpack.encode(request)
        try:
            self.core.add_request(msgspec.msgpack.decode(data, type=type(request)))
        except EngineError as exc:
            refusal = RequestOutput(
                request.request_id,
                [],
                finish_reason="error",
                error=exc.message,
                error_status=exc.status,
            )
            self.inbox.put([refusal])

    def abort(self, request_ids, outputs=()):
        self.core.abort(list(request_ids), outputs)

    def request_stats(self, *, include_trace=False):
        trace = self.core.trace() if include_trace else None
        self.inbox.put(StatsReply(self.core.stats(), trace))

    def step(self):
        if self.core.has_work():
            self.inbox.put(self.core.step())


class Server:
    """A worker without processes."""

    def __init__(self, core):
        handler = PagetierHandler()
        inbox = Inbox()
        self.engine = Engine(core, inbox)
        self.statuses: Counter[int] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()  # routes and fields
        api = OpenAIApi(
            Tokenizer(byte_level_tokenizer(), chat_template=CHAT_TEMPLATE),
            model_name="tiny",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=self.engine.core.vocab_size,
            eos_token_ids=(0,),
        )
        handler._pump = self.pump = Pump(self.engine, api, inbox, max_num_queued_reqs=64)
        self.frontend = Frontend(handler, {}, "")

    def finish(self, clients):
        for _ in range(MAX_CALLS):
            if not any(client.in_flight for client in clients):
                return
            self.engine.step()
            self.frontend.call()
        unanswered = [c.message for c in clients if c.in_flight]
        raise AssertionError(f"not answered after {MAX_CALLS} calls: {unanswered}")

    def settle(self):
        """Collect what the engine has launched."""
        for _ in range(MAX_CALLS):
            if not self.engine.core.has_work():
                return
            self.engine.step()
        raise AssertionError("a request is still in the engine")


# --- requests --------------------------------------------------------------------------------

_FIELDS = sorted(
    {
        name
        for kind in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, DrainBody)
        for name in kind.__struct_fields__
    }
    | HARMLESS
    | NOT_SUPPORTED_YET.keys()
)
_ROUTES = [
    "v1/completions", "v1/chat/completions", "", "tokenize", "detokenize", "v1/models",
    "v1/models/tiny", "health", "stats", "stats/trace",
]  # fmt: skip
# What the description says of each route that takes a body. Draining stops all others: see below.
_BODIES = {
    path.removeprefix("/predictions/{model}").removeprefix("/{version}/"): operations["post"][
        "requestBody"
    ]["content"]["application/json"]["schema"]
    for path, operations in DESCRIPTION["paths"].items()
    if "requestBody" in operations.get("post", {}) and not path.endswith("drain")
}
_described = Described(COMPONENTS)
_text = st.text(max_size=12) | st.sampled_from(["the fox", "日本", "\ud800", "\x00", "<|eos|>", ""])
_number = (
    st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf")])
    | st.floats(-2, 2)
)
_scalar = st.none() | st.booleans() | _number | _text
_json = st.recursive(
    _scalar,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(_FIELDS) | _text, inner, max_size=4)
    ),
    max_leaves=8,
)
_prompt = (
    _text
    | st.lists(st.integers(-1, 401), max_size=6)
    | st.lists(_text, max_size=3)
    | st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=3), max_size=3)
)
_call = st.fixed_dictionaries(
    {
        "id": _text,
        "function": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["f", "g"]),
                "arguments": st.sampled_from(["{}", "", "[", "{"]),
            }
        ),
    }
)
_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": _text},
    optional={
        "name": _text,
        "tool_calls": st.lists(_call, max_size=2) | _json,
        "tool_call_id": _text,
    },
)
_schema = st.sampled_from(
    [{"type": "object"}, {"type": "integer"}, {"type": "string", "maxLength": 3}, {"type": 3}]
)
_function = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "a b"])}, optional={"parameters": _schema}
)
# Values that mean something, so that many requests go far.
_PLAUSIBLE = {
    "prompt": _prompt,
    "messages": st.lists(_message, max_size=3),
    "tokens": st.lists(st.integers(-1, 401), max_size=6),
    "model": st.sampled_from(["tiny"] * 9 + ["other"]),
    "max_tokens": st.integers(0, 30),
    "max_completion_tokens": st.integers(0, 30),
    "temperature": st.floats(-0.5, 2.5),
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 500),
    "min_p": st.floats(-0.1, 1.1),
    "seed": st.integers(-(2**64), 2**64),
    "n": st.integers(0, 4),
    "best_of": st.integers(0, 4),
    "use_beam_search": st.booleans(),
    "stop": _text | st.lists(_text, max_size=3),
    "stop_token_ids": st.lists(st.integers(-1, 401), max_size=3),
    "bad_words": st.lists(_text, max_size=3),
    "allowed_token_ids": st.lists(st.integers(-1, 401), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 401).map(str) | _text, _number, max_size=3),
    "logprobs": st.integers(-1, 21) | st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "prompt_logprobs": st.integers(-1, 21),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "echo": st.booleans(),
    "timeout": st.sampled_from([0.0, 1e-9, 30.0, -1.0]),
    "request_id": _text | st.just("job-7"),
    "cache_salt": _text,
    "priority": st.integers(-(2**64), 2**64),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
        optional={"json_schema": _json},
    ),
    "guided_json": _schema,
    "tools": st.lists(st.fixed_dictionaries({"function": _function}), max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"function": {"name": "f"}}, "x"]),
    "parallel_tool_calls": st.booleans(),
}


@st.composite
def _bodies(draw, route):
    """A body that fits the route, with some plausible fields, then perhaps changed somewhere."""
    required = {
        "v1/completions": "prompt",
        "v1/chat/completions": "messages",
        "": "prompt",
        "tokenize": "prompt",
        "detokenize": "tokens",
    }
    body = {"max_tokens": 3} if route in ("v1/completions", "v1/chat/completions", "") else {}
    if route in required:
        body[required[route]] = draw(_PLAUSIBLE[required[route]])
    for name in draw(st.lists(st.sampled_from(sorted(_PLAUSIBLE)), max_size=4)):
        body[name] = draw(_PLAUSIBLE[name])
    for change in draw(st.lists(st.sampled_from(["replace", "drop", "add"]), max_size=2)):
        name = draw(st.sampled_from(sorted(body) or ["prompt"]))
        if change == "drop":
            body.pop(name, None)
        elif change == "replace":
            body[name] = draw(_json)
        else:
            body[draw(st.sampled_from(_FIELDS) | _text)] = draw(_json)
    return body


@st.composite
def _requests(draw):
    """Route, body as ``ts`` would hand it over, content type, headers."""
    route = draw(st.sampled_from([*_ROUTES, *_ROUTES[:3] * 4, "v1/embeddings", "../x", "\x00"]))
    shape = draw(
        st.sampled_from(["fields"] * 6 + ["described"] * 6 + ["json", "bytes", "cut", "none"])
    )
    headers = draw(
        st.just({}) | st.dictionaries(st.sampled_from(["X-Request-Id", "describe", "body"]),
                                      st.sampled_from(["job", "True", "a b", ""]), max_size=2)
    )  # fmt: skip
    content_type = draw(st.sampled_from(["application/json"] * 4 + ["text/plain", "a/b", ""]))
    if shape == "none":
        return route, None, content_type, headers
    if shape == "bytes":
        return route, bytearray(draw(st.binary(max_size=24))), content_type, headers
    if shape == "described" and route in _BODIES:
        return route, draw(_described.values(_BODIES[route])), content_type, headers
    body = draw(_json) if shape == "json" else draw(_bodies(route))
    if shape == "cut":
        data = json.dumps(body).encode()
        return route, bytearray(data[: draw(st.integers(0, len(data)))]), content_type, headers
    # What JSON can carry, as the frontend's reader gives it.
    return route, json.loads(json.dumps(body)), content_type, headers


# --- what must hold --------------------------------------------------------------------------


def check_answer(request, client):
    route, body = request[0], request[1]
    # Only what a client asked for itself: its own timeout.
    assert client.status < 500 or client.status == 504, (route, body, client.body)
    if client.status != 200:
        error = client.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 600, (route, body)
        assert "Traceback" not in error["message"]
        assert error["message"].endswith("."), error["message"]
    elif client.content_type == "text/event-stream":
        *events, done = client.events
        assert done is None
        assert all(e["error"]["type"] != "server_error" for e in events if "error" in e)
    else:
        assert client.json.get("error", {}).get("type") != "server_error", (route, body)


def fuzz(server, num_requests):
    """Send random requests in batches, with the neighbours beside each batch."""
    texts = []
    for body in NEIGHBOURS:
        alone = server.frontend.send("v1/completions", body)
        server.finish([alone])
        assert len(alone.text) > 20
        texts.append(alone.text)

    @settings(
        max_examples=num_requests // REQUESTS_PER_EXAMPLE,
        deadline=None,
        # Not to make a failing example smaller: each of them takes long.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(_requests(), min_size=REQUESTS_PER_EXAMPLE, max_size=REQUESTS_PER_EXAMPLE))
    def send(requests):
        neighbours = [server.frontend.send("v1/completions", body) for body in NEIGHBOURS]
        server.engine.step()
        server.frontend.call()
        clients = [server.frontend.send(*request) for request in requests]
        server.finish([*neighbours, *clients])
        for request, client in zip(requests, clients, strict=True):
            check_answer(request, client)
            server.statuses[client.status] += 1
            if isinstance(request[1], dict):
                server.sent.update((request[0], field) for field in request[1])
        assert [n.text for n in neighbours] == texts
        assert server.pump.num_open == 0
        server.settle()

    send()
    # The requests reach every part, and not only the refusals.
    assert server.statuses[200] > num_requests // 10
    assert server.statuses[400] > num_requests // 10
    assert server.statuses[404] > 0


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The engine makes its steps in this thread, so there is nothing to wait for."""
    monkeypatch.setattr(pump, "WAIT_SECONDS", 0.0)


def test_every_published_route_is_among_the_random_ones():
    published = {
        path.removeprefix("/predictions/{model}").removeprefix("/{version}/")
        for path in DESCRIPTION["paths"]
    }
    # Those two would have all others refused.
    assert {route.replace("tiny", "{name}") for route in _ROUTES} == published - {"drain", "resume"}


def test_random_requests_are_answered_and_disturb_nobody(capsys):
    config = EngineConfig.create({"model": "none", "max_model_len": MAX_MODEL_LEN})
    server = Server(FakeCore(config, step_seconds=0.0))
    fuzz(server, NUM_REQUESTS)
    described = {
        (route, field)
        for route, schema in _BODIES.items()
        for field in COMPONENTS[schema["$ref"].rpartition("/")[2]]["properties"]
    }
    never = described - server.sent.keys()
    if NUM_REQUESTS >= 10000:
        assert not never
    # Fewer requests are drawn without a few of the pairs.
    assert len(never) < len(described) / 5, never
    with capsys.disabled():
        print(f" {server.statuses.total()} requests: {dict(sorted(server.statuses.items()))}")


def test_random_requests_to_a_real_engine_break_nothing(tmp_path, capsys):
    """Few blocks, so that requests are swapped and computed again, too."""
    tiny_models.save("llama", tmp_path, vocab_size=VOCAB_SIZE, eos_token_id=0)
    byte_level_tokenizer().save_pretrained(tmp_path)
    settings = {
        "model": str(tmp_path), "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16,
        "max_num_batched_tokens": 64, "block_size": 4, "num_gpu_blocks_override": 12,
        "swap_space": 0.0005, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    core = build_engine(EngineConfig.create(settings))
    try:
        server = Server(core)
        fuzz(server, NUM_REQUESTS // 20)
        stats = core.stats()
    finally:
        core.close()
    assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]
    assert stats["num_preemptions"] > 0
    with capsys.disabled():
        print(f" {server.statuses.total()} requests: {dict(sorted(server.statuses.items()))}")
