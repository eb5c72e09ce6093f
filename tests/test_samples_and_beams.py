"""Several outputs of a prompt on real (tiny) models: samples, the best of them, and beams."""

import pytest
import torch
from support import tiny_models

from pagetier import LLM, SamplingParams
from pagetier.handler.errors import InvalidRequest

EOS = 7


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, tiny_models.save("llama", folder, eos_token_id=EOS)


def open_llm(folder, **settings) -> LLM:
    settings = {
        "dtype": "float32",
        "max_model_len": 48,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 32,
        "block_size": 4,
        "swap_space": 0.01,
        "device": "cpu",
        **settings,
    }
    return LLM(model=str(folder), **settings)


PROMPTS = [[2 + i, 5, 9, 30 + i, 11, 64, 23, 40, 41][: 3 + 2 * i] for i in range(4)]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_samples_differ_and_repeat_with_their_seed(llama):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, n=4, ignore_eos=True)
    with open_llm(llama[0]) as llm:
        first, second = (llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(2))
        single = llm.generate(
            PROMPTS,
            SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True),
            use_tqdm=False,
        )
    assert tokens_of(first) == tokens_of(second)
    for output, alone in zip(first, single, strict=True):
        assert [c.index for c in output.outputs] == [0, 1, 2, 3]
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        assert len({tuple(c.token_ids) for c in output.outputs}) > 1


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_samples_under_preemption_equal_undisturbed_ones(llama, mode):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=16, n=3, ignore_eos=True)
    with open_llm(llama[0]) as llm:
        calm = llm.generate(PROMPTS, params, use_tqdm=False)
    with open_llm(llama[0], num_gpu_blocks_override=14, preemption_mode=mode) as llm:
        pressed = llm.generate(PROMPTS, params, use_tqdm=False)
        stats = llm.stats()
    assert stats["num_preemptions"] > 0
    assert stats["num_gpu_blocks_free"] == 14
    assert tokens_of(calm) == tokens_of(pressed)


def test_best_of_gives_the_most_likely_outputs(llama):
    settings = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    with open_llm(llama[0]) as llm:
        every = llm.generate(PROMPTS, SamplingParams(n=6, logprobs=0, **settings), use_tqdm=False)
        best = llm.generate(PROMPTS, SamplingParams(n=2, best_of=6, **settings), use_tqdm=False)
    for candidates, chosen in zip(every, best, strict=True):
        ranked = sorted(
            candidates.outputs,
            key=lambda c: -sum(entry.logprob for entry in c.logprobs) / len(c.logprobs),
        )
        assert [c.token_ids for c in chosen.outputs] == [c.token_ids for c in ranked[:2]]
        assert all(c.logprobs is None for c in chosen.outputs)


@pytest.mark.parametrize("num_gpu_blocks", [200, 28])
@pytest.mark.parametrize(
    ("length_penalty", "early_stopping"), [(1.0, False), (0.0, True), (2.0, "never")]
)
def test_beams_equal_transformers(llama, num_gpu_blocks, length_penalty, early_stopping):
    folder, model = llama
    params = SamplingParams(
        temperature=0,
        max_tokens=14,
        n=4,
        use_beam_search=True,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    with open_llm(folder, num_gpu_blocks_override=num_gpu_blocks, preemption_mode="swap") as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        stats = llm.stats()
    assert (stats["num_preemptions"] > 0) == (num_gpu_blocks == 28)
    assert stats["num_gpu_blocks_free"] == num_gpu_blocks
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=14,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=EOS,
            pad_token_id=1,
        )
        for completion, tokens in zip(output.outputs, expected, strict=True):
            num_tokens = len(completion.token_ids)
            assert completion.token_ids == tokens[len(prompt) :].tolist()[:num_tokens]
            assert set(tokens[len(prompt) + num_tokens :].tolist()) <= {1}
            ended = completion.token_ids[-1] == EOS
            assert completion.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be 1 to 64"),
        ({"n": 3, "best_of": 2}, r"best_of must be at least n \(3\)"),
        ({"n": 1, "best_of": 2, "stop": "x"}, "stop must be left out"),
        ({"n": 2, "use_beam_search": True}, "temperature must be 0"),
        (
            {"n": 2, "use_beam_search": True, "temperature": 0, "presence_penalty": 1.0},
            "presence_penalty must be left out",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**settings)
