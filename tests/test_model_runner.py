"""Steps of real (tiny) models on shuffled blocks, against transformers' own ``generate``."""

import pathlib
import threading

import pytest
import torch
from support import tiny_models
from support.driver import (
    GREEDY,
    NEW_TOKENS,
    NUM_BLOCKS,
    Driver,
    generate,
    load,
    prompts,
)

from pagetier.handler.config import EngineConfig
from pagetier.handler.model_loader import LoadedModel, load_model
from pagetier.handler.sampling_params import SamplingParams

# transformers 5.17 compiles a function of GPT-BigCode in a way that torch 2.13 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_tokens_and_logits_equal_those_of_generate(
    name: str, tmp_path: pathlib.Path, device: str
) -> None:
    reference = tiny_models.build(name).to(device)
    driver = Driver(load(tmp_path, name, device))
    sequences = [driver.add(prompt) for prompt in prompts()]
    logits = driver.finish(sequences)
    driver.runner.close()
    for sequence, prompt in zip(sequences, prompts(), strict=True):
        expected, expected_logits = generate(reference, prompt, NEW_TOKENS)
        assert sequence.token_ids == expected
        torch.testing.assert_close(
            torch.stack(logits[id(sequence)]), expected_logits, atol=1e-4, rtol=1e-4
        )


def test_longrope_does_not_depend_on_what_shares_the_batch(tmp_path: pathlib.Path) -> None:
    # transformers takes the long table once any sequence of the batch is longer than 16 tokens.
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 1.5],
        "original_max_position_embeddings": 16,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    tiny_models.save("phi3", tmp_path, **changes)
    reference = tiny_models.build("phi3", **changes)
    for max_model_len, lengths in ((16, (5, 8)), (64, (25, 18))):
        config = EngineConfig.create(
            {"model": str(tmp_path), "device": "cpu", "max_model_len": max_model_len}
        )
        driver = Driver(load_model(config))
        sequences = [driver.add(prompt) for prompt in prompts(lengths)]
        driver.finish(sequences)
        for sequence, prompt in zip(sequences, prompts(lengths), strict=True):
            assert sequence.token_ids == generate(reference, prompt, NEW_TOKENS)[0]
        driver.runner.close()
    # Short ones beside long ones: the same logits as alone, in the long table.
    alone, together = Driver(load_model(config)), Driver(load_model(config))
    short, long = prompts((5, 30))
    expected = alone.runner.logits(alone.plan([alone.share(alone.add(short), 5)]))
    shares = [together.share(together.add(p), len(p)) for p in (long, short)]
    torch.testing.assert_close(together.runner.logits(together.plan(shares))[1:], expected)


def test_sampled_tokens_do_not_depend_on_what_shares_the_batch(llama: LoadedModel) -> None:
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=NEW_TOKENS, top_k=k, top_p=p)
        for seed, k, p in ((3, 0, 1.0), (4, 20, 1.0), (5, 0, 0.9), (3, 0, 1.0))
    ]
    driver = Driver(llama, seed=1)
    together = [driver.add(p, s) for p, s in zip(prompts(), params, strict=True)]
    driver.finish(together)
    for sequence, prompt, settings in zip(together, prompts(), params, strict=True):
        other = Driver(llama, seed=2)
        alone = other.add(prompt, settings)
        other.finish([alone])
        assert alone.token_ids == sequence.token_ids
    assert len({tuple(s.token_ids[-NEW_TOKENS:]) for s in together}) == len(together)


def test_recomputing_a_sequence_goes_on_with_the_same_tokens(llama: LoadedModel) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=NEW_TOKENS)
    whole = Driver(llama)
    expected = whole.add(prompts()[1], params)
    whole.finish([expected])
    driver = Driver(llama, seed=3)
    sequence = driver.add(prompts()[1], params)
    driver.step([driver.share(sequence, 13)])
    driver.step([driver.share(sequence, 1)])
    # Preempted: new blocks, another row, everything computed again.
    sequence.block_tables, sequence.row, sequence.num_computed_tokens = [[]], driver.rows.pop(), 0
    driver.finish([sequence])
    assert sequence.token_ids == expected.token_ids


def test_chunks_that_do_not_reach_the_end_sample_nothing(llama: LoadedModel) -> None:
    driver = Driver(llama)
    sequence = driver.add(prompts()[1])
    plan = driver.plan([driver.share(sequence, 6)])
    assert driver.runner.launch(plan).collect().token_ids == []


def test_block_copies_come_before_the_forward_pass(llama: LoadedModel) -> None:
    driver = Driver(llama)
    first = driver.add(prompts()[1])
    expected = driver.runner.logits(driver.plan([driver.share(first, 13)]))
    # The second sequence shares all full blocks, and gets a copy of the one it writes to.
    second = driver.add(prompts()[1])
    copy = driver.free.pop()
    second.block_tables = [[*first.block_tables[0][:3], copy]]
    second.num_computed_tokens = 12
    first.block_tables[0].append(driver.free.pop())
    third = driver.add(prompts()[1])
    third.block_tables = [[*first.block_tables[0][:2], driver.free.pop(), driver.free.pop()]]
    third.num_computed_tokens = 10
    copies = [
        (first.block_tables[0][3], copy),
        (first.block_tables[0][2], third.block_tables[0][2]),
    ]
    before = driver.pages.clone()
    plan = driver.plan([driver.share(second, 1), driver.share(third, 3)], copies)
    torch.testing.assert_close(driver.runner.logits(plan), expected.expand(2, -1))
    mine = [copy, *third.block_tables[0][2:]]
    others = [block for block in range(NUM_BLOCKS) if block not in mine]
    assert torch.equal(driver.pages[others], before[others])


def test_logprobs_go_to_those_who_asked(llama: LoadedModel) -> None:
    driver = Driver(llama)
    wishes = [None, 0, 3, 5]
    shares = [
        driver.share(
            driver.add(prompt, SamplingParams(temperature=0.8, seed=1, logprobs=wish)), len(prompt)
        )
        for prompt, wish in zip(prompts(), wishes, strict=True)
    ]
    plan = driver.plan(shares)
    raw = driver.runner.logits(plan).log_softmax(-1)
    result = driver.runner.launch(plan).collect()
    assert result.logprobs[0] is None
    for row in (1, 2, 3):
        entry, token, wish = result.logprobs[row], result.token_ids[row], wishes[row]
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(raw[row, token].item(), abs=1e-5)
        values, ids = raw[row].topk(wish)
        assert entry.top_token_ids == ids.tolist()
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)


def test_launch_returns_before_the_step_ran_and_has_read_all_it_needs(llama: LoadedModel) -> None:
    expected = Driver(llama)
    reference = expected.add(prompts()[1])
    expected.step([expected.share(reference, 13)])
    driver = Driver(llama)
    sequence = driver.add(prompts()[1])
    plan = driver.plan([driver.share(sequence, 13)])
    gate = threading.Event()
    driver.runner._worker.submit(gate.wait)
    handle = driver.runner.launch(plan)
    assert not handle.event.done()
    # What the engine may do to a launched sequence, and worse.
    sequence.block_tables[0].clear()
    sequence.token_ids.clear()
    sequence.row = -1
    gate.set()
    assert handle.collect().token_ids == reference.token_ids[13:]
    assert handle.event.done()


def test_a_failing_step_raises_when_collected_and_leaves_later_ones_alone(
    llama: LoadedModel,
) -> None:
    driver = Driver(llama)
    good, bad = driver.add(prompts()[0]), driver.add([tiny_models.VOCABULARY + 5])
    failing = driver.runner.launch(driver.plan([driver.share(bad, 1)]))
    plan = driver.plan([driver.share(good, 5)])
    working = driver.launch(plan)
    with pytest.raises(IndexError):
        failing.collect()
    driver.collect(plan, working)
    assert good.num_output_tokens == 1


def test_close_waits_for_launched_steps(llama: LoadedModel) -> None:
    driver = Driver(llama)
    handle = driver.runner.launch(driver.plan([driver.share(driver.add(prompts()[0]), 5)]))
    driver.runner.close()
    assert handle.event.done()
    assert len(handle.collect().token_ids) == 1


def test_profiling_reports_nothing_on_a_cpu(llama: LoadedModel) -> None:
    assert Driver(llama).runner.profile_peak_bytes(32) == 0


@pytest.mark.gpu
def test_profiled_peak_covers_the_largest_steps(tmp_path: pathlib.Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    driver = Driver(load(tmp_path, "llama", "cuda"))
    driver.runner.profile_peak_bytes(32)  # whatever libraries allocate once
    peak = driver.runner.profile_peak_bytes(32)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    shares = [driver.share(driver.add(prompt), len(prompt)) for prompt in prompts((22, 5, 4, 1))]
    driver.step(shares)
    assert 0 < torch.cuda.max_memory_allocated() - before <= peak


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", tiny_models.EXACT)
def test_a_step_asks_the_gpu_for_nothing(name: str, tmp_path: pathlib.Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    # In 16 bits, as usual there: torch multiplies by experts in fp32 one by one, and asks how many.
    driver = Driver(load(tmp_path, name, "cuda", "bfloat16"))
    rules = SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.1, logit_bias={3: 1.0}, min_tokens=5,
        stop_token_ids=[4], bad_words=[[5], [6, 7]], min_p=0.01, seed=1,
    )  # fmt: skip
    filters = SamplingParams(temperature=0.7, top_p=0.9, top_k=9, seed=1, logprobs=2)
    params = [GREEDY, filters, rules, filters]
    sequences = [driver.add(p, s) for p, s in zip(prompts(), params, strict=True)]
    plan = driver.plan([driver.share(s, s.num_tokens) for s in sequences])
    pending = (plan, driver.launch(plan))
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = driver.plan([driver.share(s, 1) for s in sequences], [(driver.free[0],) * 2])
        handle = driver.launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    driver.collect(*pending)
    driver.collect(plan, handle)
    assert all(s.num_output_tokens == 2 for s in sequences)
