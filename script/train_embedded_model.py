#!/usr/bin/env python3
"""Train ``model_store/pydoc-llama``, the small model that the demo and the tests serve.

Owns the whole way from nothing to a model folder: the corpus (the docstrings of Python's
standard library, as plain documents and as questions with answers), the byte-level BPE tokenizer,
the Llama-architecture model, and its training. Knows nothing of pagetier: what it writes is an
ordinary Hugging Face folder.

The same Python, seed and ``--steps`` give the same corpus, tokenizer and batches, so weights that
differ only as far as the machine's floating-point kernels do; ``--minutes`` ends by the clock
instead. With the default settings it takes a quarter of an hour on two cores.

    .venv/bin/python script/train_embedded_model.py --out /tmp/pydoc-llama
"""

import argparse
import ast
import hashlib
import inspect
import math
import random
import sysconfig
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)

FOLDER = Path(__file__).parent.parent / "model_store" / "pydoc-llama"

# A system message is rendered but was never trained on: it is legal, and changes little.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' ~ message.role ~ ': use system, user or assistant.') }}
    {%- endif %}
    {{- '<|' ~ message.role ~ '|>' ~ message.content | trim }}
    {%- if message.role == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""

# Written in C, so without source to parse; what they say is what people ask about first.
COMPILED_MODULES = ("builtins", "itertools", "math", "sys", "time")

# Installed packages, tests, and two applications whose inner notes would be a seventh of it all.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
)

# Pure Python twins of compiled modules, and the names that people know them by.
PUBLIC_MODULES = {
    "posixpath": "os.path",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}

# One docstring in this many is kept out of training, chosen by its text alone.
HELD_OUT_ONE_IN = 50

QUESTIONS = {
    "function": ("What does {name} do?", "What does {name} do?", "Explain {name}."),
    "class": ("What is {name}?", "What is {name}?", "What does {name} do?", "Explain {name}."),
    "module": ("What is {name}?", "What is the {name} module?", "What does {name} do?"),
}


# --- corpus ----------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Docstring:
    """A docstring, stripped of its indentation, and the dotted name of what it documents.

    ``kind`` is ``function``, ``class`` or ``module``.
    """

    name: str
    kind: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept out of training; the same text answers the same in every Python."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0

    @property
    def first_paragraph(self) -> str:
        """The text up to its first empty line, on one line."""
        return " ".join(self.text.split("\n\n", 1)[0].split())


def collect_docstrings() -> list[Docstring]:
    """Return the docstrings of this Python's standard library, sorted, each text once."""
    root = Path(sysconfig.get_path("stdlib"))
    by_text: dict[str, Docstring] = {}
    for found in sorted([*_source_docstrings(root), *_compiled_docstrings()]):
        # Interactive examples are mostly numbers and prompts: the model is to learn English.
        paragraphs = [part for part in found.text.split("\n\n") if ">>>" not in part]
        text = unwrapped("\n\n".join(paragraphs)).strip()
        if len(text) >= 20:
            by_text.setdefault(text, replace(found, text=text))
    return sorted(by_text.values())


def unwrapped(text: str) -> str:
    """Return ``text`` with lines joined that were only broken to keep them short.

    Where a line was broken says nothing about the language, and is hard to learn.
    """
    lines: list[str] = []
    last = ""
    for line in text.split("\n"):
        same_indent = len(line) - len(line.lstrip()) == len(last) - len(last.lstrip())
        if same_indent and len(last) >= 50 and line.lstrip()[:1] not in ("", "-", "*", "+", ":"):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
        last = line
    return "\n".join(lines)


def _source_docstrings(root: Path) -> Iterator[Docstring]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # Build leftovers (config-3.11-x86_64-linux-gnu) and such cannot be imported by name.
        if SKIPPED_FOLDERS & set(parts) or not all(part.isidentifier() for part in parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        module = PUBLIC_MODULES.get(module, module)
        yield from _docstrings_below(ast.parse(path.read_bytes()), module)


def _docstrings_below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Docstring]:
    kinds = {ast.Module: "module", ast.ClassDef: "class"}
    text = ast.get_docstring(node)
    if text:
        yield Docstring(name, kinds.get(type(node), "function"), text)
    # Definitions inside `if` and `try` count as those of the scope around them.
    below = list(ast.iter_child_nodes(node))
    while below:
        child = below.pop()
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}")
        else:
            below += ast.iter_child_nodes(child)


def _compiled_docstrings() -> Iterator[Docstring]:
    for module_name in COMPILED_MODULES:
        module = __import__(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        yield from _documented(module, module_name, "module")
        for name, value in sorted(vars(module).items()):
            if name.startswith("_"):
                continue
            if isinstance(value, type):
                yield from _documented(value, prefix + name, "class")
                for attribute, member in sorted(vars(value).items()):
                    if not attribute.startswith("_") and callable(member):
                        yield from _documented(member, f"{prefix}{name}.{attribute}", "function")
            elif isinstance(value, types.BuiltinFunctionType):
                yield from _documented(value, prefix + name, "function")


def _documented(thing: object, name: str, kind: str) -> Iterator[Docstring]:
    text = inspect.getdoc(thing)
    if text:
        yield Docstring(name, kind, text)


def documents(docstrings: list[Docstring], rng: random.Random) -> list[str]:
    """Return documents in random order: each docstring as it is, the public ones as answers too.

    The names of what a docstring documents, and how it is asked for, are drawn from ``rng``, so
    another call words the questions anew. Documents hold no begin or end token; chat documents
    hold ``<|user|>`` and ``<|assistant|>`` as the chat template renders them.
    """
    result = [docstring.text for docstring in docstrings]
    for docstring in docstrings:
        parts = docstring.name.split(".")
        if any(part.startswith("_") for part in parts):
            continue
        # `os.path.join` is asked for as `path.join` and `join` too.
        start = rng.choice([0, 0, max(0, len(parts) - 2), len(parts) - 1])
        question = rng.choice(QUESTIONS[docstring.kind]).format(name=".".join(parts[start:]))
        result.append(f"{USER}{question}{ASSISTANT}{docstring.first_paragraph}")
    rng.shuffle(result)
    return result


# --- tokenizer -------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocab_size`` tokens that puts ``<|bos|>`` in front.

    Any text survives encoding and decoding, since all 256 bytes are tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- training --------------------------------------------------------------------------------


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """Return the architecture that ``args`` describes, token ids as the tokenizer has them."""
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def batches(
    docstrings: list[Docstring],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    length: int,
    rng: random.Random,
) -> Iterator[torch.Tensor]:
    """Yield ``(batch_size, length)`` int64 token ids for ever, one epoch's documents after another.

    Documents are packed end to end, each between ``<|bos|>`` and ``<|eos|>``, and cut anywhere.
    """
    stream: list[int] = []
    size = batch_size * length
    while True:
        encoded = tokenizer(documents(docstrings, rng), verbose=False)
        for ids in encoded["input_ids"]:
            stream += ids
            stream.append(tokenizer.eos_token_id)
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(batch_size, length)
            del stream[:size]


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate at ``progress`` in [0, 1]: 3 % linear warm-up, then cosine down to 2 %."""
    if progress < 0.03:
        return peak * max(progress, 0.001) / 0.03
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (https://kellerjordan.github.io/posts/muon/).

    Takes 2-D float32 parameters. Unlike ``torch.optim.Muon`` it computes in float32, since most
    CPUs are slow in bfloat16, and for all matrices of a shape at once.
    """

    def __init__(self, params: list[torch.nn.Parameter], weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter once; takes no closure."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
                state = self.state[parameters[0]]
                average = state.setdefault("average", torch.zeros_like(gradient))
                average.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(average, group["momentum"]))
                # The root mean square of such an update is that of AdamW's, about 0.2.
                scale = 0.2 * max(shape) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(change, alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return ``(n, rows, columns)`` matrices near ``x`` with all singular values near 1.

    Five steps of the quintic Newton-Schulz iteration, with the coefficients of Muon's authors.
    """
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


def train(model: LlamaForCausalLM, data: Iterator[torch.Tensor], args: argparse.Namespace) -> float:
    """Train ``model`` in place and return the last smoothed loss, in nats per token."""
    # Muon learns from so few tokens about twice as fast as AdamW does; it is made for the hidden
    # matrices alone. Scaled as below, both take steps of the same size at the same rate.
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()]
    others += [p for p in model.model.layers.parameters() if p.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    model.train()
    start, step, smoothed = time.monotonic(), 0, math.nan
    bar = tqdm(total=100, smoothing=0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = minutes / args.minutes if args.minutes else step / args.steps
        if progress >= 1:
            break
        rate = learning_rate(progress, args.learning_rate)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        ids = next(data)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        smoothed = loss.item() if step == 1 else 0.95 * smoothed + 0.05 * loss.item()
        bar.set_postfix_str(f"step {step}, loss {smoothed:.3f}", refresh=False)
        bar.update(100 * progress - bar.n)
        if step % 100 == 0:
            tqdm.write(f"step {step}: loss {smoothed:.3f}, learning rate {rate:.1e}")
    bar.close()
    return smoothed


def build(
    docstrings: list[Docstring], args: argparse.Namespace
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """Train tokenizer and model from nothing; return both and the last smoothed loss, in nats."""
    torch.manual_seed(args.seed)
    texts = [docstring.text for docstring in docstrings]
    tokenizer = train_tokenizer(texts, args.vocab_size, args.max_length)
    model = LlamaForCausalLM(model_config(args))
    rng = random.Random(args.seed)
    data = batches(docstrings, tokenizer, args.batch_size, args.length, rng)
    return model, tokenizer, train(model, data, args)


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Return the perplexity per token over ``texts``, each a document of its own, its end counted.

    Texts longer than the model's positions are cut.
    """
    model.eval()
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        batch = torch.tensor([ids[: model.config.max_position_embeddings]])
        total += model(input_ids=batch, labels=batch).loss.item() * (batch.shape[1] - 1)
        count += batch.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder: weights in float16, tokenizer, and their configurations."""
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's settings; the defaults are the ones of the committed model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train this long instead")
    length.add_argument("--steps", type=int, default=1200, help="train this many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024, help="positions of the model")
    return parser.parse_args(argv)


def main() -> None:
    """Build the corpus, train tokenizer and model, report held-out perplexity, write the folder."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    docstrings = collect_docstrings()
    held_out = [docstring.text for docstring in docstrings if docstring.is_held_out]
    training = [docstring for docstring in docstrings if not docstring.is_held_out]
    print(f"{len(training)} docstrings to train on, {len(held_out)} held out")
    model, tokenizer, loss = build(training, args)
    print(
        f"{model.num_parameters():,} parameters, training loss {loss:.3f}, "
        f"held-out perplexity {perplexity(model, tokenizer, held_out):.1f}"
    )
    save(model, tokenizer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
