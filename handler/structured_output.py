"""Output that keeps to a JSON schema, an expression, a choice or a grammar.

Owns the compiling of grammars and each sequence's place in its own: which tokens may come next, and
whether the output is complete. Parsing is llguidance's. Knows nothing of queues, steps or tensors:
a mask is bytes.

Nothing is worked out while somebody waits for it. ``Grammars.constrain`` returns at once, and the
grammar is compiled on a thread of its own; likewise each token's mask, once the token before it was
accepted. ``Constraint.poll`` says whether it is there.

A grammar is a client's program. llguidance counts what it spends on compiling and on each mask, and
gives up beyond the limits below, which hold a mask to some tens of milliseconds at worst. Such a
grammar is that request's error alone.
"""

import concurrent.futures
import json
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from pagetier.handler.errors import EngineError, InvalidRequest
from pagetier.handler.sampling_params import StructuredOutputsParams
from pagetier.handler.tokenizer import Tokenizer
from pagetier.handler.tool_calls import GRAMMAR_TITLE

logger = logging.getLogger(__name__)

MAX_COMPILE_SECONDS = 20.0
# Compiled grammars that are kept, since clients send the same schema again and again.
_MAX_KEPT_GRAMMARS = 32
_NUM_COMPILERS = 2
_MAX_MASKERS = 4
# A mask at 14,000 units of fuel or 20,000 items a millisecond; compiling at 50,000 units.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Else llguidance encodes all text that the grammar leaves no choice about, however long it is.
_HEADER = '%llguidance {"no_forcing": true}\n'
# Any more space between two parts of JSON is a model that has lost its way, and never comes back.
_JSON_OPTIONS: dict[str, str] = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}
_MAX_REASON_CHARACTERS = 200
# Translating GBNF takes the square of these at worst.
_MAX_GBNF_RULES = 1000
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")


_T = TypeVar("_T")
# The matcher at the beginning, not to be changed, and the mask of the first token.
_CompileJob: TypeAlias = concurrent.futures.Future[tuple[LLMatcher, bytes]]
_MaskJob: TypeAlias = concurrent.futures.Future[bytes]


class _Vocabulary(TokenizerWrapper):
    """The tokenizer as llguidance wants it; the names are its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        # Not the base's own, which wants a tokenizer that encodes.
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [t for t in tokenizer.special_tokens.values() if t < vocab_size]
        self.eos_token_id = eos_token_id

    def __call__(self, text: str) -> list[int]:
        """Required, and never called: only grammars that force tokens need text encoded."""
        raise AssertionError("a grammar forces tokens")


class Grammars:
    """Compiles grammars for one model and computes their masks.

    Args:
        load_tokenizer: reads the model's tokenizer; called once, by ``prepare`` or when the first
            grammar comes.
        vocab_size: a mask has a bit for each token id below it.
        eos_token_ids: the model's; where it has none, the tokenizer's is taken.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compilers = concurrent.futures.ThreadPoolExecutor(
            _NUM_COMPILERS, thread_name_prefix="pagetier-grammar"
        )
        # Apart from the compilers, so that running sequences never wait behind a new grammar.
        self._maskers = concurrent.futures.ThreadPoolExecutor(
            min(os.cpu_count() or 1, _MAX_MASKERS), thread_name_prefix="pagetier-mask"
        )
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutputsParams, _CompileJob] = OrderedDict()
        self._num_pending = 0
        self._changed = threading.Condition()
        self._num_done = 0
        self._num_seen = 0

    def prepare(self) -> None:
        """Read the tokenizer now, and not when the first grammar comes.

        Without one that serves, grammars are refused when they come.
        """
        error = self._submit(self._compilers, self._model_tokenizer).exception()
        if error is not None:
            logger.warning("Structured output will be refused: %s", error)

    def constrain(self, params: StructuredOutputsParams) -> "Constraint":
        """A constraint for a new sequence; returns at once, before the grammar is compiled."""
        job = self._kept.pop(params, None)
        if job is None:
            job = self._submit(self._compilers, lambda: self._compile(params))
        self._kept[params] = job
        if len(self._kept) > _MAX_KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return Constraint(self, job)

    def check(self, params: StructuredOutputsParams) -> None:
        """Wait until a grammar is compiled.

        Raises:
            InvalidRequest: it is wrong or too complex.
        """
        self.constrain(params).wait()

    def begin_step(self) -> None:
        """Note what has ended by now; ``wait`` waits for something newer."""
        with self._changed:
            self._num_seen = self._num_done

    def wait(self, seconds: float) -> bool:
        """Block until something has ended since ``begin_step``, at most ``seconds``.

        Returns at once with False if there is nothing to wait for.
        """
        with self._changed:
            if not self._num_pending and self._num_done == self._num_seen:
                return False
            self._changed.wait_for(lambda: self._num_done != self._num_seen, seconds)
            return True

    def close(self) -> None:
        """Start no more work; what runs is left to end by itself."""
        for pool in (self._compilers, self._maskers):
            pool.shutdown(wait=False, cancel_futures=True)

    def submit_mask(self, matcher: LLMatcher) -> _MaskJob:
        """Compute the mask that ``matcher`` has for the next token; it is not to be touched."""
        return self._submit(self._maskers, lambda: _mask_of(matcher))

    def _submit(
        self, pool: concurrent.futures.ThreadPoolExecutor, work: Callable[[], _T]
    ) -> "concurrent.futures.Future[_T]":
        with self._changed:
            self._num_pending += 1
        future = pool.submit(work)
        future.add_done_callback(self._note_done)
        return future

    def _note_done(self, _: "concurrent.futures.Future[_T]") -> None:
        with self._changed:
            self._num_pending -= 1
            self._num_done += 1
            self._changed.notify_all()

    def _compile(self, params: StructuredOutputsParams) -> tuple[LLMatcher, bytes]:
        try:
            name, grammar = _grammar_of(params)
            matcher = LLMatcher(self._model_tokenizer(), grammar, log_level=0, limits=_LIMITS)
        except UnicodeEncodeError:
            raise InvalidRequest(
                "The grammar is not valid Unicode text: it holds half of a surrogate pair."
            ) from None
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"The {name} cannot be followed: {_reason(matcher.get_error())}.")
        if not any(mask):
            raise InvalidRequest(f"The {name} allows no output at all; correct it.")
        return matcher, mask

    def _model_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                tokenizer = self._load_tokenizer()
                eos_token_ids = list(self._eos_token_ids)
                if not eos_token_ids and tokenizer.eos_token_id is not None:
                    eos_token_ids = [tokenizer.eos_token_id]
                if not eos_token_ids:
                    raise InvalidRequest(
                        "This model has no end-of-sequence token, which structured output needs."
                    )
                vocabulary = _Vocabulary(tokenizer, self._vocab_size, eos_token_ids[0])
                self._tokenizer = LLTokenizer(
                    vocabulary, n_vocab=self._vocab_size, eos_token=eos_token_ids
                )
            return self._tokenizer


class Constraint:
    """One sequence's place in its grammar; see ``request.TokenConstraint``.

    It is compiling at first, then either settled (``mask`` is known) or working out the mask of the
    next token, until it is complete or has failed.
    """

    def __init__(self, grammars: Grammars, compiling: _CompileJob | None) -> None:
        self._grammars = grammars
        self._compiling = compiling
        self._deadline = time.monotonic() + MAX_COMPILE_SECONDS
        self._masking: _MaskJob | None = None
        self._matcher: LLMatcher | None = None
        self.mask = b""
        self.error: EngineError | None = None
        self.is_complete = False
        self.has_eos = False

    def poll(self) -> bool:
        """Whether it is settled; ``error`` says so if it never will be."""
        if self.error is not None:
            return True
        try:
            if self._compiling is not None:
                if not self._compiling.done():
                    self._check_deadline()
                    return False
                matcher, self.mask = self._compiling.result()
                self._matcher = matcher.deep_copy()
                self._compiling = None
            elif self._masking is not None:
                if not self._masking.done():
                    return False
                self.mask = self._masking.result()
                self._masking = None
        except EngineError as exc:
            self.error = exc
        except BaseException as exc:
            # A fault in llguidance comes as an exception of its own base.
            logger.exception("a grammar broke")
            self.error = EngineError(f"The grammar broke: {type(exc).__name__}.")
        return True

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen under ``mask``."""
        assert self._matcher is not None, "a token came before the grammar was compiled"
        if not self.mask[token_id // 8] >> token_id % 8 & 1:
            self.error = InvalidRequest(
                "None of the tokens that the grammar allows could be chosen; other settings of "
                "the request, such as logit_bias or allowed_token_ids, contradict it."
            )
        elif not self._matcher.consume_token(token_id):
            self.error = _too_complex(self._matcher)
        elif self._matcher.is_stopped():
            self.is_complete = True
            self.has_eos = self._matcher.stop_reason() == "EndOfSentence"
        else:
            self._masking = self._grammars.submit_mask(self._matcher)

    def fork(self) -> "Constraint":
        """Another constraint at the same place."""
        self.wait()
        child = Constraint(self._grammars, None)
        if self._matcher is not None:
            child._matcher = self._matcher.deep_copy()
        child.mask, child.error = self.mask, self.error
        child.is_complete, child.has_eos = self.is_complete, self.has_eos
        return child

    def wait(self) -> None:
        """Block until it is settled; raises ``error``."""
        while not self.poll():
            jobs: list[concurrent.futures.Future[Any]]
            jobs = [job for job in (self._compiling, self._masking) if job is not None]
            concurrent.futures.wait(jobs, timeout=1.0)
        if self.error is not None:
            raise self.error

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise InvalidRequest(
                f"The grammar was not compiled within {MAX_COMPILE_SECONDS:g} s; make it simpler."
            )


def _mask_of(matcher: LLMatcher) -> bytes:
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise _too_complex(matcher)
    return mask


def _too_complex(matcher: LLMatcher) -> InvalidRequest:
    reason = _reason(matcher.get_error())
    return InvalidRequest(f"The grammar became too complex to be followed further: {reason}.")


def _grammar_of(params: StructuredOutputsParams) -> tuple[str, str]:
    """What the grammar is called in errors, and its form in llguidance's variant of Lark."""
    if params.json is not None or params.json_object:
        assert not isinstance(params.json, dict), "the schema is not text"
        schema = json.loads(params.json or '{"type": "object"}')
        if "x-guidance" in schema:
            raise InvalidRequest("The JSON schema may not set x-guidance options; leave them out.")
        schema["x-guidance"] = _JSON_OPTIONS
        return "JSON schema", f"{_HEADER}start: %json {json.dumps(schema)}"
    if params.regex is not None:
        return "regex", f"{_HEADER}start: /{regex_to_lark(params.regex, 'd')}/"
    if params.choice is not None:
        return "choice", f"{_HEADER}start: {' | '.join(map(json.dumps, params.choice))}"
    assert params.grammar is not None, params
    if "%llguidance" in params.grammar:
        raise InvalidRequest("The grammar may not set %llguidance options; leave them out.")
    # Looking for the beginning of a grammar takes the square of the blank lines there.
    text = "\n".join(line for line in params.grammar.split("\n") if line.strip())
    if text.count("::=") > _MAX_GBNF_RULES:
        raise InvalidRequest(f"The grammar has more than {_MAX_GBNF_RULES} rules; make it simpler.")
    name = "parameters of the tools" if text.startswith(GRAMMAR_TITLE) else "grammar"
    try:
        return name, _HEADER + any_to_lark(text).removeprefix("%llguidance {}")
    except Exception as exc:
        raise InvalidRequest(f"The grammar cannot be followed: {_reason(str(exc))}.") from exc


def _reason(message: str) -> str:
    """The heart of one of llguidance's messages, which quote the grammar over many lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (causes or lines or ["it is wrong"])[0].rstrip(".")
    if reason == "NoExtensionBias":
        return "it allows no output"
    # Where in a text that is not quite the client's own.
    reason = _PLACE.sub("", reason).removeprefix("failed to compile JSON schema: ")
    if len(reason) > _MAX_REASON_CHARACTERS:
        reason = reason[:_MAX_REASON_CHARACTERS] + "..."
    return reason
