"""OpenAI's own client against real ``ts`` code and an engine whose answers are known."""

import json

import httpx
import openai
import pytest
from support.fake_core import FakeCore
from support.frontend import Frontend
from support.tokenizers import TOOL_TEMPLATE, byte_level_tokenizer

from pagetier.handler import pump
from pagetier.handler.config import EngineConfig
from pagetier.handler.exchange import Inbox
from pagetier.handler.messages import RequestOutput
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.pump import Pump
from pagetier.handler.service import PagetierHandler
from pagetier.handler.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL = (
    "I look it up.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
)


class ScriptedCore(FakeCore):
    """Gives each request a token a step, those of ``script``."""

    def __init__(self, script):
        super().__init__(EngineConfig.create({"model": "none"}), step_seconds=0.0)
        self.script = script
        self.prompts = []

    def add_request(self, request):
        super().add_request(request)
        self.prompts.append(request.prompt_token_ids)

    def _advance(self, request):
        made = self._made[request.request_id]
        made.append(self.script[len(made)])
        reason = "stop" if len(made) == len(self.script) else None
        if reason:
            del self._requests[request.request_id], self._made[request.request_id]
        return RequestOutput(request.request_id, made[-1:], finish_reason=reason)


class Engine:
    """Hands a core's outputs to the pump, in this thread."""

    def __init__(self, core, inbox):
        self.add, self._core, self._inbox = core.add_request, core, inbox

    def abort(self, request_ids, outputs=()):
        self._core.abort(list(request_ids), outputs)

    def step(self):
        if self._core.has_work():
            self._inbox.put(self._core.step())


class Rig:
    """A client whose requests are carried to a worker without processes or sockets."""

    def __init__(self):
        self.tokenizer = Tokenizer(byte_level_tokenizer(), chat_template=TOOL_TEMPLATE)
        self.core, inbox = ScriptedCore([]), Inbox()
        self.engine = Engine(self.core, inbox)
        api = OpenAIApi(
            self.tokenizer,
            model_name="tiny",
            max_model_len=4000,
            vocab_size=400,
            eos_token_ids=(0,),
        )
        handler = PagetierHandler()
        handler._pump = self.pump = Pump(self.engine, api, inbox, max_num_queued_reqs=8)
        self.frontend = Frontend(handler, {}, "")
        self.client = openai.OpenAI(
            base_url="http://test/v1",
            api_key="key",
            max_retries=0,
            http_client=httpx.Client(transport=httpx.MockTransport(self._carry)),
        )

    def _carry(self, request):
        sent = self.frontend.send(request.url.path.strip("/"), json.loads(request.content))
        for _ in range(2000):
            if not sent.in_flight:
                break
            self.engine.step()
            self.frontend.call()
        headers = {"content-type": sent.content_type}
        return httpx.Response(sent.status, content=sent.body, headers=headers)

    def answer(self, text):
        """Let the engine answer so from now on."""
        self.core.script = [*self.tokenizer.encode(text, add_special_tokens=False), 0]

    def chat(self, messages, **options):
        options = {"model": "tiny", "tools": TOOLS} | options
        return self.client.chat.completions.create(messages=messages, **options)


@pytest.fixture
def rig(monkeypatch):
    monkeypatch.setattr(pump, "WAIT_SECONDS", 0.0)
    return Rig()


def test_conversation_with_a_tool(rig):
    messages = [{"role": "user", "content": "Where is it warmer?"}]
    rig.answer(CALL)
    choice = rig.chat(messages).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    places = [json.loads(c.function.arguments)["place"] for c in choice.message.tool_calls]
    assert places == ["Zürich", "Rome"]
    # The client's own object goes back as it is.
    messages.append(choice.message)
    for call, degrees in zip(choice.message.tool_calls, ("12", "23"), strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": degrees})
    rig.answer("In Rome.")
    choice = rig.chat(messages).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "In Rome.")
    assert choice.message.tool_calls is None
    prompt = rig.tokenizer.decode(rig.core.prompts[-1], skip_special_tokens=False)
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Z' in prompt
    assert "23(call_" in prompt
    assert rig.pump.num_open == 0


def test_streamed_calls_are_put_together_by_the_client(rig):
    rig.answer(CALL)
    with rig.client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "a"}], tools=TOOLS
    ) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    assert [json.loads(c.function.arguments) for c in choice.message.tool_calls] == [
        {"place": "Zürich"},
        {"place": "Rome"},
    ]


def test_without_parallel_calls_the_engine_is_stopped(rig):
    rig.answer(CALL)
    messages = [{"role": "user", "content": "a"}]
    choice = rig.chat(messages, parallel_tool_calls=False).choices[0]
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"
    assert not rig.core.has_work()
    assert rig.core.stats()["num_aborted"] == 1


def test_refusal_is_the_clients_exception(rig):
    with pytest.raises(openai.BadRequestError, match="none of the tools") as caught:
        rig.chat(
            [{"role": "user", "content": "a"}],
            tool_choice={"type": "function", "function": {"name": "other"}},
        )
    assert caught.value.param == "tool_choice"
