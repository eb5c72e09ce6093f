"""Output keeps to its grammar, whatever the model says, and costs nobody else anything."""

import contextlib
import json
import pathlib
import random
import re
import threading
import time

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.fake_engine import FakeEngine, expected_tokens
from support.tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

from pagetier import LLM, SamplingParams, StructuredOutputsParams
from pagetier.handler.errors import EngineError, InvalidRequest
from pagetier.handler.messages import AddRequest
from pagetier.handler.openai_api import OpenAIApi
from pagetier.handler.sampling_params import (
    MAX_CHOICES,
    MAX_GRAMMAR_CHARACTERS,
    MAX_REGEX_CHARACTERS,
)
from pagetier.handler.structured_output import Grammars
from pagetier.handler.tokenizer import Tokenizer
from pagetier.kernels import allow_tokens

MAKERS = {"byte level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}
EOS = {"byte level": 0, "sentencepiece": 2}
# More than the tokenizers have, as models do whose vocabulary is padded.
VOCABULARY = 470

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "tags": {"type": "array", "items": {"enum": ["the", "fox", "日本"]}, "maxItems": 3},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{2,4}-(\d{1,3}|the fox)/[a-zà-ü]{1,2}!"
CHOICE = ["the fox", "the", "Größe 🙂", 'a "quoted"\nline', "<|user|>"]
GBNF = 'root ::= "(" item ("," item){0,3} ")"\nitem ::= [0-9] | "fox"'
LARK = "start: (WORD | NUMBER)~1..3\nWORD: /the|fox/\nNUMBER: /[0-9]{2}/"


def is_valid_json(text: str) -> bool:
    value = json.loads(text)
    return (
        isinstance(value, dict)
        and value.keys() <= SCHEMA["properties"].keys()
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(value["size"]) is int
        and -20 <= value["size"] <= 300
        and len(value.get("tags", [])) <= 3
        and set(value.get("tags", [])) <= {"the", "fox", "日本"}
    )


def is_valid_regex(text: str) -> bool:
    # As for us, \d is a digit from 0 to 9 alone.
    return re.fullmatch(REGEX.replace(r"\d", "[0-9]"), text) is not None


CASES = {
    "json": ({"json": SCHEMA}, is_valid_json),
    "json text": ({"json": json.dumps(SCHEMA)}, is_valid_json),
    "regex": ({"regex": REGEX}, is_valid_regex),
    "choice": ({"choice": CHOICE}, CHOICE.__contains__),
    "gbnf": ({"grammar": GBNF}, re.compile(r"\(([0-9]|fox)(,([0-9]|fox)){0,3}\)").fullmatch),
    "lark": ({"grammar": LARK}, re.compile(r"(the|fox|[0-9]{2}){1,3}").fullmatch),
}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return Tokenizer(MAKERS[kind]())


@pytest.fixture(scope="module")
def grammars(kind, tokenizer):
    grammars = Grammars(lambda: tokenizer, vocab_size=VOCABULARY, eos_token_ids=(EOS[kind],))
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def some_grammars():
    tokenizer = Tokenizer(byte_level_tokenizer())
    grammars = Grammars(lambda: tokenizer, vocab_size=VOCABULARY, eos_token_ids=(0,))
    yield grammars
    grammars.close()


def allowed(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def write(constraint, rng: random.Random, max_tokens: int = 1000) -> list[int]:
    """Tokens of the worst model there is: any that is allowed, one as likely as the other."""
    token_ids: list[int] = []
    constraint.wait()
    while not constraint.is_complete and len(token_ids) < max_tokens:
        token_ids.append(rng.choice(allowed(constraint.mask)))
        constraint.accept(token_ids[-1])
        constraint.wait()
    return token_ids[:-1] if constraint.has_eos else token_ids


# --- grammars --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_any_choice_among_allowed_tokens_keeps_to_the_grammar(grammars, tokenizer, case):
    params, is_valid = CASES[case]
    texts = set()
    for seed in range(25):
        constraint = grammars.constrain(StructuredOutputsParams(**params))
        data = b"".join(map(tokenizer.token_bytes, write(constraint, random.Random(seed))))
        assert constraint.is_complete
        assert is_valid(data.decode()), data
        texts.add(data)
    assert len(texts) > 3


def test_any_json_object_is_one(grammars, tokenizer):
    params = StructuredOutputsParams(json_object=True)
    num_complete = 0
    for seed in range(40):
        constraint = grammars.constrain(params)
        data = b"".join(map(tokenizer.token_bytes, write(constraint, random.Random(seed), 60)))
        if constraint.is_complete:
            assert isinstance(json.loads(data), dict)
            num_complete += 1
    assert num_complete


def test_special_tokens_are_never_allowed_but_the_end_where_the_grammar_may_end(grammars, kind):
    tokenizer = Tokenizer(MAKERS[kind]())
    special = set(tokenizer.special_tokens.values())
    ends = []
    for params in ({"regex": ".*"}, {"choice": ["<|user|>", "<s>", "</s>"]}, {"regex": ".{5}"}):
        constraint = grammars.constrain(StructuredOutputsParams(**params))
        constraint.wait()
        tokens = set(allowed(constraint.mask))
        assert tokens & special <= {EOS[kind]}
        assert max(tokens) < len(MAKERS[kind]())
        ends.append(EOS[kind] in tokens)
    assert ends == [True, False, False]


def test_end_of_sequence_completes_and_is_no_part_of_the_output(some_grammars):
    constraint = some_grammars.constrain(StructuredOutputsParams(regex="a*"))
    constraint.wait()
    constraint.accept(0)
    assert (constraint.is_complete, constraint.has_eos) == (True, True)


def test_spaces_in_json_are_bounded(some_grammars):
    """Else a model that has lost its way writes them for ever."""
    tokenizer = Tokenizer(byte_level_tokenizer())
    constraint = some_grammars.constrain(StructuredOutputsParams(json={"type": "object"}))
    constraint.wait()
    num_spaces = 0
    constraint.accept(next(t for t in allowed(constraint.mask) if tokenizer.token_bytes(t) == b"{"))
    while True:
        constraint.wait()
        blank = [t for t in allowed(constraint.mask) if tokenizer.token_bytes(t).isspace()]
        if not blank:
            break
        constraint.accept(blank[0])
        num_spaces += 1
        assert num_spaces <= 40


def test_fork_goes_on_by_itself(some_grammars):
    tokenizer = Tokenizer(byte_level_tokenizer())
    parent = some_grammars.constrain(StructuredOutputsParams(regex="ab*c"))
    a, b, c = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "abc")
    parent.wait()
    parent.accept(a)
    child = parent.fork()
    child.accept(c)
    assert child.is_complete
    parent.wait()
    assert not parent.is_complete
    parent.accept(b)
    parent.wait()
    parent.accept(c)
    assert parent.is_complete


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"regex": "("}, "The regex cannot be followed: unclosed group."),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"json": {"type": "foo"}}, "The JSON schema cannot be followed: Invalid type: foo."),
        ({"json": {"type": "object", "not": {}}}, "not"),
        ({"json": {"$ref": "http://example.org/schema"}}, "schema"),
        ({"json": {"$ref": "#"}}, "schema"),
        ({"json": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "schema"),
        ({"grammar": "root ::= root"}, "The grammar cannot be followed: it allows no output."),
        ({"grammar": "start: foo"}, 'The grammar cannot be followed: unknown name: "foo".'),
        ({"grammar": "root ::= foo"}, "grammar"),
        ({"grammar": "start: start"}, "grammar"),
        ({"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'}, "%llguidance"),
        ({"regex": "\ud800"}, "not valid Unicode"),
    ],
    ids=str,
)
def test_grammar_that_cannot_be_followed_is_refused_in_one_sentence(some_grammars, params, says):
    with pytest.raises(InvalidRequest) as caught:
        some_grammars.check(StructuredOutputsParams(**params))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    # A mistake is remembered, not made good.
    with pytest.raises(InvalidRequest):
        some_grammars.check(StructuredOutputsParams(**params))


NESTED = {"type": "string"}
for _ in range(400):
    NESTED = {"type": "array", "items": NESTED}
HOSTILE = {
    "repeated": {"regex": "(a{1000}){1000}"},
    "alternatives": {"regex": "((((a{1,100}b?){1,100}c?){1,100}){1,100})"},
    "states": {"regex": "(.*a.{300})z"},
    "parentheses": {"regex": "(" * 4000 + "a" + ")" * 4000},
    "deep lark": {"grammar": "start: " + "(" * 10000 + '"a"' + ")" * 10000},
    "deep gbnf": {"grammar": "root ::= " + "(" * 10000 + '"a"' + ")" * 10000},
    "long lark": {"grammar": "start: " + " | ".join(f'"{i}" start' for i in range(3000))},
    "lark product": {"grammar": 'start: ((("a" "b"){1000}){1000}){1000}'},
    "endless": {"grammar": 'start: a*\na: b*\nb: ""'},
    "blank lines": {"grammar": 'root ::= "a"\n' + "\n" * 65000},
    "chain": {"grammar": "root ::= r0\n" + "".join(f"r{i}::=r{i + 1}\n" for i in range(4000))},
    "nested": {"json": NESTED},
    "many": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}},
    "multiple": {"json": {"type": "integer", "multipleOf": 999983, "minimum": 1}},
    "product": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(8)]}
                for i in range(8)
            ]
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammar_is_followed_or_refused_in_time(some_grammars, name):
    start = time.monotonic()
    with contextlib.suppress(InvalidRequest):
        constraint = some_grammars.constrain(StructuredOutputsParams(**HOSTILE[name]))
        write(constraint, random.Random(1), max_tokens=20)
    assert time.monotonic() - start < 5.0


def test_limits_are_held_before_anything_is_compiled():
    for params in (
        {},
        {"regex": "a", "choice": ["a"]},
        {"regex": "a" * (MAX_REGEX_CHARACTERS + 1)},
        {"grammar": "a" * (MAX_GRAMMAR_CHARACTERS + 1)},
        {"json": {"description": "a" * MAX_GRAMMAR_CHARACTERS}},
        {"json": "[]"},
        {"json": "{"},
        {"choice": []},
        {"choice": ["a", ""]},
        {"choice": [str(i) for i in range(MAX_CHOICES + 1)]},
    ):
        with pytest.raises(InvalidRequest):
            StructuredOutputsParams(**params)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=1, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        SamplingParams(
            use_beam_search=True,
            temperature=0,
            structured_outputs=StructuredOutputsParams(regex="a"),
        )


def test_params_travel_as_a_message():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA))
    request = AddRequest("r", [1], params)
    data = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(data, type=AddRequest) == request


def test_same_grammar_is_compiled_once(some_grammars):
    params = StructuredOutputsParams(regex="compiled once")
    first, second = some_grammars.constrain(params), some_grammars.constrain(params)
    assert first._compiling is second._compiling


def test_compiling_has_a_deadline_and_nobody_waits_for_it(monkeypatch):
    go_on = threading.Event()

    def load() -> Tokenizer:
        go_on.wait()
        return Tokenizer(byte_level_tokenizer())

    grammars = Grammars(load, vocab_size=VOCABULARY, eos_token_ids=(0,))
    constraint = grammars.constrain(StructuredOutputsParams(regex="a"))
    try:
        assert not constraint.poll()
        monkeypatch.setattr(constraint, "_deadline", 0.0)
        assert constraint.poll()
        assert "was not compiled within" in constraint.error.message
    finally:
        go_on.set()
        grammars.close()


def test_wait_ends_when_something_has_been_worked_out():
    go_on = threading.Event()

    def load() -> Tokenizer:
        go_on.wait()
        return Tokenizer(byte_level_tokenizer())

    grammars = Grammars(load, vocab_size=VOCABULARY, eos_token_ids=(0,))
    grammars.begin_step()
    assert not grammars.wait(10.0)  # nothing to wait for
    constraint = grammars.constrain(StructuredOutputsParams(regex="a"))
    assert grammars.wait(0.001)
    assert not constraint.poll()
    go_on.set()
    assert grammars.wait(60.0)
    assert constraint.poll()
    grammars.close()


def test_tokenizer_is_read_once_and_early_if_wanted():
    loads = []

    def load() -> Tokenizer:
        loads.append(1)
        return Tokenizer(byte_level_tokenizer())

    grammars = Grammars(load, vocab_size=VOCABULARY, eos_token_ids=(0,))
    grammars.prepare()
    assert loads == [1]
    grammars.check(StructuredOutputsParams(regex="a"))
    grammars.check(StructuredOutputsParams(regex="b"))
    assert loads == [1]
    grammars.close()


def test_model_without_end_of_sequence_is_prepared_and_refuses_grammars():
    class Endless(Tokenizer):
        def __init__(self):
            super().__init__(byte_level_tokenizer())
            self.eos_token_id = None

    grammars = Grammars(Endless, vocab_size=VOCABULARY, eos_token_ids=())
    grammars.prepare()
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        grammars.check(StructuredOutputsParams(regex="a"))
    grammars.close()


def test_broken_tokenizer_fails_the_request_alone():
    def load() -> Tokenizer:
        raise ValueError("no such file: /secret/place")

    grammars = Grammars(load, vocab_size=VOCABULARY, eos_token_ids=(0,))
    grammars.prepare()
    with pytest.raises(EngineError) as caught:
        grammars.check(StructuredOutputsParams(regex="a"))
    assert "secret" not in caught.value.message
    grammars.close()


def test_masks_forbid_all_other_tokens():
    rng = np.random.default_rng(0)
    logits = torch.randn(150, 70)
    expected = logits.clone()
    rows = torch.from_numpy(rng.permutation(150)[:130])
    is_allowed = rng.random((130, 96)) < 0.3
    masks = np.packbits(is_allowed, axis=1, bitorder="little").view(np.int32)
    expected[rows] = torch.where(torch.from_numpy(is_allowed[:, :70]), expected[rows], -torch.inf)
    allow_tokens(logits, rows, torch.from_numpy(masks))
    assert torch.equal(logits, expected)


# --- scheduling ------------------------------------------------------------------------------


class ScriptedConstraint:
    """Settled after so many polls each time; complete, or broken, after so many tokens."""

    def __init__(self, rng, *, max_polls, num_tokens, fails_at=None):
        self.rng, self.max_polls = rng, max_polls
        self.num_left, self.fails_at = num_tokens, fails_at
        self.polls_left = rng.randint(0, max_polls)
        self.mask, self.error = b"", None
        self.is_complete = self.has_eos = False
        self.accepted = []
        self.is_settled = False

    def poll(self):
        self.polls_left -= 1
        self.is_settled = self.polls_left < 0
        if self.is_settled and len(self.accepted) == self.fails_at:
            self.error = InvalidRequest("The grammar is wrong.")
        return self.is_settled

    def accept(self, token_id):
        assert self.is_settled, "a token was chosen without a mask"
        assert not self.is_complete
        self.accepted.append(token_id)
        self.is_complete = len(self.accepted) == self.num_left
        self.is_settled = False
        self.polls_left = self.rng.randint(0, self.max_polls)

    def fork(self):
        raise AssertionError("there are no groups here")


def add_constrained(engine, request_id, prompt, constraint, max_tokens=20, **fields):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.scheduler.add(AddRequest(request_id, prompt, params, **fields), constraint)
    engine.tokens[request_id] = []


def test_constrained_sequence_runs_every_second_step_and_others_every_step():
    engine = FakeEngine(num_gpu_blocks=40)
    rng = random.Random(0)
    add_constrained(engine, "c", [1, 2], ScriptedConstraint(rng, max_polls=0, num_tokens=10))
    engine.add("free", [3, 4], max_tokens=20)
    while "free" not in engine.finished:
        engine.step()
    # The last of 20 tokens is collected in step 21; there are two steps for each constrained one.
    assert engine.runner.num_launched == 20
    assert "c" in engine.finished
    assert len(engine.tokens["c"]) == 10


def test_slow_grammar_delays_nobody_else():
    engine = FakeEngine(num_gpu_blocks=40, max_num_seqs=2)
    never = ScriptedConstraint(random.Random(0), max_polls=0, num_tokens=1)
    never.polls_left = 10**6
    add_constrained(engine, "slow", [1, 2], never)
    for number in range(30):
        engine.add(f"r{number}", [3, number], max_tokens=3)
    for _ in range(200):
        engine.step()
    assert len(engine.finished) == 30
    never.polls_left = 0
    engine.run()
    assert engine.finished["slow"].finish_reason == "stop"


def test_grammar_is_reported_as_accepted_before_its_request_runs():
    engine = FakeEngine(num_gpu_blocks=4, max_num_seqs=1)
    engine.add("first", [3, 4], max_tokens=10)
    constraint = ScriptedConstraint(random.Random(0), max_polls=0, num_tokens=3)
    add_constrained(engine, "c", [1, 2], constraint)
    outputs = engine.step()
    assert [(o.request_id, o.is_notice) for o in outputs] == [("c", True)]
    engine.run()
    # A grammar that is complete ends the output without a stop token.
    last = engine.finished["c"]
    assert (last.finish_reason, last.has_stop_token) == ("stop", False)


@pytest.mark.parametrize("fails_at", [0, 2])
def test_grammar_that_fails_ends_its_request_alone(fails_at):
    engine = FakeEngine(num_gpu_blocks=40)
    constraint = ScriptedConstraint(random.Random(0), max_polls=0, num_tokens=5, fails_at=fails_at)
    add_constrained(engine, "c", [1, 2], constraint)
    engine.add("free", [3, 4], max_tokens=10)
    engine.run()
    output = engine.finished["c"]
    assert (output.finish_reason, output.error_status) == ("error", 400)
    assert output.error == "The grammar is wrong."
    assert len(engine.tokens["c"]) == fails_at
    assert engine.tokens["free"] == expected_tokens([3, 4], 10, ignore_eos=True)
    assert engine.core.stats()["request_success"] == {"error": 1, "length": 1}


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_drawn_histories_with_constraints_keep_all_invariants(data):
    draw = data.draw
    seed = draw(st.integers(0, 10**6))
    rng = random.Random(seed)
    engine = FakeEngine(
        num_gpu_blocks=draw(st.integers(6, 14)),
        num_cpu_blocks=draw(st.integers(0, 12)),
        seed=seed,
        failure=draw(st.sampled_from([0.0, 0.2])),
        preemption_mode=draw(st.sampled_from(["swap", "recompute", "auto"])),
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_seqs=draw(st.integers(1, 4)),
        max_num_batched_tokens=8,
    )
    expected = {}
    constraints = {}
    for number in range(draw(st.integers(2, 8))):
        request_id, prompt = f"r{number}", [rng.randrange(40) for _ in range(rng.randint(1, 8))]
        priority = rng.randint(0, 2)
        num_tokens = rng.randint(1, 10)
        if rng.random() < 0.6:
            fails_at = rng.randint(0, 10) if rng.random() < 0.2 else None
            constraints[request_id] = ScriptedConstraint(
                rng, max_polls=4, num_tokens=num_tokens, fails_at=fails_at
            )
            add_constrained(
                engine, request_id, prompt, constraints[request_id], 12, priority=priority
            )
        else:
            engine.add(request_id, prompt, max_tokens=num_tokens, priority=priority)
        expected[request_id] = expected_tokens(prompt, num_tokens, ignore_eos=True)
        for _ in range(rng.randint(0, 4)):
            engine.step()
        if rng.random() < 0.1:
            engine.core.abort([request_id])
            del expected[request_id]
    engine.run()
    for request_id, tokens in expected.items():
        constraint = constraints.get(request_id)
        if constraint is not None and constraint.error is not None:
            assert engine.finished[request_id].finish_reason == "error"
            tokens = tokens[: constraint.fails_at]
        assert engine.tokens[request_id] == tokens
        if constraint is not None:
            assert constraint.accepted == tokens


# --- the whole engine ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", folder, vocab_size=VOCABULARY, eos_token_id=0)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def open_llm(folder: pathlib.Path, **changes) -> LLM:
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 32,
        "block_size": 4,
        "swap_space": 0.01,
        "num_gpu_blocks_override": 300,
        **changes,
    }
    return LLM(model=str(folder), **settings)


def params_of(seed: int, fields: dict | None, **changes) -> SamplingParams:
    constraint = None if fields is None else StructuredOutputsParams(**fields)
    settings = {"temperature": 1.0, "seed": seed, "max_tokens": 100, **changes}
    return SamplingParams(structured_outputs=constraint, **settings)


MIXED = [CASES["json"], None, CASES["regex"], CASES["choice"], None, CASES["gbnf"], CASES["lark"]]


def generate(llm: LLM, wishes) -> list[tuple[str, str]]:
    """Text and end of each wish's output, a case or None; those that are whole are checked."""
    free = {"max_tokens": 60, "ignore_eos": True}
    params = [
        params_of(i, None, **free) if wish is None else params_of(i, wish[0])
        for i, wish in enumerate(wishes)
    ]
    outputs = llm.generate([f"the quick {i}" for i in range(len(wishes))], params, use_tqdm=False)
    for wish, output in zip(wishes, outputs, strict=True):
        completion = output.outputs[0]
        if wish is not None and completion.finish_reason == "stop":
            assert wish[1](completion.text), completion.text
    return [(o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_model_keeps_to_all_grammars_and_neighbours_do_not_change(folder, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with open_llm(folder, device=device) as llm:
        free = generate(llm, [None] * len(MIXED))
        mixed = generate(llm, MIXED)
        assert [text for text, wish in zip(free, MIXED, strict=True) if wish is None] == [
            text for text, wish in zip(mixed, MIXED, strict=True) if wish is None
        ]
        reasons = [reason for (_, reason), wish in zip(mixed, MIXED, strict=True) if wish]
        assert reasons.count("stop") >= 4


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_constrained_tokens_do_not_change_under_preemption(folder, mode):
    with open_llm(folder) as llm:
        calm = generate(llm, MIXED * 2)
        assert llm.stats()["num_preemptions"] == 0
    with open_llm(folder, num_gpu_blocks_override=34, preemption_mode=mode) as llm:
        assert generate(llm, MIXED * 2) == calm
        stats = llm.stats()
        assert stats["num_preemptions"] > 0
        assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]


def test_greedy_output_is_the_best_that_the_grammar_allows(folder):
    """Against a search by hand: each token is the most likely one of those that are allowed."""
    with open_llm(folder) as llm:
        fields = {"regex": "[a-z]{12}"}
        params = params_of(0, fields, temperature=0.0, logprobs=20)
        output = llm.generate(["the fox"], params, use_tqdm=False)[0].outputs[0]
        constraint = llm._core._grammars.constrain(StructuredOutputsParams(**fields))
        for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
            constraint.wait()
            tokens = set(allowed(constraint.mask))
            assert token_id in tokens
            better = [
                t
                for t, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
                if value > entry.logprob and t in tokens
            ]
            assert not better
            constraint.accept(token_id)
        assert constraint.is_complete
        assert re.fullmatch("[a-z]{12}", output.text)


def test_several_outputs_and_the_best_of_several_are_whole(folder):
    with open_llm(folder) as llm:
        for changes in ({"n": 3}, {"n": 2, "best_of": 4}):
            params = params_of(1, CASES["choice"][0], **changes)
            outputs = llm.generate(["the fox"], params, use_tqdm=False)[0].outputs
            assert len(outputs) == changes["n"]
            assert all(o.text in CHOICE and o.finish_reason == "stop" for o in outputs)


def test_other_settings_that_leave_nothing_fail_the_request(folder):
    with open_llm(folder) as llm:
        x = llm._tokenizer.encode("x", add_special_tokens=False)
        params = params_of(0, {"choice": ["the"]}, allowed_token_ids=x)
        with pytest.raises(InvalidRequest, match="None of the tokens that the grammar allows"):
            llm.generate(["the"], params, use_tqdm=False)
        assert generate(llm, [CASES["choice"]])[0][1] == "stop"


def test_bad_grammar_is_refused_before_anything_is_generated(folder):
    with open_llm(folder) as llm:
        with pytest.raises(InvalidRequest, match="unclosed group"):
            llm.generate(["a", "b"], [params_of(0, None), params_of(0, {"regex": "("})])
        assert llm.stats()["num_steps"] == 0


def test_model_without_tokenizer_still_serves_the_rest(tmp_path):
    tiny_models.save("llama", tmp_path)
    with open_llm(tmp_path) as llm:
        with pytest.raises(EngineError):
            llm.generate([[5, 6]], params_of(0, {"regex": "a"}), use_tqdm=False)
        output = llm.generate([[5, 6]], params_of(0, None, max_tokens=4), use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 4


# --- the API ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api():
    return OpenAIApi(
        Tokenizer(byte_level_tokenizer()),
        model_name="tiny",
        max_model_len=100,
        vocab_size=VOCABULARY,
        eos_token_ids=(0,),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": json.dumps(SCHEMA)}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": LARK}, {"grammar": LARK}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"regex": "a"}),
    ],
    ids=str,
)
def test_all_names_of_structured_output_mean_the_same(api, fields, expected):
    params = None if expected is None else StructuredOutputsParams(**expected)
    message = {"role": "user", "content": "the"}
    for response in (
        api.completion("r", {"prompt": "the", **fields}),
        api.chat("r", {"messages": [message], **fields}),
    ):
        assert response.requests[0].params.structured_outputs == params


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_json": "["}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_regex": "a" * 10000}, "guided_regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_fields_of_structured_output_are_named(api, fields, param):
    with pytest.raises(InvalidRequest) as caught:
        api.completion("r", {"prompt": "the", "max_tokens": 5, **fields})
    assert caught.value.param == param
