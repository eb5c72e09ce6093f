"""Rules of logits against plain Python on the tokens, whatever the host knows of them."""

import collections
import math
import random
import time

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from pagetier.handler.logit_rules import LogitRules
from pagetier.handler.messages import AddRequest
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence
from pagetier.handler.step import ScheduledSequence
from pagetier.kernels.reference import logit_changes
from pagetier.kernels.reference.logit_changes import penalise

VOCABULARY = 12
MAX_NUM_SEQS = 5
EOS = (3, 99)  # a model's configuration may name what it does not have
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


def expected_logits(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """What the settings' descriptions say, token by token."""
    counts = collections.Counter(output)
    changed = []
    for token, logit in enumerate(logits):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logit = -math.inf
        logit += (params.logit_bias or {}).get(token, 0.0)
        for word in params.bad_words:
            if [*output, token][-len(word) :] == list(word):
                logit = -math.inf
        if len(output) < params.min_tokens and token in (*EOS, *params.stop_token_ids):
            logit = -math.inf
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * counts[token]
        logit -= params.presence_penalty * (token in output)
        changed.append(logit)
    return changed


class Host:
    """Runs rules as an engine does: a token is told to the host one step after it was chosen."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.rules = LogitRules(MAX_NUM_SEQS, VOCABULARY, torch.device(device))
        self.last_token_ids = torch.zeros(MAX_NUM_SEQS, dtype=torch.int64, device=device)
        self.device = device
        self.random = random.Random(seed)
        self.rows = list(range(MAX_NUM_SEQS))
        self.num_added = 0
        self.truth: dict[int, list[int]] = {}  # by arrival: all tokens, told or not

    def add(self, prompt: list[int], params: SamplingParams) -> Sequence:
        request = AddRequest(f"r{self.num_added}", prompt, params, eos_token_ids=EOS)
        sequence = Sequence(request, self.num_added)
        self.num_added += 1
        self.truth[sequence.arrival] = list(prompt)
        self.start(sequence)
        return sequence

    def start(self, sequence: Sequence) -> None:
        sequence.row = self.rows.pop(self.random.randrange(len(self.rows)))

    def tell(self, sequence: Sequence) -> None:
        sequence.token_ids = list(self.truth[sequence.arrival])

    def stop(self, sequence: Sequence) -> None:
        self.tell(sequence)
        self.rows.append(sequence.row)
        sequence.row = -1
        sequence.num_preemptions += 1

    def step(self, sequences: list[Sequence]) -> None:
        """Change random logits, compare, and choose random tokens."""
        for sequence in sequences:
            if self.random.random() < 0.3:
                self.tell(sequence)  # it was left out of the step before
        shares = [ScheduledSequence(s, len(self.truth[s.arrival]) - 1, 1, True) for s in sequences]
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        logits = torch.randn(len(shares), VOCABULARY, generator=generator) * 3
        changed = logits.to(self.device, copy=True)
        rules = self.rules.read(shares)
        chosen = [self.random.randrange(VOCABULARY) for _ in sequences]
        token_ids = torch.tensor(chosen, device=self.device)
        if rules is not None:
            uploaded = self.rules.upload(rules)
            self.rules.apply(changed, uploaded, self.last_token_ids)
            self.rules.count(uploaded, token_ids)
        rows = torch.tensor([s.row for s in sequences], device=self.device)
        self.last_token_ids.index_copy_(0, rows, token_ids)
        for row, sequence in enumerate(sequences):
            tokens = self.truth[sequence.arrival]
            split = sequence.num_prompt_tokens
            expected = expected_logits(
                logits[row].tolist(), sequence.params, tokens[:split], tokens[split:]
            )
            assert changed[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            # What the step before chose is known now, what this one chose is not.
            self.tell(sequence)
            tokens.append(chosen[row])


def random_params(rng: random.Random) -> SamplingParams:
    """Some of the settings at random, so that batches mix rows with and without each."""

    def some(value: object, neutral: object) -> object:
        return value if rng.random() < 0.4 else neutral

    words = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))] for _ in range(4)]
    # Words that are bound to come close, and one that ends in one way and in another.
    words += [[1, 2], [2, 2], [1, 2, 3], [2, 3, 1], [1, 2, 3, 4]]
    return SamplingParams(
        repetition_penalty=some(rng.choice([0.7, 1.3, 2.0]), 1.0),
        presence_penalty=some(rng.choice([-1.5, 0.5]), 0.0),
        frequency_penalty=some(rng.choice([-0.3, 0.9]), 0.0),
        logit_bias=some({rng.randrange(VOCABULARY): 5.5, 0: -100.0}, None),
        allowed_token_ids=some(rng.sample(range(VOCABULARY), 7), None),
        bad_words=some(words, None),
        min_tokens=some(rng.randint(1, 12), 0),
        stop_token_ids=some([5, 6], ()),
    )


@pytest.mark.parametrize("seed", range(8))
def test_logits_are_those_of_the_descriptions_whoever_shares_and_leaves(
    seed: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    host = Host(device, seed)
    if seed % 2:
        # Densely, as on a GPU without Triton.
        monkeypatch.setattr(logit_changes, "_SEARCHED_DEVICE", None)
    running: list[Sequence] = []
    stopped: list[Sequence] = []
    for _ in range(60):
        if host.rows and rng.random() < 0.3:
            if stopped and rng.random() < 0.5:
                sequence = stopped.pop()
                host.start(sequence)
            else:
                prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
                sequence = host.add(prompt, random_params(rng))
            running.append(sequence)
        elif running and rng.random() < 0.2:
            # Preempted, and in half of the cases never heard of again: rows change hands.
            sequence = running.pop(rng.randrange(len(running)))
            host.stop(sequence)
            if rng.random() < 0.5:
                stopped.append(sequence)
        batch = [s for s in running if rng.random() < 0.8]
        rng.shuffle(batch)
        if batch:
            host.step(batch)


def test_a_bad_word_is_forbidden_by_the_token_that_the_host_does_not_know() -> None:
    host = Host("cpu")
    sequence = host.add([7], SamplingParams(bad_words=[[1, 2, 3]]))
    shares = [ScheduledSequence(sequence, 2, 1, True)]
    sequence.token_ids = [7, 1]  # the next may be 2
    for last, forbidden in ((2, True), (4, False)):
        logits = torch.zeros(1, VOCABULARY)
        host.last_token_ids[sequence.row] = last
        rules = host.rules.upload(host.rules.read(shares))
        host.rules.apply(logits, rules, host.last_token_ids)
        assert logits.isinf().nonzero().tolist() == ([[0, 3]] if forbidden else [])


def test_a_bad_word_that_begins_in_the_prompt_is_not_one() -> None:
    host = Host("cpu")
    sequence = host.add([7, 1], SamplingParams(bad_words=[[1, 2]]))
    assert host.rules.read([ScheduledSequence(sequence, 0, 2, True)]) is None


def test_all_tokens_at_once_are_penalised_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, VOCABULARY, generator=generator) * 3
    counts = torch.randint(0, 3, (3, VOCABULARY), generator=generator, dtype=torch.int32)
    counts[:, ::3] += 1 << 30
    strengths = torch.tensor([[1.3, 0.5, 0.0], [0.8, 0.0, -1.0], [1.0, 0.0, 0.0]])
    whole = penalise(logits, counts, strengths[:, None, :])
    for row in range(3):
        for token in range(VOCABULARY):
            alone = penalise(logits[row, token], counts[row, token], strengths[row])
            assert whole[row, token] == alone


def test_repetition_penalty_is_that_of_transformers() -> None:
    tokens = [1, 5, 5, 9]
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    expected = processors(torch.tensor([tokens]), logits.clone())
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY).int()[None]
    strengths = torch.tensor([1.7, 0.0, 0.0])
    assert torch.equal(penalise(logits.clone(), counts, strengths), expected)


def test_neutral_penalties_change_no_bit() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * 10
    logits[0, :3] = torch.tensor([-0.0, -torch.inf, 1e30])
    counts = torch.full((2, 1000), (1 << 30) + 3, dtype=torch.int32)
    strengths = torch.tensor([1.0, 0.0, 0.0])
    assert torch.equal(penalise(logits.clone(), counts, strengths), logits)


def test_many_bad_words_cost_a_step_little() -> None:
    words = [[5, 6 + i % 5, i % 4] for i in range(500)] + [[1, 2]] * 12
    host = Host("cpu")
    sequence = host.add([7], SamplingParams(bad_words=words))
    share = [ScheduledSequence(sequence, 3, 1, True)]
    sequence.token_ids = [7, 8, 9]
    host.rules.read(share)  # arranges them
    assert len(host.rules.read(share).bans) == 12
    start = time.perf_counter()
    for _ in range(200):
        host.rules.read(share)
    assert (time.perf_counter() - start) / 200 < 1e-3


def test_requests_without_rules_allocate_nothing() -> None:
    host = Host("cpu")
    sequences = [host.add([1, 2], SamplingParams(temperature=0)) for _ in range(3)]
    shares = [ScheduledSequence(s, 0, 2, True) for s in sequences]
    assert host.rules.read(shares) is None
    assert host.rules._counts.numel() == host.rules._bias.numel() == 0


def test_rules_that_no_longer_apply_cost_nothing() -> None:
    host = Host("cpu")
    sequence = host.add([7], SamplingParams(min_tokens=2, bad_words=[[1, 2, 3]]))
    rules = []
    for position in range(1, 5):
        rules.append(host.rules.read([ScheduledSequence(sequence, position - 1, 1, True)]))
        sequence.token_ids.append(8)
    assert [r is None for r in rules] == [False, False, True, True]


def test_tables_grow_with_the_rows_in_use() -> None:
    host = Host("cpu")
    params = SamplingParams(presence_penalty=1.0, logit_bias={1: 1.0})
    sequences = [host.add([1, 2], params) for _ in range(MAX_NUM_SEQS)]
    sequences.sort(key=lambda s: s.row)
    sizes = []
    for count in range(1, MAX_NUM_SEQS + 1):
        host.step(sequences[:count])
        assert len(host.rules._counts) == len(host.rules._bias)
        sizes.append(len(host.rules._counts))
    assert sizes == [1, 2, 4, 4, 5]
