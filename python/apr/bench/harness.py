"""Times functions in turn in one process, and writes the figures down with the machine's state."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apr import ops


@dataclass
class Figure:
    """Repeated timings of one thing, in microseconds, and what there is to say about it."""

    name: str
    times_us: Sequence[float] = field(repr=False)
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return float(np.median(self.times_us))

    @property
    def minimum(self) -> float:
        return float(np.min(self.times_us))

    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile, in microseconds."""
        low, high = np.percentile(self.times_us, [10, 90])
        return float(low), float(high)

    def record(self) -> dict[str, Any]:
        low, high = self.spread()
        record = {
            "name": self.name,
            "median_us": round(self.median, 2),
            "min_us": round(self.minimum, 2),
            "p10_us": round(low, 2),
            "p90_us": round(high, 2),
            "rounds": len(self.times_us),
            **self.facts,
        }
        return record | ({"note": self.note} if self.note else {})

    def line(self) -> str:
        low, high = self.spread()
        return f"{self.name:44}{self.median:12.1f} us  [{low:.1f}, {high:.1f}]  {self.note}"


def timed(name: str, action: Callable[[], Any], rounds: int) -> Figure:
    """Repeated timings of one action."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e6)
    return Figure(name, times)


def in_turn(
    actions: Mapping[str, Callable[[], Any]], seconds: float, least: int = 5, most: int = 400
) -> dict[str, Figure]:
    """Time the actions one after the other, round by round, so that a drift of the machine hits all
    alike.

    seconds: time for all rounds together; at least `least` and at most `most` rounds are run, after
    one that is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            times[name].append((time.perf_counter() - began) * 1e6)
        rounds += 1
    return {name: Figure(name, values) for name, values in times.items()}


def ratios(of: Figure, to: Figure) -> tuple[float, float, float]:
    """Median, p10 and p90 of `of / to`, round by round."""
    quotient = np.asarray(of.times_us) / np.asarray(to.times_us)
    median, low, high = np.percentile(quotient, [50, 10, 90])
    return float(median), float(low), float(high)


def cpu_name() -> str:
    """What the operating system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Machine:
    """Where and beside what the figures were taken."""

    cpu: str = field(default_factory=cpu_name)
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    kernels: str = field(default_factory=lambda: ops.kernels().chosen)
    torch: str = field(default_factory=lambda: torch.__version__)
    gpu: str = field(
        default_factory=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    )
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.kernels}, torch {self.torch}; load {self.load}"
        )


def write(path: Path, machine: Machine, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON file a benchmark: {"machine": …, "rows": […]}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": asdict(machine), "rows": list(rows)}
    path.write_text(json.dumps(record, indent=1) + "\n")
