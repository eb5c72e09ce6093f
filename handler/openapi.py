"""The OpenAPI description of our routes, as ``docs/openapi.json`` has it.

Owns the list of routes and the shapes of responses, as types that tests hold every response
against. The shapes of requests are those that ``openai_schemas`` reads them with. After a change::

    python -m pagetier.handler.openapi > docs/openapi.json
"""

import json
import re
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pagetier.handler.openai_schemas import (
    HARMLESS,
    NOT_SUPPORTED_YET,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    DrainBody,
    TokenizeBody,
)


class _Exact(msgspec.Struct, forbid_unknown_fields=True):
    """A response has these fields and no others."""


class PromptTokensDetails(_Exact):
    """``cached_tokens`` of the prompt were found in the KV cache."""

    cached_tokens: int


class Usage(_Exact):
    """Tokens counted; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Exact):
    """Lists in parallel, an entry for each token; the first of an echoed prompt has no value."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Exact):
    """A token that the prompt has, or might have had, at a place."""

    logprob: float
    decoded_token: str


class CompletionChoice(_Exact):
    """What came of a prompt, or of a part of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    # None in the chunks of a stream but the last of a choice.
    finish_reason: str | None
    # The stop text or token id that ended it, if one did.
    stop_reason: str | int | UnsetType | None = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class _Head(_Exact):
    id: str
    object: str
    created: int
    model: str


class Completion(_Head):
    """The response of ``v1/completions``."""

    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Head):
    """A server-sent event of ``v1/completions``."""

    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopToken(_Exact):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(_Exact):
    """An entry for each token of the answer."""

    content: list[ChatToken]
    refusal: None


class FunctionCall(_Exact):
    """``arguments`` are JSON as text; in a stream a piece of it."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCall(_Exact):
    """A call that the model asks for; ``index`` in a stream only, the rest in its first piece."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCall | UnsetType = UNSET


class ChatAnswer(_Exact):
    """The assistant's turn."""

    role: str
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(_Exact):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatCompletion(_Head):
    """The response of ``v1/chat/completions``."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class ChatDelta(_Exact):
    """What a chunk adds to the assistant's turn."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(_Exact):
    """A part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | UnsetType | None = UNSET


class ChatCompletionChunk(_Head):
    """A server-sent event of ``v1/chat/completions``."""

    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Prediction(_Exact):
    """The response of the plain route, or an event of it."""

    id: str
    model: str
    # Not in a stream's last event, which has ``usage`` only.
    text: str | UnsetType = UNSET
    logprobs: CompletionLogprobs | UnsetType | None = UNSET
    finish_reason: str | UnsetType | None = UNSET
    stop_reason: str | int | UnsetType | None = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    usage: Usage | UnsetType | None = UNSET


class Model(_Exact):
    """The served model."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Exact):
    """The response of ``v1/models``."""

    object: str
    data: list[Model]


class Tokens(_Exact):
    """The response of ``tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Exact):
    """The response of ``detokenize``."""

    prompt: str


class Status(_Exact):
    """``ok``, ``draining``, ``drained`` or ``resumed``."""

    status: str


class ErrorDetails(_Exact):
    """``message`` is one sentence; ``param`` names the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Exact):
    """Any answer that is not a success."""

    error: ErrorDetails


_ROUTE = "/predictions/{model}/{version}/"
# Route, method, what it does, the body's type, the response's, that of a stream's events.
_Route = tuple[str, str, str, Any, Any, Any]
_ROUTES: list[_Route] = [
    ("v1/completions", "post", "Continue texts.", CompletionBody, Completion, CompletionChunk),
    (
        "v1/chat/completions",
        "post",
        "Answer a chat.",
        ChatBody,
        ChatCompletion,
        ChatCompletionChunk,
    ),
    ("v1/models", "get", "List the served model.", None, ModelList, None),
    ("v1/models/{name}", "get", "Describe the served model.", None, Model, None),
    ("tokenize", "post", "Tell the tokens of a text or a chat.", TokenizeBody, Tokens, None),
    ("detokenize", "post", "Tell the text of tokens.", DetokenizeBody, Text, None),
    ("health", "get", "Tell whether the engine is alive.", None, Status, None),
    ("stats", "get", "Tell gauges and totals.", None, dict[str, Any], None),
    ("stats/trace", "get", "Tell the last steps' decisions, too.", None, dict[str, Any], None),
    ("drain", "post", "Take no new requests; answers when none is open.", DrainBody, Status, None),
    ("resume", "post", "Take requests again after a drain.", None, Status, None),
]
_PLAIN: _Route = (
    "/predictions/{model}",
    "post",
    "Continue one text, in a flat shape.",
    CompletionBody,
    Prediction,
    Prediction,
)


def describe() -> dict[str, Any]:
    """The description, as OpenAPI 3.1."""
    routes = [(_ROUTE + path, *rest) for path, *rest in _ROUTES] + [_PLAIN]
    types = [t for route in routes for t in route[3:] if t is not None] + [Error]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = {repr(t): schema for t, schema in zip(types, schemas, strict=True)}
    for name in (CompletionBody.__name__, ChatBody.__name__):
        _add_fields_without_effect(components[name]["properties"])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pagetier",
            "version": "1",
            "description": (
                "Language models on TorchServe, with OpenAI's API. A field that is null counts "
                "as left out. A stream ends with the event [DONE]."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8080"}],
        "security": [{"key": []}],
        "paths": {route[0]: {route[1]: _operation(route, schema_of)} for route in routes},
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _add_fields_without_effect(properties: dict[str, Any]) -> None:
    for name in sorted(HARMLESS - properties.keys()):
        properties[name] = {"description": "Taken; changes nothing."}
    for name in sorted(NOT_SUPPORTED_YET.keys() - properties.keys()):
        properties[name] = {
            "description": "Not supported yet; taken where it asks for nothing.",
            "enum": [*NOT_SUPPORTED_YET[name], None],
        }


def _operation(route: _Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    path, _, summary, body, answer, event = route
    content = {"application/json": {"schema": schema_of[repr(answer)]}}
    if event is not None:
        content["text/event-stream"] = {"schema": schema_of[repr(event)]}
    parameters = [name.partition("}")[0] for name in path.split("{")[1:]]
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": re.sub(r"\W+", "_", path.removeprefix(_ROUTE)).strip("_"),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ],
        "responses": {
            "200": {"description": "Success.", "content": content},
            "default": {
                "description": "The request was refused, or failed.",
                "content": {"application/json": {"schema": schema_of[repr(Error)]}},
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {
            "required": body is not DrainBody,
            "content": {"application/json": {"schema": schema_of[repr(body)]}},
        }
    return operation


if __name__ == "__main__":
    print(json.dumps(describe(), indent=2))
