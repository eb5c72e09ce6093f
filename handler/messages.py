"""What travels between the handler and the engine process: one small msgpack frame each.

Owns the messages' fields. Knows nothing of connections, or of what either side does with them, and
imports no torch.
"""

from typing import Any

import msgspec

from pagetier.handler.sampling_params import SamplingParams


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """A request for the engine. ``prompt_token_ids`` is non-empty; lower ``priority`` is sooner."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    eos_token_ids: tuple[int, ...] = ()


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests, in whatever state, and free what they hold; unknown ids are fine.

    ``outputs`` stops single outputs: pairs of a request id and an index.
    """

    request_ids: list[str]
    outputs: list[tuple[str, int]] = []


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for one ``StatsReply``."""

    include_trace: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Ask the engine process to end."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities for one generated token, from the model's raw distribution."""

    token_id: int
    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one request gained in a step. ``finish_reason`` is None while it goes on.

    ``finish_reason``: ``stop`` (``stop_reason`` is the token id, None for end of sequence),
    ``length``, ``abort`` or ``error`` (``error`` has the sentence, ``error_status`` its status).
    ``prompt_logprobs``: of the prompt's tokens from the second on, with the first output token.
    ``index``: which of the request's outputs this is about; each finishes by itself.
    ``queue_seconds``: how long it waited before it was first scheduled.
    ``has_stop_token``: with ``stop``, whether the last token only ended the output; a grammar that
    is complete ends it without. A report of no token and no end says that a grammar was accepted.
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None
    error_status: int = 500
    retry_after: int | None = None
    queue_seconds: float = 0.0
    prompt_logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    has_stop_token: bool = True

    @property
    def is_notice(self) -> bool:
        """Whether it only says that a grammar was accepted."""
        return not self.new_token_ids and self.finish_reason is None


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything that came of one engine step: one message a step."""

    outputs: list[RequestOutput]


class StatsReply(msgspec.Struct, frozen=True, tag=True):
    """Gauges and totals, under the names of the metrics; ``trace`` only if it was asked for."""

    stats: dict[str, Any]
    trace: list[dict[str, Any]] | None = None


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The engine can take requests. ``info``: limits and sizes found at start."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    info: dict[str, Any]


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or broke; it ends after this message."""

    message: str


ToEngine = AddRequest | AbortRequests | GetStats | Shutdown
FromEngine = StepOutputs | StatsReply | EngineReady | EngineFailed
