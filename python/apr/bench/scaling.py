"""What a loop costs beside its model against history, threads and segments."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import apr
from apr.bench.harness import Figure
from apr.bench.sessions import fill, small_llama

STEPS = 20


def _host(session: apr.Session, threads: list[apr.Thread], name: str, **facts: int) -> Figure:
    """Microseconds of each step of a sampled run that are not the model's; the first two are left
    out.
    """
    times: list[float] = []
    options: dict[str, Any] = dict(do_sample=True, max_new_tokens=STEPS, top_p=0.9, eos_token_id=[])
    with apr.stream(session, threads, **options) as run:
        spent = session.stats.forward_seconds
        clock = session.trace.clock
        began = clock()
        for _ in run:
            now, forward = clock(), session.stats.forward_seconds
            times.append(1e6 * (now - began - (forward - spent)))
            began, spent = clock(), forward
    figure = Figure(name, times[2:], facts={"axis": name.split(",")[0], **facts})
    print(figure.line(), flush=True)
    return figure


def bench_scaling(options: argparse.Namespace) -> Iterator[Figure]:
    """Host time of a step: flat in the history and in the segments, linear in the threads."""
    model = small_llama()
    lengths = (1000, 3000) if options.smoke else (1000, 3000, 10000, 30000, 100000)
    for length in lengths:
        with apr.Session(model, max_tokens=length + 16 * 256, self_test=False) as session:
            kids = session.thread([1] * length).fork(16)
            fill(session, kids)
            yield _host(session, kids, f"history, {length} tokens, 16 threads", x=length)
    for count in (1, 10) if options.smoke else (1, 3, 10, 30, 100, 300, 1000, 2000):
        with apr.Session(model, max_tokens=512 + count * 128, self_test=False) as session:
            kids = session.thread([1] * 512).fork(count)
            fill(session, kids)
            yield _host(session, kids, f"threads, {count} on 512 tokens", x=count)
    for forks in (100, 300) if options.smoke else (100, 300, 1000, 3000, 10000):
        room = 512 + 64 * (2 * forks + 64)
        with apr.Session(model, max_tokens=room, self_test=False) as session:
            kids = session.thread([1] * 512).fork(forks)
            for kid in kids:
                kid.extend([1] * 8)
            fill(session, kids)
            yield _host(session, kids[:16], f"segments, {forks} forks, 16 threads step", x=forks)
