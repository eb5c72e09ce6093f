"""``python -m benchmarks.gpu --out FOLDER``: what a GPU machine is to be asked, in one command.

Owns the order of the questions and the time limit. First whether compiled steps and CUDA graphs
change a token, on a small model in float32; then latency and throughput of the engines asked for,
with random weights in bfloat16, one engine in a process of its own at a time. Every answer is
written as soon as it is there: what the time limit cuts off costs only what was not asked yet.

A peer is measured by the same command with ``--engine NAME``. The first repetition of a workload
is slower; all are kept, in order.
"""

import argparse
import pathlib
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import engines, record, workloads
from benchmarks.shapes import write_config
from benchmarks.worker import Worker
from benchmarks.workloads import Request


class Session:
    """Answers so far, and the time left.

    Args:
        args: the command's flags.
        folder: where models are made.
    """

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path) -> None:
        self.args = args
        self._folder = folder
        self._begin = time.monotonic()
        self._rows: list[dict[str, Any]] = []

    @property
    def seconds_left(self) -> float:
        """Until the limit."""
        return float(self.args.seconds) - (time.monotonic() - self._begin)

    def tell(self, what: str, engine: str, shape: str, **answer: Any) -> None:
        """Note an answer, print it and write all so far."""
        at = round(time.monotonic() - self._begin, 1)
        row = {"what": what, "engine": engine, "shape": shape, "at_seconds": at, **answer}
        self._rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        flags = {key: value for key, value in vars(self.args).items() if key != "out"}
        record.save(
            f"gpu_{'_'.join(self.args.engine)}",
            {"flags": flags, "results": self._rows},
            self.args.out,
        )

    def ask(self, engine: str, shape: str, work: Callable[[Worker], None], **options: Any) -> None:
        """Start an engine, let ``work`` ask it, and end it, at the limit by force."""
        if self.seconds_left < 5:
            self.tell("not asked", engine, shape, why="no time was left")
            return
        model = self._folder / shape
        if not model.exists():
            write_config(shape, model)
        start = time.monotonic()
        killed = threading.Event()
        workers: list[Worker] = []

        def kill() -> None:
            killed.set()
            for worker in workers:
                worker.kill()

        timer = threading.Timer(max(self.seconds_left, 1), kill)
        timer.start()
        try:
            with Worker(engine, model, options, started=workers.append) as worker:
                self.tell("start", engine, shape, seconds=round(time.monotonic() - start, 1))
                work(worker)
        except Exception as exc:  # the next question may be answered
            why = "the time limit" if killed.is_set() else str(exc)[-1500:]
            self.tell("failed", engine, shape, why=why)
            if not killed.is_set():
                traceback.print_exc()
        finally:
            timer.cancel()


def _options(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    if args.toy:
        options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256}
    else:
        options = {"dtype": "bfloat16", "max_model_len": 2304}
    if engine == "pagetier":
        options |= {"swap_space": 0, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
        if args.toy:
            options |= {"num_gpu_blocks_override": 1024}
    return options


def check_tokens(session: Session) -> None:
    """The same greedy requests with and without graphs and compiler: how many outputs differ."""
    shape = "tiny" if session.args.toy else "llama-134m"
    requests = workloads.mixed(16, 8, 96, "check")
    tokens: dict[bool, list[list[int]]] = {}
    for eager in (True, False):

        def work(worker: Worker, eager: bool = eager) -> None:
            worker.run(workloads.mixed(2, 8, 16, "warm-up"))
            tokens[eager] = worker.run(requests).token_ids

        session.ask(
            "pagetier",
            shape,
            work,
            dtype="float32",
            max_model_len=256,
            num_gpu_blocks_override=512,
            swap_space=0,
            max_num_seqs=16,
            enforce_eager=eager,
        )
    if len(tokens) == 2:
        different = sum(a != b for a, b in zip(tokens[True], tokens[False], strict=True))
        session.tell(
            "tokens with and without graphs",
            "pagetier",
            shape,
            num_outputs=len(requests),
            num_different=different,
        )


def seed_latency(session: Session, engine: str, worker: Worker) -> None:
    """One prompt of 14 tokens, 32 and 256 new ones."""
    for num_new in (32, 256) if not session.args.toy else (32,):
        runs = [
            worker.run(workloads.equal(1, 14, num_new, f"seed {num_new} {round_}")).seconds
            for round_ in range(7)
        ]
        session.tell(
            "one prompt of 14",
            engine,
            "opt-125m",
            new_tokens=num_new,
            ms=[round(1e3 * seconds, 1) for seconds in runs],
            median_ms=round(1e3 * statistics.median(runs[2:]), 1),
        )


def one_stream(session: Session, engine: str, shape: str, worker: Worker) -> None:
    """One stream behind a prompt of 512 tokens: time to the first token, and for each other."""
    prompt, num_new = (16, 17) if session.args.toy else (512, 129)
    first, each = [], []
    for round_ in range(5):
        one = worker.run(workloads.equal(1, prompt, 1, f"first {round_}")).seconds
        many = worker.run(workloads.equal(1, prompt, num_new, f"each {round_}")).seconds
        first.append(round(1e3 * one, 3))
        each.append(round(1e3 * (many - one) / (num_new - 1), 4))
    session.tell(
        "one stream",
        engine,
        shape,
        prompt=prompt,
        first_ms=first,
        ms_per_token=each,
        median_first_ms=statistics.median(first[1:]),
        median_ms_per_token=statistics.median(each[1:]),
    )


def throughput(session: Session, engine: str, shape: str, worker: Worker) -> None:
    """Requests of mixed lengths, all at once."""
    toy = session.args.toy
    count, shortest, longest = (16, 8, 64) if toy else (256, 100, 1024)

    def measure(what: str, requests: list[Request]) -> None:
        result = worker.run(requests)
        session.tell(
            what,
            engine,
            shape,
            num_requests=len(requests),
            seconds=round(result.seconds, 3),
            output_tokens=result.num_output_tokens,
            output_tokens_per_second=round(result.output_tokens_per_second, 1),
            stats=result.stats,
        )

    for round_ in range(2):
        measure(
            f"in and out {shortest}..{longest}",
            workloads.mixed(count, shortest, longest, f"throughput {round_}"),
        )
    if shape != "llama-8b" and session.seconds_left > 60:
        length = 32 if toy else 512
        measure(f"{length} in, {length} out", workloads.equal(count, length, length, "equal"))


def streamed(session: Session) -> None:
    """Steps of a model half of whose weights are streamed, against what their copies take."""
    args = session.args
    options = {**_options("pagetier", args), "cpu_offload_gb": 2e-4 if args.toy else 8}
    options["swap_space"] = 0.01 if args.toy else 1  # so that the link's rate is measured
    shape, num_new = ("tiny-deep", 9) if args.toy else ("llama-8b", 33)

    def work(worker: Worker) -> None:
        worker.run(workloads.mixed(8, 16, 24, "warm-up"))
        for batch in (1, 16, 64):
            begun = worker.run(workloads.equal(batch, 16, 1, f"begun {batch}")).seconds
            result = worker.run(workloads.equal(batch, 16, num_new, f"streamed {batch}"))
            seconds = (result.seconds - begun) / (num_new - 1)
            bytes_per_step = result.stats["streamed_bytes_per_step"]
            bound = bytes_per_step / result.stats["link_bytes_per_second"]
            session.tell(
                "streamed weights",
                "pagetier",
                shape,
                batch=batch,
                streamed_bytes=bytes_per_step,
                ms_per_step=round(1e3 * seconds, 2),
                bound_ms=round(1e3 * bound, 2),
                of_bound=round(bound / seconds, 3),
            )

    session.ask("pagetier", shape, work, **options)


def run(session: Session) -> None:
    """Ask everything, as long as there is time."""
    args = session.args
    if "pagetier" in args.engine and "streamed" in args.only:
        streamed(session)
    if "pagetier" in args.engine and "check" in args.only:
        check_tokens(session)
    for engine in args.engine:
        options = _options(engine, args)
        if "opt-125m" in args.only:
            opt = {**options, "max_model_len": min(options["max_model_len"], 2048)}
            shape = "tiny" if args.toy else "opt-125m"
            session.ask(engine, shape, lambda w, e=engine: seed_latency(session, e, w), **opt)
        for name in ("llama-1b", "llama-8b"):
            if name not in args.only:
                continue

            def work(worker: Worker, engine: str = engine, shape: str = name) -> None:
                worker.run(workloads.mixed(8, 16, 64, "warm-up"))
                one_stream(session, engine, shape, worker)
                throughput(session, engine, shape, worker)

            session.ask(engine, "tiny" if args.toy else name, work, **options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Asks a GPU machine whether graphs change tokens, and how fast engines are.",
    )
    parts = ("check", "opt-125m", "llama-1b", "llama-8b", "streamed")
    parser.add_argument("--engine", action="append", choices=engines.NAMES)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts[:-1]))
    parser.add_argument("--seconds", type=float, default=360, help="limit of the whole command")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to try the command itself")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    args = parser.parse_args(arguments)
    args.engine = args.engine or ["pagetier"]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask and write; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        run(Session(parse(arguments), pathlib.Path(folder)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
