"""The real ``openai`` client against a real TorchServe: what it asks, joins, leaves and breaks."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from support.live import NAME, complete, runs, wait_for

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]

PROMPTS = [
    "Return the",
    "This module provides",
    "Raise an exception if",
    "Read up to",
    "Convert a string",
    "Create a new",
    "The optional argument",
    "Write the given",
]
MESSAGES = [{"role": "user", "content": "What does os.path.join do?"}]


def _streamed(chunks):
    text, finish_reason, usage = "", None, None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.text or ""
            finish_reason = choice.finish_reason or finish_reason
        usage = chunk.usage or usage
    return text, finish_reason, usage


def test_models_are_listed(server):
    assert [model.id for model in server.client.models.list()] == [NAME]


def test_completion_streams_what_it_answers_whole(server):
    whole = complete(server.client, "Return the", max_tokens=24)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == 24 + whole.usage.prompt_tokens
    chunks = list(
        complete(
            server.client,
            "Return the",
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text, finish_reason, usage = _streamed(chunks)
    assert text == whole.choices[0].text
    assert text.strip()
    assert finish_reason == "length"
    assert usage.completion_tokens == 24
    assert len(chunks) > 2, "the stream came in one piece"


def test_completion_ends_at_a_stop_string(server):
    whole = complete(server.client, "Return the", max_tokens=24).choices[0].text
    stop = whole[5:8]
    answer = complete(server.client, "Return the", max_tokens=24, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)]


def test_chat_streams_what_it_answers_whole(server):
    options = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    whole = server.client.chat.completions.create(**options).choices[0]
    assert whole.message.role == "assistant"
    assert whole.message.content.strip()
    deltas = [
        chunk.choices[0].delta
        for chunk in server.client.chat.completions.create(**options, stream=True)
        if chunk.choices
    ]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content


def test_chat_keeps_to_a_json_schema_whole_and_streamed(server):
    schema = {
        "type": "object",
        "properties": {
            "answer": {"type": "string", "maxLength": 8},
            "is_sure": {"type": "boolean"},
        },
        "required": ["answer", "is_sure"],
        "additionalProperties": False,
    }
    options = {
        "model": NAME,
        "messages": MESSAGES,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        },
    }
    create = server.client.chat.completions.create
    choice = create(**options).choices[0]
    answer = json.loads(choice.message.content)
    assert choice.finish_reason == "stop"
    assert list(answer) == ["answer", "is_sure"]
    assert len(answer["answer"]) <= 8
    chunks = list(create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "maxLength": 6}},
                "required": ["path"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("exists", "remove")
]


@pytest.mark.parametrize(
    ("tool_choice", "allowed"),
    [
        ("required", {"exists", "remove"}),
        ({"type": "function", "function": {"name": "remove"}}, {"remove"}),
    ],
)
def test_tool_is_called_where_it_must_be_whole_and_streamed(server, tool_choice, allowed):
    options = {
        "model": NAME,
        "messages": MESSAGES,
        "temperature": 0,
        "tools": TOOLS,
        "tool_choice": tool_choice,
        "parallel_tool_calls": False,
    }
    create = server.client.chat.completions.create
    choice = create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.function.name in allowed
    arguments = json.loads(call.function.arguments)
    assert list(arguments) == ["path"]
    assert len(arguments["path"]) <= 6
    name, text = "", ""
    for chunk in create(**options, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            text += delta.function.arguments
    assert (name, text) == (call.function.name, call.function.arguments)
    answer = {"role": "tool", "tool_call_id": call.id, "content": "True"}
    messages = [*MESSAGES, choice.message, answer]
    after = create(model=NAME, messages=messages, tools=TOOLS, max_tokens=8, temperature=0)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_answer_keeps_to_its_schema_where_no_tool_is_called(server):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    choice = server.client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0,
        tools=TOOLS,
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    ).choices[0]
    if choice.message.tool_calls:
        assert choice.finish_reason == "tool_calls"
    else:
        assert list(json.loads(choice.message.content)) == ["ok"]


def test_logprobs_are_of_the_generated_tokens(server):
    answer = complete(server.client, "Return the", max_tokens=5, logprobs=2).choices[0]
    assert len(answer.logprobs.tokens) == 5
    assert "".join(answer.logprobs.tokens) == answer.text
    for chosen, top in zip(
        answer.logprobs.token_logprobs, answer.logprobs.top_logprobs, strict=True
    ):
        assert chosen == pytest.approx(max(top.values())), "greedy takes the likeliest"


def test_same_seed_gives_the_same_text(server):
    options = {"max_tokens": 16, "temperature": 1.0}
    texts = [
        complete(server.client, "Return the", seed=seed, **options).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sixty_four_streams_at_once_are_complete_and_as_if_alone(server):
    alone = {
        prompt: complete(server.client, prompt, max_tokens=32).choices[0].text for prompt in PROMPTS
    }
    before = server.stats()

    def stream(index):
        chunks = complete(
            server.client,
            PROMPTS[index % len(PROMPTS)],
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
        return _streamed(chunks)

    with ThreadPoolExecutor(64) as threads:
        results = list(threads.map(stream, range(64)))
    assert [usage.completion_tokens for _, _, usage in results] == [32] * 64
    assert {finish_reason for _, finish_reason, _ in results} == {"length"}
    for index, (text, _, _) in enumerate(results):
        assert text == alone[PROMPTS[index % len(PROMPTS)]]
    after = server.stats()
    assert after["generation_tokens"] - before["generation_tokens"] == 64 * 32


def test_request_that_joins_is_served_while_another_runs(server):
    long = complete(server.client, "Return the", max_tokens=400, stream=True)
    next(long)
    joined = complete(server.client, "Read up to", max_tokens=4)
    assert joined.usage.completion_tokens == 4
    assert server.stats()["num_requests_running"] == 1, "the long one must still be running"
    long.close()


def test_client_that_leaves_frees_its_blocks_within_a_second(server):
    stream = complete(server.client, "Return the", max_tokens=400, stream=True)
    next(stream)
    assert server.stats()["num_requests_running"] == 1
    stream.close()
    wait_for(lambda: server.stats()["num_requests_running"] == 0, 1.0, "it was not aborted")
    stats = server.stats()
    assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]


def test_client_that_leaves_disturbs_nobody(server):
    alone = complete(server.client, "Read up to", max_tokens=48).choices[0].text
    leaving = [
        complete(server.client, prompt, max_tokens=400, stream=True) for prompt in PROMPTS[:4]
    ]
    staying = complete(server.client, "Read up to", max_tokens=48, stream=True)
    first = next(staying).choices[0].text
    for stream in leaving:
        stream.close()
    assert first + _streamed(staying)[0] == alone


def test_killed_engine_is_answered_soon_and_comes_back(server):
    alone = complete(server.client, "Return the", max_tokens=8).choices[0].text
    engine, ended = server.engine(), []
    streams = [
        complete(server.client, prompt, max_tokens=400, stream=True) for prompt in PROMPTS[:4]
    ]
    for stream in streams:
        next(stream)

    def follow(stream):
        with pytest.raises(openai.OpenAIError):
            _streamed(stream)
        ended.append(time.monotonic())

    def whole():
        with pytest.raises(openai.OpenAIError):
            complete(server.client, "Write the given", max_tokens=400)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=follow, args=(stream,)) for stream in streams]
    threads.append(threading.Thread(target=whole))
    for thread in threads:
        thread.start()
    wait_for(lambda: server.stats()["num_requests_running"] == 5, 5.0, "five were not running")
    killed = time.monotonic()
    engine.kill()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 5
    assert max(ended) - killed < 2.0
    server.wait_until_it_answers()
    assert complete(server.client, "Return the", max_tokens=8).choices[0].text == alone


def test_killed_handler_takes_its_engine_along_and_comes_back(server):
    worker, engine = server.worker(), server.engine()
    stream = complete(server.client, "Return the", max_tokens=400, stream=True)
    next(stream)
    killed = time.monotonic()
    worker.kill()
    wait_for(lambda: not runs(engine), 2.0, "the engine outlived its handler")
    with pytest.raises((openai.OpenAIError, OSError)):
        _streamed(stream)
    assert time.monotonic() - killed < 2.0
    server.wait_until_it_answers()
