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

import copy
import enum
import itertools
import secrets
import time
from collections.abc import Iterable
from collections.abc import Sequence as AbcSequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from pagetier.handler.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from pagetier.handler.sequence_group import SequenceGroup

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEQUENCES = 64
MAX_LOGIT_BIAS_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_GRAMMAR_CHARACTERS = 65536
MAX_REGEX_CHARACTERS = 8192
MAX_CHOICES = 512


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What the output must look like: exactly one of these is given.

    Attributes:
        json: a JSON schema, as an object or as text; always as text afterwards.
        json_object: True: any JSON object.
        regex: an expression that matches the whole output, in the syntax of Rust's regex crate;
            ``\\d`` is 0 to 9.
        choice: the output is one of these texts.
        grammar: in GBNF or Lark's syntax; the output is its ``root`` or ``start``.

    Raises:
        InvalidRequest: none or several are given, or one is too large. What is wrong inside of
            them is found when they are compiled.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: AbcSequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, rule: str) -> None:
            if not ok:
                raise InvalidRequest(rule, param="structured_outputs")

        def fits(text: str | None, most: int, what: str) -> None:
            num = len(text or "")
            require(num <= most, f"The {what} has {num} characters; at most {most} are allowed.")

        given = [self.json, self.regex, self.choice, self.grammar]
        num_given = sum(g is not None for g in given) + bool(self.json_object)
        require(
            num_given == 1,
            "structured_outputs takes exactly one of json, json_object, regex, choice and grammar, "
            f"not {num_given}.",
        )
        if self.json is not None:
            schema = _json_schema_text(self.json)
            fits(schema, MAX_GRAMMAR_CHARACTERS, "JSON schema")
            msgspec.structs.force_setattr(self, "json", schema)
        fits(self.regex, MAX_REGEX_CHARACTERS, "regex")
        fits(self.grammar, MAX_GRAMMAR_CHARACTERS, "grammar")
        if self.choice is not None:
            choice = () if isinstance(self.choice, str) else tuple(self.choice)
            require(
                1 <= len(choice) <= MAX_CHOICES and all(isinstance(c, str) and c for c in choice),
                f"choice must be a list of 1 to {MAX_CHOICES} non-empty texts.",
            )
            fits("".join(choice), MAX_GRAMMAR_CHARACTERS, "choice")
            msgspec.structs.force_setattr(self, "choice", choice)


def _json_schema_text(schema: str | dict[str, Any]) -> str:
    try:
        value = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    except (msgspec.MsgspecError, UnicodeError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("A JSON schema must be a JSON object.", param="structured_outputs")
    return text


def _are_token_ids(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


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
        min_p: keep tokens at least this share as likely as the most likely one, in [0, 1].
        presence_penalty: taken off the logit of each token that the output has, -2 to 2.
        frequency_penalty: taken off once for each time that the output has it, -2 to 2.
        repetition_penalty: logits of tokens in prompt or output are divided by this if positive,
            multiplied if negative; above 0, and 1 changes nothing.
        logit_bias: added to the logits of these token ids, -100 to 100.
        allowed_token_ids: only these may be chosen; None allows all.
        bad_words: what the output must never contain: texts, or lists of token ids. The engine
            takes token ids only (``Tokenizer.with_bad_word_tokens``).
        min_tokens: neither end-of-sequence nor stop tokens, and no stop text, before so many.
        prompt_logprobs: report this many most likely tokens beside each of the prompt (0 to 20).
            Such a prompt is computed as a whole, whatever of it is cached.
        include_stop_str_in_output: the stop text, or the stop token's, is part of the output.
        skip_special_tokens: special tokens have no text.
        n: how many outputs the request has.
        best_of: generate this many and give out the ``n`` most likely ones; None is ``n``.
        use_beam_search: the outputs are the best of a search with ``best_of`` beams.
        length_penalty: of the search: above 0 favours long outputs.
        early_stopping: of the search: end as soon as there are enough outputs (True), once better
            ones are unlikely (False), or once they are impossible (``never``).
        structured_outputs: a schema or grammar that the output keeps to; it also ends the output.

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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: AbcSequence[int] | None = None
    bad_words: AbcSequence[str | AbcSequence[int]] | None = ()
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bad_words = tuple(w if isinstance(w, str) else tuple(w) for w in self.bad_words or ())
        msgspec.structs.force_setattr(self, "bad_words", bad_words)
        if self.allowed_token_ids is not None:
            msgspec.structs.force_setattr(self, "allowed_token_ids", tuple(self.allowed_token_ids))

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
        require(0.0 <= self.min_p <= 1.0, "min_p", "from 0 to 1")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "from -2 to 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "from -2 to 2")
        require(
            0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a number above 0"
        )
        bias = self.logit_bias or {}
        require(
            len(bias) <= MAX_LOGIT_BIAS_TOKENS
            and _are_token_ids(bias)
            and all(-100.0 <= value <= 100.0 for value in bias.values()),
            "logit_bias",
            f"at most {MAX_LOGIT_BIAS_TOKENS} token ids with numbers from -100 to 100",
        )
        require(
            self.allowed_token_ids is None
            or (len(self.allowed_token_ids) > 0 and _are_token_ids(self.allowed_token_ids)),
            "allowed_token_ids",
            "a list of at least one token id",
        )
        require(
            # A text may become two lists of token ids.
            sum(1 + isinstance(w, str) for w in bad_words) <= 2 * MAX_BAD_WORDS
            and all(w and (isinstance(w, str) or _are_token_ids(w)) for w in bad_words),
            "bad_words",
            f"at most {MAX_BAD_WORDS} non-empty texts, or twice as many lists of token ids",
        )
        most = self.max_tokens if self.max_tokens is not None else float("inf")
        require(0 <= self.min_tokens <= most, "min_tokens", "0 or more and at most max_tokens")
        require(
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
            "prompt_logprobs",
            f"0 to {MAX_LOGPROBS}",
        )
        require(
            len(stop) <= MAX_STOP_STRINGS and all(isinstance(s, str) and s for s in stop),
            "stop",
            f"at most {MAX_STOP_STRINGS} non-empty texts",
        )
        require(
            _are_token_ids(self.stop_token_ids or ()),
            "stop_token_ids",
            "a list of token ids",
        )
        # A complete output cannot go on.
        require(
            self.structured_outputs is None or self.min_tokens == 0,
            "min_tokens",
            "left out with structured output",
        )
        require(1 <= self.n <= MAX_SEQUENCES, "n", f"1 to {MAX_SEQUENCES}")
        require(
            self.best_of is None or self.n <= self.best_of <= MAX_SEQUENCES,
            "best_of",
            f"at least n ({self.n}) and at most {MAX_SEQUENCES}",
        )
        require(abs(self.length_penalty) < 100.0, "length_penalty", "a number from -100 to 100")
        if self.num_sequences > self.n or self.use_beam_search:
            # What a stop text cuts off would have been part of the comparison.
            require(not stop, "stop", "left out with best_of and use_beam_search")
        if self.use_beam_search:
            require(self.temperature == 0.0, "temperature", "0 with use_beam_search")
            for name in _NOT_WITH_BEAMS:
                neutral = _DEFAULTS[name]
                value = getattr(self, name)
                require(
                    value == neutral or not (value or neutral),
                    name,
                    "left out with use_beam_search",
                )

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated for the request's ``n`` outputs."""
        return self.n if self.best_of is None else self.best_of

    def check_tokens(self, vocab_size: int, eos_token_ids: AbcSequence[int]) -> None:
        """Check what a model's vocabulary decides.

        Args:
            vocab_size: token ids are below this.
            eos_token_ids: the model's ends of sequence.

        Raises:
            InvalidRequest: a setting names token ids that the model lacks, or all that may be
                chosen are forbidden, or ``bad_words`` holds text.
        """
        if not self.changes_logits:
            return
        words = [word for word in self.bad_words or () if not isinstance(word, str)]
        if len(words) < len(self.bad_words or ()):
            raise InvalidRequest(
                "bad_words holds text, but the engine takes token ids only; encode the words.",
                param="bad_words",
            )
        named: dict[str, Iterable[int]] = {
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": itertools.chain(*words),
            "stop_token_ids": self.stop_token_ids or (),
        }
        for name, token_ids in named.items():
            highest = max(token_ids, default=0)
            if highest >= vocab_size:
                raise InvalidRequest(
                    f"{name} holds token id {highest}, but the model's ids are 0 to "
                    f"{vocab_size - 1}.",
                    param=name,
                )
        if self.allowed_token_ids is None:
            return
        forbidden = {word[0] for word in words if len(word) == 1}
        if self.min_tokens:
            forbidden.update(self.stop_token_ids or (), () if self.ignore_eos else eos_token_ids)
        if forbidden.issuperset(self.allowed_token_ids):
            raise InvalidRequest(
                "bad_words and min_tokens forbid all of allowed_token_ids; allow more.",
                param="allowed_token_ids",
            )

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that came before are favoured or disfavoured."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to logits beside choosing from their distribution."""
        return (
            self.has_penalties
            or bool(self.logit_bias or self.bad_words or self.min_tokens)
            or self.allowed_token_ids is not None
        )


# A search ranks by the model's raw distribution and reports nothing of each token.
_NOT_WITH_BEAMS = (
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "min_tokens", "logprobs", "prompt_logprobs",
    "structured_outputs",
)  # fmt: skip
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}


def with_logprobs(params: SamplingParams, num_logprobs: int) -> SamplingParams:
    """``params`` with this many log-probabilities for each token, more than clients may ask for."""
    changed = copy.copy(params)
    msgspec.structs.force_setattr(changed, "logprobs", num_logprobs)
    return changed


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


class RequestOutput(msgspec.Struct, frozen=True, array_like=True):
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


# --- a request inside the engine -------------------------------------------------------------


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
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_overtaken",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_swapped_tokens",
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

    def __init__(self, request: AddRequest, arrival: int) -> None:
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
