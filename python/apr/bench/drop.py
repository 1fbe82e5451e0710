"""A thread that lets its middle go: what that costs beside running the rest again, and what it does
to what the model expects.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

import apr
from apr.bench.harness import Figure, ratios
from apr.bench.loop import half_billion
from apr.bench.texts import loaded, pages_of

FIRST = 4  # tokens that stay in front: StreamingLLM's sinks


def bench_drop(options: argparse.Namespace) -> Iterator[Figure]:
    """Half of a thread goes: the next token by `drop`, and by running what is left again; with
    --model, also how likely the text goes on behind each.
    """
    model = (
        half_billion(options.smoke) if not options.model else loaded(options.model, torch.float32)
    )
    for tokens in (options.prefix // 4, options.prefix):
        yield from _costs(model, tokens, 3 if options.smoke else 7)
    if options.model:
        yield from _likelihoods(model, options.model, options.prefix)


def _report(figure: Figure) -> Figure:
    print(figure.line(), flush=True)
    return figure


def _costs(model: Any, tokens: int, rounds: int) -> Iterator[Figure]:
    vocabulary, times = model.config.get_text_config().vocab_size, ("drop", "step", "again")
    spent: dict[str, list[float]] = {name: [] for name in times}
    text = [(7919 * i + 13) % (vocabulary - 3) + 3 for i in range(tokens)]
    with apr.Session(model, max_tokens=2 * tokens + 256) as session:
        for _ in range(rounds):
            thread = session.thread(text)
            session.step([thread])
            marks = [time.perf_counter()]
            thread.drop(FIRST, tokens // 2)
            marks.append(time.perf_counter())
            thread.extend([5])
            session.step([thread])
            marks.append(time.perf_counter())
            thread.release()
            again = session.thread([*text[:FIRST], *text[tokens // 2 :], 5])
            session.step([again])
            marks.append(time.perf_counter())
            again.release()
            for name, begin, end in zip(times, marks, marks[1:], strict=False):
                spent[name].append(1e6 * (end - begin))
    left = tokens - tokens // 2 + FIRST
    yield _report(Figure(f"drop {tokens // 2 - FIRST} of {tokens} tokens", spent["drop"]))
    step = Figure(f"the next token, behind {left}", spent["step"])
    again_figure = Figure(f"{left} tokens run again", spent["again"])
    median, low, high = ratios(again_figure, step)
    step.note = f"run again / this {median:.1f} [{low:.1f}, {high:.1f}]"
    yield from map(_report, (step, again_figure))


def _likelihoods(model: Any, folder: str, tokens: int, then: int = 64) -> Iterator[Figure]:
    """Nats a token of how pages of the Python reference go on: in one run, all ways of one page
    side by side.
    """
    pages, half = pages_of(folder, tokens, then), tokens // 2
    found: dict[str, list[float]] = {}
    with apr.Session(model, max_tokens=4 * tokens + 4096) as session:
        for page in pages:
            whole = session.thread(page[:tokens])
            session.step([whole])
            dropped, headless = whole.fork(2)
            dropped.drop(FIRST, half)
            headless.drop(0, half)
            again = session.thread([*page[:FIRST], *page[half:tokens]])
            threads = {
                "all of it seen": whole,
                f"{FIRST} tokens and the later half, dropped": dropped,
                "the later half, dropped": headless,
                f"{FIRST} tokens and the later half, run again": again,
            }
            for token in page[tokens:]:
                scores = session.step(list(threads.values())).log_softmax(-1)
                for name, thread, row in zip(threads, threads.values(), scores, strict=True):
                    found.setdefault(name, []).append(-float(row[token]))
                    thread.extend([token])
            for thread in threads.values():
                thread.release()
    for name, nats in found.items():
        mean = sum(nats) / len(nats)
        note = f"{mean:.3f} nats a token, over {len(nats)} of {len(pages)} pages"
        print(f"{name}: {note}")
        yield Figure(name, [0.0], note, {"nats": mean})
