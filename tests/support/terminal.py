"""What a program writes to a pseudo-terminal."""

import os
import select
import time


def read_until(fd: int, text: bytes, timeout_s: float = 30.0, *, seen: bytes = b"") -> bytes:
    """What has come from the terminal ``fd``, up to ``text`` or past it; fails after ``timeout_s``.

    ``seen`` is what an earlier call read past its own text.
    """
    deadline = time.monotonic() + timeout_s
    while text not in seen:
        left = deadline - time.monotonic()
        assert left > 0, seen[-500:]
        if select.select([fd], [], [], left)[0]:
            seen += os.read(fd, 65536)
    return seen
