"""What a loop costs beside its model against history, threads and segments."""

from __future__ import annotations

import argparse
import time
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


def _edits(model: Any, count: int) -> Iterator[Figure]:
    """Microseconds a thread, or segment, of what is done to so many of them."""
    with apr.Session(model, max_tokens=4 * count, self_test=False) as session:
        root = session.thread([1, 2, 3, 4])
        session.step([root])
        kids: list[apr.Thread] = []
        segments: list[apr.Segment] = []

        def fork() -> None:
            kids.extend(root.fork(count))

        def extend() -> None:
            for kid in kids:
                kid.extend([5])

        def trim() -> None:
            for kid in kids:
                kid.trim(4)

        def check() -> None:
            session.check()

        def tree() -> None:
            session.trace.tree()

        def join() -> None:
            root.join(kids[: count // 2], reencode=True)

        def release() -> None:
            for kid in kids[count // 2 :]:
                kid.release()

        def segment() -> None:
            segments.extend(session.segment([1]) for _ in range(count))

        def drop() -> None:
            segments.clear()
            session.table.edit()

        for action in (fork, extend, trim, check, tree, join, release, segment, drop):
            name = action.__name__
            began = time.perf_counter()
            action()
            each = 1e6 * (time.perf_counter() - began) / count
            figure = Figure(f"{name}, each of {count}", [each], facts={"axis": name, "x": count})
            print(figure.line(), flush=True)
            yield figure


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
    for count in (100, 1000) if options.smoke else (1000, 10000, 100000):
        yield from _edits(model, count)
