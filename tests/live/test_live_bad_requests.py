"""Every wrong request is answered in OpenAI's error shape, and disturbs nobody else."""

import json
import re

import httpx
import openai
import pytest
from support.live import NAME, complete

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]

GOOD = {"model": NAME, "prompt": "Return the", "max_tokens": 4}


@pytest.fixture
def bystander(server):
    """A stream that runs while the wrong request is answered, and must come out as if alone."""
    options = {"max_tokens": 40}
    alone = complete(server.client, "Read up to", **options).choices[0].text
    stream = complete(server.client, "Read up to", stream=True, **options)
    text = next(stream).choices[0].text
    yield server
    text += "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text == alone


@pytest.mark.parametrize(
    ("route", "body", "status", "says"),
    [
        ("completions", "{", 400, "JSON"),
        ("completions", "", 400, ""),
        ("completions", "[1, 2]", 400, ""),
        ("completions", {"max_tokens": 4}, 400, "prompt"),
        ("completions", {**GOOD, "max_tokens": "four"}, 400, "max_tokens"),
        ("completions", {**GOOD, "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {**GOOD, "temperature": -1}, 400, "temperature"),
        ("completions", {**GOOD, "top_p": 0}, 400, "top_p"),
        ("completions", {**GOOD, "logprobs": 1000}, 400, "logprobs"),
        ("completions", {**GOOD, "prompt": ""}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": {"text": "x"}}, 400, "prompt"),
        ("completions", {**GOOD, "prompt": [10**9]}, 400, ""),
        ("completions", {**GOOD, "tempratur": 1}, 400, "tempratur"),
        ("completions", {**GOOD, "n": 65}, 400, "n must be"),
        ("completions", {**GOOD, "guided_regex": "("}, 400, "unclosed group"),
        ("completions", {**GOOD, "guided_json": {"type": 1}, "stream": True}, 400, "type"),
        ("completions", {**GOOD, "model": "other"}, 404, "other"),
        ("chat/completions", {"model": NAME, "messages": []}, 400, "messages"),
        ("chat/completions", {"model": NAME, "messages": [{"role": 1}]}, 400, "messages"),
        ("embeddings", {"model": NAME, "input": "x"}, 404, "embeddings"),
    ],
)
def test_wrong_request_is_refused_with_its_reason(bystander, route, body, status, says):
    content = body if isinstance(body, str) else json.dumps(body)
    response = bystander.post(route, content)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert "Traceback" not in error["message"]


def test_prompt_too_long_names_both_lengths(bystander):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(bystander.client, "word " * 5000, max_tokens=4)
    error = caught.value.body
    max_model_len = bystander.stats()["max_model_len"]
    assert error["code"] == "context_length_exceeded"
    assert str(max_model_len) in error["message"]
    numbers = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert max(numbers) >= 5000, "the prompt's own length is missing"


def test_wrong_key_is_refused_by_the_frontend(bystander):
    response = bystander.post("completions", json.dumps(GOOD), key="wrong")
    assert response.status_code == 400
    assert response.json()["type"] == "InvalidKeyException"


def test_unregistered_model_is_refused_by_the_frontend(bystander):
    url = bystander.base_url.replace(f"/{NAME}/", "/nobody/") + "/models"
    response = httpx.get(url, headers=bystander.headers)
    assert response.status_code == 404
    assert response.json()["type"] == "ModelNotFoundException"


def test_models_cannot_be_registered_over_http(bystander):
    url = f"{bystander.server.management_url}/models?url=https://127.0.0.1/x.mar"
    response = httpx.post(
        url, headers={"Authorization": f"Bearer {bystander.server._management_key}"}
    )
    assert response.status_code in (405, 403)
