"""The handler in real ``ts`` code, with an engine process of its own but no model."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.frontend import Client, Frontend
from support.tokenizers import byte_level_tokenizer

from pagetier.handler import service
from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError
from pagetier.handler.service import PagetierHandler, check_paths, read_config

TESTS = Path(__file__).parent
STREAM = {"prompt": "the fox", "max_tokens": 20, "stream": True}
WHOLE = {"prompt": "the fox", "max_tokens": 20}


class FakeEngineHandler(PagetierHandler):
    engine_builder = "support.fake_core:build"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    byte_level_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def frontend(model_dir, monkeypatch):
    """A frontend with a loaded worker; the worker's watch over this process is left out."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setattr(service, "_watch_parent", lambda: None)
    levels = {name: logging.getLogger(name).level for name in ("", "pagetier")}
    handler = FakeEngineHandler()
    frontend = Frontend(handler, {"model": "model"}, str(model_dir))
    handler.initialize(frontend.service.context)
    frontend.handler = handler
    yield frontend
    handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def stats(frontend):
    client = frontend.send("stats")
    frontend.finish(client)
    return client.json


def test_streams_and_whole_responses_are_complete_and_equal(frontend):
    streams = [frontend.send("v1/completions", STREAM) for _ in range(5)]
    whole = frontend.send("v1/completions", WHOLE)
    frontend.finish(*streams, whole)
    (choice,) = whole.json["choices"]
    assert len(choice["text"]) > 0
    assert whole.json["usage"]["completion_tokens"] == 20
    assert [s.text for s in streams] == [choice["text"]] * 5
    assert {(s.status, s.phrase, s.content_type) for s in streams} == {
        (200, "OK", "text/event-stream")
    }
    assert (whole.status, whole.content_type) == (200, "application/json")
    assert all(s.events[-1] is None for s in streams)


def test_request_that_joins_later_is_served_beside_the_others(frontend):
    first = frontend.send("v1/completions", {**STREAM, "max_tokens": 200})
    while first.body == b"":
        frontend.call()
    second = frontend.send(
        "v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "stream": True},
    )
    frontend.finish(second)
    assert first.in_flight
    assert second.events[0]["choices"][0]["delta"]["role"] == "assistant"
    frontend.finish(first)
    assert first.events[-2]["choices"][0]["finish_reason"] == "length"


def test_bad_requests_have_their_own_status_and_disturb_nobody(frontend):
    good = frontend.send("v1/completions", STREAM)
    bad = {
        frontend.send("v1/completions", {**STREAM, "max_tokens": "x"}): (400, "Bad Request"),
        frontend.send("v1/completions", bytearray(b"{")): (400, "Bad Request"),
        frontend.send("v1/completions"): (400, "Bad Request"),
        frontend.send("v1/completions", {**STREAM, "model": "x"}): (404, "Not Found"),
        frontend.send("v1/nothing", {}): (404, "Not Found"),
    }
    assert frontend.call() == 6
    for client, (status, phrase) in bad.items():
        assert (client.status, client.phrase) == (status, phrase)
        assert client.json["error"]["type"] == "invalid_request_error"
    frontend.finish(good)
    assert good.status == 200
    assert len(good.text) > 0


def test_plain_prediction_takes_text(frontend):
    text = frontend.send("", "the fox", "text/plain")
    fields = frontend.send("", {"prompt": "the fox"})
    frontend.finish(text, fields)
    assert {**text.json, "id": None} == {**fields.json, "id": None}
    assert text.json["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_is_aborted_within_a_second(frontend, stream):
    frontend.send("v1/completions", {**STREAM, "max_tokens": 4000})
    leaves = frontend.send("v1/completions", {**STREAM, "max_tokens": 4000, "stream": stream})
    frontend.call()
    leaves.connected = False
    left_at = time.monotonic()
    while stats(frontend)["num_aborted"] == 0:
        assert time.monotonic() - left_at < 1.0
    assert stats(frontend)["num_requests_running"] == 1


def test_clients_that_leave_all_together_are_aborted_within_a_second(frontend):
    """No further call comes then."""
    for _ in range(3):
        frontend.send("v1/completions", {**STREAM, "max_tokens": 4000})
    frontend.call()
    frontend.jobs.clear()
    engine = frontend.handler._engine
    left_at = time.monotonic()
    while engine.stats().stats["num_aborted"] < 3:
        assert time.monotonic() - left_at < 1.5
        time.sleep(0.02)
    assert stats(frontend)["num_requests_open"] == 0


def test_description_is_given_and_the_next_request_served(frontend):
    description = frontend.describe()
    frontend.call()
    assert description.json["model"] == "tiny"
    client = frontend.send("v1/completions", STREAM)
    frontend.finish(client)
    assert client.events[-1] is None


def test_description_that_is_repeated_for_ever_is_logged(frontend, monkeypatch, caplog):
    monkeypatch.setattr("pagetier.handler.service._REPEATED_DESCRIPTION_SECONDS", 0.0)
    frontend.describe()
    frontend.call()
    description = frontend.describe()
    frontend.call()
    assert "restart TorchServe" not in caplog.text
    frontend.jobs[description.request_id] = Client(description.request_id, description.message)
    frontend.call()
    assert "restart TorchServe" in caplog.text


def test_idle_call_answers_nothing(frontend):
    client = frontend.send("v1/completions", {**STREAM, "max_tokens": 4000})
    frontend.call()
    os.kill(frontend.handler._engine.pid, signal.SIGSTOP)
    answered = [frontend.call() for _ in range(20)]
    assert 0 in answered
    assert client.in_flight


def test_fault_of_the_pump_fails_nobody(frontend, monkeypatch):
    client = frontend.send("v1/completions", STREAM)
    frontend.call()
    pump = frontend.handler._pump
    with monkeypatch.context() as patch:
        patch.setattr(pump, "exchange", lambda ids, fetch: 1 / 0)
        assert frontend.call() == 0
    frontend.finish(client)
    assert client.events[-1] is None


def test_killed_engine_is_told_to_clients_and_ends_the_worker(frontend, monkeypatch):
    exits = []
    monkeypatch.setattr(service.os, "_exit", exits.append)
    stream = frontend.send("v1/completions", {**STREAM, "max_tokens": 4000})
    whole = frontend.send("v1/completions", {**WHOLE, "max_tokens": 4000})
    while stream.body == b"":
        frontend.call()
    os.kill(frontend.handler._engine.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    frontend.finish(stream)
    late = frontend.send("v1/completions", STREAM)
    frontend.finish(late)
    assert stream.events[-2]["error"]["type"] == "service_unavailable_error"
    assert (late.status, late.phrase) == (503, "Service Unavailable")
    assert whole.in_flight  # broken off when the worker ends
    while not exits:
        assert time.monotonic() - killed_at < 2.0
        frontend.call()
    assert exits == [1]


# --- processes -------------------------------------------------------------------------------

_WORKER = """
import sys, time
from support.frontend import Client, Frontend
from test_service import FakeEngineHandler
handler = FakeEngineHandler()
handler.engine_builder = sys.argv[2]
frontend = Frontend(handler, {"model": "model"}, sys.argv[1])
handler.initialize(frontend.service.context)
client = frontend.send("v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": True})
frontend.call()
# In one piece: metrics are written beside it.
__import__("os").write(1, f"pids {__import__('os').getpid()} {handler._engine.pid}\\n".encode())
while True:
    frontend.call()
"""

_FRONTEND = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids, seconds):
    end = time.monotonic() + seconds
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, f"still there: {[p for p in pids if not gone(p)]}"
        time.sleep(0.01)


@pytest.mark.parametrize("victim", ["frontend", "worker"])
@pytest.mark.parametrize("builder", ["build", "build_endless_step"])
def test_nothing_is_left_of_killed_processes(model_dir, monkeypatch, victim, builder):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    command = [sys.executable, "-c", _FRONTEND, _WORKER, str(model_dir)]
    with subprocess.Popen(
        [*command, f"support.fake_core:{builder}"], stdout=subprocess.PIPE, text=True
    ) as parent:
        line = next(line for line in parent.stdout if line.startswith("pids "))
        worker, engine = map(int, line.split()[1:])
        os.kill(parent.pid if victim == "frontend" else worker, signal.SIGKILL)
        wait_until_gone([worker, engine], 2.0)
        parent.kill()


def test_engine_that_cannot_start_ends_the_worker_with_one_line(model_dir, monkeypatch, caplog):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setattr(service, "_watch_parent", lambda: None)
    handler = FakeEngineHandler()
    handler.engine_builder = "support.fake_core:build_unreadable"
    frontend = Frontend(handler, {"model": "model"}, str(model_dir))
    with pytest.raises(SystemExit) as caught:
        handler.initialize(frontend.service.context)
    assert caught.value.code == 1
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.getMessage() == (
        "pagetier cannot start: The model 'nowhere' cannot be read: no config.json."
    )
    assert record.exc_info is None


def test_second_worker_of_a_model_says_why_it_does_not_start(
    frontend, model_dir, monkeypatch, caplog
):
    monkeypatch.setattr(service, "_PLACE_SECONDS", 0.0)
    second = FakeEngineHandler()
    context = Frontend(second, {"model": "model"}, str(model_dir)).service.context
    with pytest.raises(SystemExit):
        second.initialize(context)
    assert "Another worker of this model runs already" in caplog.text
    frontend.handler.close()
    second.initialize(context)
    second.close()


# --- configuration ---------------------------------------------------------------------------


def test_bundled_files_are_found_in_the_archive(model_dir):
    config = read_config({"handler": {"model": "model", "tokenizer": "some/hub-id"}}, model_dir)
    assert config.model == str(model_dir / "model")
    assert config.tokenizer == "some/hub-id"


@pytest.mark.parametrize("yaml", [None, {}, {"handler": None}, {"handler": "model"}])
def test_missing_section_is_told(yaml, model_dir):
    with pytest.raises(ConfigError, match="no 'handler:' section"):
        read_config(yaml, str(model_dir))


def test_unknown_setting_is_told(model_dir):
    with pytest.raises(ConfigError, match="Unknown setting 'blocksize'"):
        read_config({"handler": {"model": "model", "blocksize": 3}}, str(model_dir))


@pytest.fixture
def outside(tmp_path):
    """Settings that name a model and a template outside the archive."""
    (tmp_path / "models" / "a").mkdir(parents=True)
    template = tmp_path / "template.jinja"
    template.write_text("")
    return EngineConfig.create(
        {"model": str(tmp_path / "models" / "a"), "chat_template": str(template)}
    )


def test_files_outside_the_archive_are_logged(outside, model_dir, caplog):
    caplog.set_level(logging.INFO)
    check_paths(outside, str(model_dir), None)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert all(text in messages[0] for text in ("'model'", outside.model, "outside the archive"))


def test_files_outside_the_allowed_folders_are_refused(outside, model_dir, tmp_path):
    check_paths(outside, str(model_dir), str(tmp_path))
    with pytest.raises(ConfigError, match=r"chat_template.*PAGETIER_MODEL_PATHS") as caught:
        check_paths(outside, str(model_dir), f"/nowhere:{tmp_path / 'models'}")
    assert caught.value.param == "chat_template"
    with pytest.raises(ConfigError, match="'model'"):
        check_paths(outside, str(model_dir), "")


def test_way_out_of_an_allowed_folder_is_no_way(model_dir, tmp_path):
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret").mkdir()
    for way in (tmp_path / "allowed" / ".." / "secret", tmp_path / "allowed" / "link"):
        if way.name == "link":
            way.symlink_to(tmp_path / "secret")
        config = EngineConfig.create({"model": str(way)})
        with pytest.raises(ConfigError, match="secret"):
            check_paths(config, str(model_dir), str(tmp_path / "allowed"))


def test_files_of_the_archive_and_hub_ids_need_no_permission(model_dir, caplog):
    caplog.set_level(logging.INFO)
    config = read_config({"handler": {"model": "model", "tokenizer": "some/hub-id"}}, model_dir)
    check_paths(config, str(model_dir), "")
    assert caplog.records == []


def test_name_of_a_request_comes_in_a_header_and_back(frontend):
    client = frontend.send("v1/completions", WHOLE, headers={"X-Request-ID": "job-7"})
    frontend.finish(client)
    assert client.json["id"] == "cmpl-job-7"
    assert client.headers["X-Client-Request-Id"] == "job-7"


def test_timeout_answers_with_its_status(frontend):
    client = frontend.send("v1/completions", {**WHOLE, "max_tokens": 4000, "timeout": 0.1})
    frontend.finish(client)
    assert (client.status, client.phrase) == (504, "Gateway Timeout")
    assert client.json["error"]["param"] == "timeout"
    while stats(frontend)["num_aborted"] == 0:
        pass


def test_drain_is_answered_when_the_last_stream_has_ended(frontend):
    stream = frontend.send("v1/completions", STREAM)
    frontend.call()
    drain = frontend.send("drain")
    late = frontend.send("v1/completions", STREAM)
    frontend.finish(stream, drain, late)
    assert stream.events[-1] is None
    assert drain.json == {"status": "drained"}
    assert (late.status, late.headers["Retry-After"]) == (503, "5")
