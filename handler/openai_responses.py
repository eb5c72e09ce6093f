"""What OpenAI's routes answer: whole bodies, server-sent events, and errors.

Owns the JSON of responses. Knows nothing of HTTP connections, of TorchServe, or of when tokens are
made: a ``Response`` is fed with outputs and asked for bytes.

A response has one choice or several: one for each of its requests to the engine (a body may hold
several prompts) and, within a request, for each output that was asked for. A streamed chunk is
built from parts that are encoded once per choice, so that a token costs little more than the
encoding of its text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pagetier.handler.errors import EngineError
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.tokenizer import OutputAssembler, OutputDelta, Tokenizer
from pagetier.handler.tool_calls import Begin, Content, Event, ToolCallParser

# JSON has no infinity; OpenAI's clients know this number instead.
MIN_LOGPROB = -9999.0

_json = msgspec.json.Encoder().encode
# A token, with its log-probability or, if it has none (the first of a prompt), as its id alone.
_Scored = TokenLogprobs | int


def error_body(error: EngineError) -> bytes:
    """``error`` as OpenAI's JSON."""
    return _json({
        "error": {
            "message": _sendable(error.message),
            "type": error.type,
            "param": None if error.param is None else _sendable(error.param),
            "code": error.code,
        }
    })  # fmt: skip


def error_event(error: EngineError) -> bytes:
    """``error`` as the end of a stream."""
    return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"


def _sendable(text: str) -> str:
    """``text`` with a question mark for each half of a surrogate pair, which no UTF-8 can carry.

    An error may quote what the client has sent.
    """
    return text.encode(errors="replace").decode()


class _Choice:
    """One choice: its output, and what of it is not sent yet."""

    __slots__ = (
        "assembler",
        "calls",
        "end",
        "event_end",
        "event_start",
        "index",
        "is_told",
        "logprobs",
        "num_logprob_characters",
        "plain_end",
        "prompt_logprobs",
        "request",
        "texts",
    )

    def __init__(self, index: int, request: AddRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.assembler = OutputAssembler(tokenizer, request.prompt_token_ids, request.params)
        self.texts: list[str] = []
        self.logprobs: list[_Scored] | None = None if request.params.logprobs is None else []
        self.num_logprob_characters = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.end: OutputDelta | None = None
        self.calls: _Calls | None = None
        self.is_told = False  # whether the stream has said how it ended
        self.event_start = self.event_end = self.plain_end = b""

    def take_text(self) -> str:
        text = "".join(self.texts)
        self.texts.clear()
        return text


class _Calls:
    """The tool calls of one choice, found in its text, and what of it is no call.

    Attributes:
        content: what is no call and not sent yet.
        whole: all that have begun, in OpenAI's shape.
    """

    def __init__(self, parser: ToolCallParser, *, several: bool) -> None:
        self._parser = parser
        self._several = several
        self._deltas: dict[int, dict[str, Any]] = {}
        self.content: list[str] = []
        self.whole: list[dict[str, Any]] = []

    @property
    def is_complete(self) -> bool:
        """Whether the one call that may be made has been."""
        return not self._several and self._parser.num_complete > 0

    def read(self, text: str, *, is_last: bool) -> None:
        """Take more of the output."""
        events = self._parser.add(text)
        if is_last:
            events += self._parser.finish()
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        index = len(self.whole)
        if isinstance(event, Content):
            # What follows the one call has not been asked for.
            if not self.is_complete:
                self.content.append(event.text)
        elif isinstance(event, Begin):
            head = {"id": self._parser.new_id(), "type": "function"}
            function = {"name": event.name, "arguments": ""}
            self._deltas[index] = {"index": index, **head, "function": {**function}}
            self.whole.append({**head, "function": function})
        else:
            index -= 1
            delta = self._deltas.setdefault(index, {"index": index, "function": {"arguments": ""}})
            delta["function"]["arguments"] += event.text
            self.whole[index]["function"]["arguments"] += event.text

    def take_deltas(self) -> list[dict[str, Any]]:
        """What has come of calls since it was asked the last time."""
        deltas, self._deltas = list(self._deltas.values()), {}
        return deltas


class Response:
    """The response to one body: takes outputs, gives bytes.

    A streamed response is read with ``opening`` once and ``take_events`` as often as there is
    something; a whole one with ``whole`` when ``finished``.

    Attributes:
        requests: what the engine is to be given.
        response_id: what the client calls it, or the server.
        stream: whether it is streamed.
        timeout: seconds it may take in all; None for ever.
    """

    id_prefix = ""
    object_name = ""

    def __init__(
        self,
        requests: Sequence[AddRequest],
        tokenizer: Tokenizer,
        *,
        response_id: str,
        model_name: str,
        created: int,
        stream: bool = False,
        include_usage: bool = False,
        echo: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Answer one body.

        Args:
            requests: one for each of its prompts, in order.
            tokenizer: of the model.
            response_id: what follows the prefix in ``id``.
            model_name: as clients know it.
            created: seconds since 1970.
            stream: whether the answer is streamed.
            include_usage: whether a stream ends with a chunk that counts tokens.
            echo: a text for each request, to stand before its output.
            timeout: for whoever keeps the time.
        """
        self.requests = list(requests)
        self.response_id = response_id
        self.stream = stream
        self.timeout = timeout
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._echoes = echo is not None
        self._choices: list[_Choice] = []
        self._choices_of: dict[str, list[_Choice]] = {}
        for number, request in enumerate(requests):
            start = len(self._choices)
            own = [_Choice(start + i, request, tokenizer) for i in range(request.params.n)]
            self._choices_of[request.request_id] = own
            self._choices += own
            if echo is not None:
                for choice in own:
                    choice.texts.append(echo[number])
        self._num_going = len(self._choices)
        self._head = {
            "id": self.id_prefix + response_id,
            "object": self.object_name,
            "created": created,
            "model": model_name,
        }
        if stream:
            head = b"data: " + _json(self._stream_head())[:-1] + b","
            usage = b',"usage":null' if include_usage else b""
            for choice in self._choices:
                before, after, close = self._choice_frame(choice.index)
                choice.event_start = head + before
                choice.event_end = after
                choice.plain_end = (
                    after + b',"logprobs":null,"finish_reason":null' + close + usage + b"}\n\n"
                )
            self._chunk_end = close + usage + b"}\n\n"

    @property
    def request(self) -> AddRequest:
        """The first, and mostly only, of ``requests``."""
        return self.requests[0]

    @property
    def num_choices_each(self) -> int:
        """Choices of one request to the engine."""
        return self.request.params.n

    @property
    def finished(self) -> bool:
        """Whether all outputs have come."""
        return self._num_going == 0

    def add(self, output: RequestOutput) -> bool:
        """Take an output; whether the engine must be told to stop, since a stop string came."""
        choice = self._choices_of[output.request_id][output.index]
        delta = choice.assembler.add(output)
        if delta.text:
            choice.texts.append(delta.text)
        if output.prompt_logprobs is not None:
            self._take_prompt_logprobs(output)
        if choice.logprobs is not None and delta.logprobs:
            choice.logprobs += delta.logprobs
        if delta.finish_reason is not None and choice.end is None:
            choice.end = delta
            self._num_going -= 1
        return delta.abort

    def opening(self) -> bytes:
        """The first piece of a streamed response; may be empty."""
        return b""

    def take_events(self) -> bytes:
        """Server-sent events for all that has come since the last call; may be empty."""
        events = b"".join([self._take_event(choice) for choice in self._choices])
        if not self.finished:
            return events
        if self._include_usage:
            events += b"data: " + _json(self._usage_chunk()) + b"\n\n"
        return events + b"data: [DONE]\n\n"

    def error_events(self, error: EngineError) -> bytes:
        """The end of a stream that fails: what has come until then, and why."""
        events = b"" if self.finished else self.take_events()
        return events + error_event(error)

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        choices = [self._whole_choice(choice) for choice in self._choices]
        return _json({**self._head, "choices": choices, "usage": self._usage()})

    # --- the rest is private -----------------------------------------------------------------

    def _take_prompt_logprobs(self, output: RequestOutput) -> None:
        """They come once, with the first output, and are the same for all choices of a prompt."""
        assert output.prompt_logprobs is not None
        for choice in self._choices_of[output.request_id]:
            choice.prompt_logprobs = output.prompt_logprobs
            if self._echoes and choice.logprobs is not None:
                choice.logprobs.append(choice.request.prompt_token_ids[0])
                choice.logprobs += output.prompt_logprobs

    def _take_event(self, choice: _Choice) -> bytes:
        if choice.end is None:
            if not choice.texts and not choice.logprobs:
                return b""
            text = choice.take_text()
            if choice.logprobs is None:
                return choice.event_start + _json(text) + choice.plain_end
            reason = b"null"
        else:
            if choice.is_told:
                return b""
            choice.is_told = True
            text = choice.take_text()
            reason = (
                _json(choice.end.finish_reason) + b',"stop_reason":' + _json(choice.end.stop_reason)
            )
        return b"".join([
            choice.event_start,
            _json(text),
            choice.event_end,
            b',"logprobs":',
            _json(self._take_logprobs(choice)),
            b',"finish_reason":',
            reason,
            self._chunk_end,
        ])  # fmt: skip

    def _stream_head(self) -> dict[str, Any]:
        return self._head

    def _choice_frame(self, index: int) -> tuple[bytes, bytes, bytes]:
        """What stands before a streamed choice's text, right after it, and at the choice's end."""
        return b'"choices":[{"index":%d,"text":' % index, b"", b"}]"

    def _whole_choice(self, choice: _Choice) -> dict[str, Any]:
        whole = {
            "index": choice.index,
            "text": choice.take_text(),
            **self._choice_end(choice),
        }
        if choice.request.params.prompt_logprobs is not None and not self._echoes:
            whole["prompt_logprobs"] = self._format_prompt_logprobs(choice)
        return whole

    def _usage_chunk(self) -> dict[str, Any]:
        return {**self._stream_head(), "choices": [], "usage": self._usage()}

    def _choice_end(self, choice: _Choice) -> dict[str, Any]:
        assert choice.end is not None, "the response is not finished"
        return {
            "logprobs": self._take_logprobs(choice),
            "finish_reason": _finish_reason(choice, choice.end),
            "stop_reason": choice.end.stop_reason,
        }

    def _usage(self) -> dict[str, Any]:
        """Tokens counted: each prompt once, whatever the number of its outputs."""
        of_prompts = [own[0].assembler for own in self._choices_of.values()]
        num_prompt_tokens = sum(a.num_prompt_tokens for a in of_prompts)
        num_output_tokens = sum(c.assembler.num_output_tokens for c in self._choices)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(a.num_cached_tokens for a in of_prompts)
            },
        }

    def _take_logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        taken, choice.logprobs = choice.logprobs, []
        return self._format_logprobs(choice, taken)

    def _format_logprobs(self, choice: _Choice, scored: list[_Scored]) -> dict[str, Any]:
        """The shape of completions: lists in parallel."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in scored:
            if isinstance(entry, TokenLogprobs):
                token = self._token_text(entry.token_id)
                token_logprobs.append(_finite(entry.logprob))
                top_logprobs.append(self._alternatives(entry))
            else:
                token = self._token_text(entry)
                token_logprobs.append(None)
                top_logprobs.append(None)
            tokens.append(token)
            offsets.append(choice.num_logprob_characters)
            choice.num_logprob_characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _alternatives(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the chosen one if it is not among them."""
        pairs = list(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True))
        if logprobs.token_id not in logprobs.top_token_ids:
            pairs.append((logprobs.token_id, logprobs.logprob))
        return {self._token_text(token_id): _finite(value) for token_id, value in pairs}

    def _format_prompt_logprobs(self, choice: _Choice) -> list[dict[str, Any] | None]:
        """vLLM's shape: for each token of the prompt but the first, alternatives by token id."""
        scored: list[dict[str, Any] | None] = [None]
        for entry in choice.prompt_logprobs or ():
            pairs = dict(zip(entry.top_token_ids, entry.top_logprobs, strict=True))
            pairs.setdefault(entry.token_id, entry.logprob)
            scored.append(
                {
                    str(token_id): {
                        "logprob": _finite(value),
                        "decoded_token": self._token_text(token_id),
                    }
                    for token_id, value in pairs.items()
                }
            )
        return scored

    def _token_text(self, token_id: int) -> str:
        return _token_text(self._tokenizer.token_bytes(token_id))


class CompletionResponse(Response):
    """Of ``v1/completions``."""

    id_prefix = "cmpl-"
    object_name = "text_completion"


class ChatResponse(Response):
    """Of ``v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"

    def opening(self) -> bytes:
        """A chunk for each choice, with the role, as OpenAI sends it."""
        return b"".join([b"data: " + _json(self._opening(c)) + b"\n\n" for c in self._choices])

    def _opening(self, choice: _Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        opened = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._stream_head(), "choices": [opened]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def expect_tool_calls(self, parser: Callable[[], ToolCallParser], *, several: bool) -> None:
        """Look for calls in each choice; without ``several`` a choice ends after its first."""
        for choice in self._choices:
            choice.calls = _Calls(parser(), several=several)

    def add(self, output: RequestOutput) -> bool:
        """Take an output, as in the base; a choice may also end with its call."""
        choice = self._choices_of[output.request_id][output.index]
        has_ended = choice.end is not None
        is_to_stop = super().add(output)
        if choice.calls is not None and not has_ended:
            choice.calls.read(choice.take_text(), is_last=choice.end is not None)
            if choice.end is None and choice.calls.is_complete:
                choice.end = OutputDelta("", [], None, finish_reason="stop")
                self._num_going -= 1
                return True
        return is_to_stop

    def _take_event(self, choice: _Choice) -> bytes:
        if choice.calls is None:
            return super()._take_event(choice)
        deltas, content = choice.calls.take_deltas(), choice.calls.content
        if choice.is_told or not (deltas or content or choice.logprobs or choice.end):
            return b""
        delta: dict[str, Any] = {}
        if content:
            delta["content"] = "".join(content)
            content.clear()
        if deltas:
            delta["tool_calls"] = deltas
        told = {"index": choice.index, "delta": delta}
        if choice.end is None:
            told |= {"logprobs": self._take_logprobs(choice), "finish_reason": None}
        else:
            choice.is_told = True
            told |= self._choice_end(choice)
        chunk = {**self._stream_head(), "choices": [told]}
        if self._include_usage:
            chunk["usage"] = None
        return b"data: " + _json(chunk) + b"\n\n"

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        choices = [self._whole_choice(choice) for choice in self._choices]
        body = {**self._head, "choices": choices, "usage": self._usage()}
        if self.request.params.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._format_prompt_logprobs(self._choices[0])
        return _json(body)

    def _whole_choice(self, choice: _Choice) -> dict[str, Any]:
        calls = choice.calls
        content = choice.take_text() if calls is None else "".join(calls.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls is not None and calls.whole:
            message |= {"content": content or None, "tool_calls": calls.whole}
        return {"index": choice.index, "message": message, **self._choice_end(choice)}

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _choice_frame(self, index: int) -> tuple[bytes, bytes, bytes]:
        return b'"choices":[{"index":%d,"delta":{"content":' % index, b"}", b"}]"

    def _format_logprobs(self, choice: _Choice, scored: list[_Scored]) -> dict[str, Any]:
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [
                    self._token(*pair)
                    for pair in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
                ],
            }
            for entry in scored
            if isinstance(entry, TokenLogprobs)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": _token_text(data), "logprob": _finite(logprob), "bytes": list(data)}


class PredictionResponse(Response):
    """Of the plain route: flat, and of one choice."""

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        (choice,) = self._choices
        whole = self._whole_choice(choice)
        del whole["index"]
        return _json({**self._stream_head(), **whole, "usage": self._usage()})

    def _stream_head(self) -> dict[str, Any]:
        return {"id": self._head["id"], "model": self._head["model"]}

    def _choice_frame(self, index: int) -> tuple[bytes, bytes, bytes]:
        return b'"text":', b"", b""

    def _usage_chunk(self) -> dict[str, Any]:
        return {**self._stream_head(), "usage": self._usage()}


def _finish_reason(choice: _Choice, end: OutputDelta) -> str | None:
    has_calls = choice.calls is not None and bool(choice.calls.whole)
    return "tool_calls" if has_calls and end.finish_reason == "stop" else end.finish_reason


def _token_text(data: bytes) -> str:
    """A token's text; OpenAI's own notation where it is no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    # Also right for NaN, which no comparison holds for.
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
