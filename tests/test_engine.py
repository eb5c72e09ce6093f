"""The whole engine on a fake device: what comes out must not depend on what happened inside."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_engine import (
    FakeEngine,
    expected_beams,
    expected_tokens,
    output_name,
    prompt_logprobs,
)

from pagetier.handler.errors import InvalidRequest, PromptTooLong, QueueFull


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 40) for _ in range(length)]


def test_one_request_gives_the_expected_tokens():
    engine = FakeEngine(num_gpu_blocks=8)
    engine.add("a", prompt_of(5), max_tokens=10)
    engine.run()
    assert engine.tokens["a"] == expected_tokens(prompt_of(5), 10, ignore_eos=True)
    assert engine.finished["a"].finish_reason == "length"


def test_next_step_is_launched_before_the_last_is_collected():
    engine = FakeEngine(num_gpu_blocks=8)
    engine.add("a", prompt_of(3), max_tokens=5)
    assert engine.step() == []  # launched, nothing to collect yet
    assert engine.runner.num_launched == 1
    (output,) = engine.step()
    assert engine.runner.num_launched == 2
    assert output.new_token_ids == expected_tokens(prompt_of(3), 1, ignore_eos=True)


def test_stop_found_late_discards_the_extra_token():
    for seed in range(50):
        prompt = prompt_of(6, seed)
        expected = expected_tokens(prompt, 30, ignore_eos=False)
        if 1 < len(expected) < 30:
            break
    else:
        raise AssertionError("no prompt ends early")
    engine = FakeEngine(num_gpu_blocks=12)
    engine.add("a", prompt, max_tokens=30, ignore_eos=False)
    engine.run()
    assert engine.tokens["a"] == expected
    assert engine.finished["a"].finish_reason == "stop"
    # One step was launched with the token that came after the end.
    assert engine.runner.num_launched == len(expected) + 1


def test_length_stop_is_foreseen_and_launches_nothing_extra():
    engine = FakeEngine(num_gpu_blocks=8)
    engine.add("a", prompt_of(5), max_tokens=7)
    engine.run()
    assert engine.runner.num_launched == 7


def test_long_prompt_goes_in_chunks_beside_decodes():
    engine = FakeEngine(
        num_gpu_blocks=40, max_num_seqs=2, max_num_batched_tokens=8, decision_trace=True
    )
    engine.add("short", prompt_of(4), max_tokens=20)
    engine.step()
    engine.add("long", prompt_of(60, 1), max_tokens=2)
    engine.run()
    for name, prompt, n in (("short", prompt_of(4), 20), ("long", prompt_of(60, 1), 2)):
        assert engine.tokens[name] == expected_tokens(prompt, n, ignore_eos=True)
    steps = [{r: n for r, _, n in s["scheduled"]} for s in engine.core.trace()]
    mixed = [s for s in steps if s.get("long", 0) > 1]
    assert len(mixed) >= 8
    # While the long prompt is read, the other stream gets a token in every step.
    assert all(s["short"] == 1 for s in mixed[:8])
    assert all(sum(s.values()) <= 8 for s in steps)


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_pressure_preempts_and_changes_no_token(mode):
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=40, preemption_mode=mode)
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    engine.run()
    for i in range(6):
        assert engine.tokens[f"r{i}"] == expected_tokens(prompt_of(6, i), 20, ignore_eos=True)
    totals = engine.scheduler.totals
    assert totals.num_preemptions > 0
    if mode == "recompute":
        assert totals.num_preemptions_swap == 0
    else:
        assert totals.num_preemptions_swap > 0
        assert totals.num_resumes_loaded > 0


def test_auto_recomputes_where_the_link_is_slow():
    engine = FakeEngine(
        num_gpu_blocks=10, num_cpu_blocks=40, preemption_mode="auto", swap_is_cheaper=False
    )
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    engine.run()
    assert engine.scheduler.totals.num_preemptions_recompute > 0
    assert engine.scheduler.totals.num_preemptions_swap == 0


def test_full_cpu_tier_falls_back_to_recomputing():
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=2, preemption_mode="swap")
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    engine.run()
    assert engine.scheduler.totals.num_preemptions_recompute > 0
    for i in range(6):
        assert engine.tokens[f"r{i}"] == expected_tokens(prompt_of(6, i), 20, ignore_eos=True)


def test_oldest_request_is_never_preempted():
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=10)
    for i in range(8):
        engine.add(f"r{i}", prompt_of(7, i), max_tokens=25)
    engine.run()
    assert engine.finished["r0"].num_preemptions == 0
    assert sum(o.num_preemptions for o in engine.finished.values()) > 0


def test_request_that_fills_the_whole_tier_finishes():
    engine = FakeEngine(num_gpu_blocks=4)
    engine.add("a", prompt_of(8), max_tokens=8)
    engine.run()
    assert engine.tokens["a"] == expected_tokens(prompt_of(8), 8, ignore_eos=True)


def test_priority_runs_first_and_preempts_lower_ones():
    engine = FakeEngine(
        num_gpu_blocks=8,
        num_cpu_blocks=20,
        scheduling_policy="priority",
        preemption_mode="swap",
    )
    for i in range(3):
        engine.add(f"batch{i}", prompt_of(8, i), max_tokens=16, priority=5)
    for _ in range(4):
        engine.step()
    engine.add("urgent", prompt_of(20, 9), max_tokens=4, priority=0)
    engine.run()
    order = list(engine.finished)
    assert order[0] == "urgent"
    assert engine.finished["urgent"].num_preemptions == 0
    for i in range(3):
        assert engine.tokens[f"batch{i}"] == expected_tokens(prompt_of(8, i), 16, ignore_eos=True)


def test_large_request_is_overtaken_a_bounded_number_of_times():
    engine = FakeEngine(num_gpu_blocks=10, max_overtaken=3, preemption_mode="recompute")
    engine.add("first", prompt_of(8), max_tokens=20)
    engine.step()
    engine.add("large", prompt_of(36, 1), max_tokens=2)
    for i in range(12):
        engine.add(f"small{i}", prompt_of(3, 2 + i), max_tokens=2)
    engine.run()
    order = list(engine.finished)
    assert order.index("large") - order.index("first") <= 4
    smalls_before = [r for r in order[: order.index("large")] if r.startswith("small")]
    assert len(smalls_before) == 3


def test_equal_prefix_is_computed_once():
    engine = FakeEngine(num_gpu_blocks=20)
    shared = prompt_of(16)
    engine.add("a", [*shared, 1, 2], max_tokens=3)
    engine.run()
    engine.add("b", [*shared, 3], max_tokens=3)
    engine.run()
    assert engine.finished["a"].num_cached_tokens == 0
    assert engine.finished["b"].num_cached_tokens == 16
    assert engine.tokens["b"] == expected_tokens([*shared, 3], 3, ignore_eos=True)


def test_wholly_cached_prompt_computes_one_token_in_a_copied_block():
    engine = FakeEngine(num_gpu_blocks=20)
    prompt = prompt_of(16)
    engine.add("a", prompt, max_tokens=8)
    engine.step()
    engine.step()
    engine.add("b", prompt, max_tokens=8)  # while a still holds the blocks
    engine.run()
    assert engine.finished["b"].num_cached_tokens == 15
    assert engine.tokens["a"] == engine.tokens["b"] == expected_tokens(prompt, 8, ignore_eos=True)


def test_salted_requests_share_nothing():
    engine = FakeEngine(num_gpu_blocks=30)
    prompt = prompt_of(16)
    engine.add("a", prompt, cache_salt="x")
    engine.run()
    engine.add("b", prompt, cache_salt="y")
    engine.run()
    engine.add("c", prompt, cache_salt="x")
    engine.run()
    assert engine.finished["b"].num_cached_tokens == 0
    assert engine.finished["c"].num_cached_tokens == 15


def test_prefix_caching_off_shares_nothing():
    engine = FakeEngine(num_gpu_blocks=30, enable_prefix_caching=False)
    engine.add("a", prompt_of(16))
    engine.step()
    engine.step()
    engine.add("b", prompt_of(16))  # while a still holds its blocks
    engine.run()
    assert engine.finished["b"].num_cached_tokens == 0
    assert engine.manager.gpu.num_cached == 0


def test_evicted_prefix_comes_back_from_the_cpu_tier():
    engine = FakeEngine(num_gpu_blocks=12, num_cpu_blocks=60, preemption_mode="swap")
    first = prompt_of(20)
    engine.add("a", first, max_tokens=2)
    engine.run()
    for i in range(8):  # enough other work to evict it from the GPU tier
        engine.add(f"x{i}", prompt_of(20, 1 + i), max_tokens=2)
        engine.run()
    engine.add("b", [*first, 5], max_tokens=2)
    engine.run()
    assert engine.finished["b"].num_cached_tokens == 20
    assert engine.scheduler.totals.kv_offload_load_bytes > 0
    assert engine.tokens["b"] == expected_tokens([*first, 5], 2, ignore_eos=True)


def test_two_loads_of_one_content_are_one():
    engine = FakeEngine(num_gpu_blocks=14, num_cpu_blocks=60, preemption_mode="swap", max_delay=0)
    first = prompt_of(20)
    engine.add("a", first, max_tokens=2)
    engine.run()
    for i in range(8):
        engine.add(f"x{i}", prompt_of(24, 1 + i), max_tokens=2)
        engine.run()
    engine.link.max_delay = 5
    loaded_before = engine.scheduler.totals.kv_offload_load_bytes
    engine.add("b", [*first, 5], max_tokens=2)
    engine.add("c", [*first, 6], max_tokens=2)
    engine.run()
    loaded = engine.scheduler.totals.kv_offload_load_bytes - loaded_before
    assert loaded == 20  # five blocks of four one-byte tokens, once
    for name, last in (("b", 5), ("c", 6)):
        assert engine.finished[name].num_cached_tokens == 20
        assert engine.tokens[name] == expected_tokens([*first, last], 2, ignore_eos=True)


@pytest.mark.parametrize("failing", ["out", "in"])
def test_failing_link_only_costs_recomputation(failing):
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=40, preemption_mode="swap")
    engine.link.fails = lambda to_cpu: to_cpu == (failing == "out")
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    engine.run()
    totals = engine.scheduler.totals
    assert totals.num_failed_transfers > 0
    assert totals.num_recomputed_tokens > 0
    for i in range(6):
        assert engine.tokens[f"r{i}"] == expected_tokens(prompt_of(6, i), 20, ignore_eos=True)


def test_swapped_bytes_come_back_equal_tail_included():
    engine = FakeEngine(num_gpu_blocks=7, num_cpu_blocks=20, preemption_mode="swap")
    engine.add("a", prompt_of(6), max_tokens=14)
    engine.add("b", prompt_of(7, 1), max_tokens=14)
    while engine.scheduler.totals.num_preemptions == 0:
        engine.step()
    (victim,) = engine.scheduler.waiting
    num_swapped = victim.num_swapped_tokens
    while not engine.manager.is_swap_settled(victim):
        engine.step()
    copies = [engine.cpu[b] for b in victim.swapped_blocks[0]]
    slots = [slot for block in copies for slot in block][:num_swapped]
    assert slots == [(t, p) for p, t in enumerate(victim.token_ids[:num_swapped])]
    assert num_swapped % 4 != 0, "the tail was part of it"
    engine.run()
    # Nothing was computed twice: all of it came back.
    assert engine.scheduler.totals.num_recomputed_tokens == 0


def test_trace_names_mode_and_both_costs_of_a_preemption():
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=40, decision_trace=True)
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    engine.run()
    preemptions = [
        d for s in engine.core.trace() for d in s["decisions"] if d["action"] == "preempt"
    ]
    assert len(preemptions) == engine.scheduler.totals.num_preemptions
    for decision in preemptions:
        assert decision["mode"] == "swap"
        assert 0 < decision["swap_seconds"] < decision["recompute_seconds"]
        assert "needs" in decision["reason"]


def test_abort_returns_every_block():
    engine = FakeEngine(num_gpu_blocks=10, num_cpu_blocks=20, preemption_mode="swap")
    for i in range(6):
        engine.add(f"r{i}", prompt_of(6, i), max_tokens=20)
    for _ in range(12):
        engine.step()
    engine.core.abort([f"r{i}" for i in range(6)] + ["unknown"])
    engine.run()
    assert engine.manager.gpu.num_free == 10
    assert engine.manager.cpu.num_free == 20


def test_impossible_requests_are_refused():
    engine = FakeEngine(num_gpu_blocks=4, max_num_queued_reqs=1)
    with pytest.raises(PromptTooLong, match=r"16 tokens.* 16 "):
        engine.add("a", prompt_of(16))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add("a", [])
    with pytest.raises(InvalidRequest, match="token id 99"):
        engine.add("a", [1, 99])
    with pytest.raises(InvalidRequest, match="token id -3"):
        engine.add("a", [1, -3])
    engine.add("a", [1])
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        engine.add("b", [1])
    engine.run()
    assert list(engine.finished) == ["a"]


def test_kv_waste_stays_under_four_percent_at_block_size_16():
    rng = random.Random(0)
    engine = FakeEngine(
        num_gpu_blocks=800,
        block_size=16,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        max_delay=0,
    )
    engine.check = lambda: None  # thousands of steps: the books are checked in other tests
    for i in range(40):
        length, new = rng.randint(100, 1024), rng.randint(100, 200)
        engine.add(f"r{i}", prompt_of(length, i), max_tokens=new)
    engine.run()
    stats = engine.core.stats()
    assert 0.0 < stats["kv_waste_perc"] < 0.04
    assert stats["kv_waste_preallocated_perc"] > 0.6


def test_samples_share_the_prompt_and_are_complete():
    engine = FakeEngine(num_gpu_blocks=40, decision_trace=True)
    prompt = prompt_of(22)
    engine.add("a", prompt, max_tokens=6, n=4)
    engine.run()
    expected = expected_tokens(prompt, 6, ignore_eos=True)
    assert [engine.tokens[name] for name in ("a", "a#1", "a#2", "a#3")] == [expected] * 4
    assert len(engine.finished) == 4
    # All but the prompt's last token was computed once.
    computed = sum(n for step in engine.core.trace() for _, _, n in step["scheduled"])
    assert computed == 21 + 4 * 6
    assert engine.manager.gpu.num_free == 40


def test_fork_copies_the_shared_tail_before_it_writes():
    engine = FakeEngine(num_gpu_blocks=40, enable_prefix_caching=False)
    engine.add("a", prompt_of(11), max_tokens=9, n=3)
    copies = []
    launch = engine.runner.launch
    engine.runner.launch = lambda plan: copies.extend(plan.block_copies) or launch(plan)
    engine.run()
    # Ten tokens are shared: two full blocks and half a third. Two of three copy that one.
    assert len(copies) == 2
    assert len({source for source, _ in copies}) == 1


def test_more_samples_than_seats_take_turns():
    engine = FakeEngine(num_gpu_blocks=40, max_num_seqs=2)
    engine.add("a", prompt_of(9), max_tokens=5, n=5)
    engine.run()
    expected = expected_tokens(prompt_of(9), 5, ignore_eos=True)
    assert list(engine.tokens.values()) == [expected] * 5


@pytest.mark.parametrize("num_gpu_blocks", [60, 21])
def test_beams_equal_a_search_on_the_tokens_alone(num_gpu_blocks):
    engine = FakeEngine(
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=60,
        preemption_mode="swap",
        max_num_seqs=16,
    )
    for i in range(3):
        engine.add(f"b{i}", prompt_of(7 + i, i), 12, n=4, use_beam_search=True, ignore_eos=False)
    engine.add("other", prompt_of(9, 9), max_tokens=14)
    engine.run()
    for i in range(3):
        names = [f"b{i}", f"b{i}#1", f"b{i}#2", f"b{i}#3"]
        expected = expected_beams(prompt_of(7 + i, i), 4, 12)
        assert [engine.tokens[name] for name in names] == expected
    assert engine.tokens["other"] == expected_tokens(prompt_of(9, 9), 14, ignore_eos=True)
    assert (engine.scheduler.totals.num_preemptions > 0) == (num_gpu_blocks == 21)
    assert engine.manager.gpu.num_free == num_gpu_blocks


def test_search_that_could_never_be_held_is_refused():
    engine = FakeEngine(num_gpu_blocks=10, max_num_seqs=4)
    with pytest.raises(InvalidRequest, match=r"4 beams .* 12 KV blocks, but there are 4 and 10"):
        engine.add("a", prompt_of(4), max_tokens=8, n=4, use_beam_search=True)
    with pytest.raises(InvalidRequest, match=r"5 beams"):
        engine.add("a", prompt_of(1), max_tokens=1, n=5, use_beam_search=True)


def test_one_output_can_be_aborted_alone():
    engine = FakeEngine(num_gpu_blocks=40)
    engine.add("a", prompt_of(9), max_tokens=8, n=3)
    for _ in range(4):
        engine.step()
    engine.core.abort([], [("a", 1)])
    engine.run()
    assert sorted(engine.finished) == ["a", "a#2"]
    assert len(engine.tokens["a#1"]) < 8


@st.composite
def engines(draw):
    """Settings under which some tens of requests of up to 24 tokens do not fit at once."""
    block_size = draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "block_size": block_size,
        "num_gpu_blocks": draw(st.integers(-(-25 // block_size), 45 // block_size)),
        "num_cpu_blocks": draw(st.sampled_from([60, 20, 5, 1, 0])),
        "preemption_mode": draw(st.sampled_from(["swap", "auto", "recompute"])),
        "swap_is_cheaper": draw(st.booleans()),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
        "max_num_seqs": draw(st.integers(3, 6)),
        "max_num_batched_tokens": draw(st.integers(6, 24)),
        "max_delay": draw(st.integers(0, 5)),
        "failure": draw(st.sampled_from([0.0, 0.3])),
        "max_overtaken": draw(st.integers(0, 4)),
        "seed": draw(st.integers(0, 10**6)),
    }


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(settings=engines(), num_requests=st.integers(4, 16), workload=st.integers(0, 10**9))
def test_any_history_keeps_the_invariants_and_the_tokens(settings, num_requests, workload):
    # The workload is drawn from a seed: hypothesis alone favours histories too small to preempt.
    rng = random.Random(workload)
    engine = FakeEngine(**settings)
    expected, scored = {}, {}
    events: list[tuple[int, str, tuple]] = []
    clock = 0
    for i in range(num_requests):
        clock += rng.choice([0, 0, 0, 1, 3])
        name, length, max_tokens = f"r{i}", rng.randint(1, 14), rng.randint(1, 10)
        prompt = [*prompt_of(length - 1, rng.randrange(3)), rng.randint(1, 3)]
        kwargs = {"priority": rng.randrange(3), "ignore_eos": rng.random() < 0.8}
        if rng.random() < 0.3:
            kwargs["n"] = rng.randint(2, 4)
            if rng.random() < 0.3:
                kwargs["best_of"] = 4
        elif rng.random() < 0.15:
            kwargs |= {"n": min(2, len(prompt)), "use_beam_search": True, "ignore_eos": False}
            prompt, max_tokens = prompt[-4:], min(max_tokens, 6)
        if "use_beam_search" not in kwargs and rng.random() < 0.3:
            kwargs["prompt_logprobs"] = 0
        events.append((clock, name, (prompt, max_tokens, kwargs)))
        if rng.random() < 0.2:
            events.append((clock + rng.randrange(30), name, ()))
        elif "use_beam_search" in kwargs:
            beams = expected_beams(prompt, kwargs["n"], max_tokens)
            expected |= {output_name(name, i): tokens for i, tokens in enumerate(beams)}
        else:
            tokens = expected_tokens(prompt, max_tokens, ignore_eos=kwargs["ignore_eos"])
            expected |= {output_name(name, i): tokens for i in range(kwargs.get("n", 1))}
            if "prompt_logprobs" in kwargs:
                scored[name] = prompt_logprobs(prompt, prompt[1:])
    for step in range(max(when for when, *_ in events) + 1):
        for when, name, request in events:
            if when == step and request:
                prompt, max_tokens, kwargs = request
                engine.add(name, prompt, max_tokens, **kwargs)
            elif when == step:
                engine.core.abort([name])
        engine.step()
    engine.run()
    for name, tokens in expected.items():
        assert engine.tokens[name] == tokens, name
    for name, logprobs in scored.items():
        assert engine.prompt_logprobs[name] == logprobs, name
    assert engine.prompt_logprobs.keys() <= {name for _, name, _ in events}
    assert engine.manager.gpu.num_free == engine.manager.gpu.num_blocks
    assert engine.manager.cpu.num_free == engine.manager.cpu.num_blocks


def test_long_prompts_beside_decodes_go_in_chunks_of_bounded_time():
    def shares(**settings):
        engine = FakeEngine(
            num_gpu_blocks=400, decision_trace=True, max_num_batched_tokens=1000, **settings
        )
        engine.add("short", prompt_of(4), max_tokens=40)
        engine.step()
        engine.add("long", prompt_of(900, 1), max_tokens=2)
        engine.run()
        assert engine.tokens["short"] == expected_tokens(prompt_of(4), 40, ignore_eos=True)
        return [n for step in engine.core.trace() for i, _, n in step["scheduled"] if i == "long"]

    assert shares(max_prefill_ms=0)[0] == 900
    # 100 parameters at a million FLOP/s, and attention over up to 512 tokens.
    seconds = (200 * 512 + 2 * 512**2) / 1e6
    for milliseconds, tokens in ((500, int(0.5 / seconds * 512)), (25, 128)):
        limited = shares(max_prefill_ms=milliseconds)
        assert limited[0] == tokens
        assert sum(limited) == 901
    # Alone, a prompt is not held back.
    engine = FakeEngine(num_gpu_blocks=400, decision_trace=True, max_num_batched_tokens=1000)
    engine.add("long", prompt_of(900, 1), max_tokens=2)
    engine.run()
    assert engine.core.trace()[0]["scheduled"] == [("long", 0, 900)]
