"""Figures with their spread, and tables of them for the terminal and for Markdown.

Owns how a figure is summarised and shown. Knows nothing of what was measured.
"""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The median of repeated measurements, the lowest and highest, and all of them in order."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "values": list(values),
    }


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The summary of ``values / others``, each pair taken in the same round."""
    return summary([value / other for value, other in zip(values, others, strict=True)])


def join(row: Row, later: Row) -> Row:
    """One row of two of the same thing: summaries of all values, and else what came later."""
    return {
        name: summary(row[name]["values"] + value["values"]) if isinstance(value, dict) else value
        for name, value in later.items()
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, interpolated; ``values`` is not empty."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def cell(value: Any) -> str:
    """A figure as text: three digits that count; a summary with its interval."""
    if isinstance(value, dict):
        middle, low, high = (cell(float(value[key])) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} to {high})"
    if value is None:
        return ""
    if isinstance(value, float):
        if abs(value) >= 100:
            return f"{value:,.0f}"
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [[cell(row.get(name)) for name in names] for row in rows]


def text(rows: Sequence[Row]) -> str:
    """A table for the terminal; columns are the rows' keys."""
    names, lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(names, *lines, strict=True)]
    return "\n".join(
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
        for line in [names, *lines]
    )


def markdown(rows: Sequence[Row]) -> str:
    """The same table in Markdown."""
    names, lines = _cells(rows)
    head = [names, ["---"] * len(names)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*head, *lines])
