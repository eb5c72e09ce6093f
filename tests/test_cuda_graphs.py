"""Decodes in graphs, which on a CPU are the same functions on the same buffers, uncaptured."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.driver import BLOCK_SIZE, MAX_NUM_SEQS, NEW_TOKENS, Driver, generate, load, prompts

from pagetier.handler.compilation import compile_forward
from pagetier.handler.cuda_graphs import default_sizes
from pagetier.handler.model_loader import LoadedModel
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.sequence import Sequence
from pagetier.handler.step_inputs import StepInputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("llama"), "llama")


def graphed(model: LoadedModel, *sizes: int, seed: int = 0, **execution: Any) -> Driver:
    driver = Driver(model, seed, graph_sizes=sizes, **execution)
    assert driver.runner.graphs is not None
    driver.runner.graphs.capture()
    return driver


def runs_of(driver: Driver) -> list[int]:
    """The sizes of the batches that run in graphs from now on."""
    seen: list[int] = []
    run = driver.runner.graphs.run
    driver.runner.graphs.run = lambda rows: seen.append(len(rows)) or run(rows)
    return seen


def start(driver: Driver, params: list[SamplingParams]) -> list[Sequence]:
    """Sequences whose prompts are computed and whose first token is chosen."""
    sequences = [driver.add(p, s) for p, s in zip(prompts(), params, strict=True)]
    driver.step([driver.share(s, s.num_tokens) for s in sequences])
    return sequences


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "gpt2", "phi3", "qwen3"])
def test_tokens_equal_those_of_generate(name: str, tmp_path: pathlib.Path, device: str) -> None:
    reference = tiny_models.build(name).to(device)
    model = load(tmp_path, name, device)
    backend = "inductor" if device == "cuda" else "graph"
    for execution in ({}, {"forward": compile_forward(model.model, backend)}):
        driver = graphed(model, 1, 2, 4, **execution)
        runs = runs_of(driver)
        sequences = [driver.add(prompt) for prompt in prompts()]
        driver.finish(sequences)
        driver.runner.close()
        assert len(runs) > NEW_TOKENS
        for sequence, prompt in zip(sequences, prompts(), strict=True):
            assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]


def test_a_batch_runs_in_the_next_larger_size_or_without_a_graph(llama: LoadedModel) -> None:
    driver = graphed(llama, 3, 1)
    graphs = driver.runner.graphs
    assert graphs.sizes == [1, 3]
    assert [graphs.size_for(n) for n in (1, 2, 3)] == [1, 3, 3]
    assert not graphs.fits(4)
    runs = runs_of(driver)
    expected, params = Driver(llama), [SamplingParams(temperature=0, max_tokens=9)] * 4
    theirs, ours = start(expected, params), start(driver, params)
    for count in (4, 2, 3, 1, 4):
        for one, sequences in ((driver, ours), (expected, theirs)):
            one.step([one.share(s, 1) for s in sequences[:count]])
    assert runs == [2, 3, 1]
    assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]


def test_default_sizes_end_with_the_largest_batch() -> None:
    assert default_sizes(1) == [1]
    assert default_sizes(5) == [1, 2, 4, 5]
    assert default_sizes(256)[-3:] == [192, 224, 256]
    for limit in (100, 256, 1024):
        sizes = default_sizes(limit)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == limit
        # Beyond the smallest, less than half of a batch is ever padding.
        assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))


def test_padding_reads_and_writes_no_block(llama: LoadedModel, device: str) -> None:
    model = llama if device == "cpu" else None
    if model is None:
        pytest.skip("compared on the CPU")
    driver = graphed(model, MAX_NUM_SEQS)
    params = [SamplingParams(temperature=0, max_tokens=9)] * 4
    sequences = start(driver, params)
    graphs = driver.runner.graphs
    # Whatever an earlier, larger batch left in the buffers must not matter.
    driver.step([driver.share(s, 1) for s in sequences])
    before = driver.pages.clone()
    some = sequences[1:3]
    written = {(s.block_tables[0][s.num_computed_tokens // BLOCK_SIZE]) for s in some}
    driver.step([driver.share(s, 1) for s in some])
    changed = (driver.pages != before).any(1).nonzero()[:, 0].tolist()
    assert set(changed) == written
    inputs = graphs._inputs[MAX_NUM_SEQS]
    assert inputs.seq_lens[2:].tolist() == [0] * (MAX_NUM_SEQS - 2)
    assert inputs.slots[2:].tolist() == [-1] * (MAX_NUM_SEQS - 2)
    assert driver.runner._rows.num_computed[driver.runner._rows.padding] == 0


def settings_of_all_kinds(expected: list[int]) -> list[SamplingParams]:
    """Four requests that want more than the most likely token; the third may not repeat itself.

    Each pair of neighbours in ``expected``, its output otherwise, is a bad word.
    """
    pairs = [list(pair) for pair in itertools.pairwise(expected)]
    return [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=30, seed=1, max_tokens=NEW_TOKENS),
        SamplingParams(temperature=0, logprobs=3, max_tokens=NEW_TOKENS),
        SamplingParams(
            temperature=0, frequency_penalty=0.1, bad_words=pairs, max_tokens=NEW_TOKENS
        ),
        SamplingParams(
            temperature=1.2, min_p=0.02, seed=5, logit_bias={7: 3.0}, max_tokens=NEW_TOKENS
        ),
    ]


def test_whatever_else_is_sampled_is_sampled_behind_the_graph(
    llama: LoadedModel, tmp_path: pathlib.Path, device: str
) -> None:
    model = llama if device == "cpu" else load(tmp_path, "llama", device)
    calm = Driver(model, seed=4)
    greedy = start(calm, [SamplingParams(temperature=0, max_tokens=NEW_TOKENS)] * 4)
    calm.finish(greedy)
    settings = settings_of_all_kinds(greedy[2].token_ids[-NEW_TOKENS:])
    drivers = [Driver(model, seed=4), graphed(model, 2, 4, seed=4)]
    runs = runs_of(drivers[1])
    results = []
    for driver in drivers:
        sequences, logprobs = start(driver, settings), []
        for _ in range(NEW_TOKENS - 1):
            plan = driver.plan([driver.share(s, 1) for s in sequences])
            handle = driver.launch(plan)
            logprobs += handle.collect().logprobs
            driver.collect(plan, handle)
        results.append(([s.token_ids for s in sequences], logprobs))
    (expected, theirs), (tokens, ours) = results
    assert tokens == expected
    assert tokens[2] != greedy[2].token_ids
    assert len(runs) == NEW_TOKENS - 1
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.top_token_ids == other.top_token_ids
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_rows_hold_what_the_host_would_have_sent(llama: LoadedModel) -> None:
    driver = graphed(llama, 4)
    params = [SamplingParams(temperature=0, max_tokens=30)] * 4
    sequences = start(driver, params)
    for step in range(12):
        some = sequences if step % 3 else sequences[1:]
        driver.step([driver.share(s, 1) for s in some])
    rows = driver.runner._rows
    for sequence in sequences:
        table = sequence.block_tables[0]
        assert rows.last_token_ids[sequence.row] == sequence.token_ids[-1]
        assert rows.num_computed[sequence.row] == sequence.num_computed_tokens
        assert rows.block_tables[sequence.row, : len(table)].tolist() == table


def test_a_steady_decode_sends_only_new_blocks(llama: LoadedModel) -> None:
    driver = graphed(llama, 4)
    sequences = start(driver, [SamplingParams(temperature=0, max_tokens=30)] * 4)
    pending = None
    for _ in range(10):  # each launched before the one before it is collected
        plan = driver.plan([driver.share(s, 1) for s in sequences])
        reader = driver.runner._reader
        changes = []
        read = reader.read
        reader.read = lambda p, read=read, to=changes: to.append(read(p)) or to[-1]
        handle = driver.launch(plan)
        reader.read = read
        if pending is not None:
            (inputs,) = changes
            new = [s for s in sequences if (s.num_computed_tokens - 1) % BLOCK_SIZE == 0]
            assert len(inputs.changes.blocks) == len(new)
            assert not len(inputs.changes.lengths)
            assert not len(inputs.changes.tokens)
            assert inputs.flat is None
            driver.collect(*pending)
        pending = (plan, handle)
    driver.collect(*pending)


def test_a_row_that_changes_hands_is_told_all_anew(llama: LoadedModel) -> None:
    expected = Driver(llama)
    whole = expected.add(prompts()[1], SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    expected.finish([whole])
    driver = graphed(llama, 1, 4)
    sequence = driver.add(prompts()[1], SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    driver.step([driver.share(sequence, 13)])
    driver.step([driver.share(sequence, 1)])
    # Preempted and resumed from copies, in other blocks of the same row, all but the last token.
    old = sequence.block_tables[0]
    new = [driver.free.pop() for _ in old]
    driver.pages[new] = driver.pages[old]
    driver.pages.view(llama.dtype)[old] = float("nan")
    sequence.block_tables, sequence.num_preemptions = [new], 1
    sequence.num_computed_tokens = sequence.num_tokens - 1
    driver.finish([sequence])
    assert sequence.token_ids == whole.token_ids


def test_the_token_that_the_host_knows_better_counts(llama: LoadedModel) -> None:
    """A beam goes on with another token than its own row chose."""
    driver, expected = graphed(llama, 4), Driver(llama)
    sequences = []
    for one in (driver, expected):
        sequence = one.add(prompts()[0], SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
        one.step([one.share(sequence, 5)])
        sequence.token_ids[-1] = 77
        one.finish([sequence])
        sequences.append(sequence.token_ids)
    assert sequences[0] == sequences[1]


def test_rows_are_only_sent_when_the_batch_changes(llama: LoadedModel) -> None:
    graphs = graphed(llama, 2, 4).runner.graphs
    graphs._put_rows(np.array([3, 1]), 4)
    assert graphs._batch_rows.tolist() == [3, 1, MAX_NUM_SEQS, MAX_NUM_SEQS]
    graphs._batch_rows.fill_(0)
    graphs._put_rows(np.array([3, 1]), 4)
    assert graphs._batch_rows.tolist() == [0, 0, 0, 0]
    graphs._put_rows(np.array([3, 1]), 2)
    assert graphs._batch_rows.tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize("change", ["known token", "other block", "preempted", "gap"])
def test_a_step_that_only_looks_steady_is_read_whole(llama: LoadedModel, change: str) -> None:
    reader = Driver(llama).runner._reader
    driver = Driver(llama)
    sequence, other = driver.add(prompts()[1]), driver.add(prompts()[0])
    driver.step([driver.share(sequence, 13), driver.share(other, 5)])
    both = [sequence, other]

    def read(copies: list[tuple[int, int]] | None = None) -> StepInputs:
        return reader.read(driver.plan([driver.share(s, 1) for s in both], copies))

    first = read()
    assert len(first.changes.lengths) == 2
    for s in both:
        s.num_in_flight += 1
    if change == "known token":
        sequence.token_ids.append(9)
        sequence.num_in_flight = 0
        assert read().changes.tokens.tolist() == [[sequence.row, 9]]
    elif change == "other block":
        sequence.block_tables[0][-1] = 63
        assert [sequence.row, 3, 63] in read([(1, 63)]).changes.blocks.tolist()
    elif change == "preempted":
        sequence.num_preemptions += 1
        sequence.block_tables[0][:] = [60, 61, 62, 63]
        blocks = [b for b in read().changes.blocks.tolist() if b[0] == sequence.row]
        assert [b[2] for b in blocks] == [60, 61, 62, 63]
    else:
        sequence.num_computed_tokens += 1
        assert read().changes.lengths.tolist() == [[sequence.row, 15]]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_steady_decode_never_waits_for_the_gpu(tmp_path: pathlib.Path, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    model = load(tmp_path, "llama", "cuda", dtype)
    driver = graphed(model, 2, 4, forward=compile_forward(model.model))
    sequences = start(driver, settings_of_all_kinds([5, 6, 7, 8]))
    pending = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            plan = driver.plan([driver.share(s, 1) for s in sequences])
            pending.append((plan, driver.launch(plan)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for plan, handle in pending:
        driver.collect(plan, handle)
