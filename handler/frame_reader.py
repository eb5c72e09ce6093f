"""Reads what the frontend sends to a worker through a buffer.

``ts`` asks the kernel for every field by itself: four times for each request in flight, at every
call of the frontend, which with hundreds of streams is most of what an exchange costs. Owns the
bytes that have arrived and were not asked for yet. Knows nothing of what they mean.
"""

import logging
import sys
from typing import Protocol

_CHUNK_BYTES = 1 << 16


class Connection(Protocol):
    """A socket, as far as it is read."""

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes that have arrived; none at its end."""
        ...


class FrameReader:
    """Takes the place of ``ts``'s ``_retrieve_buffer``; for the one connection of a worker."""

    def __init__(self) -> None:
        self._data = b""
        self._position = 0

    def __call__(self, connection: Connection, length: int) -> bytes:
        """The next ``length`` bytes; ends the process when the frontend has gone."""
        start = self._position
        if start + length > len(self._data):
            self._fill(connection, length)
            start = 0
        self._position = start + length
        return self._data[start : self._position]

    def _fill(self, connection: Connection, length: int) -> None:
        pieces = [self._data[self._position :]]
        num_missing = length - len(pieces[0])
        while num_missing > 0:
            piece = connection.recv(max(num_missing, _CHUNK_BYTES))
            if not piece:
                logging.info("Frontend disconnected.")
                sys.exit(0)
            pieces.append(piece)
            num_missing -= len(piece)
        self._data = b"".join(pieces)
        self._position = 0
