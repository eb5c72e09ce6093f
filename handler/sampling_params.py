"""What a client may ask of a request's output: how tokens are chosen, and what they keep to.

Owns ``SamplingParams``, the public face of sampling, with the limits of each value, and
``StructuredOutputsParams``. Knows nothing of HTTP, tokenisers or how a rule is applied, and imports
no torch.
"""

import copy
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as AbcSequence
from typing import Any, Literal

import msgspec

from pagetier.handler.errors import InvalidRequest

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


def _shown(value: Any) -> str:
    """``value`` as an error shows it: of what is long only how much there is."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    if len(text) <= 64:
        return text
    return f"{len(value)} of them" if isinstance(value, tuple | dict) else text[:61] + "..."


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
                given = _shown(getattr(self, param))
                raise InvalidRequest(f"{param} must be {rule}, not {given}.", param=param)

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
