"""A real TorchServe with the embedded model, and what live tests ask of it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from pagetier.handler.archive import create_archive
from pagetier.handler.torchserve import TorchServe
from support.ports import free_ports
from support.tokenizers import TOOL_TEMPLATE

MODEL_FOLDER = Path(__file__).parents[2] / "model_store" / "pydoc-llama"
NAME = "pydoc"
READY_TIMEOUT_S = 120.0
# Few blocks, so that many requests at once are swapped and recomputed, too.
SETTINGS = {
    "dtype": "float32",
    "max_num_seqs": 32,
    "num_gpu_blocks_override": 96,
    "swap_space": 0.005,
}


class LiveServer:
    """A running server, its clients, and its processes."""

    def __init__(self, server: TorchServe) -> None:
        self.server = server
        self.base_url = server.openai_base_url(NAME)
        self.headers = {"Authorization": f"Bearer {server.inference_key}"}
        self.client = openai.OpenAI(
            base_url=self.base_url, api_key=server.inference_key, max_retries=0, timeout=60
        )

    def stats(self) -> dict[str, Any]:
        """The answer of the statistics route."""
        url = f"{self.base_url.removesuffix('/v1')}/stats"
        return httpx.get(url, headers=self.headers, timeout=10).raise_for_status().json()

    def post(self, route: str, content: bytes | str, key: str | None = None) -> httpx.Response:
        """POST a raw body to a route under the base URL."""
        headers = self.headers if key is None else {"Authorization": f"Bearer {key}"}
        headers = headers | {"Content-Type": "application/json"}
        return httpx.post(f"{self.base_url}/{route}", content=content, headers=headers, timeout=30)

    def worker(self) -> psutil.Process:
        """The handler's process."""
        [pid] = self.server.worker_pids
        return psutil.Process(pid)

    def engine(self) -> psutil.Process:
        """The engine's process."""
        [engine] = [
            process
            for process in self.worker().children(recursive=True)
            if "pagetier.handler.engine_process" in process.cmdline()
        ]
        return engine

    def wait_until_it_answers(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when a completion succeeds."""

        def answers() -> bool:
            with contextlib.suppress(openai.OpenAIError):
                return bool(complete(self.client, "Return", max_tokens=1).choices)
            return False

        wait_for(answers, timeout_s, "the server did not answer again")


@contextlib.contextmanager
def live_server(folder: Path) -> Iterator[LiveServer]:
    """Serve the embedded model, with tools, from ``folder``, which takes archive and logs."""
    template = folder / "tools.jinja"
    template.write_text(TOOL_TEMPLATE, encoding="utf-8")
    settings = {**SETTINGS, "chat_template": str(template)}
    archive = create_archive(str(MODEL_FOLDER), folder / f"{NAME}.mar", settings=settings)
    with TorchServe([archive], port=free_ports(), log_dir=folder / "logs") as server:
        server.wait_ready(READY_TIMEOUT_S)
        live = LiveServer(server)
        with live.client:
            yield live


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    """A greedy completion of exactly ``max_tokens`` tokens."""
    options = {"temperature": 0, "extra_body": {"ignore_eos": True}} | options
    return client.completions.create(model=NAME, prompt=prompt, **options)


def wait_for(
    condition: Callable[[], bool], timeout_s: float, otherwise: str | Callable[[], str]
) -> float:
    """Seconds until ``condition`` held; fails with ``otherwise`` after ``timeout_s``."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            reason = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(f"{reason} within {timeout_s} s")
        time.sleep(0.02)
    return time.monotonic() - start


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that waits to be collected has."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
