import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support import fake_core

from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_client import EngineClient
from pagetier.handler.errors import EngineDead, EngineError
from pagetier.handler.messages import AddRequest, RequestOutput
from pagetier.handler.sampling_params import SamplingParams

TESTS = Path(__file__).parent
CONFIG = EngineConfig(model="fake")


@pytest.fixture(autouse=True)
def _fake_core_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


@pytest.fixture
def start():
    """Starts clients that are closed after the test; each has its outputs in ``.outputs``."""
    clients = []

    def start_client(builder="build", config=CONFIG, **kwargs):
        outputs = queue.Queue()
        client = EngineClient(
            config,
            on_outputs=lambda batch: [outputs.put(o) for o in batch],
            builder=f"support.fake_core:{builder}",
            **kwargs,
        )
        client.outputs = outputs
        clients.append(client)
        return client

    yield start_client
    for client in clients:
        client.close()


def request(request_id, prompt=(7, 8, 9), **params):
    return AddRequest(request_id, list(prompt), SamplingParams(**params))


def collect(client, *request_ids):
    """All outputs of these requests until each has ended."""
    gathered: dict[str, list[RequestOutput]] = {r: [] for r in request_ids}
    open_ids = set(request_ids)
    while open_ids:
        output = client.outputs.get(timeout=10)
        gathered[output.request_id].append(output)
        if output.finish_reason is not None:
            open_ids.discard(output.request_id)
    return gathered


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition, seconds):
    """Whether ``condition`` comes true within ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_tokens_arrive_in_order_for_each_request(start):
    lines = []
    client = start(on_progress=lines.append)
    assert lines == ["making a fake engine"]
    assert client.ready.vocab_size == fake_core.VOCAB_SIZE
    client.add(request("a", [10], max_tokens=5))
    client.add(request("b", [20], max_tokens=3))
    outputs = collect(client, "a", "b")
    assert [o.new_token_ids for o in outputs["a"]] == [[11], [12], [13], [14], [15]]
    assert [o.new_token_ids for o in outputs["b"]] == [[21], [22], [23]]
    assert outputs["a"][-1].finish_reason == "length"
    assert client.alive


def test_refused_request_fails_alone(start):
    client = start(config=EngineConfig(model="fake", max_num_queued_reqs=1))
    client.add(request("a", max_tokens=300))
    client.outputs.get(timeout=10)
    client.add(request("b"))
    refused = next(
        o for o in iter(lambda: client.outputs.get(timeout=10), None) if o.request_id == "b"
    )
    assert (refused.finish_reason, refused.error_status, refused.retry_after) == ("error", 429, 2)
    assert "requests are queued" in refused.error
    assert client.alive


def test_aborted_request_is_not_reported_again(start):
    client = start()
    client.add(request("a", max_tokens=None))
    client.outputs.get(timeout=10)
    client.abort(["a", "unknown"])
    while not client.outputs.empty():
        client.outputs.get()
    stats = client.stats().stats
    assert stats["num_aborted"] == 1
    assert stats["num_requests_running"] == 0
    assert client.outputs.empty()


def test_stats_carry_the_trace_only_when_asked_for(start):
    client = start()
    assert client.stats().trace is None
    assert client.stats(include_trace=True).trace == [{"step": 0}]


def test_start_fails_with_the_engines_own_sentence(start):
    with pytest.raises(EngineError, match=r"^The model 'nowhere' cannot be read"):
        start("build_unreadable")


def test_start_fails_when_the_builder_is_unknown(start):
    with pytest.raises(EngineError, match=r"AttributeError.*its log"):
        start("no_such")


def test_killed_engine_fails_all_in_flight_at_once(start):
    deaths = queue.Queue()
    client = start(on_death=deaths.put)
    for i in range(3):
        client.add(request(str(i), max_tokens=None))
    client.outputs.get(timeout=10)
    killed_at = time.monotonic()
    os.kill(client.pid, signal.SIGKILL)
    outputs = collect(client, "0", "1", "2")
    assert time.monotonic() - killed_at < 2.0
    assert "killed by SIGKILL" in deaths.get(timeout=2)
    last = [o[-1] for o in outputs.values()]
    assert [o.error_status for o in last] == [503] * 3
    assert all("killed by SIGKILL" in o.error for o in last)
    assert not client.alive
    with pytest.raises(EngineDead):
        client.add(request("late"))
    with pytest.raises(EngineDead):
        client.stats()


def test_stats_waiter_is_released_when_the_engine_dies(start):
    client = start()
    os.kill(client.pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (client.pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(EngineDead, match="SIGKILL"):
        client.stats(timeout=30)
    assert time.monotonic() - begun < 3.0


def test_stats_give_up_on_a_busy_engine(start):
    client = start()
    os.kill(client.pid, signal.SIGSTOP)
    with pytest.raises(EngineDead, match=r"within 0\.2 s"):
        client.stats(timeout=0.2)


def test_broken_step_is_told_without_the_exceptions_text(start):
    client = start("build_breaking")
    client.add(request("a", max_tokens=None))
    last = collect(client, "a")["a"][-1]
    assert last.error_status == 503
    assert "The engine broke (RuntimeError)" in last.error
    assert "a fault in step 3" not in last.error


@pytest.mark.parametrize("stopped", [False, True])
def test_close_ends_the_process_within_a_second_in_an_endless_step(start, stopped):
    client = start("build_endless_step")
    client.add(request("a"))
    if stopped:
        os.kill(client.pid, signal.SIGSTOP)
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 1.0
    assert gone(client.pid)
    client.close()
    with pytest.raises(EngineDead, match="closed"):
        client.add(request("b"))


_PARENT = """
import sys, time
from pagetier.handler.config import EngineConfig
from pagetier.handler.engine_client import EngineClient
from pagetier.handler.messages import AddRequest
from pagetier.handler.sampling_params import SamplingParams

def say(line):
    print(line, flush=True)

client = EngineClient(
    EngineConfig(model="fake"),
    on_outputs=lambda outputs: say("output"),
    on_progress=say,
    builder="support.fake_core:" + sys.argv[1],
)
client.add(AddRequest("a", [7], SamplingParams(max_tokens=2)))
say("added")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("builder", "last_line"),
    [("build", "output"), ("build_endless_step", "added"), ("build_endlessly", "loading for ever")],
)
def test_engine_ends_with_its_killed_parent(builder, last_line):
    command = [sys.executable, "-c", _PARENT, builder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert last_line in iter(lambda: parent.stdout.readline().strip(), "")
        (engine,) = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        assert wait_until(lambda: gone(engine.pid), 2.0)
