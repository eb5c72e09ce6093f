import contextlib

import pytest
from support.ports import free_ports
from support.stub_model import KEY, stub_model

from pagetier.handler.client import ServedModel
from pagetier.handler.errors import EngineError


@pytest.fixture
def stub():
    with stub_model() as model:
        yield model


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_address_may_end_with_the_version_of_the_api(stub, end):
    model = ServedModel(stub.url + end, KEY)
    assert model.url == stub.url
    assert model.name() == "stub"
    assert model.stats()["num_requests_running"] == 3


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8080", "http://127.0.0.1:8080", "http://h:x/predictions/m/1.0", "ftp://h/a/b"],
)
def test_address_of_no_model_is_refused_with_an_example(url):
    with pytest.raises(EngineError, match=r"must look like http://.*/predictions/NAME/1.0"):
        ServedModel(url)


def test_wrong_key_is_told_with_what_to_do(stub):
    with pytest.raises(EngineError, match=r"answers 400: Token .* failed\. Give the key"):
        ServedModel(stub.url, "wrong").stats()


def test_server_that_is_not_there_is_told():
    url = f"http://127.0.0.1:{free_ports()}/predictions/m/1.0"
    with pytest.raises(EngineError, match=r"Nobody answers at .*; is the server running\?"):
        ServedModel(url).stats()


def test_other_server_is_told_apart(stub):
    stub.stats = {"status": "Healthy"}
    with pytest.raises(EngineError, match="not as a model of pagetier"):
        ServedModel(stub.url, KEY).stats()


def ask(stub, content="hi"):
    body = {"messages": [{"role": "user", "content": content}]}
    return ServedModel(stub.url, KEY).stream("v1/chat/completions", body)


def test_refusal_carries_the_server_s_reason(stub):
    with pytest.raises(EngineError, match=r"answers 400: Too long\.$"):
        next(ask(stub, "refuse"))


def test_stream_that_breaks_off_is_an_error_after_what_came(stub):
    stub.pieces = ["Hel", None]
    events = ask(stub)
    assert next(events)["choices"][0]["delta"]["content"] == "Hel"
    with pytest.raises(EngineError, match="broke off"):
        next(events)


def test_closed_stream_hangs_up(stub):
    stub.hangs = True
    with contextlib.closing(ask(stub)) as events:
        next(events)
    assert stub.hung_up.wait(10)
