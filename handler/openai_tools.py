"""The tools of a chat: checks what a request says of them, and what they make of its output.

Owns the meaning of ``tools``, ``tool_choice`` and ``parallel_tool_calls``. How calls are written is
known by ``tool_calls``, their place in responses by ``openai_responses``.
"""

import re
from collections.abc import Sequence
from typing import Any

from pagetier.handler.errors import InvalidRequest
from pagetier.handler.openai_schemas import ChatBody, NamedToolChoice, Tool, short
from pagetier.handler.sampling_params import MAX_GRAMMAR_CHARACTERS, StructuredOutputsParams
from pagetier.handler.tokenizer import Tokenizer
from pagetier.handler.tool_calls import (
    FORM_NAMES,
    Form,
    ToolCallParser,
    form_of,
    grammar_of,
    marks_of,
    takes_tools,
)

MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ToolTemplate:
    """What the chat template of a model makes of tools."""

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str | None = None) -> None:
        """Read the template; ``tool_call_parser`` names the form of calls, None finds it there."""
        template = tokenizer.tool_template
        self._takes_tools = takes_tools(template)
        self._form = form_of(template, tool_call_parser)
        self._special_tokens = tokenizer.special_tokens

    def check(self, param: str) -> None:
        """Raise ``InvalidRequest`` about ``param`` if the template knows no tools."""
        if not self._takes_tools:
            raise InvalidRequest(
                "This model's chat template knows no tools, so it can neither be told of them nor "
                "read their answers; use another model, or name a template that does with the "
                "setting 'chat_template'.",
                param=param,
            )

    def use(self, fields: ChatBody) -> "ToolUse | None":
        """What a chat does with its tools; None if it has none, or is to call none.

        Raises:
            InvalidRequest: they are wrong, or the model cannot call any.
        """
        tools, choice = fields.tools or [], fields.tool_choice
        _check_tools(tools)
        named = choice.function.name if isinstance(choice, NamedToolChoice) else None
        must_call = choice == "required" or named is not None
        if must_call and not tools:
            raise InvalidRequest("tool_choice needs tools.", param="tool_choice")
        if not tools or choice == "none":
            return None
        self.check("tools")
        if self._form is None:
            raise InvalidRequest(
                "The form of this model's tool calls was not found in its chat template; name it "
                f"with the setting 'tool_call_parser', one of {', '.join(FORM_NAMES)}.",
                param="tools",
            )
        if named is not None:
            tools = [tool for tool in tools if tool.function.name == named]
            if not tools:
                raise InvalidRequest(
                    f"tool_choice names {short(named)}, which is none of the tools.",
                    param="tool_choice",
                )
        marks = {
            mark: self._special_tokens[mark]
            for mark in marks_of(self._form)
            if mark in self._special_tokens
        }
        several = fields.parallel_tool_calls and named is None
        return ToolUse(self._form, tools, must_call, several, marks)


class ToolUse:
    """What a chat does with its tools.

    Attributes:
        several: whether an answer may have more than one call.
        needs_special_tokens: whether calls are only seen where special tokens have text.
    """

    def __init__(
        self,
        form: Form,
        tools: Sequence[Tool],
        must_call: bool,
        several: bool,
        marks: dict[str, int],
    ) -> None:
        """Call ``tools`` in ``form``; ``marks`` are those of its marks that are special tokens."""
        self._form = form
        self._tools = tools
        self._must_call = must_call
        self._marks = marks
        self.several = several
        self.needs_special_tokens = bool(marks)

    def parser(self) -> ToolCallParser:
        """A parser for one output."""
        return ToolCallParser(self._form, [tool.function.name for tool in self._tools])

    def shape(self, wanted: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the output must look like, ``wanted`` being what other fields say of it.

        Raises:
            InvalidRequest: it cannot be both.
        """
        if wanted is None and not self._must_call:
            return None
        answer: Any = None
        if wanted is not None:
            if self._must_call:
                raise InvalidRequest(
                    "tool_choice asks for a tool call, and another field says that the output must "
                    "look otherwise; leave out one of them.",
                    param="tool_choice",
                )
            answer = '{"type": "object"}' if wanted.json_object else wanted.json
            if answer is None:
                raise InvalidRequest(
                    "With tools the output can be held to a JSON schema only, not to a regex, "
                    "choice or grammar; or set tool_choice to 'none'.",
                    param="tools",
                )
            assert isinstance(answer, str), "the schema is not text"
        grammar = grammar_of(
            self._form,
            {tool.function.name: tool.function.parameters for tool in self._tools},
            several=self.several,
            special_tokens=self._marks,
            answer=answer,
        )
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise InvalidRequest(
                f"The parameters of the tools have {len(grammar)} characters in all; at most "
                f"{MAX_GRAMMAR_CHARACTERS} are allowed where the output is held to them.",
                param="tools",
            )
        return StructuredOutputsParams(grammar=grammar)


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"There are {len(tools)} tools; at most {MAX_TOOLS} are allowed.", param="tools"
        )
    names = [tool.function.name for tool in tools]
    for name in names:
        if _TOOL_NAME.fullmatch(name) is None:
            raise InvalidRequest(
                f"A tool's name must have 1 to 64 letters, digits, '_' or '-', not {short(name)}.",
                param="tools",
            )
    if len(set(names)) < len(names):
        raise InvalidRequest("Two tools have the same name.", param="tools")
