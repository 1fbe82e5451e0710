"""Guards against what got slower: a handful of ratios, each of two things timed in turn, against
bench/ratios.json.

python bench/check.py          fails where a ratio fell below three quarters of what is stored
python bench/check.py --store  writes the ratios of this machine
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apr
from apr import ops
from apr.bench.baselines import packed_mask
from apr.bench.harness import Machine, in_turn, ratios
from apr.bench.kernels import make_problem, tree_attention
from apr.bench.sampling import by_torch
from apr.bench.sessions import fill, small_llama

STORED = Path(__file__).with_name("ratios.json")
LEAST = 0.75  # of what is stored


def sampling() -> dict[str, Callable[[], Any]]:
    """16 rows of 151,936 words, temperature and top-p: the sampler, and what generate() does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 151_936, generator=generator).bfloat16()
    draws = ops.Draws(16, key=range(16), temperature=0.8, top_p=0.95)
    return {
        "apr": lambda: ops.sample(logits, draws),
        "other": by_torch(logits, temperature=0.8, top_p=0.95),
    }


def attention() -> dict[str, Callable[[], Any]]:
    """A decode step of 8 threads on 8,192 shared tokens: ours, and SDPA under a dense mask."""
    problem = make_problem((8192, 8, 256), (32, 8, 128), torch.bfloat16)
    return {"apr": tree_attention(problem), "other": packed_mask(problem)}


def one_thread() -> dict[str, Callable[[], Any]]:
    """A decode step of one thread: ours, and SDPA."""
    problem = make_problem((8192, 1, 0), (32, 8, 128), torch.bfloat16)
    return {"apr": tree_attention(problem), "other": packed_mask(problem)}


def loop() -> dict[str, Callable[[], Any]]:
    """Steps of 64 sampled threads beside as many of one: how much the loop asks for each thread."""
    model = small_llama()

    def steps(count: int) -> Callable[[], Any]:
        session = apr.Session(model, max_tokens=1 << 17, self_test=False)
        kids = session.thread([1] * 512).fork(count)
        fill(session, kids)
        run = iter(
            apr.stream(session, kids, do_sample=True, max_new_tokens=1 << 10, eos_token_id=[])
        )
        return lambda: next(run)

    return {"apr": steps(64), "other": steps(1)}


def forks() -> dict[str, Callable[[], Any]]:
    """16 forks of 32,768 tokens beside a copy of their keys and values."""
    session = apr.Session(small_llama(), max_tokens=1 << 16, self_test=False)
    root = session.thread([1] * (1 << 15))
    fill(session, [root])
    pool = session.pools[0].k

    def fork() -> None:
        for kid in root.fork(16):
            kid.release()

    return {"apr": fork, "other": pool.clone}


CHECKS = {f.__name__: f for f in (sampling, attention, one_thread, loop, forks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each ratio")
    options = parser.parse_args()
    stored = {} if options.store else json.loads(STORED.read_text())["ratios"]
    print(Machine())
    found, fallen = {}, []
    for name, make in CHECKS.items():
        with torch.no_grad():
            figures = in_turn(make(), options.seconds)
        median, low, high = ratios(figures["other"], figures["apr"])
        found[name] = round(median, 3)
        wanted = stored.get(name)
        if wanted is not None and median < LEAST * wanted:
            fallen.append(name)
        print(f"{name:12} other / apr {median:8.2f} [{low:.2f}, {high:.2f}]  stored {wanted}")
    if options.store:
        record = {"machine": str(Machine()), "ratios": found}
        STORED.write_text(json.dumps(record, indent=1) + "\n")
    if fallen:
        raise SystemExit(f"slower than stored: {', '.join(fallen)}; is the machine idle?")


if __name__ == "__main__":
    main()
