"""What OpenAI's routes answer: whole bodies, server-sent events, and errors.

Owns the JSON of responses. Knows nothing of HTTP connections, of TorchServe, or of when tokens are
made: a ``Response`` is fed with outputs and asked for bytes.

A streamed chunk is built from parts that are encoded once per request, so that a token costs
little more than the encoding of its text.
"""

from typing import Any

import msgspec

from pagetier.handler.errors import EngineError
from pagetier.handler.request import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.tokenizer import OutputAssembler, OutputDelta, Tokenizer

# JSON has no infinity; OpenAI's clients know this number instead.
MIN_LOGPROB = -9999.0

_json = msgspec.json.Encoder().encode


def error_body(error: EngineError) -> bytes:
    """``error`` as OpenAI's JSON."""
    return _json({
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    })  # fmt: skip


def error_event(error: EngineError) -> bytes:
    """``error`` as the end of a stream."""
    return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"


class Response:
    """The response to one request: takes outputs, gives bytes.

    A streamed response is read with ``opening`` once and ``take_events`` as often as there is
    something; a whole one with ``whole`` when ``finished``.

    Attributes:
        request: what the engine is to be given.
        stream: whether it is streamed.
        finished: whether all outputs have come.
    """

    id_prefix = ""
    object_name = ""
    # What stands in a streamed choice before and after its text.
    _text_open = b""
    _text_close = b""

    def __init__(
        self,
        request: AddRequest,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        created: int,
        stream: bool,
        include_usage: bool,
    ) -> None:
        self.request = request
        self.stream = stream
        self.finished = False
        self._tokenizer = tokenizer
        self._assembler = OutputAssembler(tokenizer, request.prompt_token_ids, request.params)
        self._include_usage = include_usage
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self._num_logprob_characters = 0
        self._last: OutputDelta | None = None
        self._head = {
            "id": self.id_prefix + request.request_id,
            "object": self.object_name,
            "created": created,
            "model": model_name,
        }
        if stream:
            start = _json(self._stream_head())
            self._event_start = b"data: " + start[:-1] + b"," + self._text_open
            usage = b',"usage":null' if include_usage else b""
            self._event_end = self._choice_close() + usage + b"}\n\n"
            self._plain_end = (
                self._text_close + b',"logprobs":null,"finish_reason":null' + self._event_end
            )

    def add(self, output: RequestOutput) -> bool:
        """Take an output; whether the engine must be told to stop, since a stop string came."""
        delta = self._assembler.add(output)
        if delta.text:
            self._texts.append(delta.text)
        if self._logprobs is not None and delta.logprobs:
            self._logprobs += delta.logprobs
        if delta.finish_reason is not None and not self.finished:
            self.finished = True
            self._last = delta
        return delta.abort

    def opening(self) -> bytes:
        """The first piece of a streamed response; may be empty."""
        return b""

    def take_events(self) -> bytes:
        """Server-sent events for all that has come since the last call; may be empty."""
        text = "".join(self._texts)
        self._texts.clear()
        if not self.finished:
            if not text and not self._logprobs:
                return b""
            if self._logprobs is None:
                return self._event_start + _json(text) + self._plain_end
            return self._event(text, "null")
        assert self._last is not None
        reason = (
            _json(self._last.finish_reason) + b',"stop_reason":' + _json(self._last.stop_reason)
        )
        events = self._event(text, reason.decode())
        if self._include_usage:
            events += b"data: " + _json(self._usage_chunk()) + b"\n\n"
        return events + b"data: [DONE]\n\n"

    def error_events(self, error: EngineError) -> bytes:
        """The end of a stream that fails: what has come until then, and why."""
        events = b"" if self.finished else self.take_events()
        return events + error_event(error)

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        raise NotImplementedError

    def _event(self, text: str, reason: str) -> bytes:
        return b"".join([
            self._event_start,
            _json(text),
            self._text_close,
            b',"logprobs":',
            _json(self._take_logprobs()),
            b',"finish_reason":',
            reason.encode(),
            self._event_end,
        ])  # fmt: skip

    def _stream_head(self) -> dict[str, Any]:
        return self._head

    def _choice_close(self) -> bytes:
        return b"}]"

    def _usage_chunk(self) -> dict[str, Any]:
        return {**self._stream_head(), "choices": [], "usage": self._usage()}

    def _choice_end(self) -> dict[str, Any]:
        assert self._last is not None, "the response is not finished"
        return {
            "logprobs": self._take_logprobs(),
            "finish_reason": self._last.finish_reason,
            "stop_reason": self._last.stop_reason,
        }

    def _usage(self) -> dict[str, Any]:
        assembler = self._assembler
        return {
            "prompt_tokens": assembler.num_prompt_tokens,
            "completion_tokens": assembler.num_output_tokens,
            "total_tokens": assembler.num_prompt_tokens + assembler.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": assembler.num_cached_tokens},
        }

    def _take_logprobs(self) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        taken, self._logprobs = self._logprobs, []
        return self._format_logprobs(taken)

    def _format_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """The shape of completions: lists in parallel."""
        tokens = [_token_text(self._tokenizer.token_bytes(lp.token_id)) for lp in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._num_logprob_characters)
            self._num_logprob_characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(lp.logprob) for lp in logprobs],
            "top_logprobs": [
                {
                    _token_text(self._tokenizer.token_bytes(token_id)): _finite(value)
                    for token_id, value in _alternatives(lp)
                }
                for lp in logprobs
            ],
            "text_offset": offsets,
        }


class CompletionResponse(Response):
    """Of ``v1/completions``."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    _text_open = b'"choices":[{"index":0,"text":'

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        choice = {"index": 0, "text": "".join(self._texts), **self._choice_end()}
        return _json({**self._head, "choices": [choice], "usage": self._usage()})


class ChatResponse(Response):
    """Of ``v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    _text_open = b'"choices":[{"index":0,"delta":{"content":'
    _text_close = b"}"

    def opening(self) -> bytes:
        """A chunk with the role, as OpenAI sends it."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._stream_head(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return b"data: " + _json(chunk) + b"\n\n"

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        message = {"role": "assistant", "content": "".join(self._texts), "refusal": None}
        choice = {"index": 0, "message": message, **self._choice_end()}
        return _json({**self._head, "choices": [choice], "usage": self._usage()})

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _format_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        content = [
            {
                **self._token(lp.token_id, lp.logprob),
                "top_logprobs": [
                    self._token(*pair)
                    for pair in zip(lp.top_token_ids, lp.top_logprobs, strict=True)
                ],
            }
            for lp in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": _token_text(data), "logprob": _finite(logprob), "bytes": list(data)}


class PredictionResponse(Response):
    """The plain route's own, flat shape."""

    _text_open = b'"text":'

    def whole(self) -> bytes:
        """The body of a whole response, once ``finished``."""
        body = {
            **self._stream_head(),
            "text": "".join(self._texts),
            **self._choice_end(),
            "usage": self._usage(),
        }
        return _json(body)

    def _stream_head(self) -> dict[str, Any]:
        return {"model": self._head["model"]}

    def _choice_close(self) -> bytes:
        return b""

    def _usage_chunk(self) -> dict[str, Any]:
        return {**self._stream_head(), "usage": self._usage()}


def _token_text(data: bytes) -> str:
    """A token's text; OpenAI's own notation where it is no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    # Also right for NaN, which no comparison holds for.
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def _alternatives(logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """The most likely tokens, and the chosen one if it is not among them."""
    pairs = list(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True))
    if logprobs.token_id not in logprobs.top_token_ids:
        pairs.append((logprobs.token_id, logprobs.logprob))
    return pairs
