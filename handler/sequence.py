"""A request inside the engine: its tokens, how far they are computed, and the blocks it holds.

Owns ``Sequence`` with its states and legal moves. Knows nothing of blocks beyond holding their ids,
and imports no torch.

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

import copy
import enum
import secrets
import sys
import time
from typing import TYPE_CHECKING, Protocol

from pagetier.handler.errors import EngineError
from pagetier.handler.messages import AddRequest, TokenLogprobs

if TYPE_CHECKING:
    from pagetier.handler.sequence_group import SequenceGroup


class TokenConstraint(Protocol):
    """A sequence's place in a grammar; ``structured_output.Constraint`` is one.

    Attributes:
        mask: once settled, the tokens that may come next: a bit for each token id, lowest first,
            in whole 32-bit words, and perhaps a word more.
        error: why no token may come any more.
        is_complete: nothing may follow what was accepted.
        has_eos: the last token was an end of sequence, no part of the output.
    """

    mask: bytes
    error: EngineError | None
    is_complete: bool
    has_eos: bool

    def poll(self) -> bool:
        """Whether it is settled: ``mask`` is that of the next token, or ``error`` is set."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen; not settled again until ``poll`` says so."""
        ...

    def fork(self) -> "TokenConstraint":
        """Another one at the same place."""
        ...


class SequenceStatus(enum.Enum):
    """Where a sequence stands; see the module's docstring for the moves."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


# Seeds of a request's sequences lie this far apart (an odd number without pattern in its bits).
_SEED_STEP = 0x1E3779B97F4A7C15

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
        "awaits_mask",
        "block_hashes",
        "block_tables",
        "cache_salt",
        "changes_logits",
        "constraint",
        "eos_token_ids",
        "finish_reason",
        "group",
        "index",
        "is_lockstep",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_overtaken",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_swapped_tokens",
        "num_writable_tokens",
        "params",
        "priority",
        "prompt_logprobs",
        "queue_seconds",
        "request_id",
        "row",
        "seed",
        "status",
        "stop_reason",
        "swapped_blocks",
        "token_ids",
    )

    def __init__(self, request: AddRequest, arrival: int, max_model_len: int | None = None) -> None:
        params = request.params
        self.request_id = request.request_id
        self.params = params
        self.changes_logits = params.changes_logits
        self.priority = request.priority
        self.cache_salt = request.cache_salt
        self.eos_token_ids = () if params.ignore_eos else request.eos_token_ids
        self.arrival = arrival
        self.arrived_at = time.monotonic()
        self.queue_seconds = 0.0  # until it was first scheduled
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        # The length at which it ends, prompt included.
        self.max_num_tokens = sys.maxsize if max_model_len is None else max_model_len
        if params.max_tokens is not None:
            most = self.num_prompt_tokens + params.max_tokens
            self.max_num_tokens = min(most, self.max_num_tokens)
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_overtaken = 0
        # Tokens of the prompt whose successor's log-probabilities launched steps work out, and
        # what was collected of them until the first output token takes it along.
        self.num_prompt_logprobs = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        # Which of its request's sequences it is, and all of them together, if there are several.
        self.index = 0
        self.group: SequenceGroup | None = None
        # Whether its next token may only be planned once the one before it is known.
        self.is_lockstep = False
        # The grammar that it keeps to, and whether it must wait for what that says next.
        self.constraint: TokenConstraint | None = None
        self.awaits_mask = False
        # Index in the runner's per-sequence device buffers while it holds GPU blocks, else -1.
        self.row = -1
        self.block_tables: list[list[int]] = []  # per KV group: GPU block ids
        self.swapped_blocks: list[list[int]] = []  # per KV group: CPU block ids held for resuming
        self.num_swapped_tokens = 0  # tokens that ``swapped_blocks`` hold
        self.block_hashes: list[bytes] = []  # chained content hashes of full blocks of known tokens
        self.num_published_blocks = 0  # leading blocks of the table whose hashes were published
        # Its next slots below this one are its own: nobody else reads them.
        self.num_writable_tokens = 0

    def fork(self, index: int) -> "Sequence":
        """A sequence of the same request with the same tokens, without blocks, row or tokens in
        flight; it waits. Its random numbers differ from the parent's."""
        child = copy.copy(self)
        child.index = index
        child.seed = (self.seed + index * _SEED_STEP) % 2**63
        child.token_ids = list(self.token_ids)
        child.constraint = None if self.constraint is None else self.constraint.fork()
        child.block_hashes = list(self.block_hashes)
        child.prompt_logprobs = []
        child.block_tables, child.swapped_blocks = [], []
        child.num_swapped_tokens = child.num_computed_tokens = child.num_published_blocks = 0
        child.num_writable_tokens = 0
        child.num_in_flight = child.num_overtaken = 0
        child.row = -1
        child.status = SequenceStatus.WAITING
        return child

    @property
    def sequence_id(self) -> str:
        """Names it among all sequences of the engine."""
        return self.request_id if self.index == 0 else f"{self.request_id}#{self.index}"

    def move_to(self, status: SequenceStatus) -> None:
        """Change state; an illegal move is a bug of ours and asserts."""
        assert status in _LEGAL_MOVES[self.status], (self.request_id, self.status, status)
        self.status = status

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and all collected output."""
        return len(self.token_ids)

    @property
    def max_cached_tokens(self) -> int:
        """How many leading tokens may come from a cache; the last known one never does.

        A prompt whose log-probabilities are wanted is computed where they are not known yet.
        """
        most = len(self.token_ids) - 1
        if self.params.prompt_logprobs is None:
            return most
        is_known = self.num_prompt_logprobs == self.num_prompt_tokens - 1
        return most if is_known else self.num_prompt_logprobs

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
