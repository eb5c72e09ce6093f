"""Routes and protection through a real frontend: names, deadlines, draining, odd bytes."""

import json
import random
import time

import httpx
import openai
import pytest
from support.live import NAME, complete, live_server, wait_for

from pagetier.handler.errors import LaunchError

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]


def ask(server, route, body=None, **headers):
    """POST to a route beside ``v1``."""
    url = f"{server.base_url.removesuffix('/v1')}/{route}"
    return httpx.post(url, json=body, headers={**server.headers, **headers}, timeout=60)


def test_tokenize_and_detokenize_undo_each_other(server):
    text = "Return the größte value."
    answer = ask(server, "tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"]) > 3
    assert ask(server, "detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    usage = complete(server.client, text, max_tokens=1).usage
    assert usage.prompt_tokens == ask(server, "tokenize", {"prompt": text}).json()["count"]


def test_several_prompts_are_answered_as_if_alone(server):
    prompts = ["Return the", "Read up to", "Create a new"]
    alone = [complete(server.client, p, max_tokens=12).choices[0].text for p in prompts]
    together = complete(server.client, prompts, max_tokens=12)
    assert [c.text for c in together.choices] == alone
    streamed = dict.fromkeys(range(3), "")
    for chunk in complete(server.client, prompts, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == alone


def test_several_outputs_of_a_prompt_differ_but_begin_together(server):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "n": 3}
    choices = complete(server.client, "Return the", **options).choices
    assert [c.index for c in choices] == [0, 1, 2]
    assert len({c.text for c in choices}) == 3
    again = complete(server.client, "Return the", **options).choices
    assert [c.text for c in again] == [c.text for c in choices]


def test_repeated_prompt_is_told_as_cached(server):
    prompt = "Convert a string or number to a floating point number, if possible. " * 4
    complete(server.client, prompt, max_tokens=1)
    usage = complete(server.client, prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens // 2


def test_name_of_a_request_comes_back(server):
    body = {"prompt": "Return", "max_tokens": 1}
    answer = ask(server, "v1/completions", body, **{"X-Request-Id": "job-7"})
    assert answer.json()["id"] == "cmpl-job-7"
    assert answer.headers["X-Client-Request-Id"] == "job-7"
    refused = ask(server, "v1/completions", {}, **{"x-request-id": "job-8"})
    assert (refused.status_code, refused.headers["X-Client-Request-Id"]) == (400, "job-8")


@pytest.mark.parametrize("stream", [False, True])
def test_timeout_before_the_first_piece_is_a_504(server, stream):
    options = {"timeout": 0.0001, "ignore_eos": True}
    options = {"max_tokens": 400, "stream": stream, "extra_body": options}
    with pytest.raises(openai.APIStatusError) as caught:
        complete(server.client, "Return the", **options)
    assert caught.value.status_code == 504
    assert caught.value.body["type"] == "timeout_error"
    wait_for(lambda: server.stats()["num_requests_running"] == 0, 1.0, "it was not aborted")


def test_timeout_of_a_running_stream_is_told_in_it(server):
    options = {"timeout": 1.0, "ignore_eos": True}
    before = time.monotonic()
    # A machine may make all the tokens within the second: several streams take longer together.
    streams = [
        complete(server.client, f"Return {i}", max_tokens=480, stream=True, extra_body=options)
        for i in range(24)
    ]
    errors = []
    for stream in streams:
        try:
            list(stream)
        except openai.APIError as error:
            errors.append(error.body["type"])
    assert set(errors) == {"timeout_error"}
    assert time.monotonic() - before < 30


def test_timeout_that_does_not_pass_changes_nothing(server):
    alone = complete(server.client, "Return the", max_tokens=12).choices[0].text
    options = {"timeout": 60, "ignore_eos": True}
    whole = complete(server.client, "Return the", max_tokens=12, extra_body=options)
    assert whole.choices[0].text == alone
    chunks = complete(server.client, "Return the", max_tokens=12, stream=True, extra_body=options)
    assert "".join(c.choices[0].text for c in chunks) == alone


def test_drain_waits_for_the_last_stream_and_resume_takes_requests_again(server):
    stream = complete(server.client, "Return the", max_tokens=300, stream=True)
    next(stream)
    try:
        assert ask(server, "drain", {"timeout": 0}).status_code == 504
        with pytest.raises(openai.InternalServerError) as caught:
            complete(server.client, "Return", max_tokens=1)
        assert caught.value.status_code == 503
        assert caught.value.body["code"] == "draining"
        assert caught.value.response.headers["Retry-After"] == "5"
        assert ask(server, "health").json() == {"status": "draining"}
        assert sum(1 for _ in stream) > 0
        assert ask(server, "drain").json() == {"status": "drained"}
    finally:
        assert ask(server, "resume").json() == {"status": "ok"}
    assert complete(server.client, "Return", max_tokens=1).choices


def test_odd_bytes_are_answered_and_disturb_nobody(server):
    alone = complete(server.client, "Read up to", max_tokens=200).choices[0].text
    stream = complete(server.client, "Read up to", max_tokens=200, stream=True)
    draw = random.Random(1)
    good = json.dumps({"model": NAME, "prompt": "Return", "max_tokens": 2}).encode()
    statuses = set()
    for _ in range(100):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        statuses.add(server.post("completions", bytes(data)).status_code)
    assert statuses <= {200, 400, 404}
    assert 400 in statuses
    assert "".join(c.choices[0].text for c in stream if c.choices) == alone


def test_archive_that_names_files_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGETIER_MODEL_PATHS", str(tmp_path / "models"))
    with (
        pytest.raises(LaunchError, match=r"'model' names .* none of the folders"),
        live_server(tmp_path),
    ):
        pass


def test_body_that_is_too_large_is_refused_by_the_frontend(server):
    assert server.post("completions", b'{"prompt": "' + b"x" * 2**24).status_code == 413
