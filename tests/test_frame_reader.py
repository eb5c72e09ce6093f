import json
import random
import socket
import struct

import pytest
from ts.protocol import otf_message_handler as ts_frames

from pagetier.handler.frame_reader import FrameReader


def field(data):
    return struct.pack("!i", len(data)) + data


END = struct.pack("!i", -1)


def frame(requests):
    """An inference message of the frontend: ids, and for new ones a header and a JSON body."""
    data = b"I"
    for request_id, body in requests:
        data += field(request_id)
        if body is not None:
            data += field(b"url_path") + field(b"v1/completions")
        data += END
        if body is not None:
            data += field(b"body") + field(b"application/json") + field(json.dumps(body).encode())
        data += END
    return data + END


class Pieces:
    """A connection on which bytes arrive in pieces."""

    def __init__(self, pieces):
        self._pieces = list(pieces)

    def recv(self, size):
        if not self._pieces:
            return b""
        piece, rest = self._pieces[0][:size], self._pieces[0][size:]
        self._pieces[:1] = [rest] if rest else []
        return piece


@pytest.mark.parametrize("seed", range(5))
def test_messages_read_as_ts_reads_them_however_they_arrive(monkeypatch, seed):
    rng = random.Random(seed)
    messages = [
        frame(
            (b"request-%d" % number, {"prompt": "x" * rng.randint(0, 200_000)} if new else None)
            for number, new in enumerate(rng.choices([True, False], k=rng.randint(0, 20)))
        )
        for _ in range(4)
    ]
    data = b"".join(messages)
    cuts = sorted(rng.randint(0, len(data)) for _ in range(50))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
    plain = Pieces([data])
    expected = [ts_frames.retrieve_msg(plain) for _ in messages]
    monkeypatch.setattr(ts_frames, "_retrieve_buffer", FrameReader())
    arriving = Pieces(pieces)
    assert [ts_frames.retrieve_msg(arriving) for _ in messages] == expected


def test_process_ends_when_the_frontend_has_gone():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"ab")
        theirs.close()
        read = FrameReader()
        assert read(ours, 1) == b"a"
        with pytest.raises(SystemExit) as ended:
            read(ours, 2)
    assert ended.value.code == 0
