"""OpenAI's shapes: from a request's body to an ``AddRequest``, from outputs to responses.

Owns field names, defaults and checks of the completions, chat and plain prediction routes, the
JSON of their responses, and error bodies. Knows nothing of HTTP connections, of TorchServe, or of
when tokens are made: a ``Response`` is fed with outputs and asked for bytes.

A streamed chunk is built from parts that are encoded once per request, so that a token costs
little more than the encoding of its text.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pagetier.handler.errors import EngineError, InvalidRequest, NotFound, PromptTooLong
from pagetier.handler.request import AddRequest, RequestOutput, SamplingParams, TokenLogprobs
from pagetier.handler.tokenizer import OutputAssembler, OutputDelta, Tokenizer

MAX_STOP_CHARACTERS = 1024
# OpenAI's default for completions; a chat's answer may be as long as the model allows.
DEFAULT_MAX_TOKENS = 16
# JSON has no infinity; OpenAI's clients know this number instead.
MIN_LOGPROB = -9999.0

# Fields of OpenAI's API that change nothing about the output.
_HARMLESS = frozenset({
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip

# Fields whose feature does not exist yet, with the values that ask for nothing.
_NOT_SUPPORTED_YET: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "timeout": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_json = msgspec.json.Encoder().encode
_T = TypeVar("_T", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage``: end the stream with a chunk that counts its tokens."""

    include_usage: bool = False


class _CommonFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int64 | None = None
    seed: _Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_Int64] | None = None
    max_tokens: _Int64 | None = None
    ignore_eos: bool | None = None
    priority: _Int64 = 0
    cache_salt: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None


class CompletionBody(_CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``v1/completions`` and of the plain prediction route."""

    prompt: Any
    logprobs: int | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's content."""

    text: str
    type: Literal["text"] = "text"


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(_CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: _Int64 | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


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


class OpenAIApi:
    """Parses requests to one served model and makes their responses.

    Attributes:
        model_name: what clients call the model.
        max_model_len: most tokens of prompt and output together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Serve the model called ``model_name``; the limits are the engine's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._created = int(clock())
        self.model_name = model_name
        self.max_model_len = max_model_len

    def models(self) -> bytes:
        """The body of ``v1/models``."""
        return _json({"object": "list", "data": [self._model_card()]})

    def model(self, name: str) -> bytes:
        """The body of ``v1/models/NAME``; raises ``NotFound``."""
        self._check_model(name)
        return _json(self._model_card())

    def completion(self, request_id: str, body: Any) -> "Response":
        """Parse the body of ``v1/completions``; raises ``InvalidRequest``."""
        fields = _convert(body, CompletionBody)
        return self._complete(request_id, fields, _CompletionResponse)

    def prediction(self, request_id: str, body: Any) -> "Response":
        """Parse the body of the plain prediction route: text, or a completion's fields.

        Raises:
            InvalidRequest: the body is wrong.
        """
        if isinstance(body, str):
            body = {"prompt": body}
        fields = _convert(body, CompletionBody)
        return self._complete(request_id, fields, _PredictionResponse)

    def chat(self, request_id: str, body: Any) -> "Response":
        """Parse the body of ``v1/chat/completions``; raises ``InvalidRequest``."""
        fields = _convert(_without_null_message_fields(body), ChatBody)
        self._check_model(fields.model)
        if not fields.messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        text = self._tokenizer.render_chat([_plain_message(m) for m in fields.messages])
        prompt_ids = self._tokenizer.encode(
            text, add_special_tokens=False, max_tokens=self.max_model_len
        )
        max_tokens, param = fields.max_tokens, "max_tokens"
        if fields.max_completion_tokens is not None:
            max_tokens, param = fields.max_completion_tokens, "max_completion_tokens"
        request = self._request(
            request_id,
            fields,
            prompt_ids,
            self._room(len(prompt_ids), max_tokens, "messages", param, default=None),
            (fields.top_logprobs or 0) if fields.logprobs else None,
        )
        return self._respond(request, fields, _ChatResponse)

    # --- the rest is private -----------------------------------------------------------------

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "pagetier",
            "max_model_len": self.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise NotFound(
                f"The model {name!r} is not served here; the name of this one is "
                f"{self.model_name!r}.",
                param="model",
            )

    def _complete(
        self, request_id: str, fields: CompletionBody, kind: "type[Response]"
    ) -> "Response":
        self._check_model(fields.model)
        prompt_ids = self._prompt_ids(fields.prompt)
        max_tokens = self._room(
            len(prompt_ids), fields.max_tokens, "prompt", "max_tokens", default=DEFAULT_MAX_TOKENS
        )
        request = self._request(request_id, fields, prompt_ids, max_tokens, fields.logprobs)
        return self._respond(request, fields, kind)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt):
            raise InvalidRequest(
                "Several prompts in one request are not supported yet; send one request each.",
                param="prompt",
            )
        if prompt in ("", []):
            raise InvalidRequest("The prompt must not be empty.", param="prompt")
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, max_tokens=self.max_model_len)
        if not isinstance(prompt, list):
            raise InvalidRequest(
                f"$.prompt: expected text or a list of token ids, got {type(prompt).__name__}.",
                param="prompt",
            )
        for token_id in prompt:
            self._check_token_id(token_id, "prompt")
        return prompt

    def _check_token_id(self, token_id: Any, param: str) -> None:
        if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
            raise InvalidRequest(
                f"{param}: token ids are whole numbers from 0 to {self._vocab_size - 1}, "
                f"not {_short(token_id)}.",
                param=param,
            )

    def _room(
        self, num_prompt: int, wanted: int | None, prompt: str, param: str, default: int | None
    ) -> int:
        """How many tokens to generate; raises ``PromptTooLong`` if they do not fit."""
        room = self.max_model_len - num_prompt
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {num_prompt} tokens, but this model takes at most "
                f"{self.max_model_len}, at least one of them generated; shorten the prompt.",
                param=prompt,
            )
        if wanted is None:
            return room if default is None else min(default, room)
        if wanted > room:
            raise PromptTooLong(
                f"The prompt has {num_prompt} tokens and {param} asks for {wanted} more, but this "
                f"model takes at most {self.max_model_len} in all; shorten the prompt or lower "
                f"{param}.",
                param=param,
            )
        if wanted < 1:
            raise InvalidRequest(f"{param} must be 1 or more, not {wanted}.", param=param)
        return wanted

    def _request(
        self,
        request_id: str,
        fields: _CommonFields,
        prompt_ids: list[int],
        max_tokens: int,
        logprobs: int | None,
    ) -> AddRequest:
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if any(len(s) > MAX_STOP_CHARACTERS for s in stop):
            raise InvalidRequest(
                f"stop: a text may have at most {MAX_STOP_CHARACTERS} characters.", param="stop"
            )
        for token_id in fields.stop_token_ids or ():
            self._check_token_id(token_id, "stop_token_ids")
        given = {
            name: value
            for name in ("temperature", "top_p", "seed", "stop_token_ids", "ignore_eos")
            if (value := getattr(fields, name)) is not None
        }
        params = SamplingParams(
            # More than all tokens is all tokens.
            top_k=min(fields.top_k or 0, self._vocab_size),
            stop=stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
            **given,
        )
        return AddRequest(
            request_id,
            prompt_ids,
            params,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            eos_token_ids=self._eos_token_ids,
        )

    def _respond(
        self, request: AddRequest, fields: _CommonFields, kind: "type[Response]"
    ) -> "Response":
        if fields.stream_options is not None and not fields.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        return kind(
            request,
            self._tokenizer,
            model_name=self.model_name,
            created=int(self._clock()),
            stream=fields.stream,
            include_usage=fields.stream_options is not None and fields.stream_options.include_usage,
        )


# --- reading bodies --------------------------------------------------------------------------


def _convert(body: Any, kind: type[_T]) -> _T:
    """``body`` as ``kind``; raises ``InvalidRequest`` with one sentence that names the field."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {_json_type(body)}.")
    known = {field.name for field in msgspec.structs.fields(kind)}
    kept, unknown = {}, []
    for key, value in body.items():
        if key in known:
            # null is the same as leaving a field out.
            if value is not None:
                kept[key] = value
        elif key in _NOT_SUPPORTED_YET:
            if value is not None and not _is_neutral(value, _NOT_SUPPORTED_YET[key]):
                raise InvalidRequest(f"{key} is not supported yet; leave it out.", param=key)
        elif key not in _HARMLESS:
            unknown.append(key)
    if unknown:
        names = ", ".join(_short(key) for key in unknown[:8])
        raise InvalidRequest(
            f"Unknown field{'s' if len(unknown) > 1 else ''} {names}; leave "
            f"{'them' if len(unknown) > 1 else 'it'} out.",
            param=unknown[0][:64],
        )
    try:
        return msgspec.convert(kept, kind)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc)) from None


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True equals 1 in Python, but `n: true` is a mistake.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _invalid(message: str) -> InvalidRequest:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" with the place in front."""
    what, _, place = message.replace("`", "").partition(" - at ")
    what = (what[:1].lower() + what[1:]).replace(" | null", "")
    if not place:
        return InvalidRequest(f"The body is wrong: {what}.", param=_missing_field(what))
    param = place.removeprefix("$.").split(".")[0].split("[")[0]
    return InvalidRequest(f"{place}: {what}.", param=param)


def _missing_field(what: str) -> str | None:
    prefix = "object missing required field "
    return what.removeprefix(prefix) if what.startswith(prefix) else None


def _without_null_message_fields(body: Any) -> Any:
    """Drop null fields of messages: OpenAI's client sends an answer back with several."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        return body
    messages = [
        {k: v for k, v in m.items() if v not in (None, [])} if isinstance(m, dict) else m
        for m in body["messages"]
    ]
    return {**body, "messages": messages}


def _plain_message(message: ChatMessage) -> dict[str, str]:
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    plain = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _json_type(value: Any) -> str:
    names = {str: "text", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


# --- writing responses -----------------------------------------------------------------------


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


class _CompletionResponse(Response):
    id_prefix = "cmpl-"
    object_name = "text_completion"
    _text_open = b'"choices":[{"index":0,"text":'

    def whole(self) -> bytes:
        choice = {"index": 0, "text": "".join(self._texts), **self._choice_end()}
        return _json({**self._head, "choices": [choice], "usage": self._usage()})


class _ChatResponse(Response):
    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    _text_open = b'"choices":[{"index":0,"delta":{"content":'
    _text_close = b"}"

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = {**self._stream_head(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return b"data: " + _json(chunk) + b"\n\n"

    def whole(self) -> bytes:
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


class _PredictionResponse(Response):
    """The plain route's own, flat shape."""

    _text_open = b'"text":'

    def whole(self) -> bytes:
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


def parse_json(data: bytes | str) -> Any:
    """What ``data`` says; raises ``InvalidRequest`` if it is not JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        reason = str(exc)[:1].lower() + str(exc)[1:].rstrip(".")
        raise InvalidRequest(f"The body is not valid JSON: {reason}.") from None
