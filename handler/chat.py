"""What ``pagetier chat`` does: a conversation with a served model in the terminal.

Owns the conversation and how it is shown. Answers are shown as they arrive; Ctrl-C ends an answer,
not the conversation. Without a terminal, what comes in is one message and its answer is printed.
Imports no torch.
"""

import contextlib
import sys
import unicodedata
from collections.abc import Generator
from typing import Any, TextIO

from pagetier.handler.client import ServedModel
from pagetier.handler.errors import EngineError

_HELP = "Ctrl-C ends an answer, Ctrl-D the chat; /new forgets what was said."


class Chat:
    """One conversation.

    Attributes:
        messages: all that was said, in OpenAI's form.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Begin a conversation; what is None is left to the server.

        Raises:
            EngineError: the model does not answer.
        """
        self.name = model.name()
        self._model = model
        self._options: dict[str, Any] = {"model": self.name, "stream": True}
        if max_tokens is not None:
            self._options["max_completion_tokens"] = max_tokens
        if temperature is not None:
            self._options["temperature"] = temperature
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)

    def forget(self) -> None:
        """Begin anew."""
        self.messages = list(self._system)

    def say(self, text: str) -> Generator[str, None, None]:
        """Say ``text`` and yield the answer's pieces.

        An answer that is not taken to its end counts as far as it was taken; a message that could
        not be answered is forgotten.

        Raises:
            EngineError: there is no answer, or it broke off.
        """
        question = {"role": "user", "content": text}
        body = {**self._options, "messages": [*self.messages, question]}
        answer = ""
        # Closed at once, so that the server ends an answer that nobody reads.
        with contextlib.closing(self._model.stream("v1/chat/completions", body)) as events:
            try:
                for event in events:
                    for choice in event["choices"]:
                        piece = choice["delta"].get("content") or ""
                        answer += piece
                        if piece:
                            yield piece
            finally:
                if answer:
                    self.messages += [question, {"role": "assistant", "content": answer}]


def run_chat(chat: Chat, message: str | None) -> int:
    """Answer ``message``, or what comes in; on a terminal go on until Ctrl-D.

    Returns the exit code.

    Raises:
        EngineError: the one message without a terminal could not be answered.
    """
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message is not None:
        _show(chat.say(message), sys.stdout)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and editing keys
    print(f"{chat.name}. {_HELP}")
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            continue
        if text == "/new":
            chat.forget()
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            try:
                _show(chat.say(text), sys.stdout)
            except KeyboardInterrupt:
                print(" ...")
            except EngineError as exc:
                print(f"pagetier: {exc.message}", file=sys.stderr)


def _show(pieces: Generator[str, None, None], out: TextIO) -> None:
    with contextlib.closing(pieces):
        for piece in pieces:
            out.write(printable(piece))
            out.flush()
    out.write("\n")
    out.flush()


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: a model may have learned that, too."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or unicodedata.category(character) != "Cc"
    )
