"""What this machine does at best by torch's own operators, to set beside a kernel's figures."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def _best(action: Callable[[], object], before: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest run."""
    best = float("inf")
    for _ in range(rounds):
        before()
        began = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - began)
    return best


def operations_per_second(dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """Multiplications and additions a second of a product of two square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / _best(lambda: a @ b, lambda: None, rounds)


def bytes_per_second(size: int, rounds: int = 5) -> float:
    """Bytes a second that torch's threads together read once from `size` bytes.

    Other memory is read between the runs, so that little of it is left in a cache.
    """
    data, other = torch.ones(max(1, size // 4)), torch.ones(64 << 20)
    return data.numel() * 4 / _best(data.sum, other.sum, rounds)
