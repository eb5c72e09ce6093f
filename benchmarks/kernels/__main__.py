"""Measures kernels, prints a table last and writes JSON after each case."""

import argparse
import contextlib
import datetime
import importlib
import logging
import pathlib
import time
import types
from collections.abc import Sequence

import torch

from benchmarks import record, tables
from benchmarks.kernels import bench, ceilings
from pagetier.kernels import tuning

OPERATIONS = ("attention", "projections", "quantised", "copies", "sampling", "elementwise")
# Of the time that is left, what tuning may take.
_TUNING_SHARE = 0.6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; returns 1 if a case failed, 0 otherwise."""
    args = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms %(message)s")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device, and there is none here.")
        return 1
    deadline = time.monotonic() + args.seconds
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    measured = bench.Bench(device, ceilings.measure(device, dtype, tiny=args.tiny), args.tiny)
    shown = [f"Ceilings of {record.machine()['gpu']}\n{tables.text([measured.ceilings.row()])}"]
    print(shown[0], flush=True)
    failed = False
    name = tuning.families(device)[0] if device.type == "cuda" else "cpu"
    with contextlib.ExitStack() as tuned:
        if args.tune:
            table, rows = _tune(measured, args, name, deadline)
            tuned.enter_context(tuning.using(table))
            shown.append(f"tuned\n{tables.text(rows)}")
        for operation in args.only:
            run = bench.Run(
                operation,
                f"kernels_{operation}_{name}",
                {"only": args.only, "seconds": args.seconds, "tiny": args.tiny},
                args.out,
            )
            cases = [c for c in _module(operation).cases(measured) if args.case in c.name]
            answers = run.measure(measured, cases, deadline)
            shown.append(f"{operation}\n{tables.text(_notes_last(run.rows))}")
            notes = [row.get("note", "") for row in run.rows]
            failed |= not answers or any(note.startswith("failed") for note in notes)
            if not answers:
                break
    print("\n" + "\n\n".join(shown))
    return int(failed)


def _module(operation: str) -> types.ModuleType:
    return importlib.import_module(f"benchmarks.kernels.{operation}")


def _tune(
    measured: bench.Bench, args: argparse.Namespace, name: str, deadline: float
) -> tuple[tuning.Table, list[bench.Figures]]:
    """Find settings of all operations that have any, writing the table as it grows."""
    modules = [module for module in map(_module, args.only) if hasattr(module, "tune")]
    table: dict[str, list[tuning.Entry]] = {}
    rows: list[bench.Figures] = []
    folder: pathlib.Path = args.out or record.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for index, module in enumerate(modules):
        now = time.monotonic()
        # The rest of the time is for measuring with what was found.
        until = now + (deadline - now) * _TUNING_SHARE / (len(modules) - index)
        for tuned in module.tune(measured, until):
            table.setdefault(tuned.operation, []).append(tuned.entry)
            rows.append({"operation": tuned.operation, **tuned.figures})
            logging.info("tuned: %s", rows[-1])
            text = tuning.dumps(table, date=str(datetime.date.today()), **record.machine())
            (folder / f"tuned_{name}.json").write_text(text, encoding="utf-8")
            record.save(f"tuning_{name}", {"results": rows}, folder)
    return table, rows


def _notes_last(rows: Sequence[bench.Figures]) -> list[bench.Figures]:
    notes = ("target", "note")
    return [
        {key: row[key] for key in sorted(row, key=lambda key: key in notes)}
        for row in sorted(rows, key=lambda row: "note" in row)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--only", type=_operations, default=list(OPERATIONS), metavar="OPERATION,...",
        help=f"of {', '.join(OPERATIONS)}; all without this",
    )  # fmt: skip
    parser.add_argument(
        "--tune", action="store_true",
        help="first find the fastest settings for this device, and measure with them; "
        "writes a table that PAGETIER_TUNED can name",
    )  # fmt: skip
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--seconds", type=float, default=540, help="start no case after this long")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true",
        help="toy sizes, to try the cases without a GPU (with TRITON_INTERPRET=1); needs --out",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.tiny and args.out is None:
        parser.error("--tiny measures nothing that belongs among the results: give --out.")
    return args


def _operations(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(OPERATIONS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is not one of {', '.join(OPERATIONS)}."
        )
    return names


if __name__ == "__main__":
    raise SystemExit(main())
