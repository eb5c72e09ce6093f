"""What OpenAI's routes accept: the fields of bodies, their types, and errors that name them.

Owns field names and types, which fields are harmless and which are not supported yet, and the
reading of JSON. Knows nothing of tokenizers, limits of the model, or of what is done with the
fields: ``openai_api`` makes requests of them.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from pagetier.handler.errors import InvalidRequest
from pagetier.handler.sampling_params import StructuredOutputsParams

# Fields of OpenAI's API that change nothing about the output.
HARMLESS = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip

# Fields whose feature does not exist yet, with the values that ask for nothing.
NOT_SUPPORTED_YET: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_T = TypeVar("_T", bound=msgspec.Struct)
_encode = msgspec.json.Encoder().encode
# Types that msgspec cannot tell apart while it reads; they are checked by hand.
_Prompt = Annotated[
    Any,
    msgspec.Meta(
        description="Text or token ids, or a list of several such.",
        extra_json_schema={
            "oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "string"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}},
                },
            ]
        },
    ),
]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage``: end the stream with a chunk that counts its tokens."""

    include_usage: bool = False
    # OpenAI's padding of chunks, which does not exist here: only its absence can be asked for.
    include_obfuscation: Annotated[bool, msgspec.Meta(extra_json_schema={"const": False})] = False


class TextFormat(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema, always kept to exactly; ``name``, ``description`` and ``strict`` change
    nothing."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag="json_schema", forbid_unknown_fields=True):
    """JSON that keeps to a schema."""

    json_schema: JsonSchema


class CommonFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all routes that generate take."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Int64 | None = None
    seed: _Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[_Int64] | None = None
    max_tokens: _Int64 | None = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[_Int64] | None = None
    bad_words: list[str] | None = None
    min_tokens: _Int64 | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: _Int64 = 0
    cache_salt: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    timeout: float | None = None
    request_id: str | None = None


class CompletionBody(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``v1/completions`` and of the plain prediction route."""

    prompt: _Prompt
    logprobs: int | None = None
    echo: bool = False


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message's content."""

    text: str
    type: Literal["text"] = "text"


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``arguments`` are a JSON object, as text."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the assistant has made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a chat: a tool's has ``tool_call_id``, an assistant's may have ``tool_calls``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model is told of a tool; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that the model may call."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool that must be called."""

    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Call this tool, once."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatBody(CommonFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: _Int64 | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool = True


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``tokenize``: either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``detokenize``."""

    model: str | None = None
    tokens: list[_Int64]


class DrainBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``drain``: how many seconds to wait; None for as long as it takes."""

    timeout: float | None = None


# --- reading bodies --------------------------------------------------------------------------


def parse_json(data: bytes | str) -> Any:
    """What ``data`` says; raises ``InvalidRequest`` if it is not JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        reason = str(exc).removeprefix("JSON is ").rstrip(".")
        reason = reason[:1].lower() + reason[1:]
        raise InvalidRequest(f"The body is not valid JSON: {reason}.") from None


def read_body(body: Any, kind: type[_T]) -> _T:
    """``body`` as ``kind``; raises ``InvalidRequest`` with one sentence that names the field."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {_json_type(body)}.")
    known = kind.__struct_fields__
    kept, unknown = {}, []
    for key, value in body.items():
        if key in known:
            # null is the same as leaving a field out.
            if value is not None:
                kept[key] = value
        elif key in NOT_SUPPORTED_YET:
            if value is not None and not _is_neutral(value, NOT_SUPPORTED_YET[key]):
                raise InvalidRequest(f"{key} is not supported yet; leave it out.", param=key)
        elif key not in HARMLESS:
            unknown.append(key)
    if unknown:
        names = ", ".join(short(key) for key in unknown[:8])
        names += ", ..." if len(unknown) > 8 else ""
        raise InvalidRequest(
            f"Unknown field{'s' if len(unknown) > 1 else ''} {names}; leave "
            f"{'them' if len(unknown) > 1 else 'it'} out.",
            param=unknown[0][:64],
        )
    try:
        fields = msgspec.convert(kept, kind)
        # What the engine is given, and what is said of it, must be text that can be sent.
        _encode(kept)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc)) from None
    except UnicodeEncodeError:
        raise InvalidRequest(
            "The body is not valid Unicode text: it holds half of a surrogate pair."
        ) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    return fields


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True equals 1 in Python, but `n: true` is a mistake.
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _invalid(message: str) -> InvalidRequest:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" with the place in front."""
    what, _, place = message.replace("`", "").rpartition(" - at ")
    if not place.startswith("$"):
        what, place = message.replace("`", ""), ""
    what = shorten((what[:1].lower() + what[1:]).replace(" | null", ""), 200)
    if not place:
        return InvalidRequest(f"The body is wrong: {what}.", param=_missing_field(what))
    param = place.removeprefix("$.").split(".")[0].split("[")[0]
    return InvalidRequest(f"{place}: {what}.", param=param)


def _missing_field(what: str) -> str | None:
    prefix = "object missing required field "
    return what.removeprefix(prefix) if what.startswith(prefix) else None


def without_null_message_fields(body: Any) -> Any:
    """Drop null fields of messages: OpenAI's client sends an answer back with several."""
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        return body
    messages = [
        {k: v for k, v in m.items() if v not in (None, [])} if isinstance(m, dict) else m
        for m in body["messages"]
    ]
    return {**body, "messages": messages}


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """The message as chat templates know it: its content one text, arguments as objects.

    Raises:
        InvalidRequest: it lacks what its role needs, or has what only another may have.
    """
    if (message.tool_calls is not None) > (message.role == "assistant"):
        raise InvalidRequest(
            f"Only a message of the assistant may have tool_calls, not one of {message.role!r}.",
            param="messages",
        )
    if (message.tool_call_id is not None) != (message.role == "tool"):
        raise InvalidRequest(
            "A message of a tool, and no other, needs the tool_call_id that it answers.",
            param="messages",
        )
    content = message.content
    if content is None:
        if not message.tool_calls:
            raise InvalidRequest(f"A message of {message.role!r} has no content.", param="messages")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def _plain_call(call: MessageToolCall) -> dict[str, Any]:
    arguments = _parse_arguments(call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


def _parse_arguments(text: str) -> dict[str, Any]:
    """A call's arguments; raises ``InvalidRequest`` if they are no JSON object."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            f"messages: the arguments of a tool call must be a JSON object, as text, not "
            f"{short(text)}.",
            param="messages",
        )
    return arguments


def plain_tool(tool: Tool) -> dict[str, Any]:
    """The tool as chat templates know it: some fail where one of these is left out."""
    function = {
        "name": tool.function.name,
        "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}},
    }
    return {"type": tool.type, "function": function}


def _json_type(value: Any) -> str:
    names = {str: "text", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """``value`` for an error's text, 64 characters at most."""
    # Whole structures would take long to write, or be nested too deeply for it.
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return shorten(repr(value), 64)


def shorten(text: str, max_characters: int) -> str:
    """``text``, or its beginning if it is longer."""
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."
