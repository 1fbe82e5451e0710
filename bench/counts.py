"""What the CUDA kernels ask of a GPU, counted by the emulator, and a time estimated from it:
docs/cuda-counts.md.

python bench/counts.py                        a line a problem, for all that the emulator can take
python bench/counts.py --problem pat-1        of one problem or family
python bench/counts.py --record docs/cuda-counts.md

Wants a build with APR_EMULATION=ON, no GPU. Counts are exact; the time is an estimate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apr import _core
from apr.bench import problems
from apr.bench.gpu import HEADS, SHAPES
from apr.bench.problems import NAMED, Problem
from apr.ops import device as gpu
from apr.ops import machine

MOST_OPERATIONS = 3e11  # that a problem asks for, padding not counted
MOST_BYTES = 6 << 30


@dataclass(frozen=True)
class Gpu:
    """What the estimate takes for granted of a GPU; the rates are what kernels reach, not peaks."""

    name: str
    bytes_per_second: float
    wide_products: float  # a second: multiplications and additions of wgmma in bfloat16
    small_products: float  # of mma.sync
    exponentials: float
    multiprocessors: int = 132


# Copies reach about 90 % of the memory's rate; wgmma 650 and mma.sync 350 of 989 TFLOP/s
# (FlashAttention 2 and 3 on H100); 16 exponentials a cycle and multiprocessor at 1.75 GHz.
GPUS = [
    Gpu("H100", 3.0e12, 650e12, 350e12, 132 * 16 * 1.75e9),
    Gpu("H200", 4.3e12, 650e12, 350e12, 132 * 16 * 1.75e9),
]
LAUNCH_S = 2.5e-6  # ramp and drain of the attention kernel
MERGE_S = 1.5e-6  # of the merge, which starts while the kernel ahead drains
LOOKUP_S = 0.25e-6  # a load that hits the L2 cache
NOTE = (
    f"H100: 3.0 TB/s, H200: 4.3 TB/s; 650 TFLOP/s of wgmma, 350 of mma.sync, 3.7 T exponentials/s; "
    f"{LAUNCH_S * 1e6} µs of ramp and drain, {MERGE_S * 1e6} µs of merge, {LOOKUP_S * 1e6} µs a "
    "look-up in front of a copy"
)


@dataclass
class Counted:
    """Counts of one attention call."""

    problem: Problem
    kernel: str
    attention: Any  # _core.GpuCounts
    merge: Any

    def bytes(self, *names: str) -> int:
        return sum(self.attention.traffic[n].bytes for n in names if n in self.attention.traffic)

    @property
    def pool_times_floor(self) -> float:
        """Keys, values, queries and outputs that come from device memory, by what must."""
        first_queries = self.problem.q[0].numel() * self.problem.q[0].element_size()
        return (self.bytes("keys", "values") + 2 * first_queries) / self.problem.bytes()

    @property
    def sectors(self) -> float:
        """Sectors of keys and values by the fewest that hold the bytes."""
        both = [self.attention.traffic[n] for n in ("keys", "values")]
        return sum(x.sectors for x in both) / sum(x.least_sectors for x in both)

    @property
    def in_cache(self) -> float:
        """Partial results, queries read again and tables, written and read, by the floor."""
        every = [*self.attention.traffic.items(), *self.merge.traffic.items()]
        size = sum(32 * x.sectors for name, x in every if name not in ("keys", "values"))
        return size / self.problem.bytes()

    @property
    def conflicts(self) -> tuple[float, float]:
        """Rounds of shared memory by the fewest: of the main loop's operands, of the rest."""

        def ratio(shared: Any) -> float:
            return shared.rounds / shared.least_rounds if shared.least_rounds else 1.0

        return ratio(self.attention.operands), ratio(self.attention.other)

    @property
    def tail(self) -> float:
        """How much more the busiest multiprocessor reads than the mean."""
        mean = self.bytes("keys", "values") / GPUS[0].multiprocessors
        return self.attention.busiest_bytes / mean - 1

    def estimate(self, on: Gpu) -> tuple[float, float]:
        """Seconds of the floor, and of this call."""
        floor = max(
            self.problem.bytes() / on.bytes_per_second,
            self.problem.operations() / on.wide_products,
        )
        products = on.wide_products if self.kernel.startswith("wide") else on.small_products
        work = max(
            self.pool_times_floor * self.problem.bytes() / on.bytes_per_second,
            self.attention.products / products,
            self.attention.exponentials / on.exponentials,
        )
        later = (self.attention.spans - 1) * self.attention.later_lookups
        waits = self.attention.first_lookups + later / self.blocks_together
        return floor, work * (1 + self.tail) + LAUNCH_S + MERGE_S + waits * LOOKUP_S

    @property
    def blocks_together(self) -> int:
        """Blocks of a multiprocessor: one works while another waits. In the wide kernel a thread of
        its own looks ahead.
        """
        return self.attention.blocks // self.attention.launches // GPUS[0].multiprocessors


def count(problem: Problem) -> list[Counted]:
    """One attention call on the emulated GPU; a plan that runs in passes is counted whole."""
    step, _ = problems.ours(problem, rotated=True)
    _core.count_emulated(True)
    try:
        step(0)
        counts = _core.emulated_counts()
    finally:
        _core.count_emulated(False)
    names = [name for name in counts if name.startswith(("small", "wide"))]
    return [Counted(problem, name, counts[name], counts["merge_parts"]) for name in names]


def chosen(names: list[str]) -> Iterator[Problem]:
    device = torch.device("cpu")
    for name, named in problems.choose(names).items() if names else NAMED.items():
        for heads in named.heads if names else named.heads[:1]:
            if named.pool_bytes(heads[1]) > MOST_BYTES:
                print(f"{name}: left out: its pool takes {named.pool_bytes(heads[1]) / 1e9:.0f} GB")
                continue
            problem = named.make(name, heads, device, layers=1)
            if problem.operations() > MOST_OPERATIONS:
                print(f"{name}: left out: the emulator would take too long")
                continue
            yield problem
    if not names:
        for shape in SHAPES[:4]:
            for kind in ("tree", "hogwild"):
                problem = problems.make(kind, shape, HEADS[0], torch.bfloat16, device, 1)
                if problem.operations() <= MOST_OPERATIONS:
                    yield problem


HEAD = (
    "| problem | kernel | MB | device memory, × floor | sectors, × fewest | in cache, × floor | "
    "bank rounds: loop | rest | tail | look-ups | H100, µs | × floor | H200, µs | × floor |"
)


def line(one: Counted) -> str:
    loop, rest = one.conflicts
    cells = [
        one.problem.name,
        one.kernel,
        f"{one.problem.bytes() / 1e6:.1f}",
        f"{one.pool_times_floor:.3f}",
        f"{one.sectors:.2f}",
        f"{one.in_cache:.2f}",
        f"{loop:.2f}",
        f"{rest:.2f}",
        f"{one.tail:.0%}",
        f"{one.attention.first_lookups} + {one.attention.spans - 1} × {one.attention.later_lookups}",
    ]
    for on in GPUS:
        floor, estimate = one.estimate(on)
        cells += [f"{estimate * 1e6:.1f}", f"{estimate / floor:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--record", type=Path, help="write the page here")
    options = parser.parse_args()
    if gpu.built(emulated=True) is None:
        print("counts.py: this build has no emulation; build with APR_EMULATION=ON")
        return 1
    machine.use_kernels(gpu.EMULATED)
    kib = 1024
    _core.set_emulated_device(90, GPUS[0].multiprocessors, 227 * kib, 228 * kib, 1 << 28, 1)
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    print("\n".join(lines))
    for problem in chosen(options.problem):
        for one in count(problem):
            lines.append(line(one))
            print(lines[-1], flush=True)
    if options.record:
        text = Path(__file__).with_name("counts.md").read_text()
        day = time.strftime("%Y-%m-%d")
        options.record.write_text(f"{text.format(day=day, note=NOTE)}\n" + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
