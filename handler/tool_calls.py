"""How models write tool calls: which form a model has, a grammar of it, and finding them in text.

Owns the forms, each by the name that vLLM has for it. Knows nothing of HTTP, of OpenAI's shapes, or
of tokens beyond the ids of special ones.

::

    hermes       text <tool_call>
                 {"name": "f", "arguments": {...}}
                 </tool_call>                              Hermes 2 and 3, Qwen 2.5 and 3
    llama3_json  {"name": "f", "parameters": {...}}        Llama 3.1 to 3.3, as the whole output or
                                                           after <|python_tag|>
    mistral      text [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
                 text [TOOL_CALLS]f[ARGS]{...}             the same of newer models

A parser is fed with an output's text as it comes, and tells of each call as soon as its name is
known, and of its arguments as they are written. What only began like a call is text after all.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from pagetier.handler.errors import InvalidRequest

FORM_NAMES = ("hermes", "llama3_json", "mistral")
# Begins the grammars that are made here, so that errors can say what they are of.
GRAMMAR_TITLE = "// tool calls"

# As templates write JSON, which is what models were trained on.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Of JSON schemas: what changes nothing about values, and what holds schemas by names of its own.
_NOTES = frozenset(("title", "description", "default", "examples", "$comment"))
_MAPS_OF_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_SPACE = " \t\n\r"
# Keys of an object that may be a call; ``type`` and ``id`` say nothing of it.
_ARGUMENT_KEYS = ("arguments", "parameters")
# What may follow [TOOL_CALLS], which new models write without JSON around it.
_NAMED_CALL = re.compile(r"([\w.-]+)(?:\[ARGS\])?\s*(?={)")
_MAX_HELD_CHARACTERS = 256
_KEYS = frozenset(("name", "type", "id", *_ARGUMENT_KEYS))


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls.

    Attributes:
        name: what the setting ``tool_call_parser`` calls it.
        marker: what stands before a call, or before a list of them.
        end: what may stand after one.
        is_bare: an output may also begin with a call, without the marker.
        before, between, after: what stands around several calls; one of ``before``.
        call_start, call_end: a call without its arguments; ``NAME`` stands for its name.
        takes_several: whether an output may have more than one call.
    """

    name: str
    marker: str
    end: str
    is_bare: bool
    before: tuple[str, ...]
    between: str
    after: str
    call_start: str
    call_end: str
    takes_several: bool = True


_HERMES = Form(
    name="hermes",
    marker="<tool_call>",
    end="</tool_call>",
    is_bare=False,
    before=(),
    between="\n",
    after="",
    call_start='<tool_call>\n{"name": NAME, "arguments": ',
    call_end="}\n</tool_call>",
)
_LLAMA3_JSON = Form(
    name="llama3_json",
    marker="<|python_tag|>",
    end=";",
    is_bare=True,
    before=(),
    between="",
    after="",
    call_start='{"name": NAME, "parameters": ',
    call_end="}",
    # Its template refuses a turn with more than one.
    takes_several=False,
)
_MISTRAL = Form(
    name="mistral",
    marker="[TOOL_CALLS]",
    end="",
    is_bare=False,
    before=("[TOOL_CALLS] [", "[TOOL_CALLS]["),
    between=", ",
    after="]",
    call_start='{"name": NAME, "arguments": ',
    call_end="}",
)
_MISTRAL_ARGS = dataclasses.replace(
    _MISTRAL, before=(), between="", after="", call_start="[TOOL_CALLS]NAME[ARGS]", call_end=""
)


def takes_tools(template: str) -> bool:
    """Whether a chat template renders tools."""
    return re.search(r"\btools\b", template) is not None


def form_of(template: str, name: str | None = None) -> Form | None:
    """The form that a chat template teaches its model, or the one called ``name``; else None."""
    if name is None:
        # Others begin with a mark of these, too, and go on differently.
        if "<function=" in template or "<arg_key>" in template:
            return None
        if "[TOOL_CALLS]" in template:
            name = "mistral"
        elif "<tool_call>" in template:
            name = "hermes"
        elif "<|python_tag|>" in template or '"parameters": dictionary' in template:
            name = "llama3_json"
    if name == "mistral" and "[ARGS]" in template:
        return _MISTRAL_ARGS
    return {form.name: form for form in (_HERMES, _LLAMA3_JSON, _MISTRAL)}.get(name or "")


def marks_of(form: Form) -> list[str]:
    """What a tokenizer may have special tokens for, without which calls cannot be seen."""
    return [form.marker, form.end, "[ARGS]"] if form.name == "mistral" else [form.marker, form.end]


# --- grammars --------------------------------------------------------------------------------


def grammar_of(
    form: Form,
    tools: Mapping[str, Mapping[str, Any] | None],
    *,
    several: bool,
    special_tokens: Mapping[str, int],
    answer: str | None = None,
) -> str:
    """An output of at least one call of these tools, in llguidance's variant of Lark.

    Args:
        form: how the model writes calls.
        tools: the JSON schema of each tool's arguments, by its name; None for no arguments.
        several: whether there may be more than one call.
        special_tokens: ids of the tokenizer's special tokens, which a grammar names by them.
        answer: a JSON schema that the output may keep to instead of being calls.

    Raises:
        InvalidRequest: a schema sets options of llguidance, or is nested too deeply.
    """

    def literal(text: str) -> str:
        marks = "|".join(re.escape(m) for m in special_tokens if m in text)
        parts = re.split(f"({marks})", text) if marks else [text]
        return " ".join(
            f"<[{special_tokens[part]}]>" if part in special_tokens else json.dumps(part)
            for part in parts
            if part
        )

    def schema_of(schema: Mapping[str, Any]) -> str:
        if "x-guidance" in schema:
            raise InvalidRequest(
                "A tool's parameters may not set x-guidance options; leave them out.", param="tools"
            )
        try:
            text = json.dumps({**_without_notes(schema), "x-guidance": _JSON_OPTIONS})
        except RecursionError:
            raise InvalidRequest(
                "A tool's parameters are nested too deeply.", param="tools"
            ) from None
        # Outside of texts JSON has neither: so nothing in a schema looks like another syntax.
        return text.replace("%", "\\u0025").replace("::", ":\\u003a")

    rules, calls = [], []
    for number, (name, schema) in enumerate(tools.items()):
        own = {"type": "object", "properties": {}, "additionalProperties": False}
        if schema is not None:
            own = {"type": "object", **schema}
        written = name if form is _MISTRAL_ARGS else json.dumps(name)
        start, end = form.call_start.replace("NAME", written), form.call_end
        calls.append(" ".join(filter(None, (literal(start), f"arguments_{number}", literal(end)))))
        rules.append(f"arguments_{number}: %json {schema_of(own)}")
    turn = "call"
    if several and form.takes_several:
        turn += f" ({literal(form.between)} call)*" if form.between else " call*"
    before = " | ".join(map(literal, form.before))
    turn = " ".join(filter(None, (before and f"({before})", turn, literal(form.after))))
    start_rule = f"start: {turn}"
    if answer is not None:
        start_rule += " | answer"
        rules.append(f"answer: %json {schema_of(json.loads(answer))}")
    return "\n".join([GRAMMAR_TITLE, start_rule, f"call: {' | '.join(calls)}", *rules])


def _without_notes(schema: Any) -> Any:
    """A JSON schema without what it says to readers only, often the larger part of it."""
    if isinstance(schema, list):
        return [_without_notes(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            kept[key] = {name: _without_notes(inner) for name, inner in value.items()}
        elif key not in _NOTES:
            kept[key] = value if key in ("const", "enum") else _without_notes(value)
    return kept


# --- finding calls in text -------------------------------------------------------------------


class Content(NamedTuple):
    """Text that is no call."""

    text: str


class Begin(NamedTuple):
    """A call of the tool ``name`` begins."""

    name: str


class Arguments(NamedTuple):
    """More of the arguments of the call that began last: JSON as the model writes it."""

    text: str


Event: TypeAlias = Content | Begin | Arguments


class ToolCallParser:
    """Takes an output's text, gives what it says.

    Attributes:
        num_complete: calls that have ended.
    """

    def __init__(self, form: Form, names: Iterable[str]) -> None:
        """Look for calls in ``form``; ``names`` are the tools that the model was told of."""
        self._form = form
        self._names = frozenset(names)
        self._buffer = ""
        self._raw = ""  # what was read since a marker: text after all if no call comes of it
        self._events: list[Event] = []
        self._call = _CallReader()
        self._has_begun = False  # whether the call that is being read has been told of
        self._is_list = False
        # Reads the beginning of the buffer; whether it is to be called again.
        self._read: Callable[[], bool] = self._read_start if form.is_bare else self._read_text
        self.num_complete = 0

    def add(self, text: str) -> list[Event]:
        """What ``text`` adds; what may be the beginning of a call is held back."""
        self._buffer += text
        while self._buffer and self._read():
            pass
        events, self._events = self._events, []
        return events

    def new_id(self) -> str:
        """A name for a call; the template of this form may want it short."""
        number = uuid.uuid4().hex
        return number[:9] if self._form.marker == _MISTRAL.marker else f"call_{number[:24]}"

    def finish(self) -> list[Event]:
        """What was held back, when no more text comes."""
        held = "" if self._read == self._read_after else self._raw + self._buffer
        self._raw = self._buffer = ""
        return [Content(held)] if held else []

    # --- the rest is private -----------------------------------------------------------------

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _read_start(self) -> bool:
        """The beginning of an output that may be a call without a marker."""
        text = self._buffer.lstrip(_SPACE)
        if text.startswith("{"):
            self._open_call(self._names)
        elif not text or self._form.marker.startswith(text):
            return False
        else:
            self._read = self._read_text
        return True

    def _read_text(self) -> bool:
        """Text up to a marker; space before a marker is no part of it."""
        marker = self._form.marker
        before, found, rest = self._buffer.partition(marker)
        if not found:
            num_held = next(
                n for n in range(len(marker) - 1, -1, -1) if before.endswith(marker[:n])
            )
            before = before[: len(before) - num_held]
        content = before.rstrip(_SPACE)
        self._say(content)
        if found:
            self._raw = before[len(content) :] + marker
            self._buffer, self._read = rest, self._read_opening
        else:
            self._buffer = self._buffer[len(content) :]
        return bool(found)

    def _read_opening(self) -> bool:
        """What follows a marker: an object, a list of them, or a name and arguments."""
        text = self._buffer.lstrip(_SPACE)
        if text.startswith("{"):
            self._open_call(None)
            return True
        if self._form.marker == _MISTRAL.marker:
            if text.startswith("[") and not self._is_list:
                self._is_list = True
                self._raw += self._buffer[: -len(text)] + "["
                self._buffer = text[1:]
                return True
            if named := _NAMED_CALL.match(text):
                self._raw += self._buffer[: -len(text)] + named[0]
                self._buffer = text[named.end() :]
                self._open_call(None, named[1])
                return True
            if "{" not in text and len(text) <= _MAX_HELD_CHARACTERS:
                return False
        elif not text:
            return False
        self._give_up()
        return True

    def _open_call(self, names: frozenset[str] | None, name: str | None = None) -> None:
        self._call = _CallReader(names, name)
        self._has_begun = False
        self._read = self._read_call

    def _read_call(self) -> bool:
        call = self._call
        num_read = call.read(self._buffer)
        if not self._has_begun:
            self._raw += self._buffer[:num_read]
        self._buffer = self._buffer[num_read:]
        if call.name is not None and not self._has_begun:
            self._events.append(Begin(call.name))
            self._has_begun, self._raw = True, ""
        if self._has_begun and (arguments := call.take_arguments()):
            self._events.append(Arguments(arguments))
        if not (call.is_done or call.is_wrong):
            return False
        if self._has_begun:
            self.num_complete += 1
            self._read = self._read_after
        else:
            self._give_up()
        return True

    def _read_after(self) -> bool:
        """What stands between calls, and after the last."""
        end, text = self._form.end, self._buffer.lstrip(_SPACE)
        self._buffer = text
        if not text or (end and end != text and end.startswith(text)):
            return False
        if end and text.startswith(end):
            self._buffer = text[len(end) :]
        elif self._is_list and text[0] in ",]":
            self._is_list = text[0] == ","
            self._buffer = text[1:]
            if self._is_list:
                self._read = self._read_opening
        elif self._form.is_bare and text[0] == "{":
            self._open_call(self._names)
        else:
            self._is_list = False
            self._read = self._read_text
        return True

    def _give_up(self) -> None:
        """What was read since the marker is no call."""
        self._say(self._raw)
        self._raw, self._is_list = "", False
        self._read = self._read_text


class _CallReader:
    """Reads ``{"name": "f", "arguments": {...}}``, keys in any order, or the arguments alone.

    Attributes:
        name: the tool's, as soon as it is known.
        is_done: whether it has been read to its end.
        is_wrong: whether it turned out to be something else.
    """

    def __init__(self, names: frozenset[str] | None = None, name: str | None = None) -> None:
        """Read a call of one of ``names``, or any; or the arguments of one of ``name``."""
        self._names = names
        self.name = name
        self.is_done = self.is_wrong = False
        self._only_arguments = name is not None
        self._key = _ARGUMENT_KEYS[0] if self._only_arguments else ""
        self._step = self._in_value if self._only_arguments else self._before_object
        self._value = ""  # the key or value that is being read, but not arguments
        self._depth = 0
        self._in_text = self._is_escaped = False
        self._arguments = ""
        self._has_arguments = False

    def read(self, text: str) -> int:
        """How many characters of ``text`` belong to it; all, until it is done or wrong."""
        for position, character in enumerate(text):
            self._step(character)
            if self.is_wrong:
                return position
            if self.is_done:
                return position + 1
        return len(text)

    def take_arguments(self) -> str:
        """More of the arguments."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    # --- the rest is private: a method for each place in the object --------------------------

    def _before_object(self, character: str) -> None:
        if character == "{":
            self._step = self._before_key
        elif character not in _SPACE:
            self.is_wrong = True

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._value, self._in_text, self._step = '"', True, self._in_key
        elif character == "}":
            self._close()
        elif character not in _SPACE:
            self.is_wrong = True

    def _in_key(self, character: str) -> None:
        self._value += character
        if self._ends_text(character):
            self._key = _json_text(self._value) or ""
            self.is_wrong = self._key not in _KEYS
            self._step = self._after_key

    def _after_key(self, character: str) -> None:
        if character == ":":
            self._value, self._step = "", self._in_value
        elif character not in _SPACE:
            self.is_wrong = True

    def _in_value(self, character: str) -> None:
        """A value: to its closing bracket or quote; others to the comma or brace after them."""
        if not self._value:
            if character in _SPACE:
                return
            if character in ",}":
                self.is_wrong = True
                return
        if self._value and not self._in_text and self._depth == 0 and character in ",}" + _SPACE:
            self._take_value()
            self._step = self._after_value
            self._after_value(character)
            return
        self._value += character
        if self._key in _ARGUMENT_KEYS and self._value[0] == "{":
            self._arguments += character
            self._value = "{"  # what the value is; the rest need not be kept
        if self._in_text:
            self._ends_text(character)
        elif character == '"':
            self._in_text = True
            return
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._depth == 0 and not self._in_text and self._value[0] in '{["':
            self._take_value()
            self._step = self._after_value

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._step = self._before_key
        elif character == "}":
            self._close()
        elif character not in _SPACE:
            self.is_wrong = True

    def _ends_text(self, character: str) -> bool:
        """Whether ``character`` ends the text that it is in."""
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_text = False
        return not self._in_text

    def _take_value(self) -> None:
        if self._key in _ARGUMENT_KEYS:
            self._has_arguments = True
            if self._value[0] != "{":
                # Some models write them as text that holds JSON, or null for none.
                text = _json_text(self._value)
                self._arguments = self._value if text is None else text
                self._has_arguments = self._value != "null"
            self.is_done = self._only_arguments
        elif self._key == "name" and self.name is None:
            name = _json_text(self._value)
            if name and (self._names is None or name in self._names):
                self.name = name
            else:
                self.is_wrong = True
        self._value = ""

    def _close(self) -> None:
        self.is_wrong = self.name is None
        self.is_done = not self.is_wrong
        if self.is_done and not self._has_arguments:
            self._arguments = "{}"


def _json_text(value: str) -> str | None:
    """The text that a JSON value stands for, or None if it is none."""
    try:
        text = json.loads(value, strict=False)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
