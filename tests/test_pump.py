"""The pump with an engine that does only what the test says, and a clock that the test turns."""

import json
import threading
from concurrent.futures import wait

import pytest
from support.tokenizers import byte_level_tokenizer

from pagetier.handler.errors import EngineDead
from pagetier.handler.exchange import Inbox, Incoming
from pagetier.handler.messages import RequestOutput, StatsReply
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.pump import (
    LARGE_BODY_CHARACTERS,
    MAX_QUIET_TICKS,
    REQUESTS_PER_QUIET_TICK,
    STATS_SECONDS,
    TOUCH_SECONDS,
    Pump,
)
from pagetier.handler.tokenizer import Tokenizer

BODY = {"prompt": "the fox", "max_tokens": 50}
STREAM = {**BODY, "stream": True}


class Engine:
    """Writes down what it is asked."""

    def __init__(self, inbox):
        self.inbox = inbox
        self.added = []
        self.aborted = []
        self.asked = []

    def add(self, request):
        self.added.append(request.request_id)

    def abort(self, request_ids, outputs=()):
        self.aborted += [*request_ids, *outputs]

    def request_stats(self, *, include_trace=False):
        if self.inbox.death is not None:
            raise EngineDead(self.inbox.death)
        self.asked.append(include_trace)


class Rig:
    """A pump and what it needs; ``exchange`` takes new requests by id."""

    def __init__(self, max_waiting=4, **settings):
        self.now = 100.0
        self.inbox = Inbox()
        self.engine = Engine(self.inbox)
        self.tokenizer = Tokenizer(byte_level_tokenizer())
        api = OpenAIApi(
            self.tokenizer, model_name="tiny", max_model_len=100, vocab_size=400, eos_token_ids=()
        )
        self.pump = Pump(
            self.engine,
            api,
            self.inbox,
            max_num_queued_reqs=max_waiting,
            clock=lambda: self.now,
            **settings,
        )

    def exchange(self, *ids, **new):
        """Replies by id; ``new`` are (route, body) of ids that are not open yet."""
        ids = [*ids, *new]
        replies = self.pump.exchange(ids, lambda index: Incoming(*new[ids[index]]))
        assert len({r.index for r in replies}) == len(replies)
        return {ids[r.index]: r for r in replies}

    def gain(self, request_id, text="a", **fields):
        ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        self.inbox.put([RequestOutput(request_id, ids, **fields)])


@pytest.fixture
def rig():
    return Rig()


def test_accepted_request_is_opened_in_the_exchange_that_brings_it(rig):
    replies = rig.exchange(s=("v1/completions", STREAM), w=("v1/completions", BODY))
    assert [(r.body, r.last, r.status) for r in replies.values()] == [(b"", False, 200)] * 2
    assert replies["s"].content_type == "text/event-stream"
    assert replies["w"].content_type == "application/json"
    assert rig.engine.added == ["s", "w"]


def test_outputs_that_come_at_once_wait_for_the_next_exchange(rig):
    """A last piece must not be the first: it would go out without a head."""
    rig.engine.add = lambda request: rig.gain(request.request_id, finish_reason="length")
    assert rig.exchange(s=("v1/completions", STREAM))["s"].last is False
    assert rig.exchange("s")["s"].last is True


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text", "The body must be a JSON object, not text."),
        (bytearray(), "The request has no body that can be read"),
        (None, "The request has no body that can be read"),
    ],
)
def test_body_that_is_no_object_is_told(rig, body, message):
    """The frontend's side has parsed what is JSON; an empty body comes as no bytes."""
    reply = rig.exchange(r=("v1/completions", body, "application/json"))["r"]
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["message"].startswith(message)


def test_only_requests_that_gained_something_are_answered(rig):
    rig.exchange(a=("v1/completions", STREAM), b=("v1/completions", STREAM))
    rig.gain("b", "quick")
    replies = rig.exchange("a", "b")
    assert list(replies) == ["b"]
    assert b'"quick"' in replies["b"].body
    assert replies["b"].content_type is None


def test_whole_response_comes_in_one_piece_at_the_end(rig):
    rig.exchange(w=("v1/completions", BODY))
    rig.gain("w", "quick")
    assert rig.exchange("w") == {}
    rig.gain("w", " fox", finish_reason="length")
    reply = rig.exchange("w")["w"]
    assert reply.last is True
    assert json.loads(reply.body)["choices"][0]["text"] == "quick fox"
    assert rig.pump.num_open == 0


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("v1/completions", {"prompt": ""}, 400),
        ("v1/completions", None, 400),
        ("v1/completions", b'{"prompt"', 400),
        ("v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("v1/embeddings", {}, 404),
        ("v1/models/other", None, 404),
        ("v1/models", None, 200),
        ("v1/models/tiny", None, 200),
        ("/health/", None, 200),
    ],
)
def test_what_is_known_at_once_is_a_complete_reply(rig, route, body, status):
    reply = rig.exchange(r=(route, body))["r"]
    assert (reply.status, reply.last, reply.content_type) == (status, None, "application/json")
    assert ("error" in json.loads(reply.body)) == (status != 200)
    assert rig.engine.added == []
    assert rig.pump.num_open == 0


@pytest.mark.parametrize(
    ("body", "content_type", "prompt_or_error"),
    [
        ("the fox", "text/plain", None),
        (bytearray(b"the fox"), "application/octet-stream", None),
        ({"prompt": "the fox"}, "application/json", None),
        (bytearray(b'{"prompt": "a'), "application/json", "not valid JSON"),
        (b"\xff\xfe", "application/octet-stream", "neither JSON nor UTF-8"),
    ],
)
def test_plain_route_takes_text_or_json(rig, body, content_type, prompt_or_error):
    reply = rig.exchange(p=("", body, content_type))["p"]
    if prompt_or_error is None:
        assert reply.last is False
    else:
        assert prompt_or_error in json.loads(reply.body)["error"]["message"]


def test_json_sent_as_text_is_read_as_json_on_openais_routes(rig):
    body = json.dumps(BODY)
    assert rig.exchange(r=("v1/completions", body, "text/plain"))["r"].last is False


def test_requests_beyond_the_bound_are_refused_with_retry_after():
    rig = Rig(max_waiting=2)
    new = dict.fromkeys("abc", ("v1/completions", STREAM))
    replies = rig.exchange(**new)
    assert [r.status for r in replies.values()] == [200, 200, 429]
    assert replies["c"].headers == {"Retry-After": "1"}
    assert json.loads(replies["c"].body)["error"]["code"] == "queue_full"
    # One that has its first token waits no longer, nor does one that has left.
    rig.gain("a")
    assert rig.exchange("a", "b", d=("v1/completions", STREAM))["d"].status == 200
    assert rig.exchange("a", "b", "d", e=("v1/completions", STREAM))["e"].status == 429
    assert rig.exchange("a", "d", f=("v1/completions", STREAM))["f"].status == 200


def test_request_missing_from_a_call_is_aborted(rig):
    rig.exchange(a=("v1/completions", STREAM), b=("v1/completions", STREAM))
    rig.exchange("b")
    assert rig.engine.aborted == ["a"]
    rig.gain("a")
    rig.gain("b")
    assert list(rig.exchange("b")) == ["b"]


def test_those_that_gain_nothing_are_touched_from_time_to_time(rig):
    """The frontend notices a client that has left only when it has a piece for it."""
    rig.exchange(s=("v1/completions", STREAM), w=("v1/completions", BODY))
    rig.gain("w")
    assert rig.exchange("s", "w") == {}
    rig.now += TOUCH_SECONDS
    rig.gain("w")
    rig.gain("s")
    replies = rig.exchange("s", "w")
    assert (replies["w"].body, replies["w"].last) == (b"", False)
    assert replies["s"].body != b""
    rig.now += TOUCH_SECONDS / 2
    assert rig.exchange("s", "w") == {}


def test_stop_string_aborts_in_the_engine(rig):
    rig.exchange(s=("v1/completions", {**STREAM, "stop": "fox"}))
    rig.gain("s", "quick fox")
    reply = rig.exchange("s")["s"]
    assert reply.last is True
    assert b'"finish_reason":"stop"' in reply.body
    assert rig.engine.aborted == ["s"]


def test_silent_frontend_aborts_all(rig):
    rig.exchange(a=("v1/completions", STREAM), b=("v1/completions", BODY))
    for _ in range(MAX_QUIET_TICKS):
        rig.pump.tick()
    assert rig.engine.aborted == []
    rig.pump.tick()
    rig.pump.tick()
    assert rig.engine.aborted == ["a", "b"]
    # A frontend that was only slow gets an end for each.
    replies = rig.exchange("a", "b")
    assert all(r.last is True and b"interrupted" in r.body for r in replies.values())
    assert rig.pump.num_open == 0


def test_call_between_two_ticks_is_no_silence(rig):
    rig.exchange(a=("v1/completions", STREAM))
    for _ in range(3 * MAX_QUIET_TICKS):
        rig.pump.tick()
        rig.exchange("a")
    assert rig.engine.aborted == []


def test_frontend_with_many_requests_may_take_longer():
    num_requests = 2 * REQUESTS_PER_QUIET_TICK
    rig = Rig(max_waiting=num_requests)
    rig.exchange(**dict.fromkeys(map(str, range(num_requests)), ("v1/completions", STREAM)))
    for _ in range(MAX_QUIET_TICKS + 2):
        rig.pump.tick()
    assert rig.engine.aborted == []
    rig.pump.tick()
    assert len(rig.engine.aborted) == num_requests


def test_silence_with_nothing_open_aborts_nothing(rig):
    rig.exchange(m=("v1/models", None))
    for _ in range(3 * MAX_QUIET_TICKS):
        rig.pump.tick()
    assert rig.engine.aborted == []


def test_engines_refusal_reaches_its_client_only(rig):
    rig.exchange(a=("v1/completions", STREAM), b=("v1/completions", BODY))
    for name in "ab":
        rig.gain(name, "", finish_reason="error", error="Too long.", error_status=400)
    replies = rig.exchange("a", "b")
    assert [r.last for r in replies.values()] == [True, True]
    assert b'data: {"error":{"message":"Too long.","type":"invalid_request_error"' in (
        replies["a"].body
    )
    assert json.loads(replies["b"].body)["error"]["message"] == "Too long."
    assert rig.pump.num_open == 0


@pytest.mark.parametrize("broken", ["add", "take_events"])
def test_output_that_cannot_be_formatted_fails_its_request_only(rig, monkeypatch, broken):
    rig.exchange(a=("v1/completions", STREAM), b=("v1/completions", STREAM))
    response = rig.pump._open["a"].response
    if broken == "add":
        monkeypatch.setattr(response, "add", lambda output: 1 / 0)
    else:
        monkeypatch.setattr(response, "take_events", lambda: 1 / 0)
        monkeypatch.setattr(response, "add", lambda output: False)
    rig.gain("a")
    rig.gain("b")
    replies = rig.exchange("a", "b")
    assert b"server's own" in replies["a"].body
    assert replies["a"].last is True
    assert replies["b"].last is False
    assert rig.engine.aborted == ["a"]


def test_request_that_cannot_be_read_fails_alone(rig):
    def fetch(index):
        if index == 0:
            raise ValueError("a fault")
        return Incoming("v1/completions", STREAM)

    replies = rig.pump.exchange(["a", "b"], fetch)
    assert [r.status for r in replies] == [500, 200]


def test_dead_engine_ends_streams_with_an_error_and_leaves_whole_ones_to_be_broken_off(rig):
    rig.exchange(s=("v1/completions", STREAM), w=("v1/completions", BODY), q=("stats", None))
    for name in "sw":
        rig.gain(name, "", finish_reason="error", error="Dead.", error_status=503)
    rig.inbox.put_death("Dead.")
    replies = rig.exchange("s", "w", "q")
    assert replies["s"].last is True
    assert b'"service_unavailable_error"' in replies["s"].body
    assert "w" not in replies
    assert (replies["q"].status, replies["q"].last) == (503, None)
    assert rig.pump.num_untold == 0
    # Whoever comes now is told with a status.
    for route in ("v1/completions", "v1/chat/completions", "", "health", "stats"):
        assert rig.exchange("w", n=(route, STREAM))["n"].status == 503
    assert rig.exchange("w", n=("v1/models", None))["n"].status == 200


def test_stats_are_answered_when_the_engine_has_told_them(rig):
    assert rig.exchange(a=("stats", None), t=("stats/trace", None)) == {}
    assert rig.engine.asked == [False, True]
    assert rig.exchange("a", "t") == {}
    rig.inbox.put(StatsReply({"num_requests_running": 3}, [{"step": 1}]))
    replies = rig.exchange("a", "t")
    assert list(replies) == ["t"]
    assert json.loads(replies["t"].body)["trace"] == [{"step": 1}]
    rig.inbox.put(StatsReply({"num_requests_running": 4}))
    reply = rig.exchange("a")["a"]
    stats = json.loads(reply.body)
    assert (stats["num_requests_running"], stats["num_requests_open"]) == (4, 0)
    assert stats["time_to_first_token_seconds"]["count"] == 0
    assert reply.last is None


def test_stats_that_nobody_waits_for_are_dropped(rig):
    rig.exchange(a=("stats", None))
    rig.exchange()
    rig.inbox.put(StatsReply({}))
    assert rig.exchange() == {}


def test_stats_do_not_wait_for_ever(rig):
    rig.exchange(a=("stats", None))
    rig.now += STATS_SECONDS + 1
    reply = rig.exchange("a")["a"]
    assert (reply.status, reply.last) == (503, None)


# --- several prompts in one request ----------------------------------------------------------


def test_request_with_several_prompts_is_whole_when_all_are(rig):
    rig.exchange(w=("v1/completions", {**BODY, "prompt": ["a", "b"]}))
    assert rig.engine.added == ["w-0", "w-1"]
    rig.gain("w-1", "quick", finish_reason="length")
    assert rig.exchange("w") == {}
    rig.gain("w-0", "fox", finish_reason="length")
    reply = rig.exchange("w")["w"]
    assert reply.last is True
    assert [c["text"] for c in json.loads(reply.body)["choices"]] == ["fox", "quick"]
    assert rig.pump.num_open == 0


def test_all_prompts_of_a_request_count_as_waiting():
    rig = Rig(max_waiting=3)
    several = ("v1/completions", {**STREAM, "prompt": ["a", "b"]})
    assert rig.exchange(a=several)["a"].status == 200
    assert rig.exchange("a", b=several)["b"].status == 429
    assert rig.engine.added == ["a-0", "a-1"]
    rig.gain("a-0")
    assert rig.exchange("a", c=several)["c"].status == 200


def test_client_that_leaves_takes_all_its_prompts_along(rig):
    rig.exchange(a=("v1/completions", {**STREAM, "prompt": ["a", "b"]}))
    rig.exchange()
    assert rig.engine.aborted == ["a-0", "a-1"]


def test_refusal_of_one_prompt_fails_the_request_and_stops_the_others(rig):
    rig.exchange(a=("v1/completions", {**BODY, "prompt": ["a", "b"]}))
    rig.gain("a-1", "", finish_reason="error", error="Too long.", error_status=400)
    reply = rig.exchange("a")["a"]
    assert json.loads(reply.body)["error"]["message"] == "Too long."
    assert "a-0" in rig.engine.aborted
    rig.gain("a-0")
    assert rig.exchange() == {}


# --- what protects the server ----------------------------------------------------------------


def test_tokens_of_waiting_prompts_are_bounded():
    rig = Rig(max_num_queued_tokens=10)
    # One alone may be longer: it could never be served otherwise.
    assert rig.exchange(a=("v1/completions", {**STREAM, "prompt": [7] * 20}))["a"].status == 200
    reply = rig.exchange("a", b=("v1/completions", STREAM))["b"]
    assert (reply.status, reply.headers) == (429, {"Retry-After": "1"})
    rig.gain("a")
    six = ("v1/completions", {**STREAM, "prompt": [7] * 6})
    replies = rig.exchange("a", c=six, d=six)
    assert (replies["c"].status, replies["d"].status) == (200, 429)
    assert rig.exchange("a", e=six)["e"].status == 200  # c has left


def test_request_with_a_timeout_gets_its_status_with_its_first_piece(rig):
    timed = {"timeout": 5}
    assert rig.exchange(s=("v1/completions", {**STREAM, **timed})) == {}
    assert rig.exchange("s", w=("v1/completions", {**BODY, **timed})) == {}
    rig.gain("s", "quick")
    rig.gain("w", "quick")
    reply = rig.exchange("s", "w")["s"]
    assert (reply.last, reply.status, reply.content_type) == (False, 200, "text/event-stream")
    assert b'"quick"' in reply.body
    rig.gain("s", "", finish_reason="length")
    rig.gain("w", "", finish_reason="length")
    replies = rig.exchange("s", "w")
    assert replies["s"].last is True
    assert (replies["w"].last, replies["w"].content_type) == (None, "application/json")
    assert json.loads(replies["w"].body)["choices"][0]["text"] == "quick"


def test_stream_with_a_timeout_that_ends_at_once_is_one_complete_reply(rig):
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "timeout": 5}
    assert rig.exchange(s=("v1/chat/completions", body)) == {}
    rig.gain("s", "quick", finish_reason="stop")
    reply = rig.exchange("s")["s"]
    assert (reply.last, reply.content_type) == (None, "text/event-stream")
    assert reply.body.count(b"data: ") == 3


@pytest.mark.parametrize("stream", [True, False])
def test_timeout_before_the_first_piece_is_a_504(rig, stream):
    rig.exchange(a=("v1/completions", {**BODY, "stream": stream, "timeout": 5}))
    rig.now += 4.9
    assert rig.exchange("a") == {}
    rig.now += 0.2
    reply = rig.exchange("a")["a"]
    assert (reply.status, reply.last) == (504, None)
    assert json.loads(reply.body)["error"]["type"] == "timeout_error"
    assert rig.engine.aborted == ["a"]
    assert rig.pump.num_open == 0


def test_timeout_of_a_running_stream_is_told_in_it(rig):
    rig.exchange(a=("v1/completions", {**STREAM, "timeout": 5}), b=("v1/completions", STREAM))
    rig.gain("a", "quick")
    rig.exchange("a", "b")
    rig.now += 6
    reply = rig.exchange("a", "b")["a"]
    assert reply.last is True
    assert b'"type":"timeout_error"' in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert rig.engine.aborted == ["a"]


def test_request_that_ends_with_its_timeout_is_answered(rig):
    rig.exchange(a=("v1/completions", {**BODY, "timeout": 5}))
    rig.gain("a", "quick", finish_reason="length")
    rig.now += 6
    assert rig.exchange("a")["a"].status == 200


def test_engines_refusal_of_a_request_with_a_timeout_has_a_status(rig):
    rig.exchange(a=("v1/completions", {**BODY, "timeout": 5}))
    rig.gain("a", "", finish_reason="error", error="Dead.", error_status=503)
    assert rig.exchange("a")["a"].status == 503


def read(rig, *ids):
    """Let the thread that reads large bodies finish, and exchange."""
    wait([reading.result for reading in rig.pump._reading.values()], timeout=10)
    return rig.exchange(*ids)


LARGE = {**STREAM, "prompt": "x " * LARGE_BODY_CHARACTERS}


@pytest.fixture
def may_read(rig, monkeypatch):
    """Large texts wait for this event while they are encoded, and then count as short ones."""
    event = threading.Event()
    encode = rig.tokenizer.encode

    def slow_encode(text, **options):
        if len(text) > LARGE_BODY_CHARACTERS:
            event.wait(10)
            text = "the fox"
        return encode(text, **options)

    monkeypatch.setattr(rig.tokenizer, "encode", slow_encode)
    return event


def test_large_body_is_read_beside_the_exchanges(rig, may_read):
    rig.exchange(a=("v1/completions", STREAM))
    tokenize = ("tokenize", {"prompt": LARGE["prompt"]})
    assert rig.exchange("a", b=("v1/completions", LARGE), t=tokenize) == {}
    rig.gain("a", "quick")
    assert b'"quick"' in rig.exchange("a", "b", "t")["a"].body
    assert rig.engine.added == ["a"]
    may_read.set()
    replies = read(rig, "a", "b", "t")
    assert (replies["b"].status, replies["b"].last) == (200, False)
    assert json.loads(replies["t"].body)["count"] == 2
    assert rig.engine.added == ["a", "b"]
    rig.gain("b", "fox", finish_reason="length")
    assert rig.exchange("a", "b")["b"].last is True


def test_large_body_that_is_wrong_is_refused_with_its_status(rig):
    named = Incoming("v1/completions", LARGE, client_id="job")
    assert rig.pump.exchange(["b"], lambda index: named) == []
    reply = read(rig, "b")["b"]
    assert (reply.status, reply.last) == (400, None)
    assert reply.headers == {"X-Client-Request-Id": "job"}
    assert json.loads(reply.body)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x" * LARGE_BODY_CHARACTERS, "max_tokens": 1},
        {"prompt": ["x" * 999] * 20},
        {"prompt": [7] * 2 * LARGE_BODY_CHARACTERS},
        {"messages": [{"role": "user", "content": [{"text": "x " * LARGE_BODY_CHARACTERS}]}]},
    ],
)
def test_large_bodies_of_any_shape_are_read_beside_the_exchanges(rig, body):
    route = "v1/chat/completions" if "messages" in body else "v1/completions"
    body["cache_salt"] = "x"
    assert rig.exchange(b=(route, body)) == {}
    assert read(rig, "b")["b"].status in (200, 400)


def test_client_with_a_large_body_that_leaves_is_forgotten(rig, may_read):
    rig.exchange(b=("v1/completions", LARGE))
    assert rig.exchange() == {}
    may_read.set()
    assert json.loads(rig.exchange(d=("drain", None))["d"].body) == {"status": "drained"}
    assert rig.engine.added == []


def test_drain_waits_for_a_large_body_that_is_being_read(rig, may_read):
    rig.exchange(b=("v1/completions", LARGE))
    assert rig.exchange("b", d=("drain", None)) == {}
    may_read.set()
    assert read(rig, "b", "d").keys() == {"b"}
    rig.gain("b", "fox", finish_reason="length")
    assert rig.exchange("b", "d").keys() == {"b", "d"}


# --- what the client calls a request ---------------------------------------------------------


def test_name_that_the_client_gave_comes_back(rig):
    named = Incoming("v1/completions", BODY, client_id="job-7")
    (reply,) = rig.pump.exchange(["r"], lambda index: named)
    assert reply.headers == {"X-Client-Request-Id": "job-7"}
    assert rig.engine.added == ["r"]
    rig.gain("r", "fox", finish_reason="length")
    assert json.loads(rig.exchange("r")["r"].body)["id"] == "cmpl-job-7"
    wrong = Incoming("v1/completions", {}, client_id="job-8")
    (reply,) = rig.pump.exchange(["q"], lambda index: wrong)
    assert (reply.status, reply.headers) == (400, {"X-Client-Request-Id": "job-8"})


def test_impossible_name_in_a_header_is_left_out(rig):
    named = Incoming("v1/completions", BODY, client_id="a\r\nSet-Cookie: b")
    (reply,) = rig.pump.exchange(["r"], lambda index: named)
    assert (reply.status, reply.headers) == (200, {})


# --- tokens, draining ------------------------------------------------------------------------


def test_tokenize_and_detokenize_are_answered_at_once(rig):
    body = json.loads(rig.exchange(t=("tokenize", {"prompt": "the fox"}))["t"].body)
    reply = rig.exchange(d=("detokenize", {"tokens": body["tokens"]}))["d"]
    assert json.loads(reply.body) == {"prompt": "the fox"}
    assert rig.exchange(t=("tokenize", None))["t"].status == 400


def test_drain_stops_admission_and_answers_when_the_last_request_is_gone(rig):
    rig.exchange(a=("v1/completions", STREAM))
    assert rig.exchange("a", d=("drain", None)) == {}
    reply = rig.exchange("a", "d", n=("v1/completions", STREAM))["n"]
    assert (reply.status, reply.headers) == (503, {"Retry-After": "5"})
    assert json.loads(reply.body)["error"]["code"] == "draining"
    health = rig.exchange("a", "d", h=("health", None))["h"]
    assert (health.status, json.loads(health.body)) == (200, {"status": "draining"})
    assert rig.exchange("a", "d") == {}
    rig.gain("a", "fox", finish_reason="length")
    replies = rig.exchange("a", "d")
    assert replies["a"].last is True
    assert json.loads(replies["d"].body) == {"status": "drained"}
    assert rig.exchange(n=("v1/completions", STREAM))["n"].status == 503


def test_drain_of_an_idle_server_is_answered_at_once(rig):
    assert json.loads(rig.exchange(d=("drain", None))["d"].body) == {"status": "drained"}


def test_drain_gives_up_after_its_timeout_but_admits_nobody(rig):
    rig.exchange(a=("v1/completions", STREAM))
    rig.exchange("a", d=("drain", {"timeout": 3}))
    rig.now += 3
    reply = rig.exchange("a", "d")["d"]
    assert reply.status == 504
    assert "1 requests are still open" in json.loads(reply.body)["error"]["message"]
    assert rig.exchange("a", n=("v1/completions", STREAM))["n"].status == 503


@pytest.mark.parametrize("body", [{"timeout": -1}, {"timeout": "soon"}, {"x": 1}, b"{", [1]])
def test_wrong_drain_stops_nothing(rig, body):
    assert rig.exchange(d=("drain", body))["d"].status == 400
    assert rig.exchange(n=("v1/completions", STREAM))["n"].status == 200


def test_resume_takes_requests_again_and_ends_a_drain(rig):
    rig.exchange(a=("v1/completions", STREAM))
    rig.exchange("a", d=("drain", None))
    replies = rig.exchange("a", "d", r=("resume", None))
    assert replies["r"].status == 200
    assert json.loads(replies["d"].body) == {"status": "resumed"}
    assert rig.exchange("a", n=("v1/completions", STREAM))["n"].status == 200


def test_drain_can_be_switched_off():
    rig = Rig(enable_drain=False)
    for route in ("drain", "resume"):
        assert rig.exchange(d=(route, None))["d"].status == 404
    assert rig.exchange(n=("v1/completions", STREAM))["n"].status == 200


def test_client_that_leaves_a_drain_does_not_resume(rig):
    rig.exchange(a=("v1/completions", STREAM))
    rig.exchange("a", d=("drain", None))
    assert rig.exchange("a", n=("v1/completions", STREAM))["n"].status == 503


# --- several outputs of a prompt -------------------------------------------------------------


def test_stop_string_of_one_output_stops_that_output_only(rig):
    rig.exchange(w=("v1/completions", {**BODY, "n": 2, "stop": "fox"}))
    rig.gain("w", "quick fox", index=1)
    assert rig.exchange("w") == {}
    assert rig.engine.aborted == [("w", 1)]
    rig.gain("w", "lazy dog", index=0, finish_reason="length")
    choices = json.loads(rig.exchange("w")["w"].body)["choices"]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [
        ("lazy dog", "length"),
        ("quick ", "stop"),
    ]


# --- grammars --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_grammar_that_cannot_be_followed_is_answered_with_a_status(rig, stream):
    body = {**BODY, "stream": stream, "guided_regex": "("}
    assert rig.exchange(g=("v1/completions", body)) == {}
    rig.gain("g", "", finish_reason="error", error="Unclosed group.", error_status=400)
    reply = rig.exchange("g")["g"]
    assert (reply.status, reply.last) == (400, None)
    assert json.loads(reply.body)["error"]["message"] == "Unclosed group."
    assert rig.pump.num_open == 0


def test_request_with_a_grammar_is_opened_when_that_is_accepted(rig):
    body = {"messages": [{"role": "user", "content": "a"}], "guided_regex": "a+"}
    replies = rig.exchange(
        s=("v1/chat/completions", {**body, "stream": True}), w=("v1/chat/completions", body)
    )
    assert replies == {}
    rig.now += 2 * TOUCH_SECONDS
    assert rig.exchange("s", "w") == {}
    rig.gain("s", "")
    rig.gain("w", "")
    replies = rig.exchange("s", "w")
    assert [(r.status, r.last) for r in replies.values()] == [(200, False)] * 2
    assert replies["s"].content_type == "text/event-stream"
    assert b'"role":"assistant"' in replies["s"].body
    assert (replies["w"].body, replies["w"].content_type) == (b"", "application/json")
    # Neither is any nearer to its first token.
    assert len(rig.pump._waiting) == 2
    rig.gain("s", "a")
    assert b'"role"' not in rig.exchange("s", "w")["s"].body
    rig.gain("w", "a", finish_reason="stop", has_stop_token=False)
    choice = json.loads(rig.exchange("s", "w")["w"].body)["choices"][0]
    assert choice["message"]["content"] == "a"


def test_notice_of_a_grammar_does_not_open_a_request_with_a_timeout(rig):
    rig.exchange(a=("v1/completions", {**STREAM, "timeout": 5, "guided_regex": "a"}))
    rig.gain("a", "")
    assert rig.exchange("a") == {}
    rig.now += 6
    assert rig.exchange("a")["a"].status == 504
