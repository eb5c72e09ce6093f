"""Engines that need no model, for tests of the handler: their tokens count up from the prompt's.

Each ``build_*`` function can be named to ``EngineClient`` as the builder of its process.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ModelError, QueueFull
from pagetier.handler.messages import AddRequest, RequestOutput, TokenLogprobs
from pagetier.handler.metrics_export import COUNTERS, GAUGES

VOCAB_SIZE = 400
MAX_MODEL_LEN = 4096
FIRST_TOKEN = 5  # the ids below are special in the tests' tokenizer


def next_token(token_id: int) -> int:
    """The token that follows another one, never a special one."""
    return FIRST_TOKEN + (token_id + 1 - FIRST_TOKEN) % (VOCAB_SIZE - FIRST_TOKEN - 60)


class FakeCore:
    """Gives every request one token a step; a step takes ``step_seconds``."""

    def __init__(self, config: EngineConfig, step_seconds: float = 0.005) -> None:
        self.max_model_len = config.max_model_len or MAX_MODEL_LEN
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = (0,)
        self.info: dict[str, Any] = {"device": "none"}
        self.closed = False
        self._step_seconds = step_seconds
        self._max_queued = config.max_num_queued_reqs
        self._max_tokens: dict[str, int] = {}
        self._requests: dict[str, AddRequest] = {}
        self._made: dict[str, list[int]] = {}
        self._num_steps = 0
        self._num_aborted = 0

    def add_request(self, request: AddRequest) -> None:
        if len(self._requests) >= self._max_queued:
            raise QueueFull(f"{self._max_queued} requests are queued; try again.", retry_after=2)
        self._requests[request.request_id] = request
        self._made[request.request_id] = []

    def abort(self, request_ids: list[str], outputs: Sequence[tuple[str, int]] = ()) -> None:
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._num_aborted += 1
                del self._made[request_id]

    def step(self) -> list[RequestOutput]:
        time.sleep(self._step_seconds)
        self._num_steps += 1
        return [
            msgspec.structs.replace(output, index=index)
            for request in list(self._requests.values())
            for output in [self._advance(request)]
            for index in range(request.params.n)
        ]

    def _advance(self, request: AddRequest) -> RequestOutput:
        """What each of the request's outputs gains."""
        made = self._made[request.request_id]
        token = next_token(made[-1] if made else request.prompt_token_ids[-1])
        made.append(token)
        limit = self.max_model_len - len(request.prompt_token_ids)
        if request.params.max_tokens is not None:
            limit = min(limit, request.params.max_tokens)
        reason, stop_reason = None, None
        if token in (request.params.stop_token_ids or ()):
            reason, stop_reason = "stop", token
        elif len(made) >= limit:
            reason = "length"
        logprobs = None
        if request.params.logprobs is not None:
            top = [token, *range(FIRST_TOKEN, FIRST_TOKEN + request.params.logprobs)]
            top = top[: request.params.logprobs]
            logprobs = [TokenLogprobs(token, -0.5, top, [-0.5 - i for i in range(len(top))])]
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None and len(made) == 1:
            prompt_logprobs = [
                TokenLogprobs(t, -0.5, [t], [-0.5]) for t in request.prompt_token_ids[1:]
            ]
        if reason is not None:
            del self._requests[request.request_id], self._made[request.request_id]
        return RequestOutput(
            request.request_id,
            [token],
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=len(request.prompt_token_ids) // 16 * 16,
            prompt_logprobs=prompt_logprobs,
        )

    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self) -> dict[str, Any]:
        return {
            **dict.fromkeys((*GAUGES, *COUNTERS), 0),
            "num_requests_running": len(self._requests),
            "num_steps": self._num_steps,
            "num_aborted": self._num_aborted,
        }

    def trace(self) -> list[dict[str, Any]]:
        return [{"step": self._num_steps}]

    def close(self) -> None:
        self.closed = True


class _BreakingCore(FakeCore):
    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        if self._num_steps == 3:
            raise RuntimeError("a fault in step 3")
        return outputs


def build(config: EngineConfig, progress: Callable[[str], None] | None) -> FakeCore:
    """An engine of 5 ms a step."""
    if progress is not None:
        progress("making a fake engine")
    return FakeCore(config)


def build_endless_step(config: EngineConfig, progress: Callable[[str], None] | None) -> FakeCore:
    """An engine whose first step never ends."""
    return FakeCore(config, step_seconds=3600.0)


def build_breaking(config: EngineConfig, progress: Callable[[str], None] | None) -> FakeCore:
    """An engine whose third step fails."""
    return _BreakingCore(config)


def build_unreadable(config: EngineConfig, progress: Callable[[str], None] | None) -> FakeCore:
    """An engine that cannot start, and knows why."""
    raise ModelError("The model 'nowhere' cannot be read: no config.json.")


def build_endlessly(config: EngineConfig, progress: Callable[[str], None] | None) -> FakeCore:
    """An engine whose start never ends."""
    assert progress is not None
    progress("loading for ever")
    threading.Event().wait()
    raise AssertionError("unreachable")
