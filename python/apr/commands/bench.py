"""Measure: attention against torch's operators, what forks, plans, steps and fresh pages cost."""

from __future__ import annotations

import argparse
from pathlib import Path

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

BENCHES = {
    "attention": kernels.bench_attention,
    "prefill": kernels.bench_prefill,
    "workers": kernels.bench_workers,
    "fork": sessions.bench_fork,
    "drop": drop.bench_drop,
    "plan": sessions.bench_plan,
    "threads": sessions.bench_threads,
    "pages": sessions.bench_pages,
    "codes": codes.bench_codes,
    "sampling": sampling.bench_sampling,
    "loop": loop.bench_loop,
    "latent": latent.bench_latent,
    "scaling": scaling.bench_scaling,
    "width": kernels.bench_width,
    "gpu": gpu.bench_gpu,
    "methods": methods.bench_methods,
    "ranks": ranks.bench_ranks,
    "adaptive": adaptive.bench_adaptive,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=list(BENCHES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each table of kernels")
    parser.add_argument("--tokens", type=int, default=131072, help="length of the forked thread")
    parser.add_argument("--threads", type=int, default=64, help="threads of the planned step")
    parser.add_argument(
        "--prefix",
        type=int,
        default=4096,
        help="shared tokens of `threads`, `latent` and `codes`, length of `drop`",
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument(
        "--model", help="of `loop`, `drop` and `codes`: a folder, instead of random weights"
    )
    parser.add_argument(
        "--problem",
        action="append",
        metavar="NAME",
        help="of `attention` and `gpu`: problems of others, by name or family (pat, fasttree, "
        "hydragen, trtllm, hogwild, deft)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see it run")


def main(options: argparse.Namespace) -> None:
    if options.problem and options.what not in ("attention", "gpu"):
        raise InvalidInput(f"--problem: bench {options.what} has none; expected attention or gpu")
    for name in ("seconds", "tokens", "threads", "prefix", "rounds"):
        if not getattr(options, name) > 0:
            raise InvalidInput(f"--{name}: got {getattr(options, name)}; expected more than 0")
    if options.smoke:
        options.tokens, options.rounds, options.prefix, options.seconds = 8192, 20, 256, 0.05
    machine = harness.Machine()
    print(f"{machine}; medians, with p10 and p90")
    records = []
    for figure in BENCHES[options.what](options):
        records.append(figure.record())
        if (
            options.json and is_first_rank()
        ):  # after each, so that a run that is stopped leaves what it has
            harness.write(options.json, machine, records)
