"""What several Python threads do at once, for a thread sanitizer (tools/sanitize.sh): each has
pools and sessions of its own, on one model. With `race` they write the same slots, which it must
see.
"""

from __future__ import annotations

import sys
import threading

import torch

import apr
from apr import _core, ops
from apr.ops import machine
from kernel_cases import check, make, run, tree
from models import CLOSE, build, distance, stock, tokens

THREADS, TURNS = 3, 4


def kernels(seed):
    for turn in range(TURNS):
        for dtype in (torch.float32, torch.bfloat16):
            pool, generator = make(dtype, 2, 64, seed=seed * 100 + turn)
            got, want, _, _ = run(tree(), pool, 4, generator)
            check(got, want, dtype)
            scores = torch.randn(5, 5000, generator=generator).to(dtype)
            draws = ops.Draws(5, temperature=0.7, top_p=0.9, key=list(range(5)), count=turn)
            assert bool((ops.sample(scores, draws).tokens >= 0).all())


def sessions(model, seed):
    with apr.Session(model, max_tokens=1024) as s:
        root = s.thread(tokens(12, seed))
        kids = root.fork(3)
        apr.decode(s, kids, max_new_tokens=TURNS, eos_token_id=[])
        root.join(kids[:2])
        kids[2].extend([5])
        assert distance(s.step([kids[2]])[0], stock(model, kids[2].tokens)[-1]) < CLOSE
        s.check()


def in_threads(count, work):
    """Do work(i) in a Python thread for each i, and raise what one of them raised."""
    errors = []

    def guarded(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def race():
    pool, _ = make(torch.float32, 2, 64)
    plan = ops.plan(tree(), pool, 4)
    rows = torch.randn(plan.num_rows, 2, 64)
    in_threads(THREADS, lambda i: [ops.append(rows, rows, pool, plan) for _ in range(500)])


if __name__ == "__main__":
    machine.use_own_workers(True)  # a sanitizer cannot follow OpenMP's
    torch.set_num_threads(2)
    if sys.argv[1:] == ["race"]:
        race()
    else:
        llama = build("llama")
        in_threads(THREADS, kernels)
        in_threads(THREADS, lambda i: sessions(llama, i))
    print("done", _core.instruction_set())
