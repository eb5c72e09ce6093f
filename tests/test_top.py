import io
import os
import pty
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from support.stub_model import KEY, STATS, stub_model
from support.terminal import read_until

from pagetier.handler.cli import main
from pagetier.handler.top import Snapshot, picture


@pytest.fixture
def stub():
    with stub_model() as model:
        yield model


def shown(now, before=None):
    console = Console(record=True, width=100, force_terminal=False, file=io.StringIO())
    console.print(picture("stub", now, before))
    return {line.split("  ")[0]: line.split() for line in console.export_text().splitlines()}


def test_both_tiers_and_all_requests_are_shown():
    lines = shown(Snapshot(STATS, 0.0))
    assert lines["GPU"][-6:] == ["75", "%", "96", "24", "96.0", "MiB"]
    assert lines["CPU"][-6:] == ["50", "%", "128", "64", "128", "MiB"]
    assert lines["now"] == ["now", "3", "5", "2", "4", "1", "none"]


def test_rates_are_growth_over_time():
    later = STATS | {"generation_tokens": 100, "kv_offload_store_bytes": 2**20}
    lines = shown(Snapshot(later, 12.0), Snapshot(STATS, 10.0))
    assert lines["tokens generated"] == ["tokens", "generated", "50.0", "100"]
    assert lines["copied out"] == ["copied", "out", "512", "KiB", "1.0", "MiB"]


def test_rates_after_a_restart_are_unknown():
    before = STATS | {"generation_tokens": 100}
    lines = shown(Snapshot(STATS, 12.0), Snapshot(before, 10.0))
    assert lines["tokens generated"] == ["tokens", "generated", "-", "0"]


def test_latencies_are_shown_once_there_are_some():
    summary = {"count": 2, "sum": 3.0, "p50": 0.0125, "p90": 1.5, "p99": 2.0}
    lines = shown(Snapshot(STATS | {"time_to_first_token_seconds": summary}, 0.0))
    assert lines["first token"] == ["first", "token", "12.5", "ms", "1.50", "s", "2.00", "s"]
    assert lines["whole request"] == ["whole", "request", "-", "-", "-"]


def test_engine_without_a_cpu_tier_is_shown():
    lines = shown(Snapshot(STATS | {"num_cpu_blocks": 0, "num_cpu_blocks_free": 0}, 0.0))
    assert lines["CPU"][1] == "none"


def test_without_a_terminal_it_is_printed_once(stub, capsys):
    assert main(["top", stub.url, "--key", KEY, "--interval", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tokens generated") == 1
    assert "\x1b" not in printed


def test_mistakes_are_one_sentence(stub, capsys):
    assert main(["top", stub.url, "--key", "wrong"]) == 1
    assert "Give the key" in capsys.readouterr().err
    assert main(["top", stub.url, "--interval", "0"]) == 1
    assert capsys.readouterr().err == "pagetier: --interval must be above 0, not 0.0.\n"


def test_on_a_terminal_it_goes_on_until_ctrl_c_and_over_an_outage(stub):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pagetier", "top", stub.url, "--interval", "0.05"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PAGETIER_API_KEY": KEY, "TERM": "xterm", "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        read_until(ours, b"tokens generated")
        stub.stats = {}
        read_until(ours, b"answers, but not as")
        stub.stats = STATS | {"num_requests_running": 77}
        read_until(ours, b"77")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
