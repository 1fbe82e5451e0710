"""What the CUDA kernels ask of a GPU, counted by the emulator, and a time estimated from it.

python bench/counts.py                    all problems that the emulator can take: about 40 minutes
python bench/counts.py --problem pat-1    one problem or family
python bench/counts.py --page             docs/cuda-counts.md from what was counted, at once

Counts go to bench/results/cuda-counts.json, problem by problem: a run that is stopped goes on where
it was, and what stands there is counted again by its name alone (or delete the file). Wants a build
with APR_EMULATION=ON, no GPU. Counts are exact; the time is an estimate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apr import _core
from apr.bench import problems
from apr.bench.gpu import HEADS, SHAPES
from apr.bench.problems import NAMED, Problem
from apr.ops import device as gpu
from apr.ops import machine

HERE = Path(__file__).parent
STORED = HERE / "results" / "cuda-counts.json"
PAGE = HERE.parent / "docs" / "cuda-counts.md"
MOST_OPERATIONS = 1e11  # that a problem asks for, padding not counted
MOST_BYTES = 6 << 30


@dataclass(frozen=True)
class Gpu:
    """What the estimate takes for granted of a GPU: rates that kernels reach, not peaks."""

    name: str
    bytes_per_second: float


# Copies reach about 90 % of the memory's rate; of 989 TFLOP/s wgmma 650 and mma.sync 350
# (FlashAttention 3 and 2 on H100); 16 exponentials a cycle and multiprocessor at 1.75 GHz.
GPUS = [Gpu("H100", 3.0e12), Gpu("H200", 4.3e12)]
MULTIPROCESSORS = 132
WIDE_PRODUCTS, SMALL_PRODUCTS = 650e12, 350e12
EXPONENTIALS = MULTIPROCESSORS * 16 * 1.75e9
CACHE_BYTES_PER_SECOND = 5.5e12  # of the L2 cache
ONE_BYTES_PER_SECOND = 100e9  # that one multiprocessor reads at most
LAUNCH_US = 2.5  # ramp and drain of the attention kernel
MERGE_US = 1.5  # the merge starts while the kernel ahead drains
LOOKUP_US = 0.25  # a load that hits the L2 cache
QUERY_LOOKUPS = 3  # item, visit, query: behind the first copy, in front of the first product


def counted(problem: Problem) -> dict[str, Any]:
    """Counts of one attention call on the emulated GPU."""
    step, _ = problems.ours(problem, rotated=True)
    _core.count_emulated(True)
    try:
        step(0)
        counts = _core.emulated_counts()
    finally:
        _core.count_emulated(False)
    (kernel,) = (name for name in counts if name.startswith(("small", "wide", "plain")))
    assert counts[kernel].launches == 1, "a plan that runs in passes"
    attention, merge = counts[kernel], counts["merge_parts"]
    few = 8 if kernel.startswith("wide") else 1  # tokens that a copy takes at least
    segments = {tuple(v.pages): v.hi - v.lo for _, views in problem.sets for v in views}
    tokens = sum(-(-n // few) * few for n in segments.values())
    pool = [attention.traffic[side] for side in ("keys", "values")]
    every = [*attention.traffic.values(), *merge.traffic.values()]
    _, kv_heads, dim = problem.heads
    size = problem.q[0].element_size()
    return {
        "kernel": kernel,
        "floor_bytes": problem.bytes(),
        "floor_operations": problem.operations(),
        "distinct_bytes": 2 * tokens * kv_heads * dim * size,
        "end_bytes": 2 * problem.q[0].numel() * size,  # queries and outputs
        "pool_bytes": sum(x.bytes for x in pool),
        "pool_sectors": sum(x.sectors for x in pool),
        "pool_least_sectors": sum(x.least_sectors for x in pool),
        "cache_bytes": 32 * sum(x.sectors for x in every),
        "busiest_bytes": attention.busiest_bytes,
        "operands": [attention.operands.rounds, attention.operands.least_rounds],
        "other": [attention.other.rounds, attention.other.least_rounds],
        "products": attention.products,
        "exponentials": attention.exponentials,
        "blocks": attention.working_blocks,
        "spans": attention.spans,
        "lookups": [attention.first_lookups, attention.later_lookups],
    }


def chosen(names: list[str]) -> Iterator[tuple[str, Any]]:
    """(title, what makes the problem): named ones with all heads, of all problems the first."""
    device = torch.device("cpu")
    for name, named in problems.choose(names).items() if names else NAMED.items():
        for heads in named.heads if names else named.heads[:1]:
            if named.pool_bytes(heads[1]) > MOST_BYTES:
                print(f"{name}: left out: its pool takes {named.pool_bytes(heads[1]) / 1e9:.0f} GB")
                continue
            make = partial(named.make, name, heads, device, 1)
            yield f"{name}, {heads[0]}/{heads[1]}/128", make
    if not names:
        for shape in SHAPES[:4]:
            for kind in ("tree", "hogwild"):
                title = f"{kind} P {shape[0]} N {shape[1]} S {shape[2]}, 32/8/128"
                yield (
                    title,
                    partial(problems.make, kind, shape, HEADS[0], torch.bfloat16, device, 1),
                )


def estimate_us(one: dict[str, Any], on: Gpu) -> tuple[float, float]:
    """Microseconds of the floor, and of the call."""
    floor = max(one["floor_bytes"] / on.bytes_per_second, one["floor_operations"] / WIDE_PRODUCTS)
    wide = one["kernel"].startswith("wide")
    work = max(
        (one["distinct_bytes"] + one["end_bytes"]) / on.bytes_per_second,
        one["cache_bytes"] / CACHE_BYTES_PER_SECOND,
        one["busiest_bytes"] / ONE_BYTES_PER_SECOND,
        one["products"] / (WIDE_PRODUCTS if wide else SMALL_PRODUCTS),
        one["exponentials"] / EXPONENTIALS,
    )
    first, later = one["lookups"]
    together = max(1, one["blocks"] // MULTIPROCESSORS)  # one works while the other waits
    if wide:
        later = 0  # the thread that copies is ahead
    waits = first + (one["spans"] - 1) * (later + QUERY_LOOKUPS) / together
    return floor * 1e6, work * 1e6 + LAUNCH_US + MERGE_US + waits * LOOKUP_US


HEAD = (
    "| problem, heads | kernel | MB | from memory | read, × once | sectors | in cache | loop | "
    "rest | tail | spans | look-ups | H100, µs | × floor | H200, µs | × floor |"
)


def rounds(needed: int, least: int) -> str:
    return f"{needed / least:.2f}" if least else "–"


def line(title: str, one: dict[str, Any]) -> str:
    least = one["floor_bytes"]
    cells = [
        title,
        one["kernel"],
        f"{least / 1e6:.1f}",
        f"{(one['distinct_bytes'] + one['end_bytes']) / least:.3f}",
        f"{one['pool_bytes'] / one['distinct_bytes']:.2f}",
        f"{one['pool_sectors'] / one['pool_least_sectors']:.2f}",
        f"{one['cache_bytes'] / least:.2f}",
        rounds(*one["operands"]),
        rounds(*one["other"]),
        f"{one['busiest_bytes'] * MULTIPROCESSORS / one['pool_bytes'] - 1:.0%}",
        f"{one['spans']}",
        f"{one['lookups'][0]} + {one['lookups'][1]}",
    ]
    for on in GPUS:
        floor, time_us = estimate_us(one, on)
        cells += [f"{time_us:.0f}", f"{time_us / floor:.2f}"]
    return f"| {' | '.join(cells)} |"


def page(stored: dict[str, Any]) -> str:
    lines = [line(title, one) for title, one in stored.items()]
    rule = "|" + "---|" * (HEAD.count("|") - 1)
    taken = (
        f"{', '.join(f'{g.name} {g.bytes_per_second / 1e12} TB/s' for g in GPUS)}, "
        f"{WIDE_PRODUCTS / 1e12:.0f} TFLOP/s of wgmma and {SMALL_PRODUCTS / 1e12:.0f} of mma.sync, "
        f"{EXPONENTIALS / 1e12:.1f} T exponentials/s, {CACHE_BYTES_PER_SECOND / 1e12} TB/s of the "
        f"L2 cache, {ONE_BYTES_PER_SECOND / 1e9:.0f} GB/s of one multiprocessor; {LAUNCH_US} µs of "
        f"ramp and drain, {MERGE_US} µs of merge, {LOOKUP_US} µs a look-up"
    )
    text = Path(__file__).with_name("counts.md").read_text()
    return text.format(taken=taken, table="\n".join([HEAD, rule, *lines]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--page", action="store_true", help="write docs/cuda-counts.md, count none")
    options = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if options.page:
        PAGE.write_text(page(stored))
        return 0
    if gpu.built(emulated=True) is None:
        print("counts.py: this build has no emulation; build with APR_EMULATION=ON")
        return 1
    machine.use_kernels(gpu.EMULATED)
    _core.set_emulated_device(90, MULTIPROCESSORS, 227 << 10, 228 << 10, 1 << 28, 1)
    print(HEAD)
    for title, make in chosen(options.problem):
        if title in stored and not options.problem:
            continue
        problem = make()
        if problem.operations() > MOST_OPERATIONS:
            print(f"{title}: left out: the emulator would take too long")
            continue
        stored[title] = counted(problem)
        print(line(title, stored[title]), flush=True)
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
