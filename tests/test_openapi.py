"""Requests and responses against OpenAI's own published types, and against our description."""

import itertools
import json
from pathlib import Path

import msgspec
import pytest
from openai.types import Completion, Model
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import (
    ChatCompletionStreamOptionsParam,
)
from openai.types.shared_params import FunctionDefinition
from support.tokenizers import byte_level_tokenizer

from pagetier.handler import openapi
from pagetier.handler.errors import QueueFull
from pagetier.handler.messages import RequestOutput, TokenLogprobs
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.openai_responses import error_body
from pagetier.handler.openai_schemas import (
    HARMLESS,
    NOT_SUPPORTED_YET,
    ChatBody,
    ChatMessage,
    CompletionBody,
    Function,
    MessageToolCall,
    NamedToolChoice,
    StreamOptions,
    Tool,
)
from pagetier.handler.tokenizer import Tokenizer

DESCRIPTION = Path(__file__).parent.parent / "docs" / "openapi.json"
# What vLLM adds to OpenAI's shapes, and we with it.
ADDITIONS = {"stop_reason", "prompt_logprobs", "max_model_len"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(byte_level_tokenizer())


@pytest.fixture(scope="module")
def api(tokenizer):
    return OpenAIApi(
        tokenizer, model_name="tiny", max_model_len=100, vocab_size=400, eos_token_ids=(0,)
    )


def test_published_description_is_current():
    assert json.loads(DESCRIPTION.read_text(encoding="utf-8")) == openapi.describe(), (
        "run: python -m pagetier.handler.openapi > docs/openapi.json"
    )


def test_description_refers_to_nothing_that_is_missing():
    text = json.dumps(openapi.describe())
    components = openapi.describe()["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references == set(components)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (completion_params.CompletionCreateParamsBase, CompletionBody),
        (completion_params.CompletionCreateParamsStreaming, CompletionBody),
        (chat_params.CompletionCreateParamsBase, ChatBody),
        (chat_params.CompletionCreateParamsStreaming, ChatBody),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionFunctionToolParam, Tool),
        (FunctionDefinition, Function),
        (ChatCompletionNamedToolChoiceParam, NamedToolChoice),
        (ChatCompletionMessageFunctionToolCallParam, MessageToolCall),
        (ChatCompletionToolMessageParam, ChatMessage),
    ],
)
def test_every_field_of_openais_requests_is_known(theirs, ours):
    fields = theirs.__annotations__.keys()
    assert fields
    known = {field.name for field in msgspec.structs.fields(ours)} | NOT_SUPPORTED_YET.keys()
    assert not fields - known - HARMLESS


def outputs(requests, tokenizer, num_steps=3):
    """What an engine says of ``requests``: ``num_steps`` tokens each, the last one at once."""
    for request in requests:
        ids = tokenizer.encode("the quick 日本", add_special_tokens=False)[:num_steps]
        for number, token_id in enumerate(ids):
            scored = [TokenLogprobs(token_id, -0.5, [token_id, 70], [-0.5, -1.5])]
            prompt_logprobs = None
            if request.params.prompt_logprobs is not None and number == 0:
                prompt_logprobs = [
                    TokenLogprobs(t, -0.5, [t], [-0.5]) for t in request.prompt_token_ids[1:]
                ]
            yield RequestOutput(
                request.request_id,
                [token_id],
                logprobs=None if request.params.logprobs is None else scored,
                prompt_logprobs=prompt_logprobs,
                finish_reason="length" if number == len(ids) - 1 else None,
                num_cached_tokens=16,
            )


def whole(response, tokenizer):
    for output in outputs(response.requests, tokenizer):
        response.add(output)
    return json.loads(response.whole())


def chunks(response, tokenizer):
    data = response.opening()
    for output in outputs(response.requests, tokenizer):
        response.add(output)
        data += response.take_events()
    events = data.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def unexpected(model):
    """Fields that OpenAI's types do not have, anywhere in a validated response."""
    found = set((model.__pydantic_extra__ or {}).keys())
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if hasattr(item, "__pydantic_extra__"):
                found |= unexpected(item)
    return found


def check(body, theirs, ours):
    """``body`` is exactly of the type ``theirs``, but for the known additions, and of ``ours``."""
    model = theirs.model_validate_json(json.dumps(body), strict=True)
    assert unexpected(model) <= ADDITIONS
    msgspec.convert(body, ours)


OPTIONS = [
    dict(pairs)
    for pairs in itertools.product(
        [("prompt", "the"), ("prompt", ["the fox", "a"]), ("prompt", [7, 8])],
        [("logprobs", None), ("logprobs", 0), ("logprobs", 2)],
        [("echo", True), ("echo", False)],
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_completions_are_of_openais_types(api, tokenizer, options):
    body = whole(api.completion("r", options), tokenizer)
    msgspec.convert(body, openapi.Completion)
    check(_as_published(body), Completion, openapi.Completion)
    for stream_options in (None, {"include_usage": True}):
        body = {**options, "stream": True, "stream_options": stream_options}
        for chunk in chunks(api.completion("r", body), tokenizer):
            msgspec.convert(chunk, openapi.CompletionChunk)
            check(_as_published(chunk), Completion, openapi.CompletionChunk)


def _as_published(body):
    """``body`` with values where OpenAI's server sends nulls that its published type lacks.

    They are the reason for the end of a choice that goes on, and the log-probability of the first
    token of an echoed prompt.
    """
    body = json.loads(json.dumps(body))
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        logprobs = choice["logprobs"]
        if logprobs is not None and logprobs["token_logprobs"][:1] == [None]:
            logprobs["token_logprobs"][0] = 0.0
            logprobs["top_logprobs"][0] = {}
    return body


@pytest.mark.parametrize(
    "logprobs", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}]
)
def test_chats_are_of_openais_types(api, tokenizer, logprobs):
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 5, **logprobs}
    check(whole(api.chat("r", body), tokenizer), ChatCompletion, openapi.ChatCompletion)
    for stream_options in (None, {"include_usage": True}):
        streamed = {**body, "stream": True, "stream_options": stream_options}
        for chunk in chunks(api.chat("r", streamed), tokenizer):
            check(chunk, ChatCompletionChunk, openapi.ChatCompletionChunk)


def test_prompt_logprobs_are_of_the_described_shape(api, tokenizer):
    body = {"prompt": [7, 8, 9], "prompt_logprobs": 1}
    answer = whole(api.completion("r", body), tokenizer)
    check(answer, Completion, openapi.Completion)
    first, *others = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in others] == [["8"], ["9"]]
    chat = {"messages": [{"role": "user", "content": "the"}], "prompt_logprobs": 1}
    check(whole(api.chat("r", chat), tokenizer), ChatCompletion, openapi.ChatCompletion)


def test_other_responses_are_of_their_types(api, tokenizer):
    check(json.loads(api.model("tiny")), Model, openapi.Model)
    msgspec.json.decode(api.models(), type=openapi.ModelList)
    msgspec.json.decode(api.tokenize({"prompt": "a"}), type=openapi.Tokens)
    msgspec.json.decode(api.detokenize({"tokens": [7]}), type=openapi.Text)
    msgspec.json.decode(error_body(QueueFull("Full.")), type=openapi.Error)
    body = {"prompt": "the", "logprobs": 1}
    msgspec.convert(whole(api.prediction("r", body), tokenizer), openapi.Prediction)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in chunks(api.prediction("r", body), tokenizer):
        msgspec.convert(chunk, openapi.Prediction)
