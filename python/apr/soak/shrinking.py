"""The fewest operations that still fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from apr.soak.steps import Operation


def shrink(
    operations: Sequence[Operation],
    fails: Callable[[Sequence[Operation]], bool],
    seconds: float = 60.0,
) -> list[Operation]:
    """Leaves parts out, smaller and smaller ones, as long as what is left fails (delta debugging:
    Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002).
    """
    kept, size = list(operations), max(1, len(operations) // 2)
    end = time.monotonic() + seconds
    while True:
        at, before = 0, len(kept)
        while at < len(kept) and time.monotonic() < end:
            without = [*kept[:at], *kept[at + size :]]
            if fails(without):
                kept = without
            else:
                at += size
        if time.monotonic() >= end or (size == 1 and len(kept) == before):
            return kept
        size = max(1, size // 2)


def script(operations: Sequence[Operation]) -> str:
    """A Python program that plays them."""
    lines = ",\n    ".join(map(repr, operations))
    return f"from apr.soak import replay\n\nreplay([\n    {lines},\n])\n"
