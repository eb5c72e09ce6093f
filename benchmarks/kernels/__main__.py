"""Measures kernels, prints a table last and writes JSON after each case."""

import argparse
import importlib
import logging
import pathlib
import time
from collections.abc import Sequence

import torch

from benchmarks import tables
from benchmarks.kernels import bench, ceilings

OPERATIONS = ("attention", "projections", "copies", "sampling")


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
    shown = [f"Ceilings of {bench.device_slug(device)}\n{tables.text([measured.ceilings.row()])}"]
    print(shown[0], flush=True)
    failed = False
    for operation in args.only:
        module = importlib.import_module(f"benchmarks.kernels.{operation}")
        run = bench.Run(
            operation,
            f"kernels_{operation}_{bench.device_slug(device)}",
            {"only": args.only, "seconds": args.seconds, "tiny": args.tiny},
            args.out,
        )
        cases = [c for c in module.cases(measured) if args.case in c.name]
        answers = run.measure(measured, cases, deadline)
        shown.append(f"{operation}\n{tables.text(_notes_last(run.rows))}")
        failed |= not answers or any(row.get("note", "").startswith("failed") for row in run.rows)
        if not answers:
            break
    print("\n" + "\n\n".join(shown))
    return int(failed)


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
