"""OpenAI's API for one model: from a request's body to what the engine is given.

Owns defaults and checks of the completions, chat and plain prediction routes. The fields are in
``openai_schemas``, the responses in ``openai_responses``. Knows nothing of HTTP connections, of
TorchServe, or of when tokens are made.
"""

import re
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pagetier.handler.errors import InvalidRequest, NotFound, PromptTooLong
from pagetier.handler.messages import AddRequest
from pagetier.handler.openai_responses import (
    ChatResponse,
    CompletionResponse,
    PredictionResponse,
    Response,
)
from pagetier.handler.openai_schemas import (
    ChatBody,
    ChatMessage,
    CommonFields,
    CompletionBody,
    DetokenizeBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    TokenizeBody,
    Tool,
    plain_message,
    plain_tool,
    read_body,
    short,
    without_null_message_fields,
)
from pagetier.handler.openai_tools import ToolTemplate, ToolUse
from pagetier.handler.sampling_params import SamplingParams, StructuredOutputsParams
from pagetier.handler.tokenizer import Tokenizer

MAX_CHOICES = 128
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TIMEOUT_SECONDS = 86400
MAX_CLIENT_ID_CHARACTERS = 128
# OpenAI's default for completions; a chat's answer may be as long as the model allows.
DEFAULT_MAX_TOKENS = 16

# Those that are called alike by clients and in ``SamplingParams``, and mean the same.
_SAMPLING_FIELDS = (
    "temperature", "top_p", "min_p", "seed", "stop_token_ids", "ignore_eos", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words", "min_tokens",
    "include_stop_str_in_output", "skip_special_tokens", "n", "best_of", "use_beam_search",
    "length_penalty", "early_stopping",
)  # fmt: skip
_CLIENT_ID = re.compile(rf"[\w.:-]{{1,{MAX_CLIENT_ID_CHARACTERS}}}", re.ASCII)
_TOKEN_ID = re.compile(r"[0-9]{1,18}")
_json = msgspec.json.Encoder().encode


class OpenAIApi:
    """Parses requests to one served model and makes their responses.

    Attributes:
        model_name: what clients call the model.
        max_model_len: most tokens of prompt and output together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        tool_call_parser: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Serve the model called ``model_name``; the limits are the engine's.

        ``tool_call_parser`` names the form of its tool calls; None finds it in the chat template.
        """
        self._tokenizer = tokenizer
        self._tool_template = ToolTemplate(tokenizer, tool_call_parser)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._created = int(clock())
        self.model_name = model_name
        self.max_model_len = max_model_len

    def models(self) -> bytes:
        """The body of ``v1/models``."""
        return _json({"object": "list", "data": [self._model_card()]})

    def model(self, name: str) -> bytes:
        """The body of ``v1/models/NAME``; raises ``NotFound``."""
        self._check_model(name)
        return _json(self._model_card())

    def completion(self, request_id: str, body: Any, client_id: str | None = None) -> Response:
        """Parse the body of ``v1/completions``.

        Args:
            request_id: names the request; those of several prompts get a number at its end.
            body: parsed JSON.
            client_id: what the client calls the request, for the response's ``id``.

        Raises:
            InvalidRequest: the body is wrong.
        """
        fields = read_body(body, CompletionBody)
        return self._complete(request_id, fields, CompletionResponse, client_id)

    def prediction(self, request_id: str, body: Any, client_id: str | None = None) -> Response:
        """Parse the body of the plain prediction route: text, or a completion's fields.

        Raises:
            InvalidRequest: the body is wrong.
        """
        if isinstance(body, str):
            body = {"prompt": body}
        fields = read_body(body, CompletionBody)
        return self._complete(request_id, fields, PredictionResponse, client_id)

    def chat(self, request_id: str, body: Any, client_id: str | None = None) -> Response:
        """Parse the body of ``v1/chat/completions``; raises ``InvalidRequest``."""
        fields = read_body(without_null_message_fields(body), ChatBody)
        self._check_model(fields.model)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        use = self._tool_template.use(fields)
        prompt_ids = self._encode_chat(fields.messages, tools=None if use is None else fields.tools)
        max_tokens, param = fields.max_tokens, "max_tokens"
        if fields.max_completion_tokens is not None:
            max_tokens, param = fields.max_completion_tokens, "max_completion_tokens"
        request = self._request(
            request_id,
            fields,
            prompt_ids,
            self._room(len(prompt_ids), max_tokens, "messages", param, default=None),
            (fields.top_logprobs or 0) if fields.logprobs else None,
            use=use,
        )
        response = self._respond([request], fields, ChatResponse, client_id or request_id)
        if use is not None:
            assert isinstance(response, ChatResponse)
            response.expect_tool_calls(use.parser, several=use.several)
        return response

    def tokenize(self, body: Any) -> bytes:
        """Answer a body of ``tokenize`` as vLLM does; raises ``InvalidRequest``."""
        fields = read_body(without_null_message_fields(body), TokenizeBody)
        self._check_model(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequest("Give either prompt or messages.", param="prompt")
        if fields.messages is not None:
            token_ids = self._encode_chat(
                fields.messages,
                tools=fields.tools,
                add_generation_prompt=fields.add_generation_prompt,
                # The template writes what the model expects.
                add_special_tokens=fields.add_special_tokens is True,
            )
        else:
            assert fields.prompt is not None
            token_ids = self._tokenizer.encode(
                fields.prompt,
                add_special_tokens=fields.add_special_tokens is not False,
                max_tokens=self.max_model_len,
            )
        texts = [self._tokenizer.token_bytes(t).decode(errors="replace") for t in token_ids]
        return _json({
            "count": len(token_ids),
            "max_model_len": self.max_model_len,
            "tokens": token_ids,
            "token_strs": texts if fields.return_token_strs else None,
        })  # fmt: skip

    def detokenize(self, body: Any) -> bytes:
        """Answer a body of ``detokenize`` as vLLM does; raises ``InvalidRequest``."""
        fields = read_body(body, DetokenizeBody)
        self._check_model(fields.model)
        self._check_token_ids(fields.tokens, "tokens")
        text = self._tokenizer.decode(fields.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    # --- the rest is private -----------------------------------------------------------------

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "pagetier",
            "max_model_len": self.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise NotFound(
                f"The model {short(name)} is not served here; the name of this one is "
                f"{self.model_name!r}.",
                param="model",
            )

    def _complete(
        self,
        request_id: str,
        fields: CompletionBody,
        kind: type[Response],
        client_id: str | None,
    ) -> Response:
        self._check_model(fields.model)
        prompts = _prompts(fields.prompt)
        if kind is PredictionResponse and (len(prompts) > 1 or (fields.n or 1) > 1):
            raise InvalidRequest(
                "This route takes one prompt and gives one output; send more to v1/completions.",
                param="n" if len(prompts) == 1 else "prompt",
            )
        num_each = max(fields.n or 1, fields.best_of or 1)
        if len(prompts) > 1 and len(prompts) * num_each > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts of {num_each} outputs each are more than one request may "
                f"have, which is {MAX_CHOICES} in all; send several requests.",
                param="prompt",
            )
        requests = []
        for number, prompt in enumerate(prompts):
            prompt_ids = self._prompt_ids(prompt)
            max_tokens = self._room(
                len(prompt_ids),
                fields.max_tokens,
                "prompt",
                "max_tokens",
                default=DEFAULT_MAX_TOKENS,
            )
            own_id = request_id if len(prompts) == 1 else f"{request_id}-{number}"
            requests.append(
                self._request(
                    own_id,
                    fields,
                    prompt_ids,
                    max_tokens,
                    fields.logprobs,
                    # OpenAI's way to ask for the prompt's log-probabilities.
                    prompt_logprobs=fields.logprobs if fields.echo else None,
                )
            )
        echo = None
        if fields.echo:
            echo = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in prompts]
        return self._respond(requests, fields, kind, client_id or request_id, echo)

    def _prompt_ids(self, prompt: str | list[Any]) -> list[int]:
        if not prompt:
            raise InvalidRequest("The prompt must not be empty.", param="prompt")
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, max_tokens=self.max_model_len)
        self._check_token_ids(prompt, "prompt")
        return prompt

    def _encode_chat(
        self,
        messages: list[ChatMessage],
        *,
        tools: list[Tool] | None = None,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        if not messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        if tools or any(m.tool_calls or m.role == "tool" for m in messages):
            self._tool_template.check("tools" if tools else "messages")
        text = self._tokenizer.render_chat(
            [plain_message(m) for m in messages],
            tools=[plain_tool(t) for t in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            return self._tokenizer.encode(
                text, add_special_tokens=add_special_tokens, max_tokens=self.max_model_len
            )
        except PromptTooLong as exc:
            raise PromptTooLong(exc.message, param="messages") from None

    def _check_token_ids(self, token_ids: list[Any], param: str) -> None:
        # First, since it would take long to look at each of very many.
        if len(token_ids) > self.max_model_len:
            raise self._too_long(len(token_ids), param)
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"{param}: token ids are whole numbers from 0 to {self._vocab_size - 1}, "
                    f"not {short(token_id)}.",
                    param=param,
                )

    def _too_long(self, num_tokens: int, param: str) -> PromptTooLong:
        return PromptTooLong(
            f"The prompt has {num_tokens} tokens, but this model takes at most "
            f"{self.max_model_len}, at least one of them generated; shorten the prompt.",
            param=param,
        )

    def _room(
        self, num_prompt: int, wanted: int | None, prompt: str, param: str, default: int | None
    ) -> int:
        """How many tokens to generate; raises ``PromptTooLong`` if they do not fit."""
        if num_prompt == 0:  # such a tokenizer drops spaces, or a chat template empty messages
            raise InvalidRequest("The prompt has no tokens; say more.", param=prompt)
        room = self.max_model_len - num_prompt
        if room < 1:
            raise self._too_long(num_prompt, prompt)
        if wanted is None:
            return room if default is None else min(default, room)
        if wanted > room:
            raise PromptTooLong(
                f"The prompt has {num_prompt} tokens and {param} asks for {wanted} more, but this "
                f"model takes at most {self.max_model_len} in all; shorten the prompt or lower "
                f"{param}.",
                param=param,
            )
        if wanted < 1:
            raise InvalidRequest(f"{param} must be 1 or more, not {wanted}.", param=param)
        return wanted

    def _request(
        self,
        request_id: str,
        fields: CommonFields,
        prompt_ids: list[int],
        max_tokens: int,
        logprobs: int | None,
        *,
        prompt_logprobs: int | None = None,
        use: ToolUse | None = None,
    ) -> AddRequest:
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if any(len(s) > MAX_STOP_CHARACTERS for s in stop):
            raise InvalidRequest(
                f"stop: a text may have at most {MAX_STOP_CHARACTERS} characters.", param="stop"
            )
        if len(fields.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} token ids.",
                param="stop_token_ids",
            )
        self._check_token_ids(fields.stop_token_ids or [], "stop_token_ids")
        if any(len(word) > MAX_STOP_CHARACTERS for word in fields.bad_words or ()):
            raise InvalidRequest(
                f"bad_words: a text may have at most {MAX_STOP_CHARACTERS} characters.",
                param="bad_words",
            )
        if fields.prompt_logprobs is not None and fields.stream:
            raise InvalidRequest(
                "prompt_logprobs is not given in a stream; leave out one of the two.",
                param="prompt_logprobs",
            )
        given = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(fields, name)) is not None
        }
        structured_outputs = _structured_outputs(fields)
        if use is not None:
            structured_outputs = use.shape(structured_outputs)
            if use.needs_special_tokens:
                given["skip_special_tokens"] = False
        if fields.use_beam_search:
            given.setdefault("temperature", 0.0)
        params = SamplingParams(
            # More than all tokens is all tokens.
            top_k=min(fields.top_k or 0, self._vocab_size),
            stop=stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=fields.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            logit_bias=_logit_bias(fields.logit_bias or {}),
            structured_outputs=structured_outputs,
            **given,
        )
        params = self._tokenizer.with_bad_word_tokens(params)
        params.check_tokens(self._vocab_size, self._eos_token_ids)
        return AddRequest(
            request_id,
            prompt_ids,
            params,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            eos_token_ids=self._eos_token_ids,
        )

    def _respond(
        self,
        requests: list[AddRequest],
        fields: CommonFields,
        kind: type[Response],
        response_id: str,
        echo: list[str] | None = None,
    ) -> Response:
        if fields.stream_options is not None and not fields.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if fields.stream_options is not None and fields.stream_options.include_obfuscation:
            raise InvalidRequest(
                "stream_options.include_obfuscation is not supported yet; leave it out.",
                param="stream_options",
            )
        if fields.timeout is not None and not 0 < fields.timeout <= MAX_TIMEOUT_SECONDS:
            raise InvalidRequest(
                f"timeout must be above 0 and at most {MAX_TIMEOUT_SECONDS} seconds, not "
                f"{fields.timeout}.",
                param="timeout",
            )
        if fields.request_id is not None and not is_client_id(fields.request_id):
            raise InvalidRequest(
                f"request_id must have 1 to {MAX_CLIENT_ID_CHARACTERS} letters, digits or "
                f"'_', '.', ':', '-', not {short(fields.request_id)}.",
                param="request_id",
            )
        return kind(
            requests,
            self._tokenizer,
            response_id=fields.request_id or response_id,
            model_name=self.model_name,
            created=int(self._clock()),
            stream=fields.stream,
            include_usage=fields.stream_options is not None and fields.stream_options.include_usage,
            echo=echo,
            timeout=fields.timeout,
        )


def is_client_id(text: str) -> bool:
    """Whether a client may call its request so; the name goes into headers and logs."""
    return _CLIENT_ID.fullmatch(text) is not None


def _structured_outputs(fields: CommonFields) -> StructuredOutputsParams | None:
    """What the output is to keep to, by whichever of its names it was given."""
    given: dict[str, dict[str, Any]] = {}
    match fields.response_format:
        case JsonObjectFormat():
            given["response_format"] = {"json_object": True}
        case JsonSchemaFormat(json_schema=wanted):
            given["response_format"] = {"json": wanted.schema}
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(fields, f"guided_{kind}")) is not None:
            given[f"guided_{kind}"] = {kind: value}
    names = [*given, *(["structured_outputs"] if fields.structured_outputs is not None else [])]
    if len(names) > 1:
        raise InvalidRequest(
            f"{names[0]} and {names[1]} both say what the output must look like; give one of them.",
            param=names[1],
        )
    for name, params in given.items():
        try:
            return StructuredOutputsParams(**params)
        except InvalidRequest as exc:
            raise InvalidRequest(exc.message, param=name) from None
    return fields.structured_outputs


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    """OpenAI's shape, whose token ids are text, as JSON has no other keys."""
    wrong = next((key for key in bias if not _TOKEN_ID.fullmatch(key)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"logit_bias: token ids are whole numbers, not {short(wrong)}.", param="logit_bias"
        )
    return {int(key): value for key, value in bias.items()}


def _prompts(prompt: Any) -> list[Any]:
    """The prompts in a body's field: each a text or a list, the list's items unchecked."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise InvalidRequest(
            f"$.prompt: expected text or a list of token ids, got {type(prompt).__name__}.",
            param="prompt",
        )
    if not any(isinstance(p, str | list) for p in prompt):
        return [prompt]
    wrong = next((p for p in prompt if not isinstance(p, str | list)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"$.prompt: expected texts or lists of token ids, got {short(wrong)} among them.",
            param="prompt",
        )
    return prompt
