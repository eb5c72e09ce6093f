"""What a case of any operation is made of: how it is described, run, judged and kept.

Owns cases, their targets, and the loop that runs them within a time limit and writes after each
one, so that nothing measured is lost. Knows nothing of any operation.
"""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import record
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.timing import Launch, seconds_each
from pagetier.kernels import tuning

logger = logging.getLogger(__name__)

Figures = dict[str, Any]

# All sets of a case's data together: several times the L2 cache of any card.
_MIN_BYTES = 1 << 30
# Relative, of results in 16 bits: bf16 rounds by 4e-3.
_MAX_ERROR = 1e-2


class SkipCase(Exception):
    """A case cannot be measured here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on one figure of a case."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, figures: Figures) -> str:
        """``reached``, ``missed``, or ``unknown`` if the figure was not measured."""
        value = figures.get(self.figure)
        if not isinstance(value, (int, float)):
            return "unknown"
        low_enough = self.at_most is None or value <= self.at_most
        return "reached" if low_enough and value >= (self.at_least or 0.0) else "missed"

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"
        return f"{self.figure} {bound}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: unique in its operation.
        measure: returns figures by name, or raises ``SkipCase``.
        targets: what they have to reach on an H200.
    """

    name: str
    measure: Callable[["Bench"], Figures]
    targets: tuple[Target, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how cases are run.

    Attributes:
        device: where.
        ceilings: of the device.
        tiny: whether sizes are made so small that an interpreted kernel finishes, which tests the
            cases and measures nothing.
    """

    device: torch.device
    ceilings: Ceilings
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """bf16; Triton's interpreter multiplies it wrongly, so fp16 where that could serve."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    def seconds(self, launches: Sequence[Launch], **how: Any) -> float:
        """Seconds of one of ``launches``; ``how`` as of ``timing.seconds_each``."""
        return seconds_each(launches, self.device, **how)

    def num_sets(self, set_bytes: int, *, most: int = 64) -> int:
        """How many sets of a case's data exceed the L2 cache together."""
        return 1 if self.tiny else max(1, min(most, -(-_MIN_BYTES // set_bytes)))


def triton_serves(device: torch.device) -> bool:
    """Whether Triton's kernels can run there."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, of that of ``expected``."""
    expected = expected.float()
    return float((actual.float() - expected).norm() / expected.norm())


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning found for some shapes: settings, and the measurements that speak for them."""

    operation: str
    entry: tuning.Entry
    figures: Figures


@dataclasses.dataclass
class Run:
    """The cases of one operation, and what came of each.

    Attributes:
        operation: its name.
        name: of the JSON file.
        flags: how the program was called.
        folder: where the JSON goes; None is ``benchmarks/results``.
        rows: finished cases.
    """

    operation: str
    name: str
    flags: dict[str, Any]
    folder: pathlib.Path | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def measure(self, bench: Bench, cases: Sequence[Case], deadline: float) -> bool:
        """Run ``cases`` in order until ``deadline`` on the monotonic clock.

        Returns:
            False if the device does not answer any more after an error: nothing can run on it.
        """
        for case in cases:
            self.rows.append(_measure(case, bench, deadline))
            logger.info("%s: %s", self.operation, self.rows[-1])
            self._save(bench)
            if not _device_answers(bench.device):
                logger.error("The device does not answer after case %r: stopping.", case.name)
                return False
        return True

    def _save(self, bench: Bench) -> None:
        content = {
            "flags": self.flags,
            "ceilings": dataclasses.asdict(bench.ceilings),
            "results": self.rows,
        }
        record.save(self.name, content, self.folder)


def _measure(case: Case, bench: Bench, deadline: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name}
    start = time.monotonic()
    if start > deadline:
        return {**row, "note": "not run: no time was left"}
    try:
        figures = case.measure(bench)
    except SkipCase as reason:
        return {**row, "note": f"skipped: {reason}"}
    except Exception as error:
        # One failing kernel must not cost the figures of all others.
        logger.exception("Case %r failed.", case.name)
        return {**row, "note": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    finally:
        if bench.device.type == "cuda":
            _release()
    error = figures.get("error", 0.0)
    if not error <= _MAX_ERROR:
        # A figure of a kernel that computes something else would mislead.
        return {**row, "error": error, "note": f"failed: off the reference by {error:.2g}"}
    verdicts = [f"{target}: {target.verdict(figures)}" for target in case.targets]
    row |= figures
    if verdicts:
        row["target"] = "; ".join(verdicts)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def _release() -> None:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        logger.exception("The device reported an error.")


def _device_answers(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
