import pytest
from support.live import live_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("live")) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The session's server, whose engine must be idle and whole again after each test."""
    yield shared_server
    shared_server.wait_until_it_answers()
    stats = shared_server.stats()
    assert stats["num_requests_running"] == 0
    assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]
