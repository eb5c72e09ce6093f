"""``python -m benchmarks.run WORKLOAD --engine NAME``: measures, prints a table, writes JSON.

Owns the command and the workloads that need no server (``serving`` has the others). Each engine
lives in a process of its own (``worker``), stays alive, and is warm before anything is timed. In
each round every engine gets the same requests, one engine after the other, so that whatever else
slows the machine down meets all of them. A figure is the median over the rounds; beside it stand
the lowest and the highest, and ratios are taken within a round.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import engines, null_engine, record, serving, tables, workloads
from benchmarks.engines import Result
from benchmarks.shapes import SHAPES, write_config
from benchmarks.tables import Row
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import Request

_BLOCK_SIZE = 16
# Room for all requests of any workload at once, by default.
_AMPLE_TOKENS = 32768
_MAX_MODEL_LEN = 1024
_SWAP_SPACE_GIB = 2.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the things compared: an engine with its options, under the name in the table."""

    name: str
    engine: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, engine: str, **options: Any) -> "Variant":
        """A variant with these options."""
        return cls(name, engine, tuple(sorted(options.items())))


class Bench:
    """What all workloads share: flags, models, and the engines that are alive.

    Args:
        args: the command's flags.
        folder: where models are made.

    Attributes:
        workload: the name of the one under way.
    """

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path) -> None:
        self.args = args
        self.folder = folder
        self.workload = ""
        self._stack = contextlib.ExitStack()
        self._workers: dict[tuple[str, Variant], Worker] = {}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def model(self, shape: str) -> pathlib.Path:
        """The folder of a model of that shape."""
        folder = self.folder / shape
        return folder if folder.exists() else write_config(shape, folder)

    def options(self, engine: str, **options: Any) -> dict[str, Any]:
        """An engine's options: those of every run, and ``options``."""
        common: dict[str, Any] = {"dtype": self.args.dtype, "max_model_len": _MAX_MODEL_LEN}
        if engine == "pagetier":
            block_size = options.get("block_size", _BLOCK_SIZE)
            common |= {
                "num_gpu_blocks_override": _AMPLE_TOKENS // block_size,
                "swap_space": _SWAP_SPACE_GIB,
            }
        return {**common, **options}

    def start(self, shape: str, variant: Variant) -> Worker:
        """A fresh process with that variant; the caller closes it.

        Raises:
            WorkerError: the engine is missing or could not start.
        """
        return Worker(
            variant.engine,
            self.model(shape),
            self.options(variant.engine, **dict(variant.options)),
            self.args.threads,
        )

    def worker(self, shape: str, variant: Variant) -> Worker:
        """The process with that variant, started and warm; it stays alive for other workloads."""
        key = (shape, dataclasses.replace(variant, name=""))
        if key not in self._workers:
            worker = self._stack.enter_context(self.start(shape, variant))
            worker.run(workloads.mixed(4, 8, 24, "warm-up"))
            self._workers[key] = worker
        return self._workers[key]

    def close(self, shape: str, variant: Variant) -> None:
        """End that variant's process, to have its memory back."""
        worker = self._workers.pop((shape, dataclasses.replace(variant, name="")), None)
        if worker is not None:
            worker.close()

    def available(self, shape: str, variants: Sequence[Variant]) -> list[Variant]:
        """The variants whose engines could be started; says of the others why not."""
        found = []
        for variant in variants:
            try:
                self.worker(shape, variant)
                found.append(variant)
            except WorkerError as exc:
                print(f"{variant.name}: {exc}", file=sys.stderr, flush=True)
        return found

    def compare(
        self,
        shape: str,
        variants: Sequence[Variant],
        make_requests: Callable[[int], list[Request]],
        num_rounds: int | None = None,
    ) -> dict[str, list[Result]]:
        """Run each round's requests in every variant, in turn; results by the variant's name."""
        results: dict[str, list[Result]] = {variant.name: [] for variant in variants}
        for round_ in range(num_rounds or self.args.rounds):
            requests = make_requests(round_)
            for variant in variants:
                result = self.worker(shape, variant).run(requests)
                results[variant.name].append(result)
                self.say(f"round {round_ + 1}, {variant.name}: {result.seconds:.2f} s")
        return results

    def peers(self) -> list[Variant]:
        """The engines that were asked for, as they are."""
        return [Variant.of(name, name) for name in self.args.engine]

    def mixed(self, round_: int) -> list[Request]:
        """A round's requests of mixed lengths, which no other workload has used."""
        args = self.args
        return workloads.mixed(
            args.num_requests, args.shortest, args.longest, f"{self.workload} {round_}"
        )

    def say(self, line: str) -> None:
        """Tell how far it has come."""
        if not self.args.quiet:
            print(f"  {line}", file=sys.stderr, flush=True)


def _rates(results: Sequence[Result]) -> list[float]:
    return [result.output_tokens_per_second for result in results]


def _milliseconds(results: Sequence[Result]) -> list[float]:
    return [result.seconds * 1e3 for result in results]


def _mean(results: Sequence[Result], key: str) -> float:
    return sum(float(result.stats[key]) for result in results) / len(results)


def _by_rate(results: dict[str, list[Result]]) -> list[Row]:
    """A row for each variant: its rate, and how many times it the first one's is."""
    first = next(iter(results.values()))
    return [
        {
            "engine": name,
            "output tokens/s": tables.summary(_rates(runs)),
            "first / this": tables.ratios(_rates(first), _rates(runs)),
        }
        for name, runs in results.items()
    ]


def throughput(bench: Bench) -> list[Row]:
    """Requests of mixed lengths, all at once."""
    shape = bench.args.shape
    return _by_rate(bench.compare(shape, bench.available(shape, bench.peers()), bench.mixed))


def seed_latency(bench: Bench) -> list[Row]:
    """One prompt of 14 tokens, 32 and 256 new ones."""
    shape = "tiny" if bench.args.shape == "tiny" else "opt-125m"
    rows = []
    variants = bench.available(shape, bench.peers())
    for num_new in (32, 256):
        results = bench.compare(
            shape,
            variants,
            functools.partial(_one_prompt, num_new),
        )
        first = next(iter(results.values()))
        rows += [
            {
                "new tokens": num_new,
                "engine": name,
                "ms": tables.summary(_milliseconds(runs)),
                "this / first": tables.ratios(_milliseconds(runs), _milliseconds(first)),
            }
            for name, runs in results.items()
        ]
    for variant in variants:
        bench.close(shape, variant)
    return rows


def _one_prompt(num_new: int, round_: int) -> list[Request]:
    return workloads.equal(1, 14, num_new, f"seed-latency {round_}")


def pressure(bench: Bench) -> list[Row]:
    """KV for a part of the demand, beside ample KV with as many sequences at once."""
    args = bench.args
    first_round = bench.mixed(-1)
    longest = max(r.num_tokens for r in first_round)
    rows = []
    for share in args.shares:
        demand = workloads.num_blocks(first_round, _BLOCK_SIZE)
        # One sequence of the greatest length must fit.
        num_blocks = max(int(demand * share), -(-longest // _BLOCK_SIZE) + 1)
        pressed, limits = [], {}
        for mode in ("swap", "auto", "recompute"):
            variant = Variant.of(
                f"{mode}, KV for {100 * share:.0f} %",
                "pagetier",
                preemption_mode=mode,
                num_gpu_blocks_override=num_blocks,
                max_model_len=longest,
            )
            pressed.append(variant)
            batch = bench.worker(args.shape, variant).run(first_round).stats["mean_running_batch"]
            limits[variant] = max(1, round(batch))
            bench.say(f"{variant.name}: mean running batch {batch:.2f}")
        ample = {
            limit: Variant.of(f"ample, max_num_seqs={limit}", "pagetier", max_num_seqs=limit)
            for limit in sorted(set(limits.values()))
        }
        results = bench.compare(args.shape, [*ample.values(), *pressed], bench.mixed)
        for variant in pressed:
            runs, beside = results[variant.name], results[ample[limits[variant]].name]
            rows.append({
                "preemption_mode": variant.name,
                "output tokens/s": tables.summary(_rates(runs)),
                "max_num_seqs with ample KV": limits[variant],
                "ample KV, output tokens/s": tables.summary(_rates(beside)),
                "pressed / ample": tables.ratios(_rates(runs), _rates(beside)),
                "swaps": _mean(runs, "num_preemptions_swap"),
                "recomputations": _mean(runs, "num_preemptions_recompute"),
                "tokens recomputed": _mean(runs, "num_recomputed_tokens"),
            })  # fmt: skip
        for variant in [*ample.values(), *pressed]:
            bench.close(args.shape, variant)
    return rows


def shared_prefix(bench: Bench) -> list[Row]:
    """Requests behind one long common prefix."""
    args = bench.args
    num_requests, prefix_len = args.num_requests, 2 * args.longest

    def requests(round_: int) -> list[Request]:
        return workloads.shared_prefix(num_requests, prefix_len, 16, 16, f"shared {round_}")

    variants = bench.peers()
    if "pagetier" in args.engine:
        off = Variant.of("pagetier, no prefix caching", "pagetier", enable_prefix_caching=False)
        variants.insert(1, off)
    return _by_rate(bench.compare(args.shape, bench.available(args.shape, variants), requests))


def multi_turn(bench: Bench) -> list[Row]:
    """Conversations whose every turn sends all that was said before."""
    args = bench.args
    num_talks = max(1, args.num_requests // 4)
    num_said, num_answered, num_turns = args.longest // 4, args.longest // 8, 4
    variants = bench.peers()
    if "pagetier" in args.engine:
        demand = num_talks * num_turns * (num_said + num_answered) // _BLOCK_SIZE
        floor = num_turns * (num_said + num_answered) // _BLOCK_SIZE + 1
        small = {"num_gpu_blocks_override": max(demand // 4, floor)}
        small["max_model_len"] = floor * _BLOCK_SIZE
        variants[1:1] = [
            Variant.of("pagetier, GPU tier for a quarter", "pagetier", **small),
            Variant.of("pagetier, no prefix caching", "pagetier", enable_prefix_caching=False),
        ]
    variants = bench.available(args.shape, variants)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    last: dict[str, list[float]] = {variant.name: [] for variant in variants}
    hits: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for round_ in range(args.rounds):
        histories: dict[str, list[list[int]]] = {v.name: [[]] * num_talks for v in variants}
        totals = dict.fromkeys(histories, 0.0)
        for turn in range(num_turns):
            said = workloads.equal(num_talks, num_said, num_answered, f"turn {round_} {turn}")
            for variant in variants:
                prompts = [
                    Request(history + request.prompt, request.num_new)
                    for history, request in zip(histories[variant.name], said, strict=True)
                ]
                result = bench.worker(args.shape, variant).run(prompts)
                histories[variant.name] = [
                    request.prompt + answer
                    for request, answer in zip(prompts, result.token_ids, strict=True)
                ]
                totals[variant.name] += result.seconds
                if turn == num_turns - 1:
                    last[variant.name].append(result.seconds)
                    queries = result.stats.get("prefix_cache_queries")
                    if queries:
                        hits[variant.name].append(result.stats["prefix_cache_hits"] / queries)
        for name, total in totals.items():
            seconds[name].append(total)
            bench.say(f"round {round_ + 1}, {name}: {total:.2f} s")
    return [
        {
            "engine": variant.name,
            f"s for {num_turns} turns of {num_talks}": tables.summary(seconds[variant.name]),
            "s for the last turn": tables.summary(last[variant.name]),
            "of it found in the cache": tables.summary(hits[variant.name])
            if hits[variant.name]
            else None,
        }
        for variant in variants
    ]


def block_size(bench: Bench) -> list[Row]:
    """The size of a block: speed against slots that are allocated and empty."""
    args = bench.args
    variants = [Variant.of(str(size), "pagetier", block_size=size) for size in (1, 4, 16, 64, 256)]
    results = bench.compare(args.shape, bench.available(args.shape, variants), bench.mixed)
    for variant in variants:
        if variant.name != str(_BLOCK_SIZE):
            bench.close(args.shape, variant)
    return [
        {
            "block_size": int(name),
            "output tokens/s": tables.summary(_rates(runs)),
            "empty slots, %": 100 * _mean(runs, "kv_waste"),
            "reserving max_model_len, %": 100 * _mean(runs, "kv_waste_preallocated"),
        }
        for name, runs in results.items()
    ]


def memory(bench: Bench) -> list[Row]:
    """The process's memory at its peak, and KV slots allocated and empty, in fresh processes."""
    args = bench.args
    rows = []
    for variant in bench.peers():
        try:
            with bench.start(args.shape, variant) as worker:
                result = worker.run(bench.mixed(0))
                loaded, last = worker.loaded, worker.last
        except WorkerError as exc:
            print(f"{variant.name}: {exc}", file=sys.stderr, flush=True)
            continue
        waste = result.stats.get("kv_waste")
        rows.append({
            "engine": variant.name,
            "MiB with the model loaded": loaded.memory_bytes / 2**20,
            "MiB at the peak of the run": last.peak_memory_bytes / 2**20,
            "MiB more": (last.peak_memory_bytes - loaded.memory_bytes) / 2**20,
            "empty KV slots, %": None if waste is None else 100 * waste,
        })  # fmt: skip
    return rows


def overhead(bench: Bench) -> list[Row]:
    """What the engine costs beside the model: planning, and a step outside the forward pass."""
    counts = (1, 64, 256, 1024)
    milliseconds = {count: null_engine.step_milliseconds(count) for count in counts}
    shape = bench.args.shape
    [variant] = bench.available(shape, [Variant.of("pagetier", "pagetier")])
    shares = []
    for round_ in range(bench.args.rounds):
        requests = workloads.equal(32, 16, 48, f"overhead {round_}")
        shares.append(bench.worker(shape, variant).run(requests).stats["outside_forward"])
    return [
        *(
            {
                "what": f"a decode of {count} sequences with a device that does nothing, ms",
                "median": tables.percentile(durations, 0.5),
                "99 %": tables.percentile(durations, 0.99),
            }
            for count, durations in milliseconds.items()
        ),
        {
            "what": "time outside the model's forward pass, 32 decoding sequences, %",
            "median": 100 * tables.percentile(shares, 0.5),
            "99 %": None,
        },
    ]


def serve(bench: Bench) -> list[Row]:
    """Through TorchServe's REST interface: beside the offline rate, and by Poisson arrivals."""
    args = bench.args
    offline = Variant.of("offline", "pagetier")
    rows = []
    with serving.server(bench.model(args.shape), bench.options("pagetier")) as server:
        serving.run(server, workloads.mixed(4, 8, 24, "warm-up"))
        served, beside, requests_per_second = [], [], 0.0
        for round_ in range(args.rounds):
            requests = bench.mixed(round_)
            alone = bench.worker(args.shape, offline).run(requests)
            beside.append(alone.output_tokens_per_second)
            requests_per_second = len(requests) / alone.seconds
            load = serving.run(server, requests)
            served.append(load.tokens_per_second)
            bench.say(f"round {round_ + 1}: {beside[-1]:.1f} offline, {served[-1]:.1f} served")
        rows.append({
            "load": f"{args.num_requests} at once",
            "output tokens/s": tables.summary(served),
            "served / offline": tables.ratios(served, beside),
            **load.latencies(),
        })  # fmt: skip
        for share in args.arrivals:
            load = serving.run(
                server,
                bench.mixed(round(1000 * share)),
                requests_per_second=share * requests_per_second,
            )
            rows.append({
                "load": f"Poisson arrivals at {100 * share:.0f} % of the offline rate",
                "output tokens/s": load.tokens_per_second,
                **load.latencies(),
            })  # fmt: skip
    return rows


def streams(bench: Bench) -> list[Row]:
    """What REST carries: many streams of an engine that takes 5 ms a step and computes nothing."""
    rows = []
    settings = {"max_num_seqs": 512, "max_model_len": _MAX_MODEL_LEN, "swap_space": 0}
    with serving.server(bench.model("tiny"), settings, null_engine=True) as server:
        for num_streams in (64, 512):
            requests = workloads.equal(num_streams, 8, bench.args.stream_tokens, "streams")
            serving.run(server, requests)  # Java compiles what runs often
            loads = [serving.run(server, requests) for _ in range(bench.args.rounds)]
            rows.append({
                "streams": num_streams,
                "tokens/s": tables.summary([load.tokens_per_second for load in loads]),
                **loads[-1].latencies(),
            })  # fmt: skip
    return rows


WORKLOADS: dict[str, Callable[[Bench], list[Row]]] = {
    "throughput": throughput,
    "pressure": pressure,
    "overhead": overhead,
    "serve": serve,
    "seed-latency": seed_latency,
    "streams": streams,
    "shared-prefix": shared_prefix,
    "multi-turn": multi_turn,
    "block-size": block_size,
    "memory": memory,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measures pagetier beside other engines, prints a table and writes JSON.",
    )
    parser.add_argument("workload", choices=[*WORKLOADS, "all"])
    parser.add_argument(
        "--engine",
        action="append",
        choices=engines.NAMES,
        help="once for each engine; default: pagetier, hf-generate and hf-continuous",
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-134m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, with --quick 2")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=16, help="of prompts and outputs, tokens")
    parser.add_argument("--longest", type=int, default=256, help="of prompts and outputs, tokens")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.25, 0.1], help="pressure: KV, of the demand"
    )
    parser.add_argument(
        "--arrivals", type=float, nargs="+", default=[0.5, 0.8], help="serve: of the offline rate"
    )
    parser.add_argument("--stream-tokens", type=int, default=256, help="streams: tokens of each")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it to torch")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and smaller where that says as much"
    )
    parser.add_argument("--quiet", action="store_true", help="tables only")
    parser.add_argument(
        "--append",
        action="store_true",
        help="add the rounds to those in the JSON, if that has the same flags and machine: so a "
        "long measurement can be made in pieces",
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    args = parser.parse_args(arguments)
    args.engine = args.engine or ["pagetier", "hf-generate", "hf-continuous"]
    args.rounds = args.rounds or (2 if args.quick else 5)
    return args


# Flags that say nothing of what is measured.
_HOW_TO_RUN = ("workload", "quiet", "append", "out")
# What --quick changes for one workload beside the number of rounds.
_QUICK: dict[str, dict[str, Any]] = {
    "throughput": {"rounds": 1},
    "pressure": {"shares": [0.25], "num_requests": 16, "longest": 128},
    "serve": {"arrivals": [0.8], "rounds": 1},
    "seed-latency": {"rounds": 3},
    "shared-prefix": {"num_requests": 16, "longest": 128, "rounds": 1},
    "multi-turn": {"num_requests": 16, "rounds": 1},
    "block-size": {"num_requests": 16, "longest": 128, "rounds": 1},
    "memory": {"num_requests": 16, "longest": 128},
}


def _join(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The results of two runs with the same flags as one of all their rounds.

    Raises:
        SystemExit: their flags or machines differ.
    """
    rounds = [run["flags"].pop("rounds") for run in (earlier, result)]
    if earlier["flags"] != result["flags"] or earlier["machine"] != record.machine():
        raise SystemExit("The earlier JSON is of other flags or another machine; --append cannot.")
    return {
        "flags": {**result["flags"], "rounds": sum(rounds)},
        "busy_before_percent": earlier["busy_before_percent"] + result["busy_before_percent"],
        "seconds": earlier["seconds"] + result["seconds"],
        "results": [
            tables.join(old, new)
            for old, new in zip(earlier["results"], result["results"], strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    args = parse(arguments)
    names = list(WORKLOADS) if args.workload == "all" else [args.workload]
    flags = {k: v for k, v in vars(args).items() if k not in _HOW_TO_RUN}
    with tempfile.TemporaryDirectory() as folder, Bench(args, pathlib.Path(folder)) as bench:
        for name in names:
            changes = _QUICK.get(name, {}) if args.quick else {}
            bench.args = argparse.Namespace(**{**vars(args), **changes})
            bench.workload = name
            workload = WORKLOADS[name]
            print(f"{name}: {workload.__doc__}", flush=True)
            busy = record.busy_percent()
            start = time.monotonic()
            rows = workload(bench)
            seconds = time.monotonic() - start
            print(f"{tables.text(rows)}\n({seconds:.0f} s)\n", flush=True)
            result = {
                "flags": {**flags, **changes},
                "busy_before_percent": [busy],
                "seconds": seconds,
                "results": rows,
            }
            stem = name.replace("-", "_")
            if args.append and (earlier := record.load(stem, args.out)) is not None:
                result = _join(earlier, result)
                print(f"with earlier rounds:\n{tables.text(result['results'])}\n", flush=True)
            record.save(stem, result, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
