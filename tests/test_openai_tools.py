"""Tools in chats: what requests may say, what the model is told, and what clients get."""

import json

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from support.tokenizers import TOOL_TEMPLATE, byte_level_tokenizer

from pagetier.handler import openapi
from pagetier.handler.errors import InvalidRequest
from pagetier.handler.messages import RequestOutput, TokenLogprobs
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.openai_tools import MAX_TOOLS
from pagetier.handler.tokenizer import Tokenizer

PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS},
}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
CHAT = [{"role": "user", "content": "the fox"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
SECOND = '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def make_api(template=TOOL_TEMPLATE, **settings):
    return OpenAIApi(
        Tokenizer(byte_level_tokenizer(), chat_template=template),
        **{"max_model_len": 4000, **settings},
        model_name="tiny",
        vocab_size=400,
        eos_token_ids=(0,),
    )


@pytest.fixture(scope="module")
def api():
    return make_api()


def ask(api, **body):
    return api.chat("r", {"messages": CHAT, "tools": [WEATHER, NOW], **body})


def prompt(response):
    ids = response.request.prompt_token_ids
    return Tokenizer(byte_level_tokenizer()).decode(ids, skip_special_tokens=False)


def say(response, text, *, size=4, finish_reason="stop"):
    """Let the model say ``text``; the events that come of it, if it is a stream."""
    tokenizer = Tokenizer(byte_level_tokenizer())
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = response.opening() if response.stream else b""
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        is_last = start + size >= len(ids)
        output = RequestOutput(
            response.request.request_id,
            piece,
            logprobs=[TokenLogprobs(t, -0.5, [t], [-0.5]) for t in piece],
            finish_reason=finish_reason if is_last else None,
            has_stop_token=False,
        )
        is_stopped = response.add(output)
        data += response.take_events() if response.stream else b""
        if is_stopped:
            break
    if not response.stream:
        return json.loads(response.whole())
    events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")[:-1]]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


# --- what the model is told ------------------------------------------------------------------


def test_template_is_given_the_tools_in_openais_form(api):
    text = prompt(ask(api))
    assert json.dumps(WEATHER, sort_keys=True) in text or '"description": "Tell it."' in text
    assert '"name": "now"' in text
    assert "null" not in text
    assert prompt(ask(api, tool_choice="none")) == "<|user|>the fox<|end|><|assistant|>"
    assert prompt(ask(api, tools=[])) == prompt(ask(api, tools=None))


def test_templates_are_given_all_three_parts_of_a_tool():
    """Those of Hermes 3 add descriptions together and look into properties."""
    template = (
        "{% for t in tools %}{{ t.function.name + t.function.description }}"
        "{{ t.function.parameters.properties | length }}{% endfor %}<tool_call>"
    )
    assert prompt(ask(make_api(template=template))) == "weatherTell it.1now0<tool_call>"


def test_conversation_with_calls_and_answers_is_rendered(api):
    messages = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"place": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    text = prompt(api.chat("r", {"messages": messages}))
    # Templates write arguments as JSON, so they are given objects.
    assert '"arguments": {"place": "Rome"}' in text
    assert text.endswith("<|user|>sunny(call_1)<|end|><|assistant|>")


def test_tokenize_counts_what_the_chat_would_have(api):
    body = {"messages": CHAT, "tools": [WEATHER, NOW]}
    assert json.loads(api.tokenize(body))["tokens"] == ask(api).request.prompt_token_ids


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "custom"}]}, "tools", "type"),
        ({"tools": [{"function": {}}]}, "tools", "name"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools", "letters"),
        ({"tools": [NOW, NOW]}, "tools", "same name"),
        ({"tools": [NOW] * (MAX_TOOLS + 1)}, "tools", "at most 128"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"function": {"name": "f"}}}, "tool_choice", "none of the tools"),
        ({"tool_choice": "any"}, "tool_choice", "tool_choice"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice", "look otherwise"),
        ({"guided_regex": "a"}, "tools", "JSON schema only"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages", "no content"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [
                {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
            "messages", "Only a message of the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages", "must be a JSON object",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"x-guidance": {}}}}],
             "tool_choice": "required"},
            "tools", "x-guidance",
        ),
    ],
)  # fmt: skip
def test_wrong_tools_are_refused_with_the_reason(api, body, param, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        ask(api, **body)
    assert caught.value.param == param


def test_parameters_that_are_too_large_are_refused():
    tool = {"function": {"name": "f", "parameters": {"required": ["b" * 70000]}}}
    api = make_api(max_model_len=100000)
    with pytest.raises(InvalidRequest, match="at most 65536 are allowed") as caught:
        ask(api, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
    assert ask(api, tools=[tool])


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [NOW]},
        {"tools": [NOW], "tool_choice": "required"},
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]},
        {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
    ],
)  # fmt: skip
def test_template_without_tools_is_one_clear_refusal(body):
    api = make_api(template=None)
    with pytest.raises(InvalidRequest, match="chat template knows no tools"):
        api.chat("r", {"messages": CHAT, **body})
    assert api.chat("r", {"messages": CHAT, "tools": [NOW], "tool_choice": "none"})


def test_unknown_form_is_refused_and_the_setting_named():
    with pytest.raises(InvalidRequest, match="'tool_call_parser', one of hermes"):
        ask(make_api(template="{{ tools }}"))
    assert ask(make_api(template="{{ tools }}", tool_call_parser="mistral"))


def test_tools_are_of_chats_only(api):
    with pytest.raises(InvalidRequest, match="Unknown field 'tools'"):
        api.completion("r", {"prompt": "a", "tools": [NOW]})


# --- what the output is held to --------------------------------------------------------------


def grammar(response):
    shape = response.request.params.structured_outputs
    return None if shape is None else shape.grammar


def test_only_what_must_be_is_held_to_a_grammar(api):
    assert grammar(ask(api)) is None
    assert grammar(ask(api, tool_choice="auto")) is None
    required = grammar(ask(api, tool_choice="required"))
    assert '\\"weather\\"' in required
    assert '\\"now\\"' in required
    assert "call)*" in required
    assert "call)*" not in grammar(ask(api, tool_choice="required", parallel_tool_calls=False))
    named = grammar(ask(api, tool_choice=NAMED))
    assert '\\"weather\\"' not in named
    assert "call)*" not in named


def test_answers_schema_and_calls_are_alternatives(api):
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    assert "| answer" in grammar(ask(api, response_format=schema))
    assert "| answer" in grammar(ask(api, response_format={"type": "json_object"}))
    assert grammar(ask(api, response_format={"type": "text"})) is None


def test_special_tokens_have_text_where_calls_are_made_of_them(api):
    assert ask(api).request.params.skip_special_tokens
    template = "{{ tools }}<|python_tag|>"
    tokenizer = byte_level_tokenizer()
    assert ask(make_api(template=template)).request.params.skip_special_tokens
    tokenizer = Tokenizer(tokenizer, chat_template=template)
    tokenizer.__class__ = type("Other", (Tokenizer,), {
        "special_tokens": property(lambda self: {"<|python_tag|>": 1})
    })  # fmt: skip
    other = OpenAIApi(
        tokenizer, model_name="t", max_model_len=4000, vocab_size=400, eos_token_ids=(0,)
    )
    assert not ask(other).request.params.skip_special_tokens
    assert other.chat("r", {"messages": CHAT}).request.params.skip_special_tokens


# --- what clients get ------------------------------------------------------------------------


def joined(chunks):
    """The message that a stream's chunks make, as OpenAI's clients put it together."""
    content, calls, reason = "", {}, None
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        msgspec.convert(chunk, openapi.ChatCompletionChunk)
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls", []):
                call = calls.setdefault(delta["index"], {"name": "", "arguments": "", "ids": []})
                call["ids"] += [delta["id"]] if "id" in delta else []
                call["name"] += delta["function"].get("name", "")
                call["arguments"] += delta["function"]["arguments"]
            assert reason is None, "something came after the end"
            reason = choice["finish_reason"]
    assert all(len(call["ids"]) == 1 for call in calls.values())
    return content, [(c["name"], c["arguments"]) for c in calls.values()], reason


@pytest.mark.parametrize("size", [1, 3, 500])
@pytest.mark.parametrize("options", [{}, {"logprobs": True}])
def test_calls_come_whole_and_streamed_alike(api, size, options):
    text = f"Let me see.\n{CALL}{SECOND}"
    body = say(ask(api, **options), text, size=size)
    ChatCompletion.model_validate_json(json.dumps(body), strict=True)
    msgspec.convert(body, openapi.ChatCompletion)
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [c["function"] for c in calls] == [
        {"name": "weather", "arguments": '{"place": "Rome"}'},
        {"name": "now", "arguments": "{}"},
    ]
    assert {c["type"] for c in calls} == {"function"}
    assert len({c["id"] for c in calls}) == 2
    chunks = say(ask(api, stream=True, **options), text, size=size)
    content, streamed, reason = joined(chunks)
    assert content == "Let me see."
    assert streamed == [("weather", '{"place": "Rome"}'), ("now", "{}")]
    assert reason == "tool_calls"
    if options:
        num = len(choice["logprobs"]["content"])
        told = [len(c["choices"][0]["logprobs"]["content"]) for c in chunks[1:]]
        assert sum(told) == num == body["usage"]["completion_tokens"]


def test_content_is_null_where_there_are_only_calls(api):
    message = say(ask(api), CALL)["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


def test_answer_without_calls_is_an_ordinary_one(api):
    choice = say(ask(api), "It is sunny.")["choices"][0]
    assert choice["message"] == {
        "role": "assistant", "content": "It is sunny.", "refusal": None
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    chunks = say(ask(api, stream=True), "It is sunny.", size=1)
    assert joined(chunks) == ("It is sunny.", [], "stop")


def test_calls_are_text_where_none_may_be_made(api):
    choice = say(ask(api, tool_choice="none"), CALL)["choices"][0]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


def test_call_that_is_cut_off_keeps_its_reason(api):
    text = CALL[: CALL.index("Ro")]
    choice = say(ask(api), text, finish_reason="length")["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"place": "'


def test_without_parallel_calls_the_first_ends_the_answer(api):
    body = say(ask(api, parallel_tool_calls=False), CALL + SECOND, size=1)
    choice = body["choices"][0]
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"
    num_needed = len(Tokenizer(byte_level_tokenizer()).encode(CALL.split("\n</")[0]))
    assert body["usage"]["completion_tokens"] <= num_needed + 1
    chunks = say(ask(api, parallel_tool_calls=False, stream=True), CALL + SECOND, size=1)
    assert joined(chunks) == ("", [("weather", '{"place": "Rome"}')], "tool_calls")


def test_stream_ends_with_its_usage(api):
    chunks = say(ask(api, stream=True, stream_options={"include_usage": True}), CALL)
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_each_choice_has_its_own_calls(api):
    response = ask(api, n=2)
    ids = Tokenizer(byte_level_tokenizer()).encode(CALL)
    for index in (1, 0):
        text_ids = ids if index else ids[:3]
        response.add(RequestOutput("r", text_ids, finish_reason="stop", index=index,
                                   has_stop_token=False))  # fmt: skip
    first, second = json.loads(response.whole())["choices"]
    assert "tool_calls" not in first["message"]
    assert second["message"]["tool_calls"][0]["function"]["name"] == "weather"
