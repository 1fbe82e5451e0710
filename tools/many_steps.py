"""Steps of eight threads, with forks, joins and trims between them: resident memory on the way.

python tools/many_steps.py 1000000
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch

import apr
from apr.bench.sessions import small_llama

PROMPT = [1, 2, 3, 4]


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def edited(
    session: apr.Session, root: apr.Thread, kids: list[apr.Thread], rng: random.Random
) -> tuple[apr.Thread, list[apr.Thread]]:
    """The children's parts joined into the root, or, past 2,000 tokens, all begun anew."""
    if len(root) > 2000:
        for thread in (root, *kids):
            thread.release()
        root = session.thread(PROMPT)
    else:
        root.join(kids)
        root.extend([5])
        session.step([root])
        root.trim(max(len(PROMPT), len(root) - rng.randrange(300)))
        root.extend([6])
    session.step([root])
    return root, root.fork(8)


def main(steps: int) -> None:
    torch.set_num_threads(1)
    rng, began = random.Random(0), time.perf_counter()
    model = small_llama(hidden=32, layers=1, heads=2, kv_heads=1)
    with apr.Session(model, max_tokens=1 << 16) as session:
        root = session.thread(PROMPT)
        kids = root.fork(8)
        for i in range(steps):
            for kid in kids:
                kid.extend([rng.randrange(64)])
            session.step(kids)
            if i % 50 == 49:
                root, kids = edited(session, root, kids, rng)
            if i % max(steps // 20, 1) == 0:
                seconds = time.perf_counter() - began
                print(f"{i:9d} steps {resident():8.1f} MiB {seconds:6.0f} s", flush=True)
        session.check()
        print(f"{steps:9d} steps {resident():8.1f} MiB, {session.stats}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
