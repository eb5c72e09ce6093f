"""Free ports for servers of tests that run beside each other."""

import os
import socket

_NUM_PORTS = 5


def free_ports() -> int:
    """The first of five free neighbouring ports, from a range of the test process's own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    base = 28080 + 1000 * (worker % 16)
    for first in range(base, base + 990, 10):
        try:
            for port in range(first, first + _NUM_PORTS):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError(f"no {_NUM_PORTS} free neighbouring ports from {base}")
