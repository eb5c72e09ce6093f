"""Tiny tokenizers made on the spot: one byte-level, one in the manner of sentencepiece."""

import functools
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import normalizers as norm

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# In the manner of Hermes, with what a test must see of each message.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<tool_call>{...}</tool_call><|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog and returns the list of values",
    "Größe, naïve café, 日本語のテキスト, русский текст, 🙂🙃👩‍🚀 and 中文字符",
    "def f(x):\n    return x + 1\n\n",
] * 4


@functools.cache
def byte_level_tokenizer() -> Any:
    """A byte-level BPE as a transformers fast tokenizer: any text round-trips."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", chat_template=CHAT_TEMPLATE
    )


@functools.cache
def sentencepiece_tokenizer() -> Any:
    """A BPE like Llama 2's: spaces written as U+2581, unknown characters as byte tokens."""
    from transformers import PreTrainedTokenizerFast

    space = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    letters = [*sorted({c for c in _CORPUS[0] if c != " "}), space]
    words = [space + "the", "th", space + "t", "he", "quick", "fo", "fox"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces + letters + words))}
    merges = [("t", "h"), (space, "t"), ("h", "e"), (space + "t", "he"), ("f", "o"), ("fo", "x")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = norm.Sequence([norm.Prepend(space), norm.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
