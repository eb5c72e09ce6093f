"""Running a file of kernel tests under Triton's interpreter, on a machine without a GPU."""

import os
import re
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def skip_unless_kernels_run(device: str) -> None:
    """Skip a test whose kernel cannot run on ``device`` in this process."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("run in a process of its own, under the interpreter")


def run_under_interpreter(file: str, *, at_least: int) -> None:
    """Run a file's tests in a process of its own: Triton reads the variable when it is imported.

    Raises:
        AssertionError: a test failed, or fewer than ``at_least`` ran.
    """
    if INTERPRETED:
        pytest.skip("this is the run that it starts")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # Inside a run of pytest-xdist these would make the new one a worker of it.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", "not cuda"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-500:]
    assert int(passed[1]) >= at_least, result.stdout[-500:]
