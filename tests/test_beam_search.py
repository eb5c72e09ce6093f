"""The rules of beam search, against transformers' ``generate`` on a model that is a table."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagetier.handler.beam_search import BeamSearch, Candidate

VOCABULARY = 12
EOS = 3
PAD = 2  # not 0, which transformers takes for none


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def search(model, prompt, width, max_tokens, eos, **settings) -> BeamSearch:
    """Run the whole search with a fresh forward pass for every beam."""
    beams = [list(prompt)]
    state = BeamSearch(width, max_tokens, eos, **settings)
    while True:
        with torch.no_grad():
            logprobs = model(torch.tensor(beams)).logits[:, -1].log_softmax(-1)
        top = logprobs.topk(min(state.num_candidates, VOCABULARY))
        candidates = [
            [Candidate(t, p) for t, p in zip(ids, values, strict=True)]
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        continuations = state.advance(candidates)
        if continuations is None:
            return state
        beams = [[*beams[c.parent], c.token_id] for c in continuations]


@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping", "eos"),
    [
        *itertools.product((2, 4), (1.0, 0.0, -1.0, 2.0), (True, False, "never"), [(EOS,)]),
        (3, 1.0, False, (EOS, 5)),
        (3, 1.0, False, ()),
    ],
)
def test_hypotheses_equal_transformers(model, width, length_penalty, early_stopping, eos):
    ended_early = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, VOCABULARY, (1 + seed,), generator=generator).tolist()
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=list(eos) or -1,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
        state = search(
            model,
            prompt,
            width,
            10,
            eos,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        assert len(state.hypotheses) == width
        for hypothesis, tokens, score in zip(
            state.hypotheses, expected.sequences, expected.sequences_scores, strict=True
        ):
            output = tokens[len(prompt) :].tolist()
            assert hypothesis.token_ids == output[: len(hypothesis.token_ids)]
            assert set(output[len(hypothesis.token_ids) :]) <= {PAD}, "only padding is left"
            assert hypothesis.score == pytest.approx(score.item(), abs=1e-4)
            ended_early += len(hypothesis.token_ids) < 10
    assert ended_early > 0 or length_penalty > 1.0 or not eos
