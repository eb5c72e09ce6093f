"""Sampling settings through the whole engine: transformers' own processors, and preemption."""

import pathlib
import random

import msgspec
import pytest
import torch
from support import tiny_models
from transformers import LogitsProcessor

from pagetier import LLM, SamplingParams
from pagetier.handler.errors import InvalidRequest, ModelError
from pagetier.handler.messages import AddRequest, ToEngine

EMBEDDED_MODEL = pathlib.Path(__file__).parent.parent / "model_store" / "pydoc-llama"
NEW_TOKENS = 16
STOP = 17
MODES = ("swap", "recompute", "auto")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", folder)
    return folder


def open_llm(folder: pathlib.Path, **settings) -> LLM:
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "swap_space": 0.01,
        **settings,
    }
    return LLM(model=str(folder), **settings)


def prompts_of(seed: int, count: int = 7) -> list[list[int]]:
    """Prompts of 1 to 26 tokens, some with common prefixes."""
    rng = random.Random(seed)
    common = [rng.randrange(2, tiny_models.VOCABULARY) for _ in range(20)]
    return [
        common[: rng.choice([0, 16, 20])]
        + [rng.randrange(2, tiny_models.VOCABULARY) for _ in range(rng.randint(1, 6))]
        for _ in range(count)
    ]


class OpenAIPenalties(LogitsProcessor):
    """Presence and frequency penalties of what follows the prompt, one token at a time."""

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[0, self.num_prompt :].tolist()
        scores = scores.clone()
        for token in set(output):
            scores[0, token] -= self.presence + self.frequency * output.count(token)
        return scores


# Settings of ours, and how transformers is asked for the same.
SETTINGS = {
    "repetition": (
        {"repetition_penalty": 1.5},
        lambda prompt: {"repetition_penalty": 1.5},
    ),
    "penalties": (
        {"presence_penalty": 0.8, "frequency_penalty": 1.1},
        lambda prompt: {"logits_processor": [OpenAIPenalties(len(prompt), 0.8, 1.1)]},
    ),
    "rewards": (
        {"presence_penalty": -1.0, "frequency_penalty": -0.5},
        lambda prompt: {"logits_processor": [OpenAIPenalties(len(prompt), -1.0, -0.5)]},
    ),
    "bias": (
        {"logit_bias": {5: 3.0, 8: 3.5, 40: -100.0}},
        lambda prompt: {"sequence_bias": {(5,): 3.0, (8,): 3.5, (40,): -100.0}},
    ),
    "allowed": (
        {"allowed_token_ids": list(range(30, 60))},
        lambda prompt: {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(30, 60))},
    ),
    "min_tokens": (
        {"min_tokens": 9, "stop_token_ids": list(range(1, 120, 3))},
        lambda prompt: {"min_new_tokens": 9, "eos_token_id": list(range(1, 120, 3))},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_those_of_transformers_processors(name, llama):
    ours, theirs = SETTINGS[name]
    model = tiny_models.build("llama")
    prompts = prompts_of(seed=3)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, **ours)
    plain = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    # Beside requests without the setting, and with room for half of them.
    with open_llm(llama, num_gpu_blocks_override=24) as llm:
        outputs = llm.generate(prompts * 2, [params] * 7 + [plain] * 7, use_tqdm=False)
        assert llm.stats()["num_preemptions"] > 0
    tokens = [o.outputs[0].token_ids for o in outputs]
    for settings, got in ((theirs, tokens[:7]), (lambda prompt: {}, tokens[7:])):
        for prompt, ids in zip(prompts, got, strict=True):
            expected = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                **settings(prompt),
            )
            assert ids == expected[0, len(prompt) :].tolist()
    assert tokens[:7] != tokens[7:]


def test_bad_words_never_come_and_change_nothing_else(llama):
    prompts = prompts_of(seed=4)
    plain = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    with open_llm(llama) as llm:
        free = [o.outputs[0].token_ids for o in llm.generate(prompts, plain, use_tqdm=False)]
        # A pair, a triple and a single token that would have come.
        for ids in free:
            words = [ids[2:4], ids[5:8], ids[11:12], [110, 111, 112]]
            params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, bad_words=words)
            (output,) = llm.generate(prompts[free.index(ids)], params, use_tqdm=False)
            got = output.outputs[0].token_ids
            for word in words:
                places = range(len(got) - len(word) + 1)
                assert all(got[i : i + len(word)] != word for i in places)
            first = min(i for i, (a, b) in enumerate(zip(ids, got, strict=True)) if a != b)
            assert any(ids[: first + 1][-len(word) :] == word for word in words)


def mixed_params(count: int, seed: int) -> list[SamplingParams]:
    """Seeded sampling with each rule in some of the requests."""
    rng = random.Random(seed)
    return [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0, 1.4]),
            seed=index,
            max_tokens=NEW_TOKENS + index % 3,
            min_p=rng.choice([0.0, 0.05]),
            top_k=rng.choice([0, 15]),
            repetition_penalty=rng.choice([1.0, 1.4, 0.8]),
            presence_penalty=rng.choice([0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, -0.7, 0.6]),
            logit_bias=rng.choice([None, {4: 4.0, 9: -4.0}]),
            bad_words=rng.choice([None, [[a, b] for a in range(4, 30) for b in (5, 9, 21)]]),
            min_tokens=rng.choice([0, 8]),
            stop_token_ids=[STOP, 40, 41],
            logprobs=rng.choice([None, 2]),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preemption_changes_no_token(llama, mode, enable_prefix_caching):
    """Counts on the device are made anew where a sequence resumes, in whatever row."""
    prompts, params = prompts_of(seed=5, count=12), mixed_params(12, seed=6)
    with open_llm(llama, num_gpu_blocks_override=300, max_num_seqs=12) as llm:
        calm = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] == 0
    with open_llm(
        llama,
        num_gpu_blocks_override=22,
        preemption_mode=mode,
        enable_prefix_caching=enable_prefix_caching,
    ) as llm:
        pressed = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["num_preemptions"] > 3
    assert [o.outputs[0].token_ids for o in calm] == [o.outputs[0].token_ids for o in pressed]
    reasons = [o.outputs[0].finish_reason for o in calm]
    assert {"stop", "length"} == set(reasons)


def test_several_outputs_of_a_prompt_are_each_penalised_by_their_own_tokens(llama):
    settings = {
        "temperature": 1.2,
        "seed": 3,
        "max_tokens": NEW_TOKENS,
        # Negative logits, multiplied by this: no token a second time.
        "allowed_token_ids": list(range(40, 90)),
        "logit_bias": dict.fromkeys(range(40, 90), -100.0),
        "repetition_penalty": 1e6,
        "prompt_logprobs": 1,
    }
    prompts = prompts_of(seed=10, count=4)
    outputs = []
    for num_blocks in (300, 20):
        with open_llm(llama, num_gpu_blocks_override=num_blocks) as llm:
            params = SamplingParams(n=3, **settings)
            outputs.append(llm.generate(prompts, params, use_tqdm=False))
            assert (llm.stats()["num_preemptions"] > 0) == (num_blocks == 20)
    calm, pressed = [[[o.token_ids for o in r.outputs] for r in run] for run in outputs]
    assert calm == pressed
    for prompt, request in zip(prompts, calm, strict=True):
        assert len({tuple(ids) for ids in request}) == 3
        for ids in request:
            assert len({*ids, *prompt}) == len(ids) + len(set(prompt))
            assert set(ids) <= set(range(40, 90))
    model = tiny_models.build("llama")
    for run in outputs:
        for result in run:
            check_prompt_logprobs(model, result.prompt_token_ids, params, result.prompt_logprobs)


def check_prompt_logprobs(model, prompt, params, got) -> None:
    """Against transformers' logits of the whole prompt."""
    assert got[0] is None
    assert len(got) == len(prompt)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for position, entry in enumerate(got[1:]):
        row = expected[position]
        top = row.topk(params.prompt_logprobs)
        assert entry.token_id == prompt[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.top_token_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_logprobs_are_those_of_transformers_cached_or_not(llama, mode):
    model = tiny_models.build("llama")
    prompts = [*prompts_of(seed=7), [9]]
    prompts += [prompts[0] * 3, prompts[1][:16] * 2]  # longer than a step takes
    asking = [
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=wanted % 4)
        for wanted in range(len(prompts))
    ]
    plain = SamplingParams(temperature=0, max_tokens=12)
    with open_llm(llama, preemption_mode=mode, num_gpu_blocks_override=18) as llm:
        first = llm.generate(prompts, plain, use_tqdm=False)
        # The prompts are cached now, and more requests want the room than it holds.
        outputs = llm.generate(prompts * 2, asking + [plain] * len(prompts), use_tqdm=False)
        again = llm.generate(prompts[-1], plain, use_tqdm=False)
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    assert again[0].num_cached_tokens > 0
    for output, params in zip(outputs, asking, strict=False):
        assert output.num_cached_tokens == 0
        check_prompt_logprobs(model, output.prompt_token_ids, params, output.prompt_logprobs)
    for output in outputs[len(prompts) :]:
        assert output.prompt_logprobs is None
    # Tokens do not depend on it.
    expected = [o.outputs[0].token_ids for o in first]
    assert [o.outputs[0].token_ids for o in outputs[len(prompts) :]] == expected
    assert [o.outputs[0].token_ids for o in outputs[: len(prompts)]] == [t[:6] for t in expected]


def test_a_prompt_preempted_midway_reports_each_logprob_once(llama):
    model = tiny_models.build("llama")
    prompt = [7 + i for i in range(50)]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    for mode in MODES:
        with open_llm(
            llama, preemption_mode=mode, num_gpu_blocks_override=20, max_num_batched_tokens=8
        ) as llm:
            # The first grows while the prompt of the second is computed, chunk by chunk.
            settings = [SamplingParams(temperature=0, max_tokens=40), params]
            outputs = llm.generate([[5, 6, 7, 8] * 5, prompt], settings, use_tqdm=False)
        check_prompt_logprobs(model, prompt, params, outputs[1].prompt_logprobs)
        assert outputs[1].num_preemptions > 0


def test_a_step_works_out_no_more_prompt_logprobs_than_it_may(llama, monkeypatch):
    monkeypatch.setattr("pagetier.handler.scheduler.MAX_PROMPT_LOGPROBS_PER_STEP", 5)
    model = tiny_models.build("llama")
    prompts = prompts_of(seed=9)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    launched = []
    with open_llm(llama) as llm:
        launch = llm._core._runner.launch
        monkeypatch.setattr(
            llm._core._runner, "launch", lambda plan: (launched.append(plan), launch(plan))[1]
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_prompt_logprobs(model, prompt, params, output.prompt_logprobs)
    counts = [
        sum(end - first for first, end in (s.prompt_logprobs for s in plan.scheduled))
        for plan in launched
    ]
    assert max(counts) == 5
    assert sum(counts) == sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty must be from -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0"),
        ({"logit_bias": {3: 101.0}}, "numbers from -100 to 100"),
        ({"logit_bias": {-3: 1.0}}, "token ids with numbers"),
        ({"allowed_token_ids": ["4"]}, "at least one token id"),
        ({"allowed_token_ids": []}, "at least one token id"),
        ({"bad_words": [""]}, "non-empty texts"),
        ({"bad_words": [[]]}, "non-empty texts"),
        ({"bad_words": ["a"] * 257}, "at most 256"),
        ({"min_tokens": 20, "max_tokens": 10}, "at most max_tokens"),
        ({"prompt_logprobs": 21}, "0 to 20"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**settings)
    assert caught.value.param in settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {120: 1.0}}, "logit_bias holds token id 120, but .* 0 to 119"),
        ({"allowed_token_ids": [4, 500]}, "allowed_token_ids holds token id 500"),
        ({"bad_words": [[1, 130]]}, "bad_words holds token id 130"),
        ({"allowed_token_ids": [4, 5], "bad_words": [[4], [5]]}, "allow more"),
        (
            {"allowed_token_ids": [4], "stop_token_ids": [4], "min_tokens": 2},
            "allow more",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(llama, settings, message):
    with open_llm(llama) as llm, pytest.raises(InvalidRequest, match=message) as caught:
        llm.generate([3, 4], SamplingParams(**settings), use_tqdm=False)
    assert caught.value.param in settings


def test_settings_survive_the_way_to_the_engine_process():
    params = SamplingParams(
        min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1,
        logit_bias={3: 1.5, 70_000: -100.0}, allowed_token_ids=range(4), bad_words=[[1, 2], [3]],
        min_tokens=2, prompt_logprobs=3, include_stop_str_in_output=True,
        skip_special_tokens=False,
    )  # fmt: skip
    request = AddRequest("r", [1], params)
    message = msgspec.msgpack.encode(request)
    got = msgspec.msgpack.Decoder(ToEngine).decode(message)
    assert got.params.logit_bias == params.logit_bias
    assert list(got.params.allowed_token_ids) == [0, 1, 2, 3]
    assert got.params.bad_words == ((1, 2), (3,))
    assert msgspec.msgpack.encode(got) == message


def test_words_of_text_are_forbidden_and_shown_as_asked():
    settings = {"device": "cpu", "swap_space": 0.01, "num_gpu_blocks_override": 64}
    with LLM(model=str(EMBEDDED_MODEL), **settings) as llm:

        def text(**changes):
            params = SamplingParams(temperature=0, max_tokens=40, **changes)
            return llm.generate("Return the", params, use_tqdm=False)[0].outputs[0].text

        plain = text()
        word = plain.split()[1]
        assert word not in text(bad_words=[word])
        assert text(stop=[word]) == plain[: plain.index(word)]
        assert text(stop=[word], include_stop_str_in_output=True).endswith(word)
        late = text(stop=[word], min_tokens=30)
        assert len(late) > len(plain)
        assert late.startswith(plain[:-1])
        assert "<|" in text(skip_special_tokens=False, ignore_eos=True)


def test_texts_among_bad_words_need_a_tokenizer(llama):
    with open_llm(llama) as llm, pytest.raises(ModelError, match="tokenizer"):
        llm.generate([3, 4], SamplingParams(bad_words=["text"]), use_tqdm=False)
