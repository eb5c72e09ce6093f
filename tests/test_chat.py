import io
import os
import pty
import subprocess
import sys
import threading

import pytest
from support.stub_model import KEY, stub_model
from support.terminal import read_until

from pagetier.handler.chat import Chat, printable
from pagetier.handler.cli import main
from pagetier.handler.client import ServedModel
from pagetier.handler.errors import EngineError


@pytest.fixture
def stub():
    with stub_model() as model:
        yield model


def test_conversation_is_sent_with_each_message(stub):
    chat = Chat(ServedModel(stub.url, KEY), system="Be brief.", max_tokens=5, temperature=0.0)
    assert "".join(chat.say("hi")) == "Hello."
    assert "".join(chat.say("and?")) == "Hello."
    assert stub.bodies[1] == {
        "model": "stub",
        "stream": True,
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "and?"},
        ],
    }
    chat.forget()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_message_that_is_refused_is_forgotten(stub):
    chat = Chat(ServedModel(stub.url, KEY))
    with pytest.raises(EngineError, match="Too long"):
        list(chat.say("refuse"))
    assert chat.messages == []


def test_answer_that_is_cut_short_counts_as_far_as_it_came(stub):
    stub.hangs = True
    chat = Chat(ServedModel(stub.url, KEY))
    answer = chat.say("hi")
    assert next(answer) == "Hel"
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "Hel"}
    assert stub.hung_up.wait(10), "the server was not told"


def test_one_message_is_answered_and_printed(stub, capsys):
    assert main(["chat", stub.url, "--key", KEY, "-m", "hi"]) == 0
    assert capsys.readouterr().out == "Hello.\n"


def test_without_a_terminal_what_comes_in_is_the_message(stub, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("line one\nline two\n"))
    assert main(["chat", stub.url, "--key", KEY]) == 0
    assert capsys.readouterr().out == "Hello.\n"
    assert stub.bodies[0]["messages"][0]["content"] == "line one\nline two"


def test_what_steers_a_terminal_is_left_out():
    assert printable("a\x1b[2Jb\tc\n\x07\x9bé🙂") == "a[2Jb\tc\né🙂"


def test_on_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(stub):
    stub.hangs = True
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pagetier", "chat", stub.url],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PAGETIER_API_KEY": KEY, "TERM": "dumb", "PYTHONSAFEPATH": "1"},
        # Its own terminal, so that Ctrl-C reaches it as a signal.
        preexec_fn=lambda: (os.setsid(), os.close(os.open(os.ttyname(0), os.O_RDWR))),
    )
    os.close(theirs)
    try:
        read_until(ours, b"> ")
        os.write(ours, b"hi\n")
        read_until(ours, b"Hello.")
        interrupted = threading.Event()

        def press_until_interrupted():
            """As a user does when nothing happens: once, on a busy machine, nothing did."""
            os.write(ours, b"\x03")
            while not interrupted.wait(5):
                os.write(ours, b"\x03")

        pressing = threading.Thread(target=press_until_interrupted)
        pressing.start()
        try:
            read_until(ours, b"> ")
        finally:
            interrupted.set()
            pressing.join()
        assert stub.hung_up.wait(10)
        os.write(ours, b"refuse\n")
        rest = read_until(ours, b"Too long.").partition(b"Too long.")[2]
        read_until(ours, b"> ", seen=rest)
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
