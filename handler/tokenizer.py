"""Text to token ids and back: encoding, chat templates, incremental decoding, stop strings.

Owns everything about text. Knows nothing of how tokens are made, nor of how text is sent to a
client. The handler and the offline ``LLM`` feed an ``OutputAssembler`` with what the engine
reports of a request, and get text that is safe to show.

Decoding is incremental: a token costs the same however long the output is. Where the tokenizer is
byte-level (GPT-2, Llama 3, Qwen, ...), a token is a string of bytes and the text is their UTF-8,
so that is what is computed. Any other tokenizer is asked for the text of a short window of tokens
with and without the new ones; the difference is what they add, spaces included.
"""

import codecs
import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import decoders

from pagetier.handler.config import EngineConfig
from pagetier.handler.errors import ConfigError, InvalidRequest, ModelError, PromptTooLong
from pagetier.handler.messages import RequestOutput, TokenLogprobs
from pagetier.handler.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Tokens of the prompt that a window decoder looks back on, to see the spaces between.
_PROMPT_WINDOW = 5
# A character has at most four bytes, so at most three tokens of a window can be half of one.
_MAX_HELD_TOKENS = 3
# Text with more characters a token than this is rare; with less, there is nothing to look into.
_USUAL_TOKEN_CHARACTERS = 8
_SLICE_CHARACTERS = 16384
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Any of these may be what a tokenizer is made from. Without one, transformers makes an empty one.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tiktoken.model",
)  # fmt: skip


def check_tokenizer_files(config: EngineConfig) -> None:
    """Raise ``ModelError`` if the tokenizer's folder is there but holds no tokenizer.

    It takes no time, so a start can fail of it before the model is loaded.
    """
    name = config.tokenizer or config.model
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"The folder {name!r} holds no tokenizer; put its tokenizer.json there, or name "
            "another folder or hub id with the setting 'tokenizer'."
        )


class Tokenizer:
    """A fast Hugging Face tokenizer, reduced to what serving needs.

    Attributes:
        eos_token_id: the tokenizer's own end of sequence, or None.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        """Wrap ``tokenizer``, a fast tokenizer of transformers.

        Args:
            tokenizer: the tokenizer; its own settings of truncation and padding are not used.
            chat_template: a Jinja template to use instead of the tokenizer's own.

        Raises:
            ModelError: the tokenizer is not a fast one.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} has no fast version, which serving "
                "needs; add a tokenizer.json to the model."
            )
        self._hf = tokenizer
        # A copy, because truncation and padding are state of the object that transformers sets.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._chat_template = chat_template
        self.eos_token_id: int | None = tokenizer.eos_token_id
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        # Of byte-level tokenizers: what each token is, and what is shown of it.
        self._token_bytes: list[bytes] | None = None
        self._text_bytes: list[bytes] = []
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            self._token_bytes = _byte_level_table(vocabulary)
            self._text_bytes = list(self._token_bytes)
            for token_id, token in self._backend.get_added_tokens_decoder().items():
                if token.special:
                    self._text_bytes[token_id] = b""

    @classmethod
    def load(cls, config: EngineConfig) -> "Tokenizer":
        """Read the tokenizer that ``config`` names, and its chat template.

        Raises:
            ConfigError: the chat template's file cannot be read.
            ModelError: there is no tokenizer, or not a fast one.
        """
        from transformers import AutoTokenizer

        check_tokenizer_files(config)
        name = config.tokenizer or config.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=config.trust_remote_code
            )
        except Exception as exc:
            # transformers raises many kinds of exceptions here, most with pages of text.
            logger.debug("AutoTokenizer.from_pretrained failed", exc_info=True)
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            if reason.endswith(":"):  # a list follows
                reason = "none of its files can be used"
            raise ModelError(
                f"The tokenizer of {name!r} cannot be read: {reason.rstrip('.')}."
            ) from exc
        template = None
        if config.chat_template is not None:
            try:
                template = Path(config.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as exc:
                raise ConfigError(
                    f"The chat template {config.chat_template!r} cannot be read: {exc}.",
                    param="chat_template",
                ) from exc
        return cls(tokenizer, chat_template=template)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: what to encode.
            add_special_tokens: put around it what the model expects, such as a first token.
            max_tokens: a text that has far more tokens than this is not encoded to its end.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, so it is not Unicode text.
            PromptTooLong: it has far more than ``max_tokens`` tokens; a little more is not checked.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "The prompt is not valid Unicode text: it holds half of a surrogate pair.",
                param="prompt",
            ) from None
        if max_tokens is not None and len(text) > _USUAL_TOKEN_CHARACTERS * max_tokens:
            self._refuse_if_far_too_long(text, max_tokens)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _refuse_if_far_too_long(self, text: str, max_tokens: int) -> None:
        """Encode in slices until it is clear, since a huge text would take seconds as a whole."""
        num_tokens = 0
        for start in range(0, len(text), _SLICE_CHARACTERS):
            piece = text[start : start + _SLICE_CHARACTERS]
            num_tokens += len(self._backend.encode(piece, add_special_tokens=False).ids)
            # Each cut may have made a token or two more, so "a little more" proves nothing.
            if num_tokens > 1.25 * max_tokens:
                about = num_tokens * len(text) // (start + len(piece))
                raise PromptTooLong(
                    f"The prompt has about {about} tokens, but this model takes at most "
                    f"{max_tokens}; shorten the prompt.",
                    param="prompt",
                )

    @property
    def tool_template(self) -> str:
        """The chat template that is used where there are tools; empty if there is none."""
        template = self._chat_template or self._hf.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return str(template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as one text that ends where the assistant's answer begins.

        Without ``add_generation_prompt`` it ends with the last message. ``tools`` are put where the
        template wants them, in OpenAI's form.

        Raises:
            InvalidRequest: there is no chat template, or it refuses these messages.
        """
        if self._chat_template is None and not self._hf.chat_template:
            raise InvalidRequest(
                "This model has no chat template; use v1/completions, or name a template with the "
                "setting 'chat_template'.",
                param="messages",
            )
        try:
            text = self._hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=None if tools is None else [dict(t) for t in tools],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as exc:
            # A template is a program that may fail in any way, mostly for what it was given.
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0][:200].rstrip(".")
            raise InvalidRequest(
                f"The chat template refuses these messages: {reason}.", param="messages"
            ) from exc
        return str(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``, as a whole."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of tokens that stand for no text, such as the end of a sequence, by their names."""
        added = sorted(self._backend.get_added_tokens_decoder().items())
        return {token.content: token_id for token_id, token in added if token.special}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that one token stands for; special tokens as they are written."""
        if self._token_bytes is not None:
            in_table = 0 <= token_id < len(self._token_bytes)
            return self._token_bytes[token_id] if in_table else b""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        # Sentencepiece writes a space as a low line of its own; a lone token loses its space when
        # decoded, since it stands at the start of the text.
        return str(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def with_bad_word_tokens(self, params: SamplingParams) -> SamplingParams:
        """``params`` with token ids in the place of texts among ``bad_words``.

        A word has other tokens after a space than at the start of a text, so it stands for both,
        whether it is given with a space in front or without.
        """
        if not any(isinstance(word, str) for word in params.bad_words or ()):
            return params
        words: list[tuple[int, ...]] = []
        for word in params.bad_words or ():
            if not isinstance(word, str):
                words.append(tuple(word))
                continue
            bare = word.lstrip(" ")
            texts = (bare, f" {bare}")
            variants = [tuple(self.encode(t, add_special_tokens=False)) for t in texts]
            words += [ids for ids in dict.fromkeys(variants) if ids]
        return msgspec.structs.replace(params, bad_words=words)

    def decoder(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> "IncrementalDecoder":
        """A decoder of one output, which follows ``prompt_token_ids``."""
        if self._token_bytes is not None:
            return _ByteLevelDecoder(self._text_bytes if skip_special_tokens else self._token_bytes)
        return _WindowDecoder(self, prompt_token_ids, skip_special_tokens=skip_special_tokens)


class IncrementalDecoder(Protocol):
    """Turns tokens into text as they come; special tokens have none, unless they are wanted."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` add; half a character is held back."""
        ...

    def finish(self) -> str:
        """What was held back; nothing may be added afterwards."""
        ...


class _ByteLevelDecoder:
    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._half = b""  # the first bytes of a character

    def add(self, token_ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = self._half + b"".join([table[t] for t in token_ids])
        except IndexError:  # a model's vocabulary may be larger than its tokenizer's
            data = self._half + b"".join([table[t] for t in token_ids if t < len(table)])
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._half = data[num_used:]
        return text

    def finish(self) -> str:
        half, self._half = self._half, b""
        return half.decode(errors="replace")


class _WindowDecoder:
    """Shows what new tokens add to a window: ``ids[start:shown]`` is shown, the rest is not yet."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._ids = list(prompt_token_ids[-_PROMPT_WINDOW:])
        self._num_shown = len(self._ids)

    def add(self, token_ids: Sequence[int]) -> str:
        return "".join([self._add_one(t) for t in token_ids])

    def _add_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        held = text.endswith(_REPLACEMENT) and len(self._ids) - self._num_shown <= _MAX_HELD_TOKENS
        if held or not text:
            # A token without text (special, say) stays in the window, but not forever.
            if len(self._ids) > 4 * _PROMPT_WINDOW and not held:
                self._slide()
            return ""
        self._slide()
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._ids[: self._num_shown])
        return self._decode(self._ids)[len(shown) :]

    def _slide(self) -> None:
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)

    def finish(self) -> str:
        text = self._new_text() if len(self._ids) > self._num_shown else ""
        self._slide()
        return text


def _byte_level_table(vocabulary: Mapping[str, int]) -> list[bytes]:
    """Bytes of each token of a byte-level vocabulary, by token id.

    Source: ``bytes_to_unicode`` of openai/gpt-2, ``src/encoder.py``: printable Latin-1 characters
    stand for themselves, the other bytes for the characters from 256 up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        try:
            table[token_id] = bytes([byte_of[char] for char in token])
        except KeyError:  # an added token, written as it is
            table[token_id] = token.encode()
    return table


# --- stop strings ----------------------------------------------------------------------------


class _StopString:
    """One stop string, matched character by character (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # borders[i]: length of the longest proper prefix of text[:i] that also ends it.
        self._borders = [0, 0]
        length = 0
        for char in text[1:]:
            while length and char != text[length]:
                length = self._borders[length]
            length += char == text[length]
            self._borders.append(length)

    def add(self, char: str) -> bool:
        """Take the next character; whether it completes the stop string."""
        length = self.num_matched
        while length and char != self.text[length]:
            length = self._borders[length]
        length += char == self.text[length]
        is_complete = length == len(self.text)
        # A complete one may be passed over; the next may begin inside it.
        self.num_matched = self._borders[length] if is_complete else length
        return is_complete


class StopChecker:
    """Holds text back while it may become a stop string, and finds the first that ends.

    Which stop string is found does not depend on how the text is divided into pieces: it is the
    one that is complete first, and of several complete at once the longest.
    """

    def __init__(self, stop: Sequence[str], *, shows_found: bool = False) -> None:
        """Look for the non-empty texts ``stop``; ``shows_found``: what is found is shown too."""
        self._stops = [_StopString(s) for s in stop]
        self._shows_found = shows_found
        self._held = ""
        self.found: str | None = None

    def add(self, text: str, *, may_stop: bool = True) -> str:
        """The text that can be shown now; none after ``found`` is set.

        Args:
            text: what has come.
            may_stop: False passes over a stop string that is complete in ``text``, and shows it.
        """
        buffer = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            complete = [stop.text for stop in self._stops if stop.add(char)]
            if complete and may_stop:
                self.found = max(complete, key=len)
                self._held = ""
                return buffer[: position - (0 if self._shows_found else len(self.found))]
        num_held = max((stop.num_matched for stop in self._stops), default=0)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


# --- one request's output --------------------------------------------------------------------


class OutputDelta(msgspec.Struct, gc=False):
    """What a request gained: text safe to show, and the tokens behind it.

    ``finish_reason`` is None while the request goes on; ``stop_reason`` is then the stop string or
    stop token id that ended it, or None. ``abort``: the engine does not know that the request has
    ended and must be told.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    abort: bool = False


class OutputAssembler:
    """Makes text of what the engine reports of one request, and sees where it ends.

    Attributes:
        num_prompt_tokens, num_output_tokens: tokens counted so far; tokens that the engine made
            after a stop string was complete are not.
        num_cached_tokens, num_preemptions: as the engine last reported them.
        finish_reason: None while the request goes on.
    """

    __slots__ = (
        "_decoder",
        "_min_tokens",
        "_shows_stop",
        "_stops",
        "finish_reason",
        "num_cached_tokens",
        "num_output_tokens",
        "num_preemptions",
        "num_prompt_tokens",
    )

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._decoder = tokenizer.decoder(
            prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._shows_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._stops = (
            StopChecker(params.stop, shows_found=self._shows_stop) if params.stop else None
        )
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.finish_reason: str | None = None

    def add(self, output: RequestOutput) -> OutputDelta:
        """Take a report of the engine; a report after the end changes nothing."""
        if self.finish_reason is not None:
            return OutputDelta("", [], None, self.finish_reason)
        self.num_cached_tokens = output.num_cached_tokens
        self.num_preemptions = output.num_preemptions
        token_ids, logprobs = output.new_token_ids, output.logprobs
        if self._stops is None and output.finish_reason is None:
            self.num_output_tokens += len(token_ids)
            return OutputDelta(self._decoder.add(token_ids), token_ids, logprobs)
        # The token that ended the output is counted, but is no part of its text unless asked for.
        is_stop = output.finish_reason == "stop" and output.has_stop_token
        is_hidden = is_stop and not self._shows_stop
        with_text = token_ids[:-1] if is_hidden else token_ids
        if self._stops is None:
            text = self._decoder.add(with_text)
        else:
            text = ""
            for position, token_id in enumerate(with_text, start=1):
                may_stop = self.num_output_tokens + position > self._min_tokens
                text += self._stops.add(self._decoder.add((token_id,)), may_stop=may_stop)
                if self._stops.found is not None:
                    self.finish_reason = "stop"
                    self.num_output_tokens += position
                    return OutputDelta(
                        text,
                        token_ids[:position],
                        logprobs and logprobs[:position],
                        finish_reason="stop",
                        stop_reason=self._stops.found,
                        abort=output.finish_reason is None,
                    )
        self.num_output_tokens += len(token_ids)
        self.finish_reason = output.finish_reason
        if output.finish_reason is None:
            return OutputDelta(text, token_ids, logprobs)
        tail = self._decoder.finish()
        text += tail if self._stops is None else self._stops.add(tail) + self._stops.finish()
        return OutputDelta(text, token_ids, logprobs, output.finish_reason, output.stop_reason)
