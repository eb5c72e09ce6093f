"""The benchmarks, on a model so small that their figures say nothing: only that they measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_module(name, *arguments, **variables):
    """What ``python -m benchmarks.NAME`` prints, from the repository's root."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def benchmarks():
    """The package, which is not installed: its modules by name."""
    sys.path.insert(0, str(ROOT))
    try:
        import benchmarks.report
        import benchmarks.run
    finally:
        if str(ROOT) in sys.path:
            sys.path.remove(str(ROOT))
    return benchmarks


def test_requests_are_equal_for_equal_seeds_and_new_for_others(benchmarks):
    mixed = benchmarks.workloads.mixed
    first, again, other = mixed(8, 4, 30, "a"), mixed(8, 4, 30, "a"), mixed(8, 4, 30, "b")
    assert first == again
    assert [len(r.prompt) for r in first] == [len(r.prompt) for r in other]
    assert [r.num_new for r in first] == [r.num_new for r in other]
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert all(4 <= len(r.prompt) <= 30 and 4 <= r.num_new <= 30 for r in first)


def test_requests_behind_a_prefix_share_exactly_it(benchmarks):
    requests = benchmarks.workloads.shared_prefix(3, 20, 5, 2, "a")
    assert len({tuple(r.prompt[:20]) for r in requests}) == 1
    assert len({tuple(r.prompt[20:]) for r in requests}) == 3
    assert benchmarks.workloads.num_blocks(requests, 16) == 3 * 2


def test_summary_keeps_all_values_and_ratios_are_taken_in_pairs(benchmarks):
    tables = benchmarks.tables
    assert tables.summary([3.0, 1.0, 2.0]) == {
        "median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]
    }  # fmt: skip
    # The medians' own ratio would be 1.
    assert tables.ratios([1.0, 2.0, 4.0], [2.0, 4.0, 1.0])["median"] == 0.5
    assert tables.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert tables.percentile([7.0], 0.99) == 7.0


def test_pieces_of_a_measurement_are_joined_if_they_measure_the_same(benchmarks):
    def piece(rates, shape="tiny"):
        return {
            "machine": benchmarks.record.machine(),
            "flags": {"shape": shape, "rounds": len(rates)},
            "busy_before_percent": [1.0],
            "seconds": 10.0,
            "results": [{"engine": "a", "tokens/s": benchmarks.tables.summary(rates), "num": 3}],
        }

    joined = benchmarks.run._join(piece([3.0, 1.0]), piece([5.0]))
    assert joined["flags"] == {"shape": "tiny", "rounds": 3}
    assert (joined["busy_before_percent"], joined["seconds"]) == ([1.0, 1.0], 20.0)
    [row] = joined["results"]
    assert (row["engine"], row["num"], row["tokens/s"]["values"]) == ("a", 3, [3.0, 1.0, 5.0])
    with pytest.raises(SystemExit, match="other flags"):
        benchmarks.run._join(piece([1.0]), piece([1.0], shape="llama-134m"))


def test_tables_show_intervals_and_leave_missing_figures_empty(benchmarks):
    rows = [
        {"engine": "a", "rate": benchmarks.tables.summary([1.0, 2.0, 3.0])},
        {"engine": "b", "hits": 1234},
    ]
    assert benchmarks.tables.text(rows).splitlines() == [
        "engine  rate                 hits",
        "a       2.00 (1.00 to 3.00)",
        "b                            1,234",
    ]
    assert benchmarks.tables.markdown(rows).splitlines()[2] == "| a | 2.00 (1.00 to 3.00) |  |"


def test_static_batches_hold_slots_for_their_longest(benchmarks):
    request = benchmarks.workloads.Request
    allocated, filled = benchmarks.engines._static_slots([
        request([1] * 4, 2), request([1] * 2, 1)
    ])  # fmt: skip
    assert (allocated, filled) == (2 * 4 + 2 * 5, 4 + 5 + 2)


def test_planning_a_step_without_a_model_takes_every_sequence(benchmarks):
    durations = benchmarks.null_engine.step_milliseconds(16, num_steps=20)
    assert len(durations) == 20
    assert all(0 < ms < 1000 for ms in durations)


def test_engines_are_compared_and_a_missing_one_is_named(tmp_path):
    done = run_module(
        "run", "throughput", "--shape", "tiny", "--rounds", 2, "--num-requests", 4,
        "--longest", 24, "--out", tmp_path,
        "--engine", "pagetier", "--engine", "hf-generate", "--engine", "vllm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "vLLM is not installed here" not in done.stderr:
        pytest.fail(done.stderr)
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert written["flags"]["shape"] == "tiny"
    assert written["machine"]["versions"]["torch"]
    rows = {row["engine"]: row for row in written["results"]}
    assert list(rows) == ["pagetier", "hf-generate"]
    assert len(rows["pagetier"]["output tokens/s"]["values"]) == 2
    assert rows["pagetier"]["first / this"]["median"] == 1.0
    assert str(ROOT) not in (tmp_path / "throughput.json").read_text()


def test_pressure_preempts_and_compares_with_as_many_sequences(tmp_path):
    done = run_module(
        "run", "pressure", "--shape", "tiny", "--rounds", 1, "--num-requests", 8,
        "--longest", 48, "--shares", 0.3, "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "pressure.json").read_text())["results"]
    swap, auto, recompute = rows
    assert swap["swaps"] > 0
    assert recompute["recomputations"] > 0
    assert swap["recomputations"] == recompute["swaps"] == 0
    assert auto["swaps"] + auto["recomputations"] > 0
    assert all(1 <= row["max_num_seqs with ample KV"] < 8 for row in rows)


def test_rounded_keys_and_values_are_compared_with_exact_ones(tmp_path):
    done = run_module(
        "kv_rounding", "--device", "cpu", "--num", 2, "--new-tokens", 4, "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "kv_rounding.json").read_text())["results"]
    assert list(results) == ["auto", "int8", "fp8"]
    assert results["auto"]["off_99_percent"] == 0
    assert results["auto"]["num_equal_outputs"] == results["auto"]["num_outputs"] == 2
    assert 0 < results["int8"]["off_median"] < results["fp8"]["off_median"] < 0.1
    assert results["int8"]["kv_token_bytes"] < 0.3 * results["auto"]["kv_token_bytes"]


def test_every_kernel_case_runs_at_a_toy_size(tmp_path):
    # FlashAttention-3 cannot run here: this only shows that it would be called, and how.
    peer = tmp_path / "flash_attn_interface.py"
    peer.write_text("def _fwd(q, k, v, out, starts, _, used, *more): assert k.shape == v.shape\n")
    done = run_module(
        "kernels", "--device", "cpu", "--tiny", "--tune", "--out", tmp_path,
        TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT / 'src'}:{tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {
        "attention": 14, "projections": 20, "quantised": 6, "copies": 5, "sampling": 5,
        "elementwise": 12,
    }  # fmt: skip
    for operation, num_cases in expected.items():
        rows = json.loads((tmp_path / f"kernels_{operation}_cpu.json").read_text())["results"]
        assert len(rows) >= num_cases
        assert done.stdout.count(f"\n{operation}\n") == 1
        notes = [row["note"] for row in rows if "note" in row]
        assert all(note.startswith("skipped: ") for note in notes), notes
    tuned = json.loads((tmp_path / "tuned_cpu.json").read_text())["operations"]
    assert [entry["when"]["num_tokens"] for entry in tuned["linear"]] == [[1, 1], [9, 16]]
    assert len(tuned["quantised_linear"]) == 2 * 2
    written = json.loads((tmp_path / "kernels_attention_cpu.json").read_text())
    assert written["ceilings"]["read_triton"] > 0
    rows = [row for row in written["results"] if "KV" not in row["case"]]
    assert all("FA3 us" in row for row in rows)


def test_kernel_cases_not_begun_in_time_and_failing_ones_are_said_to_be(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import torch
    from benchmarks.kernels import bench, ceilings

    def fail(_):
        raise RuntimeError("the kernel is broken")

    def skip(_):
        raise bench.SkipCase("there is none")

    fast, slow = bench.Target("us", at_most=60), bench.Target("of read", at_least=0.9)
    cases = [
        bench.Case("bad", fail),
        bench.Case("wrong", lambda _: {"us": 1.0, "error": float("nan")}),
        bench.Case("none", skip),
        bench.Case("good", lambda _: {"us": 50.0, "of read": 0.8}, (fast, slow)),
    ]
    cpu = torch.device("cpu")
    at = bench.Bench(cpu, ceilings.Ceilings(None, 1.0, 1.0, 1.0, 1.0, 1.0), tiny=True)
    run = bench.Run("some", "kernels_some", {}, tmp_path)
    assert run.measure(at, cases, float("inf"))
    assert run.measure(at, [bench.Case("late", fail)], 0.0)
    rows = json.loads((tmp_path / "kernels_some.json").read_text())["results"]
    assert [row.get("note") for row in rows] == [
        "failed: RuntimeError: the kernel is broken", "failed: off the reference by nan",
        "skipped: there is none", None, "not run: no time was left",
    ]  # fmt: skip
    assert rows[3]["target"] == "us <= 60: reached; of read >= 0.9: missed"


def test_report_replaces_what_is_between_its_marks_only(benchmarks, tmp_path):
    result = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {
            "gpu": None,
            "num_cpus": 2,
            "versions": {"torch": "1", "transformers": "2", "torchserve": "3"},
        },
        "flags": {"shape": "tiny", "dtype": "float32", "rounds": 4},
        "results": [{"engine": "a", "rate": 2.5}],
    }
    (tmp_path / "speed.json").write_text(json.dumps(result))
    document = "Before\n<!-- table: speed -->\nold\n<!-- end -->\nAfter\n"
    rendered = benchmarks.report.render(document, tmp_path)
    assert rendered == (
        "Before\n<!-- table: speed -->\n| engine | rate |\n| --- | --- |\n| a | 2.50 |\n\n"
        "2026-01-02, 2 CPU cores, tiny in float32, 4 rounds; torch 1, transformers 2, "
        "torchserve 3.\n<!-- end -->\nAfter\n"
    )
    assert benchmarks.report.render(rendered, tmp_path) == rendered
