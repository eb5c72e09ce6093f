"""What a program writes to a pseudo-terminal."""

import os
import select
import time


def read_until(fd: int, text: bytes, timeout_s: float = 30.0) -> bytes:
    """What has come from the terminal ``fd`` up to ``text``; fails after ``timeout_s``."""
    seen, deadline = b"", time.monotonic() + timeout_s
    while text not in seen:
        left = deadline - time.monotonic()
        assert left > 0, seen[-500:]
        if select.select([fd], [], [], left)[0]:
            seen += os.read(fd, 65536)
    return seen
