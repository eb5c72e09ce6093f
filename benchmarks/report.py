"""``python -m benchmarks.report``: puts the tables of the JSON into ``docs/performance.md``.

Owns the marks between which tables stand in the document, and rewrites what is between them; all
other text is written by hand. ``--check`` only says whether the document is up to date.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from benchmarks import record, tables

DOCUMENT = record.RESULTS.parent.parent / "docs" / "performance.md"
_OF_KERNELS_UNSHOWN = {
    "seconds",
    "FA3 splits",
    "SDPA flash us",
    "error",
    "ours / FA3",
    "torch argmax us",
}
_MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(document: str, results: pathlib.Path = record.RESULTS) -> str:
    """``document`` with every mark's table made anew; what was not measured stays as it is."""

    def replace(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return match[0]
        return f"{match[1]}{_section(json.loads(path.read_text()))}\n{match[3]}"

    return _MARK.sub(replace, document)


def _section(result: dict[str, Any]) -> str:
    machine, flags = result["machine"], result["flags"]
    device = machine["gpu"] or f"{machine['num_cpus']} CPU cores"
    versions = ", ".join(
        f"{package} {machine['versions'][package]}"
        for package in ("torch", "triton", "transformers", "torchserve")
        if machine["versions"].get(package)
    )
    rows = result["results"]
    if "ceilings" in result:  # of kernels, whose rows say more than a page can show
        rows = [{k: v for k, v in row.items() if k not in _OF_KERNELS_UNSHOWN} for row in rows]
    of_model = f", {flags['shape']} in {flags['dtype']}" if "shape" in flags else ""
    rounds = f", {flags['rounds']} rounds" if "rounds" in flags else ""
    note = f"{result['date'][:10]}, {device}{of_model}{rounds}; {versions}."
    size = (flags.get("num_requests", 32), flags.get("longest", 256))
    if size != (32, 256):
        note += f" Smaller than usual: {size[0]} requests, lengths up to {size[1]}."
    busy = max(result.get("busy_before_percent", [0.0]))
    if busy > 5:
        note += f" **Disturbed**: other work kept the machine {busy:.0f} % busy."
    return f"{tables.markdown(rows)}\n\n{note}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the document, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(arguments)
    before = DOCUMENT.read_text(encoding="utf-8")
    after = render(before)
    if args.check:
        return int(after != before)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
