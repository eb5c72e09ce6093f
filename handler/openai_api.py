"""OpenAI's API for one model: from a request's body to what the engine is given.

Owns defaults and checks of the completions, chat and plain prediction routes. The fields are in
``openai_schemas``, the responses in ``openai_responses``. Knows nothing of HTTP connections, of
TorchServe, or of when tokens are made.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from pagetier.handler.errors import InvalidRequest, NotFound, PromptTooLong
from pagetier.handler.openai_responses import (
    ChatResponse,
    CompletionResponse,
    PredictionResponse,
    Response,
)
from pagetier.handler.openai_schemas import (
    ChatBody,
    CommonFields,
    CompletionBody,
    plain_message,
    read_body,
    short,
    without_null_message_fields,
)
from pagetier.handler.request import AddRequest, SamplingParams
from pagetier.handler.tokenizer import Tokenizer

MAX_STOP_CHARACTERS = 1024
# OpenAI's default for completions; a chat's answer may be as long as the model allows.
DEFAULT_MAX_TOKENS = 16

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
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Serve the model called ``model_name``; the limits are the engine's."""
        self._tokenizer = tokenizer
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

    def completion(self, request_id: str, body: Any) -> "Response":
        """Parse the body of ``v1/completions``; raises ``InvalidRequest``."""
        fields = read_body(body, CompletionBody)
        return self._complete(request_id, fields, CompletionResponse)

    def prediction(self, request_id: str, body: Any) -> "Response":
        """Parse the body of the plain prediction route: text, or a completion's fields.

        Raises:
            InvalidRequest: the body is wrong.
        """
        if isinstance(body, str):
            body = {"prompt": body}
        fields = read_body(body, CompletionBody)
        return self._complete(request_id, fields, PredictionResponse)

    def chat(self, request_id: str, body: Any) -> "Response":
        """Parse the body of ``v1/chat/completions``; raises ``InvalidRequest``."""
        fields = read_body(without_null_message_fields(body), ChatBody)
        self._check_model(fields.model)
        if not fields.messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        if fields.top_logprobs is not None and not fields.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        text = self._tokenizer.render_chat([plain_message(m) for m in fields.messages])
        prompt_ids = self._tokenizer.encode(
            text, add_special_tokens=False, max_tokens=self.max_model_len
        )
        max_tokens, param = fields.max_tokens, "max_tokens"
        if fields.max_completion_tokens is not None:
            max_tokens, param = fields.max_completion_tokens, "max_completion_tokens"
        request = self._request(
            request_id,
            fields,
            prompt_ids,
            self._room(len(prompt_ids), max_tokens, "messages", param, default=None),
            (fields.top_logprobs or 0) if fields.logprobs else None,
        )
        return self._respond(request, fields, ChatResponse)

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
                f"The model {name!r} is not served here; the name of this one is "
                f"{self.model_name!r}.",
                param="model",
            )

    def _complete(
        self, request_id: str, fields: CompletionBody, kind: "type[Response]"
    ) -> "Response":
        self._check_model(fields.model)
        prompt_ids = self._prompt_ids(fields.prompt)
        max_tokens = self._room(
            len(prompt_ids), fields.max_tokens, "prompt", "max_tokens", default=DEFAULT_MAX_TOKENS
        )
        request = self._request(request_id, fields, prompt_ids, max_tokens, fields.logprobs)
        return self._respond(request, fields, kind)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt):
            raise InvalidRequest(
                "Several prompts in one request are not supported yet; send one request each.",
                param="prompt",
            )
        if prompt in ("", []):
            raise InvalidRequest("The prompt must not be empty.", param="prompt")
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, max_tokens=self.max_model_len)
        if not isinstance(prompt, list):
            raise InvalidRequest(
                f"$.prompt: expected text or a list of token ids, got {type(prompt).__name__}.",
                param="prompt",
            )
        for token_id in prompt:
            self._check_token_id(token_id, "prompt")
        return prompt

    def _check_token_id(self, token_id: Any, param: str) -> None:
        if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
            raise InvalidRequest(
                f"{param}: token ids are whole numbers from 0 to {self._vocab_size - 1}, "
                f"not {short(token_id)}.",
                param=param,
            )

    def _room(
        self, num_prompt: int, wanted: int | None, prompt: str, param: str, default: int | None
    ) -> int:
        """How many tokens to generate; raises ``PromptTooLong`` if they do not fit."""
        room = self.max_model_len - num_prompt
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {num_prompt} tokens, but this model takes at most "
                f"{self.max_model_len}, at least one of them generated; shorten the prompt.",
                param=prompt,
            )
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
    ) -> AddRequest:
        stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if any(len(s) > MAX_STOP_CHARACTERS for s in stop):
            raise InvalidRequest(
                f"stop: a text may have at most {MAX_STOP_CHARACTERS} characters.", param="stop"
            )
        for token_id in fields.stop_token_ids or ():
            self._check_token_id(token_id, "stop_token_ids")
        given = {
            name: value
            for name in ("temperature", "top_p", "seed", "stop_token_ids", "ignore_eos")
            if (value := getattr(fields, name)) is not None
        }
        params = SamplingParams(
            # More than all tokens is all tokens.
            top_k=min(fields.top_k or 0, self._vocab_size),
            stop=stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
            **given,
        )
        return AddRequest(
            request_id,
            prompt_ids,
            params,
            priority=fields.priority,
            cache_salt=fields.cache_salt,
            eos_token_ids=self._eos_token_ids,
        )

    def _respond(
        self, request: AddRequest, fields: CommonFields, kind: "type[Response]"
    ) -> "Response":
        if fields.stream_options is not None and not fields.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        return kind(
            request,
            self._tokenizer,
            model_name=self.model_name,
            created=int(self._clock()),
            stream=fields.stream,
            include_usage=fields.stream_options is not None and fields.stream_options.include_usage,
        )
