"""Clients are answered whatever dies, blocks come back whoever leaves, and memory stays flat.

Each test is small where all tests run. ``PAGETIER_KILLS``, ``PAGETIER_LEAVERS`` and
``PAGETIER_SOAK_MINUTES`` give them the sizes that the project promises (100, 1000 and 60), and with
``PAGETIER_RESULTS`` they write what came of it into that folder, ``benchmarks/results`` say.
"""

import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.live import MODEL_FOLDER, NAME, SETTINGS, live_server, wait_for
from support.load import FULL, PROMPTS, Client, Leaver, Load
from support.memory import MemoryWatch, growth

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("reliability")]

NUM_KILLS = int(os.environ.get("PAGETIER_KILLS", "4"))
NUM_LEAVERS = int(os.environ.get("PAGETIER_LEAVERS", "100"))
SOAK_MINUTES = float(os.environ.get("PAGETIER_SOAK_MINUTES", "1.5"))
SEED = int(os.environ.get("PAGETIER_SEED", "0"))
RESTART_TIMEOUT_S = 120.0
MIB = 2**20
# What each process may grow by after its warm-up, in bytes: the resolution of the test, since heaps
# and arenas settle slowly. Java's grows up to its limit as its collector pleases.
MAX_GROWTH = {"engine": 4 * MIB, "worker": 4 * MIB, "frontend": 64 * MIB}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("reliability")) as live:
        yield live
        check_idle(live)


def check_idle(server):
    """Assert that nothing runs, and no block is held."""
    stats = server.stats()
    assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    assert stats["num_gpu_blocks_free"] == stats["num_gpu_blocks"]


def write_result(name, *rows):
    """Add rows to a result where they are wanted, for ``benchmarks.report`` to show."""
    folder = os.environ.get("PAGETIER_RESULTS")
    if not folder:
        return
    root = str(Path(__file__).parents[2])
    sys.path.insert(0, root)
    try:
        from benchmarks import record
    finally:
        if root in sys.path:
            sys.path.remove(root)
    earlier = record.load(name, Path(folder)) or {"results": []}
    flags = {"shape": MODEL_FOLDER.name, "dtype": SETTINGS["dtype"], "rounds": 1}
    result = {"flags": flags, "results": [*earlier["results"], *rows]}
    record.save(name, result, Path(folder))


def spread(values):
    """Median, lowest and highest, as ``benchmarks.tables`` shows them."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def test_every_client_is_answered_whatever_is_killed(server):
    rng = random.Random(SEED)
    recoveries = {"engine": [], "worker": []}
    victims = [name for name in recoveries for _ in range(NUM_KILLS // 2)]
    rng.shuffle(victims)
    load = Load(Client(server), num_threads=8)
    with load.running():
        wait_for(lambda: load.has_answered_since(0), 30.0, "nobody is answered")
        for number, name in enumerate(victims):
            time.sleep(rng.uniform(0.0, 0.5))
            victim = server.engine() if name == "engine" else server.worker()
            killed = time.monotonic()
            victim.kill()
            recoveries[name].append(
                wait_for(
                    lambda since=killed: load.has_answered_since(since),
                    RESTART_TIMEOUT_S,
                    f"after kill {number}, of the {name}, nobody was answered",
                )
            )
    load.check()
    assert len(server.server.worker_pids) == 1
    counts = load.counts
    write_result(
        "reliability_kills",
        {
            **{f"{name} killed, times": len(times) for name, times in recoveries.items()},
            "full answers": counts.pop(FULL),
            "clear errors": sum(counts.values()),
            "s until answered again": spread([t for times in recoveries.values() for t in times]),
        },
    )


def test_clients_that_leave_midway_hold_no_block_a_second_later(server):
    rng = random.Random(SEED)
    log, num_left, delays = server.server.log_path, 0, []
    with log.open() as lines:
        lines.seek(0, os.SEEK_END)
        while num_left < NUM_LEAVERS:
            leavers = [
                Leaver(server, stream=rng.random() < 0.7)
                for _ in range(rng.choice([1, 2, 4, 8, 16]))
            ]
            for leaver in leavers:
                leaver.read_beginning()
            time.sleep(rng.uniform(0.0, 0.05))
            left = time.monotonic()
            for leaver in leavers:
                leaver.leave(abruptly=rng.random() < 0.5)
            num_left += len(leavers)
            # The log tells of it without disturbing: to ask the server would wake it up.
            num_missed = len(leavers)
            while num_missed:
                num_missed -= sum("finish=abort" in line for line in lines.readlines())
                assert time.monotonic() - left < 10.0, f"{num_missed} have left unnoticed"
                time.sleep(0.01)
            check_idle(server)
            delays.append(time.monotonic() - left)
    assert max(delays) < 1.0, sorted(delays)[-10:]
    write_result(
        "reliability_leavers",
        {"clients that left": num_left, "s until all blocks were back": spread(delays)},
    )


def test_memory_stays_flat_under_mixed_load(server):
    processes = {
        "frontend": psutil.Process(server.server.pid),
        "worker": server.worker(),
        "engine": server.engine(),
    }
    is_over = threading.Event()
    broken = []

    def disturb(rng=random.Random(SEED)):  # noqa: B008 - one generator, used by this thread alone
        """Clients that leave, wrong requests, statistics, several outputs, grammars, counts."""
        bodies = [
            {"max_tokens": 0},
            {"max_tokens": 8, "n": 3, "temperature": 1.0},
            {"max_tokens": 8, "logprobs": 3, "prompt": "x" * 300},
            {"max_tokens": 12, "structured_outputs": {"choice": ["yes", "no"]}},
            {"max_tokens": 8, "n": 2, "use_beam_search": True, "temperature": 0},
        ]
        try:
            while not is_over.wait(0.05):
                leaver = Leaver(server, stream=rng.random() < 0.7)
                leaver.read_beginning()
                leaver.leave(abruptly=rng.random() < 0.5)
                body = {"model": NAME, "prompt": rng.choice(PROMPTS), **rng.choice(bodies)}
                answer = server.post("completions", json.dumps(body))
                assert answer.status_code in (200, 400), answer.text
                server.stats()
        except Exception as exc:
            broken.append(exc)

    load = Load(Client(server), num_threads=8)
    disturber = threading.Thread(target=disturb)
    with load.running(), MemoryWatch(processes) as watch:
        disturber.start()
        try:
            is_over.wait(60 * SOAK_MINUTES)
        finally:
            is_over.set()
            disturber.join()
    load.check()
    assert not broken, broken
    grown = {name: growth(samples) for name, samples in watch.samples.items()}
    write_result(
        "reliability_soak",
        *(
            {
                "process": name,
                "minutes": SOAK_MINUTES,
                "answers": sum(load.counts.values()),
                "MiB at the end": watch.samples[name][-1][1] / MIB,
                "MiB grown after warming up": value / MIB,
                "MiB allowed": MAX_GROWTH[name] / MIB,
            }
            for name, value in grown.items()
        ),
    )
    assert load.counts.keys() == {"full"}, load.counts
    assert all(grown[name] < MAX_GROWTH[name] for name in grown), grown
