"""What this build contains and what runs here."""

from __future__ import annotations

from typing import NamedTuple

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
    """Run the kernels of one instruction set from `kernels().cpu`; "" returns to the best. For
    benchmarks.

    "cuda_emulated" runs the CUDA kernels' source on CPU tensors, slowly, where the build has it
    (tests).
    """
    _core.force_instruction_set(name)


def use_own_workers(own: bool) -> None:
    """Run the kernels on threads of their own although torch has some. For tests and benchmarks."""
    _core.force_own_workers(own)
