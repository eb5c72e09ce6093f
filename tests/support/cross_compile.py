"""Compiling what a launcher would launch, for GPUs that this machine does not have.

Owns a driver that claims to be some GPU, and reading a compiled kernel's needs. Launchers are
called as they are, with tensors on the CPU: Triton specialises on their addresses and strides
exactly as it would on the GPU, compiles, and stops short of launching.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

KIB = 1024
# Compute capability: shared memory that one program can have (CUDA C Programming Guide, table
# "Technical Specifications per Compute Capability").
SHARED_BYTES = {
    75: 64 * KIB,
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    120: 99 * KIB,
}
_REGISTERS = 64 * KIB  # of a multiprocessor, in all of these
# Of a thread: a few values that wait outside of a loop cost nothing that could be measured.
_MAX_SPILLED_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled for one GPU.

    Attributes:
        name: of the kernel.
        capability: of the GPU.
        settings: constants and options it was compiled with.
        shared_bytes: shared memory of a program.
        registers: of a thread.
        spilled_bytes: local memory of a thread, where what does not fit into registers goes.
        num_warps: of a program.
    """

    name: str
    capability: int
    settings: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    num_warps: int

    def problem(self, *, may_spill: bool = False) -> str | None:
        """What the GPU cannot give it, or None."""
        found = []
        if self.shared_bytes > SHARED_BYTES[self.capability]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.registers * 32 * self.num_warps > _REGISTERS:
            found.append(f"{self.registers} registers in {self.num_warps} warps")
        if self.spilled_bytes > _MAX_SPILLED_BYTES and not may_spill:
            found.append(f"{self.spilled_bytes} bytes of spilled registers")
        return f"{self.name} ({self.settings}) needs {', '.join(found)}" if found else None


class _Driver:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for a GPU of ``capability``; yields what was compiled, once each."""
    function = triton.JITFunction
    launch = function.run
    found: dict[str, Compiled] = {}

    def run(self, *args, grid, warmup=False, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            settings = {k: v for k, v in named.items() if isinstance(v, int) and k not in _SIZES}
            found[kernel.hash] = _examine(kernel, capability, settings)
        return kernel

    before = driver._active  # None on a machine without a GPU, where `active` would look for one
    driver.set_active(_Driver(capability))
    function.run = run
    compiled: list[Compiled] = []
    try:
        yield compiled
    finally:
        function.run = launch
        driver.set_active(before)
        compiled += found.values()


# Arguments whose value does not change what is compiled.
_SIZES = {"num_tokens", "out_size", "in_size"}


def _examine(kernel, capability: int, settings: dict) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name],
            env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    # STACK also holds what a function call needs; a kernel that calls none has none.
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    assert "REG" in usage, output
    return Compiled(
        name=kernel.metadata.name,
        capability=capability,
        settings=" ".join(f"{k}={v}" for k, v in settings.items()),
        shared_bytes=kernel.metadata.shared,
        registers=usage["REG"],
        spilled_bytes=usage.get("STACK", 0) + usage.get("LOCAL", 0),
        num_warps=kernel.metadata.num_warps,
    )
