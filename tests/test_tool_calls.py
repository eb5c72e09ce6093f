"""Finding tool calls in text, and grammars of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import byte_level_tokenizer

from pagetier.handler.errors import InvalidRequest
from pagetier.handler.sampling_params import StructuredOutputsParams
from pagetier.handler.structured_output import Grammars
from pagetier.handler.tokenizer import Tokenizer
from pagetier.handler.tool_calls import (
    Arguments,
    Begin,
    Content,
    ToolCallParser,
    form_of,
    grammar_of,
    takes_tools,
)

HERMES = form_of("", "hermes")
LLAMA = form_of("", "llama3_json")
MISTRAL = form_of("", "mistral")
MISTRAL_ARGS = form_of("[TOOL_CALLS]f[ARGS]", "mistral")


# --- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for t in tools %}... <tool_call> {...} </tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS] [", "mistral"),
        ("{{ tools }} [TOOL_CALLS]f[ARGS]", "mistral"),
        ('{{ tools }} {"name": function name, "parameters": dictionary of argument', "llama3_json"),
        ("{{ tools }} <|python_tag|>", "llama3_json"),
        ("{{ tools }} <tool_call><function=f>", None),
        ("{{ tools }} <tool_call>f\n<arg_key>", None),
        ("{{ tools }}", None),
    ],
)
def test_form_is_found_in_the_template(template, name):
    form = form_of(template)
    assert (form and form.name) == name
    assert takes_tools(template)


def test_setting_decides_whatever_the_template_says():
    assert form_of("<tool_call>", "mistral").name == "mistral"
    assert not takes_tools("{{ message.tool_calls }} <tool_call>")


# --- finding calls ---------------------------------------------------------------------------


def found(form, text, size, names=("f", "g")):
    """What is found in ``text``, which comes in pieces, as (content, [(name, arguments)])."""
    parser = ToolCallParser(form, names)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    events = [event for piece in pieces for event in parser.add(piece)] + parser.finish()
    content, calls = "", []
    for event in events:
        match event:
            case Content(more):
                content += more
            case Begin(name):
                calls.append([name, ""])
            case Arguments(more):
                calls[-1][1] += more
    return content, [tuple(call) for call in calls]


NESTED = '{"a": "}\\"{ </tool_call>", "b": [1, {"c": 2}], "d": null}'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        # Hermes
        (
            HERMES,
            f'Let me see. \n<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>',
            "Let me see.",
            [("f", NESTED)],
        ),
        (
            HERMES,
            '<tool_call>{"arguments": {"x": 1}, "name": "g"}</tool_call>\n'
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n',
            "",
            [("g", '{"x": 1}'), ("f", "{}")],
        ),
        (HERMES, '<tool_call>{"name": "f"}</tool_call> done', "done", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"type": "function", "name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("f", '{"a": 1}')],
        ),
        # A tool that does not exist is for the client to answer.
        (HERMES, '<tool_call>{"name": "h", "arguments": {}}</tool_call>', "", [("h", "{}")]),
        # One brace too few, and an end that never comes.
        (HERMES, '<tool_call>{"name": "f", "arguments": {}\n</tool_call> x', "x", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        # No calls
        (HERMES, "plain text  \n", "plain text  \n", []),
        (HERMES, "a <tool_call> is a <tool", "a <tool_call> is a <tool", []),
        (HERMES, '<tool_call>{"nam": 3}</tool_call>', '<tool_call>{"nam": 3}</tool_call>', []),
        (HERMES, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        (HERMES, "x <tool_call>{'name': 'f'}", "x <tool_call>{'name': 'f'}", []),
        (HERMES, ' <tool_call>{"name": "f', ' <tool_call>{"name": "f', []),
        (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
        # Llama 3
        (LLAMA, f' {{"name": "f", "parameters": {NESTED}}}', "", [("f", NESTED)]),
        (
            LLAMA,
            '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        (LLAMA, '{"answer": [3]} ', '{"answer": [3]} ', []),
        (LLAMA, 'Use {"name": "f"}', 'Use {"name": "f"}', []),
        (LLAMA, "<|python", "<|python", []),
        # Mistral
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (
            MISTRAL_ARGS,
            'So: [TOOL_CALLS]f[ARGS]{"a": {}}[TOOL_CALLS]my-tool {"b":1}',
            "So:",
            [("f", '{"a": {}}'), ("my-tool", '{"b":1}')],
        ),
        (MISTRAL, "[TOOL_CALLS] what? [x] {", "[TOOL_CALLS] what? [x] {", []),
        (MISTRAL, "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
        (MISTRAL, "[TOOL_CALLS] f", "[TOOL_CALLS] f", []),
    ],
)
def test_calls_are_found_however_the_text_is_divided(form, text, content, calls, size):
    assert found(form, text, size) == (content, calls)


_PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "{", "}", "[", "]",
    '{"name": "f", ', '"arguments": ', '{"a": "}"}', ",", ";", '"', "\\", ": ", "\n", "é",
    "<", "f", "null", '{"name": "f", "arguments": {"a": [1]}}', '{"name": "f", "parameters": {}}',
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(_PIECES, max_size=12), st.integers(1, 9))
def test_whatever_a_model_writes_is_read_alike_in_any_division(form, pieces, size):
    text = "".join(pieces)
    whole = found(form, text, len(text) or 1)
    assert found(form, text, size) == whole
    if not whole[1]:
        assert whole[0] == text
    for name, _ in whole[1]:
        assert name


def test_arguments_come_as_they_are_written():
    parser = ToolCallParser(HERMES, ["f"])
    assert parser.add('<tool_call>{"name": "f", ') == [Begin("f")]
    assert parser.add('"arguments": {"a": "on') == [Arguments('{"a": "on')]
    assert parser.add('e"}') == [Arguments('e"}')]
    assert parser.num_complete == 0
    assert parser.add("}</tool_call>") == []
    assert parser.num_complete == 1


def test_text_is_held_back_only_while_it_may_be_a_call():
    parser = ToolCallParser(HERMES, ["f"])
    assert parser.add("a <") == [Content("a")]
    assert parser.add("tool") == []
    assert parser.add("s> b") == [Content(" <tools> b")]
    parser = ToolCallParser(LLAMA, ["f"])
    assert parser.add('{"ans') == []
    assert "".join(e.text for e in parser.add('wer": 3')) == '{"answer": 3'


def test_names_of_calls_differ_and_are_short_for_mistral():
    ids = {ToolCallParser(HERMES, []).new_id() for _ in range(50)}
    assert len(ids) == 50
    short = ToolCallParser(MISTRAL, []).new_id()
    assert len(short) == 9
    assert short.isalnum()


# --- grammars --------------------------------------------------------------------------------

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/Place"},
            "unit": {"enum": ["C", "F"], "description": "100 % of :: a ::= %llguidance"},
        },
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {
            "Place": {
                "type": "object",
                "properties": {"zip": {"type": "integer"}},
                "required": ["zip"],
                "additionalProperties": False,
            }
        },
    },
    "now": None,
}
WEATHER = '{"place": {"zip": 10115}, "unit": "C"}'


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(byte_level_tokenizer())


def kept(tokenizer, grammar, text):
    """How much of ``text`` the grammar allows, and whether it may end there."""
    grammars = Grammars(lambda: tokenizer, vocab_size=400, eos_token_ids=(0,))
    try:
        constraint = grammars.constrain(StructuredOutputsParams(grammar=grammar))
        done = ""
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            constraint.wait()
            if not constraint.mask[token_id // 8] >> token_id % 8 & 1:
                return done, None
            constraint.accept(token_id)
            done += tokenizer.decode([token_id], skip_special_tokens=False)
            if constraint.is_complete:
                return done, True
        constraint.wait()
        return done, bool(constraint.mask[0] & 1)
    finally:
        grammars.close()


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>'),
        (LLAMA, f'{{"name": "get_weather", "parameters": {WEATHER}}}'),
        (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}]'),
        (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {}}]'),
        (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}"),
    ],
)
def test_grammar_allows_a_call_in_the_models_own_form_and_no_other(tokenizer, form, text):
    grammar = grammar_of(form, TOOLS, several=False, special_tokens={})
    assert kept(tokenizer, grammar, text) == (text, True)
    assert found(form, text, 3, TOOLS)[1] == [
        ("now", "{}") if "now" in text else ("get_weather", WEATHER)
    ]
    for wrong in (text.replace("get_weather", "get_other"), f"So: {text}"):
        if wrong != text:
            assert kept(tokenizer, grammar, wrong)[1] is None
    assert kept(tokenizer, grammar, text.replace("10115", '"Berlin"'))[1] is ("now" in text or None)


def test_grammar_allows_several_calls_where_they_are_allowed(tokenizer):
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    both = f"{call}\n{call}"
    several = grammar_of(HERMES, TOOLS, several=True, special_tokens={})
    assert kept(tokenizer, several, both) == (both, True)
    one = grammar_of(HERMES, TOOLS, several=False, special_tokens={})
    assert kept(tokenizer, one, both) == (call, True)
    # Llama's template refuses a turn with two.
    bare = '{"name": "now", "parameters": {}}'
    llama = grammar_of(LLAMA, TOOLS, several=True, special_tokens={})
    assert kept(tokenizer, llama, bare + bare) == (bare, True)


def test_grammar_allows_the_answer_instead(tokenizer):
    schema = json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}})
    grammar = grammar_of(HERMES, TOOLS, several=True, special_tokens={}, answer=schema)
    assert kept(tokenizer, grammar, '{"ok": true}') == ('{"ok": true}', True)
    assert kept(tokenizer, grammar, "<tool_call>")[0] == "<tool_call>"


def test_marks_that_are_special_tokens_are_named_by_their_ids(tokenizer):
    special = {"[TOOL_CALLS]": tokenizer.special_tokens["<|user|>"]}
    grammar = grammar_of(MISTRAL, TOOLS, several=True, special_tokens=special)
    text = '<|user|> [{"name": "now", "arguments": {}}]'
    assert kept(tokenizer, grammar, text) == (text, True)
    assert kept(tokenizer, grammar, "[TOOL_CALLS]")[1] is None


def test_notes_of_a_schema_take_no_room_in_the_grammar(tokenizer):
    schema = {
        "title": "T",
        "description": "long " * 99,
        "type": "object",
        "properties": {
            "title": {"type": "integer", "description": "a property of that name"},
            "kind": {"const": {"title": "t"}},
        },
        "required": ["title", "kind"],
    }
    grammar = grammar_of(LLAMA, {"f": schema}, several=False, special_tokens={})
    assert "long" not in grammar
    text = '{"name": "f", "parameters": {"title": 3, "kind": {"title": "t"}}}'
    assert kept(tokenizer, grammar, text) == (text, True)


def test_schema_that_is_nested_too_deeply_is_refused():
    schema: dict = {}
    for _ in range(3000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        grammar_of(HERMES, {"f": schema}, several=False, special_tokens={})


def test_what_cannot_be_kept_to_is_said_of_the_tools(tokenizer):
    with pytest.raises(InvalidRequest, match="x-guidance"):
        grammar_of(HERMES, {"f": {"x-guidance": {}}}, several=False, special_tokens={})
    schema = {"properties": {"a": {"not": {"type": "null"}}}}
    grammar = grammar_of(HERMES, {"f": schema}, several=False, special_tokens={})
    with pytest.raises(InvalidRequest, match="parameters of the tools cannot be followed"):
        kept(tokenizer, grammar, "")
