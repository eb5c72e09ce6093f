"""What the device can do at most: memory, matrix products, and the link to the host.

Measured in every run, since two machines with the same chip differ, and so does one at two times.
"""

import dataclasses
import logging

import torch

from benchmarks.kernels.timing import seconds_each

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates in bytes or floating-point operations per second.

    Attributes:
        read_triton: reading a large tensor once, the best of a Triton kernel's settings; None
            without Triton.
        read_torch: the same by ``torch.sum``.
        copy: a copy inside the device's memory, bytes read and written.
        gemm: a large matrix product in 16 bits.
        host_to_device: a large copy from pinned memory.
        device_to_host: a large copy to pinned memory.
    """

    read_triton: float | None
    read_torch: float
    copy: float
    gemm: float
    host_to_device: float
    device_to_host: float

    @property
    def read(self) -> float:
        """The faster of the ways of reading."""
        return max(self.read_torch, self.read_triton or 0.0)

    def row(self) -> dict[str, float | None]:
        """All of them, for a table."""
        read_triton = self.read_triton and self.read_triton / 1e9
        return {
            "read (Triton) GB/s": read_triton,
            "read (torch) GB/s": self.read_torch / 1e9,
            "copy GB/s": self.copy / 1e9,
            "GEMM TFLOP/s": self.gemm / 1e12,
            "host to device GB/s": self.host_to_device / 1e9,
            "device to host GB/s": self.device_to_host / 1e9,
        }


def measure(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
    """All ceilings, in about two seconds; ``tiny`` only shows that they can be measured."""
    read_triton, read_torch = _read(device, tiny)
    up, down = _link(device, tiny)
    return Ceilings(
        read_triton, read_torch, _copy(device, tiny), _gemm(device, dtype, tiny), up, down
    )


def _read(device: torch.device, tiny: bool) -> tuple[float | None, float]:
    data = torch.ones((1 << (16 if tiny else 32)) // 8, dtype=torch.int64, device=device)
    by_torch = data.nbytes / seconds_each([lambda: data.sum()], device)
    return _read_by_triton(data, tiny), by_torch


def _copy(device: torch.device, tiny: bool) -> float:
    source = torch.ones((1 << (16 if tiny else 31)) // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_each([lambda: target.copy_(source)], device)


def _gemm(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    size = 32 if tiny else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / seconds_each([lambda: a @ b], device)


def _link(device: torch.device, tiny: bool) -> tuple[float, float]:
    """To the device, and to the host."""
    num_bytes = 1 << (16 if tiny else 28)
    on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = on_host.to(device)
    up = seconds_each([lambda: on_device.copy_(on_host, non_blocking=True)], device)
    down = seconds_each([lambda: on_host.copy_(on_device, non_blocking=True)], device)
    return num_bytes / up, num_bytes / down


def _read_by_triton(data: torch.Tensor, tiny: bool) -> float | None:
    """Bytes per second of the fastest setting, or None where Triton does not serve the device."""
    from benchmarks.kernels import bench

    if not bench.triton_serves(data.device):
        return None
    from benchmarks.kernels import read_kernel

    settings = [(1024, 1, 4)] if tiny else read_kernel.SETTINGS
    rates = {}
    for tile, rounds, warps in settings:
        launch = read_kernel.launcher(data, tile, rounds, warps)
        rates[tile, rounds, warps] = data.nbytes / seconds_each([launch], data.device, replays=5)
    best = max(rates, key=lambda key: rates[key])
    logger.info("Reading is fastest with tile, rounds and warps of %s.", best)
    tile, rounds, warps = best
    launch = read_kernel.launcher(data, tile, rounds, warps)
    return data.nbytes / seconds_each([launch], data.device)
