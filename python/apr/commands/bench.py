"""Measure: attention against torch's operators, what forks, plans, steps and fresh pages cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apr.bench import (
    adaptive,
    codes,
    drop,
    gpu,
    harness,
    kernels,
    latent,
    loop,
    methods,
    ranks,
    sampling,
    scaling,
    sessions,
)
from apr.errors import InvalidInput
from apr.hf.world import is_first_rank

# Of each: what measures, and which of OPTIONS it takes.
BENCHES = {
    "attention": (kernels.bench_attention, "seconds problem"),
    "prefill": (kernels.bench_prefill, "seconds"),
    "workers": (kernels.bench_workers, "seconds"),
    "fork": (sessions.bench_fork, "tokens rounds"),
    "drop": (drop.bench_drop, "prefix model"),
    "plan": (sessions.bench_plan, "threads rounds"),
    "threads": (sessions.bench_threads, "prefix rounds"),
    "pages": (sessions.bench_pages, ""),
    "codes": (codes.bench_codes, "prefix seconds model"),
    "sampling": (sampling.bench_sampling, "seconds"),
    "loop": (loop.bench_loop, "model"),
    "latent": (latent.bench_latent, "prefix"),
    "scaling": (scaling.bench_scaling, ""),
    "width": (kernels.bench_width, "seconds"),
    "gpu": (gpu.bench_gpu, "problem"),
    "methods": (methods.bench_methods, ""),
    "ranks": (ranks.bench_ranks, "prefix"),
    "adaptive": (adaptive.bench_adaptive, ""),
}
SIZES = {"seconds": 4.0, "tokens": 131072, "threads": 64, "prefix": 4096, "rounds": 300}
SMALL = {"seconds": 0.05, "tokens": 8192, "threads": 64, "prefix": 256, "rounds": 20}
OPTIONS: dict[str, dict[str, Any]] = {
    "seconds": {"type": float, "help": "for each table of kernels"},
    "tokens": {"type": int, "help": "length of the forked thread"},
    "threads": {"type": int, "help": "threads of the planned step"},
    "prefix": {"type": int, "help": "shared tokens; of `drop` all of a thread's"},
    "rounds": {"type": int, "help": "how often; whole steps a tenth of it"},
    "model": {"help": "a folder, instead of random weights"},
    "problem": {
        "action": "append",
        "metavar": "NAME",
        "help": "problems of others, by name or family (pat, fasttree, hydragen, trtllm, hogwild, "
        "deft)",
    },
}


def _argument(option: str) -> dict[str, Any]:
    about = dict(OPTIONS[option])
    if option in SIZES:
        about["help"] += f" ({SIZES[option]:g}; with --smoke {SMALL[option]:g})"
    return about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (measure, takes) in BENCHES.items():
        about = (measure.__doc__ or "").split("\n\n")[0]
        kind = kinds.add_parser(name, help=about, description=about)
        for option in takes.split():
            kind.add_argument(f"--{option}", **_argument(option))
        kind.add_argument("--json", type=Path, help="write the figures here too")
        kind.add_argument("--smoke", action="store_true", help="small sizes, to see it run")


def main(options: argparse.Namespace) -> None:
    measure, takes = BENCHES[options.what]
    for name in SIZES.keys() & takes.split():
        if getattr(options, name) is None:
            setattr(options, name, (SMALL if options.smoke else SIZES)[name])
        if not getattr(options, name) > 0:
            raise InvalidInput(f"--{name}: got {getattr(options, name)}; expected more than 0")
    machine = harness.Machine()
    print(f"{machine}; medians, with p10 and p90")
    records = []
    for figure in measure(options):
        records.append(figure.record())
        if (
            options.json and is_first_rank()
        ):  # after each, so that a run that is stopped leaves what it has
            harness.write(options.json, machine, records)
