"""The committed model in ``model_store/pydoc-llama``, and the script that trained it."""

import importlib.util
import math
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "model_store" / "pydoc-llama"

# Measured with Python 3.11: 53.7. Other Pythons have other docstrings.
MAX_HELD_OUT_PERPLEXITY = 70.0


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "train_embedded_model", ROOT / "script" / "train_embedded_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def docstrings(script):
    return script.collect_docstrings()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def complete(model, ids: list[int], **settings) -> list[int]:
    prompt = torch.tensor([ids])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return output[0, len(ids) :].tolist()


def chat_ids(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


# --- the model folder ------------------------------------------------------------------------


def test_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10_000_000


def test_architecture_is_a_small_llama_with_grouped_queries(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_load_exactly_in_float32(model):
    parameters = dict(model.named_parameters())
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert names == set(parameters)
        for name in names:
            stored = file.get_tensor(name)
            assert stored.dtype == torch.float16
            assert torch.equal(stored.float(), parameters[name])


def test_special_token_ids_agree_between_model_and_tokenizer(model, tokenizer):
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings


# --- its tokenizer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Return the number of items.",
        "  leading, trailing  and\tinner\n\n  white space \r\n",
        "Grüße, 世界! مرحبا नमस्ते 👩‍👩‍👧 é e\u0301",
        "\x00\x01\x7f\u2028\ufeff\U0010ffff",
        "'s n't  .  ,x 1234567890",
        "",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_round_trips_random_unicode(tokenizer):
    rng = random.Random(0)
    planes = [range(0x20, 0x7F), range(0xA0, 0xD800), range(0xE000, 0x110000)]
    for _ in range(200):
        text = "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randint(1, 40)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_tokenizer_is_fast_and_compresses_english(tokenizer):
    text = "Return a list of the names of all files in the given directory."
    assert tokenizer.is_fast
    assert len(tokenizer(text)["input_ids"]) < len(text) / 3


def test_chat_template_renders_a_conversation(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is dict? "},
        {"role": "assistant", "content": "A mapping."},
        {"role": "user", "content": "And list?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|user|>What is dict?<|assistant|>A mapping.<|eos|>"
        "<|user|>And list?<|assistant|>"
    )


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="Unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_chat_prompt_is_as_trained_on(tokenizer, script):
    ids = chat_ids(tokenizer, "What is dict?")
    document = f"{script.USER}What is dict?{script.ASSISTANT}"
    assert ids == tokenizer(document)["input_ids"]


# --- what it has learnt ----------------------------------------------------------------------


def test_greedy_completions_are_made_of_words(model, tokenizer, docstrings):
    known = {word for d in docstrings for word in re.findall(r"[a-z]+", d.text.lower())}
    prompts = ("Return the", "This module provides", "If the argument", "Create a new", "Raise an")
    words: list[str] = []
    for prompt in prompts:
        ids = complete(model, tokenizer(prompt)["input_ids"], max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        words += re.findall(r"[a-z]+", text.lower())
    # Completions are short sentences, so they are counted together.
    assert len(words) >= 5 * len(prompts), words
    assert sum(word in known for word in words) >= 0.9 * len(words), words
    assert len(set(words)) >= 0.4 * len(words), words


def test_perplexity_on_held_out_docstrings_is_low(model, tokenizer, docstrings, script):
    texts = [docstring.text for docstring in docstrings if docstring.is_held_out]
    assert len(texts) > 50
    assert script.perplexity(model, tokenizer, texts) < MAX_HELD_OUT_PERPLEXITY


@pytest.mark.parametrize(
    "question", ["What does os.path.join do?", "What is threading.Lock?", "Explain sorted."]
)
def test_chat_answer_ends_with_eos(model, tokenizer, question):
    ids = complete(model, chat_ids(tokenizer, question), max_new_tokens=160, do_sample=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer.decode(ids, skip_special_tokens=True).split()) >= 3


def test_logits_stay_finite_at_the_longest_length(model):
    ids = torch.randint(
        6, model.config.vocab_size, (1, 1024), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


# --- the training script ---------------------------------------------------------------------


def test_corpus_is_sorted_and_without_duplicates(docstrings):
    assert docstrings == sorted(docstrings)
    assert len({docstring.text for docstring in docstrings}) == len(docstrings) > 5000
    assert not any(">>>" in docstring.text for docstring in docstrings)


def test_corpus_knows_functions_by_the_names_people_use(docstrings):
    kinds = {docstring.name: docstring.kind for docstring in docstrings}
    assert kinds["os.path.join"] == "function"
    assert kinds["threading.Thread"] == "class"
    assert kinds["json"] == "module"
    assert kinds["len"] == "function"


def test_unwrapped_joins_wrapped_prose_and_keeps_lists(script):
    long = "A sentence that is long enough to have been broken by"
    text = f"{long}\nits author.\n\nshort\nlist\n    {long}\n    hand.\n{long}\n- an item"
    assert script.unwrapped(text) == (
        f"{long} its author.\n\nshort\nlist\n    {long} hand.\n{long}\n- an item"
    )


def test_docstrings_below_finds_conditional_and_nested_definitions(script):
    source = '''
"""Module."""
if True:
    class C:
        """Class."""
        def f(self):
            """Method."""
'''
    found = script._docstrings_below(script.ast.parse(source), "m")
    assert [(d.name, d.kind, d.text) for d in found] == [
        ("m", "module", "Module."),
        ("m.C", "class", "Class."),
        ("m.C.f", "function", "Method."),
    ]


def test_documents_ask_for_public_names_only(script):
    public = script.Docstring("os.path.join", "function", "Join paths.\nAll of them.\n\nMore.")
    private = script.Docstring("os._exists", "function", "Whether a name is defined.")
    made = script.documents([public, private], random.Random(0))
    assert public.text in made
    assert private.text in made
    (chat,) = set(made) - {public.text, private.text}
    assert re.fullmatch(r"<\|user\|>.*join.*[?.]<\|assistant\|>Join paths\. All of them\.", chat)


def test_learning_rate_warms_up_then_falls(script):
    rates = [script.learning_rate(progress, 1.0) for progress in (0.0, 0.03, 0.5, 1.0)]
    assert 0 < rates[0] < 0.1
    assert rates[1] == pytest.approx(1.0)
    assert rates[3] == pytest.approx(0.02)
    assert rates[3] < rates[2] < rates[1]


def test_orthogonal_brings_singular_values_near_one(script):
    x = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(script.orthogonal(x))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(script.orthogonal(x.mT), script.orthogonal(x).mT)


def test_training_is_reproducible_and_learns(script, docstrings):
    some = docstrings[:200]

    arguments = shlex.split(
        "--steps=12 --batch-size=2 --length=64 --vocab-size=400 --hidden-size=32 "
        "--intermediate-size=64 --layers=1 --heads=2 --kv-heads=1"
    )
    args = script.parse_arguments(arguments)
    first, _, loss = script.build(some, args)
    second, _, _ = script.build(some, args)
    assert loss < math.log(args.vocab_size)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
