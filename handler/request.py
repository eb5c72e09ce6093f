"""What a request is: sampling settings, the messages that carry it, and its life as a sequence.

Owns ``SamplingParams`` (the public face of sampling), the messages between the handler and the
engine process, and ``Sequence`` with its states and legal moves. Knows nothing of blocks beyond
holding their ids, nothing of tokenisers, and imports no torch.

States of a sequence::

    WAITING ──────────────> RUNNING ───────────────> FINISHED
       │                     │   ^                       ^
       │                     v   │ (recompute)           │
       │                  PREEMPTED ──> LOADING ─────────┤
       └───────────────────────────────>  │ ^            │
                (prefix found in the CPU tier)     any state, on abort

WAITING    never ran; holds no block (a failed load leads back here or to PREEMPTED)
LOADING    holds its whole reservation; blocks are being copied in; in no launched step
RUNNING    holds blocks; may be scheduled
PREEMPTED  ran before; holds no GPU block; may hold CPU blocks
FINISHED   holds nothing
"""

import enum
import secrets
import time
from collections.abc import Sequence as AbcSequence
from typing import Any

import msgspec

from pagetier.handler.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen for one request.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep this many tokens; 0 or -1 keeps all.
        seed: same seed and prompt give the same tokens, whatever shares the batch; None draws one.
        stop: texts at which generation ends; they are not part of the output. A single text is
            taken too.
        stop_token_ids: token ids at which generation ends, beside the model's own.
        max_tokens: most tokens to generate; None means up to the model's length.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: report this many most likely tokens beside the chosen one (0 to 20).

    Raises:
        InvalidRequest: a value is impossible; ``param`` names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | AbcSequence[str] | None = ()
    stop_token_ids: AbcSequence[int] | None = ()
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))

        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(
                    f"{param} must be {rule}, not {getattr(self, param)!r}.", param=param
                )

        # `not (x >= 0)` rather than `x < 0`, so that NaN is refused too.
        require(0.0 <= self.temperature < float("inf"), "temperature", "a number from 0 up")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(self.top_k >= -1, "top_k", "-1, 0 (both: all tokens) or a positive count")
        require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more")
        require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"0 to {MAX_LOGPROBS}",
        )
        require(
            len(stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in stop),
            "stop",
            f"at most {MAX_STOP_STRINGS} non-empty texts",
        )
        require(
            all(isinstance(t, int) and t >= 0 for t in self.stop_token_ids or ()),
            "stop_token_ids",
            "a list of token ids",
        )


# --- messages between handler and engine process ---------------------------------------------


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """A request for the engine. ``prompt_token_ids`` is non-empty; lower ``priority`` is sooner."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    eos_token_ids: tuple[int, ...] = ()


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests, in whatever state, and free what they hold; unknown ids are fine."""

    request_ids: list[str]


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


class RequestOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one request gained in a step. ``finish_reason`` is None while it goes on.

    ``finish_reason``: ``stop`` (``stop_reason`` is the token id, None for end of sequence),
    ``length``, ``abort`` or ``error`` (``error`` has the sentence, ``error_status`` its status).
    ``queue_seconds``: how long it waited before it was first scheduled.
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


# --- a request inside the engine -------------------------------------------------------------


class SequenceStatus(enum.Enum):
    """Where a sequence stands; see the module's docstring for the moves."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_S = SequenceStatus
_LEGAL_MOVES = {
    _S.WAITING: {_S.RUNNING, _S.LOADING, _S.FINISHED},
    _S.LOADING: {_S.RUNNING, _S.WAITING, _S.PREEMPTED, _S.FINISHED},
    _S.RUNNING: {_S.PREEMPTED, _S.FINISHED},
    _S.PREEMPTED: {_S.RUNNING, _S.LOADING, _S.FINISHED},
    _S.FINISHED: set(),
}


class Sequence:
    """One request in the engine: its tokens, how far they are computed, and the blocks it holds.

    Three counts of tokens are kept apart: ``num_tokens`` are known (prompt and collected output),
    ``num_in_flight`` are sampled by launched steps but not collected yet, and
    ``num_computed_tokens`` have, or will have once the launched steps end, their keys and values
    in the KV cache. In steady decoding
    ``num_computed_tokens == num_tokens + num_in_flight - 1``.
    """

    __slots__ = (
        "arrival",
        "arrived_at",
        "block_hashes",
        "block_tables",
        "cache_salt",
        "eos_token_ids",
        "finish_reason",
        "is_lockstep",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_overtaken",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_swapped_tokens",
        "params",
        "priority",
        "queue_seconds",
        "request_id",
        "row",
        "seed",
        "status",
        "stop_reason",
        "swapped_blocks",
        "token_ids",
    )

    def __init__(self, request: AddRequest, arrival: int) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.priority = request.priority
        self.cache_salt = request.cache_salt
        self.eos_token_ids = () if params.ignore_eos else request.eos_token_ids
        self.arrival = arrival
        self.arrived_at = time.monotonic()
        self.queue_seconds = 0.0  # until it was first scheduled
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_overtaken = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        # Whether its next token may only be planned once the one before it is known.
        self.is_lockstep = False
        # Index in the runner's per-sequence device buffers while it holds GPU blocks, else -1.
        self.row = -1
        self.block_tables: list[list[int]] = []  # per KV group: GPU block ids
        self.swapped_blocks: list[list[int]] = []  # per KV group: CPU block ids held for resuming
        self.num_swapped_tokens = 0  # tokens that ``swapped_blocks`` hold
        self.block_hashes: list[bytes] = []  # chained content hashes of full blocks of known tokens
        self.num_published_blocks = 0  # leading blocks of the table whose hashes were published

    def move_to(self, status: SequenceStatus) -> None:
        """Change state; an illegal move is a bug of ours and asserts."""
        assert status in _LEGAL_MOVES[self.status], (self.request_id, self.status, status)
        self.status = status

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and all collected output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Collected output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, in-flight ones included, that no launched step computes yet."""
        return len(self.token_ids) + self.num_in_flight - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has left the engine."""
        return self.status is SequenceStatus.FINISHED
