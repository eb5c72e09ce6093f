import json
import math

import pytest
from support.tokenizers import byte_level_tokenizer

from pagetier.handler.errors import (
    EngineDead,
    EngineError,
    InvalidRequest,
    NotFound,
    PromptTooLong,
    QueueFull,
)
from pagetier.handler.messages import RequestOutput, TokenLogprobs
from pagetier.handler.openai_api import MAX_CHOICES, OpenAIApi
from pagetier.handler.openai_responses import MIN_LOGPROB, error_body
from pagetier.handler.openai_schemas import parse_json
from pagetier.handler.tokenizer import Tokenizer

MAX_MODEL_LEN = 100
VOCAB_SIZE = 400
CHAT = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(byte_level_tokenizer())


@pytest.fixture(scope="module")
def api(tokenizer):
    return OpenAIApi(
        tokenizer,
        model_name="tiny",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(0,),
        clock=lambda: 1234.5,
    )


def completion(api, **body):
    return api.completion("r1", {"prompt": "the fox", **body})


def chat(api, **body):
    return api.chat("r1", {"messages": CHAT, **body})


def feed(response, tokenizer, text, *, steps=1, logprobs=None, **last):
    """Give ``response`` the tokens of ``text`` in ``steps`` outputs of about equal size."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = math.ceil(len(ids) / steps)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    for number, piece in enumerate(pieces):
        made = None
        if logprobs is not None:
            made = [
                TokenLogprobs(t, -0.25, [t, 70][:logprobs], [-0.25, -2.0][:logprobs]) for t in piece
            ]
        is_last = number == len(pieces) - 1
        reason = {"finish_reason": "length", **last} if is_last else {}
        response.add(RequestOutput("r1", piece, logprobs=made, num_cached_tokens=16, **reason))
    return ids


def events(data):
    """The JSON of server-sent events, ``[DONE]`` as None."""
    assert data.endswith(b"\n\n")
    lines = data.decode().split("\n\n")[:-1]
    assert all(line.startswith("data: ") for line in lines)
    return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# --- parsing ---------------------------------------------------------------------------------


def test_completion_defaults_are_openais(api, tokenizer):
    response = completion(api)
    request = response.request
    assert request.prompt_token_ids == tokenizer.encode("the fox")
    assert request.eos_token_ids == (0,)
    assert (request.params.max_tokens, request.params.temperature) == (16, 1.0)
    assert (request.params.top_p, request.params.logprobs) == (1.0, None)
    assert not response.stream


def test_completion_fields_reach_the_engine(api):
    request = completion(
        api, model="tiny", max_tokens=5, temperature=0, top_p=0.5, top_k=7, seed=-3,
        stop="x", stop_token_ids=[9], ignore_eos=True, logprobs=2, priority=-1, cache_salt="s",
    ).request  # fmt: skip
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0, 0.5, 7)
    assert (params.seed, params.stop, params.stop_token_ids) == (-3, ("x",), (9,))
    assert (params.ignore_eos, params.logprobs) == (True, 2)
    assert (request.priority, request.cache_salt) == (-1, "s")


@pytest.mark.parametrize("prompt", [[7, 8, 9], [[7, 8, 9]]])
def test_prompt_may_be_token_ids(api, prompt):
    assert completion(api, prompt=prompt).request.prompt_token_ids == [7, 8, 9]


def test_prompt_may_be_a_list_of_one_text(api, tokenizer):
    assert completion(api, prompt=["the fox"]).request.prompt_token_ids == tokenizer.encode(
        "the fox"
    )


@pytest.mark.parametrize("prompt", [["the fox", "b"], [[7], [8, 9]], ["a", [8]]])
def test_several_prompts_are_several_requests_to_the_engine(api, tokenizer, prompt):
    requests = completion(api, prompt=prompt, max_tokens=3).requests
    assert [r.request_id for r in requests] == ["r1-0", "r1-1"]
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompt]
    assert [r.prompt_token_ids for r in requests] == ids
    assert [r.params.max_tokens for r in requests] == [3, 3]


def test_too_many_prompts_are_refused(api):
    assert len(completion(api, prompt=["a"] * MAX_CHOICES).requests) == MAX_CHOICES
    with pytest.raises(InvalidRequest, match="128 in all"):
        completion(api, prompt=["a"] * (MAX_CHOICES + 1))


def test_plain_route_takes_one_prompt(api):
    with pytest.raises(InvalidRequest, match="one prompt"):
        api.prediction("r1", {"prompt": ["a", "b"]})


def test_huge_list_of_token_ids_is_refused_by_its_length(api):
    with pytest.raises(PromptTooLong, match="has 101 tokens"):
        completion(api, prompt=[-1] * (MAX_MODEL_LEN + 1))


def test_echo_asks_for_the_prompts_logprobs_where_it_asks_for_any(api):
    assert completion(api, echo=True).request.params.prompt_logprobs is None
    params = completion(api, echo=True, logprobs=2).request.params
    assert (params.logprobs, params.prompt_logprobs) == (2, 2)
    assert completion(api, logprobs=2).request.params.prompt_logprobs is None


@pytest.mark.parametrize(
    ("header", "field", "expected"),
    [(None, None, "r1"), ("job:7", None, "job:7"), (None, "mine", "mine"), ("job", "mine", "mine")],
)
def test_response_is_called_as_the_client_calls_the_request(
    api, tokenizer, header, field, expected
):
    body = {"prompt": "the", "request_id": field}
    response = api.completion("r1", body, header)
    assert response.request.request_id == "r1"
    feed(response, tokenizer, "fox")
    assert json.loads(response.whole())["id"] == f"cmpl-{expected}"


def test_timeout_is_kept_for_the_pump(api):
    assert completion(api).timeout is None
    assert completion(api, timeout=2.5).timeout == 2.5


def test_chat_is_rendered_and_takes_all_the_room(api, tokenizer):
    request = chat(api).request
    assert request.prompt_token_ids == tokenizer.encode("<|user|>the fox<|end|><|assistant|>")
    assert request.params.max_tokens == MAX_MODEL_LEN - len(request.prompt_token_ids)
    assert chat(api, max_tokens=3).request.params.max_tokens == 3
    assert chat(api, max_tokens=3, max_completion_tokens=4).request.params.max_tokens == 4


@pytest.mark.parametrize(
    "field",
    [
        {"stop": ["ab"] * 5000},
        {"bad_words": ["ab"] * 5000},
        {"logit_bias": {str(i): 0.0 for i in range(400)} | {str(i + 400): 0 for i in range(4000)}},
    ],
)
def test_error_of_a_long_list_does_not_repeat_it(api, field):
    with pytest.raises(InvalidRequest, match=r"not (5000|4400) of them") as caught:
        completion(api, **field)
    assert len(caught.value.message) < 200


def test_chat_that_is_far_too_long_is_an_error_of_its_messages(api):
    with pytest.raises(PromptTooLong) as caught:
        chat(api, messages=[{"role": "user", "content": "fox " * 5000}])
    assert caught.value.param == "messages"


def test_chat_of_no_tokens_is_refused(tokenizer):
    """The engine cannot begin with nothing."""
    tokenizer = Tokenizer(byte_level_tokenizer(), chat_template="{{ messages[0].content }}")
    api = OpenAIApi(
        tokenizer, model_name="t", max_model_len=9, vocab_size=VOCAB_SIZE, eos_token_ids=()
    )
    assert chat(api, messages=[{"role": "user", "content": "a"}])
    with pytest.raises(InvalidRequest, match="no tokens") as caught:
        chat(api, messages=[{"role": "user", "content": ""}])
    assert caught.value.param == "messages"


def test_chat_takes_what_openais_client_sends_back(api, tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "d"},
    ]
    request = chat(api, messages=messages).request
    expected = "<|user|>a\nb<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>"
    assert request.prompt_token_ids == tokenizer.encode(expected)


def test_plain_prediction_takes_text_or_fields(api):
    assert api.prediction("r1", "the fox").request == completion(api).request
    fields = {"prompt": "the fox", "max_tokens": 3, "stream": True}
    assert api.prediction("r1", fields).stream


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1), ("presence_penalty", 0), ("frequency_penalty", 0.0),
        ("repetition_penalty", 1.0), ("logit_bias", {}), ("logit_bias", None), ("min_p", 0),
        ("min_tokens", 0), ("echo", False), ("response_format", {"type": "text"}),
        ("bad_words", []),
        ("skip_special_tokens", True), ("user", "me"), ("metadata", {"a": "b"}), ("store", True),
        ("service_tier", "auto"), ("temperature", None), ("max_tokens", None), ("stop", None),
    ],
)  # fmt: skip
def test_neutral_and_harmless_fields_change_nothing(api, field, value):
    assert completion(api, **{field: value}).request == completion(api).request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spaces_between_special_tokens", False),
        ("functions", [{}]), ("reasoning_effort", "low"),
    ],
)  # fmt: skip
def test_features_that_do_not_exist_yet_are_refused(api, field, value):
    with pytest.raises(InvalidRequest, match=f"^{field} is not supported yet") as caught:
        completion(api, **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("ask", [completion, chat])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 0.1), ("presence_penalty", -0.5), ("frequency_penalty", 2),
        ("repetition_penalty", 1.3), ("allowed_token_ids", (5, 399)), ("min_tokens", 3),
        ("prompt_logprobs", 2), ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
    ],
)  # fmt: skip
def test_sampling_settings_reach_the_engine(api, ask, field, value):
    params = ask(api, **{field: value}).request.params
    assert getattr(params, field) == value
    assert getattr(params, field) != getattr(ask(api).request.params, field)


def test_outputs_and_beams_reach_the_engine(api):
    params = completion(api, n=2, best_of=3).request.params
    assert (params.n, params.best_of) == (2, 3)
    params = completion(
        api, n=2, use_beam_search=True, length_penalty=0.5, early_stopping="never"
    ).request.params
    assert (params.use_beam_search, params.length_penalty) == (True, 0.5)
    assert (params.early_stopping, params.temperature) == ("never", 0.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"), ({"n": 65}, "n"), ({"n": True}, "n"), ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 10**6}, "best_of"), ({"n": 10, "prompt": ["a"] * 13}, "prompt"),
        ({"use_beam_search": True, "temperature": 1}, "temperature"),
        ({"early_stopping": "perhaps"}, "early_stopping"),
    ],
)  # fmt: skip
def test_too_many_outputs_are_refused(api, body, param):
    with pytest.raises(InvalidRequest) as caught:
        completion(api, **body)
    assert caught.value.param == param


def test_choices_are_numbered_over_prompts_and_outputs(api, tokenizer):
    response = completion(api, prompt=["the fox", "a"], n=2, echo=True)
    for number, (request, index) in enumerate(
        [(r, i) for r in response.requests for i in range(2)]
    ):
        ids = tokenizer.encode(" " + "jump" * (number + 1), add_special_tokens=False)
        response.add(RequestOutput(request.request_id, ids, finish_reason="length", index=index))
    assert response.finished
    body = json.loads(response.whole())
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"].partition(" jump")[0] for c in body["choices"]] == ["the fox"] * 2 + ["a"] * 2
    # A prompt counts once.
    assert body["usage"]["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in response.requests)


def test_logit_bias_is_keyed_by_text_and_bad_words_become_tokens(api, tokenizer):
    request = completion(api, logit_bias={"5": 1, "17": -100}, bad_words=["fox", " the"]).request
    assert request.params.logit_bias == {5: 1.0, 17: -100.0}
    texts = {tokenizer.decode(word) for word in request.params.bad_words}
    assert texts == {"fox", " fox", "the", " the"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("logit_bias", {"five": 1}, "whole numbers, not 'five'"),
        ("logit_bias", {"9" * 5000: 1}, "whole numbers"),
        ("logit_bias", {"400": 1}, "token id 400, but the model's ids are 0 to 399"),
        ("logit_bias", {"4": 101}, "from -100 to 100"),
        ("allowed_token_ids", [], "at least one"),
        ("allowed_token_ids", [400], "token id 400"),
        ("bad_words", [""], "non-empty"),
        ("bad_words", ["x" * 1025], "at most 1024 characters"),
        ("min_tokens", 17, "at most max_tokens"),
        ("min_p", "much", "expected float"),
    ],
)
def test_impossible_sampling_settings_are_refused_by_name(api, field, value, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        completion(api, **{field: value})
    assert caught.value.param == field


def test_prompt_logprobs_are_not_streamed(api):
    with pytest.raises(InvalidRequest, match="not given in a stream"):
        completion(api, prompt_logprobs=1, stream=True)


def test_unknown_fields_are_named(api):
    with pytest.raises(InvalidRequest, match=r"^Unknown fields 'maxtokens', 'topp'") as caught:
        completion(api, maxtokens=3, topp=1)
    assert caught.value.param == "maxtokens"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"max_tokens": "x"}, r"^\$\.max_tokens: expected int, got str\.$", "max_tokens"),
        ({"max_tokens": 1.5}, r"^\$\.max_tokens: expected int, got float\.$", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, not 0", "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens", "max_tokens"),
        ({"temperature": -1}, "temperature must be", "temperature"),
        ({"temperature": float("nan")}, "temperature must be", "temperature"),
        ({"temperature": "hot"}, "expected float, got str", "temperature"),
        ({"top_p": 0}, "top_p must be", "top_p"),
        ({"top_k": -5}, "top_k must be", "top_k"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"priority": 2**64}, "priority", "priority"),
        ({"stop": [1]}, r"\$\.stop\[0\]: expected str, got int", "stop"),
        ({"stop": [""]}, "stop must be", "stop"),
        ({"stop": "x" * 2000}, "at most 1024 characters", "stop"),
        ({"stop": ["x"] * 17}, "stop must be", "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "from 0 to 399, not 400", "stop_token_ids"),
        ({"logprobs": 21}, "logprobs must be 0 to 20", "logprobs"),
        ({"stream": "yes"}, "expected bool, got str", "stream"),
        ({"stream_options": {"include_usage": True}}, "needs stream", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown field x", "stream_options"),
        ({"prompt": ""}, "must not be empty", "prompt"),
        ({"prompt": []}, "must not be empty", "prompt"),
        ({"prompt": [""]}, "must not be empty", "prompt"),
        ({"prompt": None}, "missing required field prompt", "prompt"),
        ({"prompt": 5}, r"\$\.prompt: expected text or a list of token ids, got int", "prompt"),
        ({"prompt": {"a": 1}}, "got dict", "prompt"),
        ({"prompt": [7, VOCAB_SIZE]}, "from 0 to 399, not 400", "prompt"),
        ({"prompt": [7, -1]}, "not -1", "prompt"),
        ({"prompt": [True]}, "not True", "prompt"),
        ({"prompt": [1.5]}, "not 1.5", "prompt"),
        ({"prompt": [7, "a"]}, "got 7 among them", "prompt"),
        ({"prompt": [7, [[8]]]}, "got 7 among them", "prompt"),
        ({"prompt": [[7, [8]]]}, "not a list", "prompt"),
        ({"prompt": "\ud800"}, "surrogate", None),
        ({"cache_salt": "\ud800"}, "surrogate", None),
        ({"timeout": 0}, "timeout must be above 0", "timeout"),
        ({"timeout": float("nan")}, "timeout must be above 0", "timeout"),
        ({"request_id": "a b"}, "request_id must have", "request_id"),
        ({"request_id": ""}, "request_id must have", "request_id"),
        ({"stop_token_ids": [5] * 300}, "at most|has 300", "stop_token_ids"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "not supported",
            "stream_options",
        ),
    ],
)
def test_wrong_completion_fields_are_told_in_one_sentence(api, body, message, param):
    with pytest.raises(InvalidRequest, match=message) as caught:
        completion(api, **body)
    assert caught.value.param == param
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"messages": []}, "must not be empty", "messages"),
        ({"messages": None}, "missing required field messages", "messages"),
        ({"messages": "hi"}, "expected array, got str", "messages"),
        ({"messages": ["hi"]}, r"\$\.messages\[0\]: expected object, got str", "messages"),
        ({"messages": [{"role": "user"}]}, "has no content", "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "invalid enum", "messages"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "unknown role", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "image_url",
            "messages",
        ),
        ({"top_logprobs": 2}, "needs logprobs", "top_logprobs"),
        ({"logprobs": 2}, "expected bool, got int", "logprobs"),
        ({"max_completion_tokens": 500}, "asks for 500 more", "max_completion_tokens"),
    ],
)
def test_wrong_chat_fields_are_told_in_one_sentence(api, body, message, param):
    with pytest.raises(InvalidRequest, match=message) as caught:
        chat(api, **body)
    assert caught.value.param == param


@pytest.mark.parametrize("body", ["text", 5, [1], True])
def test_body_that_is_no_object_is_refused(api, body):
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        api.completion("r1", body)


def test_prompt_that_is_too_long_names_both_lengths(api):
    with pytest.raises(PromptTooLong, match=r"has 100 tokens.*at most 100") as caught:
        completion(api, prompt=[7] * 100)
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    with pytest.raises(PromptTooLong, match=r"has 90 tokens .*11 more.*at most 100") as caught:
        completion(api, prompt=[7] * 90, max_tokens=11)
    assert caught.value.param == "max_tokens"
    assert completion(api, prompt=[7] * 90, max_tokens=10).request.params.max_tokens == 10
    # The default asks for no more than there is.
    assert completion(api, prompt=[7] * 90).request.params.max_tokens == 10


def test_unknown_model_is_not_found(api):
    for send in (completion, chat):
        with pytest.raises(NotFound, match=r"'gpt-4'.*'tiny'") as caught:
            send(api, model="gpt-4")
        assert caught.value.status == 404
    with pytest.raises(NotFound):
        api.model("gpt-4")


def test_models_list_the_served_one(api):
    card = {
        "id": "tiny", "object": "model", "created": 1234, "owned_by": "pagetier",
        "max_model_len": MAX_MODEL_LEN,
    }  # fmt: skip
    assert json.loads(api.models()) == {"object": "list", "data": [card]}
    assert json.loads(api.model("tiny")) == card


def test_error_of_json_begins_its_reason_in_lower_case_but_not_json():
    with pytest.raises(InvalidRequest, match="JSON: malformed: invalid character"):
        parse_json(b"nonsense")


@pytest.mark.parametrize("data", [b'{"a": ', b"\xff", "nonsense", b"[" * 100_000])
def test_malformed_json_is_an_invalid_request(data):
    with pytest.raises(InvalidRequest, match=r"^The body is not valid JSON: "):
        parse_json(data)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("No.", param="n"), ("No.", "invalid_request_error", "n", None)),
        (
            PromptTooLong("Long."),
            ("Long.", "invalid_request_error", None, "context_length_exceeded"),
        ),
        (QueueFull("Full."), ("Full.", "rate_limit_error", None, "queue_full")),
        (EngineDead("Dead."), ("Dead.", "service_unavailable_error", None, None)),
    ],
)
def test_errors_have_openais_shape(error, expected):
    body = json.loads(error_body(error))
    assert body == {"error": dict(zip(("message", "type", "param", "code"), expected, strict=True))}


def test_error_that_quotes_half_a_surrogate_pair_can_be_sent():
    body = json.loads(error_body(InvalidRequest("Unknown field '\ud800'.", param="\ud800")))
    assert (body["error"]["message"], body["error"]["param"]) == ("Unknown field '?'.", "?")


# --- responses -------------------------------------------------------------------------------


def test_whole_completion_has_openais_shape(api, tokenizer):
    response = completion(api)
    assert not response.finished
    ids = feed(response, tokenizer, "jumps over 日本", steps=3)
    assert response.finished
    assert json.loads(response.whole()) == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": 1234,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "jumps over 日本",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": len(ids),
            "total_tokens": 2 + len(ids),
            "prompt_tokens_details": {"cached_tokens": 16},
        },
    }


def test_whole_chat_has_openais_shape(api, tokenizer):
    response = chat(api)
    feed(response, tokenizer, "jumps", finish_reason="stop", stop_reason=None)
    body = json.loads(response.whole())
    assert (body["id"], body["object"]) == ("chatcmpl-r1", "chat.completion")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("include_usage", [False, True])
def test_streamed_completion_carries_the_same_as_a_whole_one(api, tokenizer, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = completion(api, stream=True, **options)
    assert response.opening() == b""
    assert response.take_events() == b""
    text = 'say "hi" \\ 日本 🙂\n'
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = b""
    for number, token in enumerate(ids, start=1):
        reason = "length" if number == len(ids) else None
        response.add(RequestOutput("r1", [token], finish_reason=reason))
        data += response.take_events()
    *chunks, done = events(data)
    assert done is None
    if include_usage:
        *chunks, usage = chunks
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(ids)
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert "".join(c["choices"][0]["text"] for c in chunks) == text
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {
        ("cmpl-r1", "text_completion", "tiny")
    }


def test_steps_between_two_pumps_share_a_chunk(api, tokenizer):
    response = completion(api, stream=True)
    for token in tokenizer.encode("the lazy dog", add_special_tokens=False):
        response.add(RequestOutput("r1", [token]))
    (chunk,) = events(response.take_events())
    assert chunk["choices"][0]["text"] == "the lazy dog"


def test_streamed_chat_opens_with_the_role(api, tokenizer):
    response = chat(api, stream=True)
    (first,) = events(response.opening())
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    feed(response, tokenizer, "jumps")
    last, done = events(response.take_events())
    assert last["choices"][0] == {
        "index": 0,
        "delta": {"content": "jumps"},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert done is None


def test_plain_prediction_has_a_flat_shape(api, tokenizer):
    response = api.prediction("r1", {"prompt": "the", "stream": True})
    feed(response, tokenizer, "fox")
    assert events(response.take_events()) == [
        {
            "id": "r1", "model": "tiny", "text": "fox", "logprobs": None,
            "finish_reason": "length", "stop_reason": None,
        },
        None,
    ]  # fmt: skip
    response = api.prediction("r1", "the")
    feed(response, tokenizer, "fox")
    body = json.loads(response.whole())
    assert (body["text"], body["finish_reason"], body["usage"]["prompt_tokens"]) == (
        "fox", "length", 1,
    )  # fmt: skip


def test_stop_string_is_told_and_ends_the_engines_work(api, tokenizer):
    response = completion(api, stop=["over"], stream=True)
    ids = tokenizer.encode("jumps over the", add_special_tokens=False)
    aborts = [response.add(RequestOutput("r1", [t])) for t in ids]
    assert aborts.count(True) == 1
    assert response.finished
    chunk, _ = events(response.take_events())
    assert chunk["choices"][0]["text"] == "jumps "
    assert chunk["choices"][0]["finish_reason"] == "stop"
    assert chunk["choices"][0]["stop_reason"] == "over"


def test_completion_logprobs_are_parallel_lists(api, tokenizer):
    response = completion(api, logprobs=1)
    ids = feed(response, tokenizer, "jumps over", logprobs=1)
    logprobs = json.loads(response.whole())["choices"][0]["logprobs"]
    tokens = [tokenizer.decode([t]) for t in ids]
    assert logprobs["tokens"] == tokens
    assert logprobs["token_logprobs"] == [-0.25] * len(ids)
    assert logprobs["top_logprobs"] == [{t: -0.25} for t in tokens]
    starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert logprobs["text_offset"] == starts


def test_chosen_token_is_among_the_completions_top_logprobs(api):
    response = completion(api, logprobs=1)
    chosen = TokenLogprobs(80, -5.0, [70], [-0.1])
    response.add(RequestOutput("r1", [80], logprobs=[chosen], finish_reason="length"))
    (top,) = json.loads(response.whole())["choices"][0]["logprobs"]["top_logprobs"]
    assert sorted(top.values()) == [-5.0, -0.1]


def test_streamed_logprobs_go_on_where_the_last_chunk_ended(api, tokenizer):
    response = completion(api, stream=True, logprobs=0)
    offsets = []
    for word in ("jumps", " over"):
        ids = tokenizer.encode(word, add_special_tokens=False)
        made = [TokenLogprobs(t, -1.0, [], []) for t in ids]
        response.add(RequestOutput("r1", ids, logprobs=made))
        (chunk,) = events(response.take_events())
        offsets += chunk["choices"][0]["logprobs"]["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert len("jumps") in offsets


def test_chat_logprobs_have_bytes_of_half_characters(api, tokenizer):
    response = chat(api, logprobs=True, top_logprobs=1)
    half = tokenizer._backend.token_to_id("Ã")
    made = [TokenLogprobs(half, -math.inf, [half], [-math.inf])]
    response.add(RequestOutput("r1", [half], logprobs=made, finish_reason="length"))
    (entry,) = json.loads(response.whole())["choices"][0]["logprobs"]["content"]
    token = {"token": "bytes:\\xc3", "logprob": MIN_LOGPROB, "bytes": [0xC3]}
    assert entry == {**token, "top_logprobs": [token]}


def test_failing_stream_tells_what_came_before_and_why(api, tokenizer):
    response = completion(api, stream=True)
    response.add(RequestOutput("r1", tokenizer.encode("jumps", add_special_tokens=False)))
    chunk, error, done = events(response.error_events(EngineError("It broke.")))
    assert chunk["choices"][0]["text"] == "jumps"
    assert error["error"]["message"] == "It broke."
    assert done is None


# --- several choices -------------------------------------------------------------------------


def test_choices_of_several_prompts_are_in_the_prompts_order(api, tokenizer):
    response = completion(api, prompt=["the fox", "a"])
    ids = {r.request_id: tokenizer.encode(w, add_special_tokens=False)
           for r, w in zip(response.requests, ["jumps", " over it"], strict=True)}  # fmt: skip
    for request_id in reversed(ids):
        assert not response.finished
        response.add(
            RequestOutput(request_id, ids[request_id], finish_reason="length", num_cached_tokens=1)
        )
    assert response.finished
    body = json.loads(response.whole())
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "jumps"), (1, " over it")]
    num_prompt = sum(len(r.prompt_token_ids) for r in response.requests)
    num_output = sum(map(len, ids.values()))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_streamed_choices_carry_their_index_and_end_once(api, tokenizer):
    response = completion(
        api, prompt=["the fox", "a"], stream=True, stream_options={"include_usage": True}
    )
    first, second = (r.request_id for r in response.requests)
    word = tokenizer.encode("jumps", add_special_tokens=False)
    data = b""
    for request_id, reason in [
        (second, None), (first, "length"), (second, None), (second, "stop"),
    ]:  # fmt: skip
        response.add(RequestOutput(request_id, word, finish_reason=reason))
        data += response.take_events()
    *chunks, usage, done = events(data)
    assert done is None
    assert usage["usage"]["completion_tokens"] == 4 * len(word)
    told = [(c["choices"][0]["index"], c["choices"][0]["finish_reason"]) for c in chunks]
    assert told == [(1, None), (0, "length"), (1, None), (1, "stop")]
    assert {c["id"] for c in chunks} == {"cmpl-r1"}


def test_stop_string_of_one_choice_leaves_the_others_going(api, tokenizer):
    response = completion(api, prompt=["the fox", "a"], stop="over")
    word = tokenizer.encode("jumps over", add_special_tokens=False)
    assert response.add(RequestOutput("r1-0", word)) is True
    assert not response.finished
    assert response.add(RequestOutput("r1-1", word[:1], finish_reason="length")) is False
    assert response.finished


# --- echo and the prompt's log-probabilities -------------------------------------------------


@pytest.mark.parametrize("prompt", ["the fox", [260, 261]])
def test_echo_puts_the_prompt_in_front(api, tokenizer, prompt):
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    whole = completion(api, prompt=prompt, echo=True)
    feed(whole, tokenizer, " jumps")
    assert json.loads(whole.whole())["choices"][0]["text"] == text + " jumps"
    stream = completion(api, prompt=prompt, echo=True, stream=True)
    feed(stream, tokenizer, " jumps")
    chunks = events(stream.take_events())[:-1]
    assert "".join(c["choices"][0]["text"] for c in chunks) == text + " jumps"


def test_echo_with_logprobs_begins_with_the_prompts(api):
    response = completion(api, prompt=[80, 81, 82], echo=True, logprobs=1)
    scored = [TokenLogprobs(t, -1.0, [70], [-0.5]) for t in (81, 82)]
    made = [TokenLogprobs(83, -2.0, [83], [-2.0])]
    response.add(
        RequestOutput(
            "r1", [83], logprobs=made, prompt_logprobs=scored, finish_reason="length"
        )
    )  # fmt: skip
    logprobs = json.loads(response.whole())["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -2.0]
    assert logprobs["top_logprobs"][0] is None
    assert sorted(logprobs["top_logprobs"][1].values()) == [-1.0, -0.5]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 4


# --- tokens ----------------------------------------------------------------------------------


def test_tokenize_answers_in_vllms_shape(api, tokenizer):
    body = json.loads(api.tokenize({"prompt": "the fox", "return_token_strs": True}))
    ids = tokenizer.encode("the fox")
    assert (body["tokens"], body["count"]) == (ids, len(ids))
    assert body["max_model_len"] == MAX_MODEL_LEN
    assert "".join(body["token_strs"]) == "the fox"
    assert json.loads(api.tokenize({"prompt": ""}))["tokens"] == []
    assert json.loads(api.tokenize({"prompt": "a"}))["token_strs"] is None


def test_tokenize_renders_chats(api, tokenizer):
    body = json.loads(api.tokenize({"messages": CHAT}))
    assert body["tokens"] == chat(api).request.prompt_token_ids
    body = json.loads(api.tokenize({"messages": CHAT, "add_generation_prompt": False}))
    assert body["tokens"] == tokenizer.encode("<|user|>the fox<|end|>")


def test_detokenize_undoes_tokenize(api):
    text = "Größe, 日本 🙂<|end|>"
    tokens = json.loads(api.tokenize({"prompt": text}))["tokens"]
    assert json.loads(api.detokenize({"tokens": tokens})) == {"prompt": text}


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("tokenize", {}, "either prompt or messages"),
        ("tokenize", {"prompt": "a", "messages": CHAT}, "either prompt or messages"),
        ("tokenize", {"messages": []}, "must not be empty"),
        ("tokenize", {"prompt": "a", "model": "x"}, "not served here"),
        ("tokenize", {"prompt": "a b " * 5000}, "about .* tokens"),
        ("detokenize", {"tokens": [VOCAB_SIZE]}, "not 400"),
        ("detokenize", {"tokens": ["a"]}, "expected int"),
        ("detokenize", {}, "missing required field tokens"),
        ("detokenize", {"tokens": [5] * 200}, "has 200 tokens"),
    ],
)
def test_wrong_bodies_of_the_token_routes_are_told(api, route, body, message):
    with pytest.raises(InvalidRequest, match=message):
        getattr(api, route)(body)
