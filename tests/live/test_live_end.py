"""Nothing of ours outlives a killed frontend."""

import psutil
import pytest
from support.live import complete, live_server, runs, wait_for

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]


def test_killed_frontend_takes_handler_and_engine_along(tmp_path):
    with live_server(tmp_path) as server:
        frontend = psutil.Process(server.server.pid)
        family = {"frontend": frontend, "handler": server.worker(), "engine": server.engine()}
        stream = complete(server.client, "Return the", max_tokens=400, stream=True)
        next(stream)
        frontend.kill()

        def left():
            return [name for name, process in family.items() if runs(process)]

        wait_for(lambda: not left(), 2.0, lambda: f"{left()} outlived the frontend")
