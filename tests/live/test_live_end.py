"""Nothing of ours outlives a killed frontend."""

import psutil
import pytest
from support.live import complete, live_server, wait_for

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]


def test_killed_frontend_takes_handler_and_engine_along(tmp_path):
    with live_server(tmp_path) as server:
        frontend = psutil.Process(server.server.pid)
        family = [frontend, server.worker(), server.engine()]
        stream = complete(server.client, "Return the", max_tokens=400, stream=True)
        next(stream)
        frontend.kill()
        wait_for(
            lambda: not any(_runs(process) for process in family),
            2.0,
            "a process outlived the frontend",
        )


def _runs(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
