"""What this build contains and what runs here; the machine's own rates, to set beside a kernel's."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from apr import _core


class Kernels(NamedTuple):
    """What this build contains and what runs here."""

    cpu: list[str]
    chosen: str
    cuda: str  # architectures, empty without CUDA kernels
    threads: str  # whose threads the CPU kernels run on


def kernels() -> Kernels:
    """The instruction sets of the CPU kernels, best first, and the CUDA architectures."""
    threads = "torch's (OpenMP)" if _core.has_openmp() else "own: torch loaded no OpenMP runtime"
    cuda = _core.gpu(False)
    return Kernels(
        _core.instruction_sets(),
        _core.instruction_set(),
        cuda.architectures if cuda else "",
        threads,
    )


def use_kernels(name: str = "") -> None:
    """Run the kernels of one instruction set from `kernels().cpu`; "" returns to the best. For benchmarks.

    "cuda_emulated" runs the CUDA kernels' source on CPU tensors, slowly, where the build has it (tests).
    """
    _core.force_instruction_set(name)


def use_own_workers(own: bool) -> None:
    """Run the kernels on threads of their own although torch has some. For tests and benchmarks."""
    _core.force_own_workers(own)


def operations_per_second(dtype: torch.dtype, threads: int, rounds: int = 5) -> float:
    """Multiplications and additions a second of the widest unit that kernels of a dtype use: the best of
    `rounds` runs on data in registers."""
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        done = _core.operate(code, 100_000, threads)
        best = max(best, done / (time.perf_counter() - began))
    return best


def bytes_per_second(size: int, threads: int, rounds: int = 5) -> float:
    """Bytes a second that all threads together read once from `size` bytes: the best of `rounds` runs.

    Other memory is read between the runs, so that little of it is left in a cache.
    """
    granule = 512 * threads  # the kernel gives each thread an equal share of whole granules
    data = torch.ones(max(1, size // 4 // granule) * granule)
    other = torch.ones(64 << 20)
    best = 0.0
    for _ in range(rounds):
        _core.read(other.data_ptr(), other.numel(), threads)
        began = time.perf_counter()
        _core.read(data.data_ptr(), data.numel(), threads)
        best = max(best, data.numel() * 4 / (time.perf_counter() - began))
    return best
