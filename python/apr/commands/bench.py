"""Measure: what a fork costs, what the plan of a decode step costs."""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import apr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["fork", "plan"])
    parser.add_argument("--tokens", type=int, default=131072, help="length of the forked thread")
    parser.add_argument("--threads", type=int, default=64, help="threads of the planned step")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see it run")


def main(options: argparse.Namespace) -> None:
    if options.smoke:
        options.tokens, options.rounds = 8192, 20
    load = os.getloadavg()[0]
    print(
        f"load {load:.2f} on {os.cpu_count()} cores; medians of {options.rounds}, with p10 and p90"
    )
    rows = bench_fork(options) if options.what == "fork" else bench_plan(options)
    if options.json:
        options.json.write_text(json.dumps({"load": load, "rows": rows}, indent=1) + "\n")


def _time(action: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median, p10 and p90 of one call, in microseconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e6)
    median, low, high = np.percentile(times, [50, 10, 90])
    return float(median), float(low), float(high)


def _model() -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=1 << 18,
    )
    return LlamaForCausalLM(config).eval()


def _fill(session: apr.Session, threads: list[apr.Thread]) -> None:
    """Mark the queued tokens as encoded without running the model: what a fork costs does not see it.

    The pages hold random numbers.
    """
    for pool in session.pools:
        pool.k.normal_()
        pool.v.normal_()
    step = session._begin(threads, step_tokens=1 << 40)
    while step.next():
        pass
    session._end(step, commit=True)


def _row(name: str, figures: tuple[float, float, float], note: str) -> dict[str, Any]:
    median, low, high = figures
    print(f"{name:44}{median:12.1f} us  [{low:.1f}, {high:.1f}]  {note}")
    return {"name": name, "median_us": median, "p10_us": low, "p90_us": high, "note": note}


def bench_fork(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fork of a long thread against a deep copy of stock transformers' cache of the same size."""
    rows = []
    with apr.Session(_model(), max_tokens=options.tokens + 64 * 64, self_test=False) as session:
        root = session.thread([1] * options.tokens)
        _fill(session, [root])
        kv_bytes = options.tokens * session.spec.bytes_per_token
        before = session.stats.used_pages
        kept: list[apr.Thread] = []
        for n in (1, 16):

            def fork(n: int = n) -> None:
                kept.extend(root.fork(n))

            figures = _time(fork, options.rounds)
            moved = (session.stats.used_pages - before) * session.page_size
            moved *= session.spec.bytes_per_token
            rows.append(_row(f"fork({n}), {options.tokens} tokens", figures, f"{moved} KV bytes"))
            for thread in kept:
                thread.release()
            kept.clear()
        layers = len(session.pools)
        heads, dim = session.spec.layers[0].kv_heads, session.spec.layers[0].head_dim
    cache = DynamicCache()
    for layer in range(layers):
        x = torch.randn(1, heads, options.tokens, dim)
        cache.update(x, x.clone(), layer)
    figures = _time(lambda: copy.deepcopy(cache), max(5, options.rounds // 30))
    rows.append(_row("deep copy of a DynamicCache, same size", figures, f"{kv_bytes} KV bytes"))
    rows.append(_memory())
    return rows


def _memory() -> dict[str, Any]:
    """Sixteen threads of 256 tokens on one prefix of 8,192: pages in use against the bound."""
    prefix, own, count = 8192, 256, 16
    with apr.Session(_model(), max_tokens=32768, self_test=False) as session:
        root = session.thread([1] * prefix)
        kids = root.fork(count)
        for kid in kids:
            kid.extend([2] * own)
        _fill(session, kids)
        stats = session.stats
        stored = stats.used_pages * session.page_size
    floor = prefix + count * own
    note = (
        f"{stored} token slots; prefix + own {floor} ({stored / floor - 1:+.1%}); "
        f"with a copy a thread {stats.replicated_pages * 64} ({stats.seen_tokens / floor:.1f}x)"
    )
    print(f"memory of {count} threads on an {prefix}-token prefix: {note}")
    return {"name": "memory", "slots": stored, "floor": floor, "note": note}


def bench_plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The plan of an ordinary decode step: one token a thread, shared prefix, own tails."""
    rows = []
    for shape in ("fork", "deep", "hogwild"):
        with apr.Session(_model(), max_tokens=1 << 19, self_test=False) as session:
            threads = _shape(session, shape, options.threads)
            figures = []
            for _ in range(options.rounds):
                for thread in threads:
                    thread.extend([1])
                began = time.perf_counter()
                step = session._begin(threads, session.step_tokens)
                step.next()
                figures.append((time.perf_counter() - began) * 1e6)
                pairs = step.plan.num_pairs
                session._end(step, commit=True)
            median, low, high = (float(x) for x in np.percentile(figures, [50, 10, 90]))
            name = f"plan, {len(threads)} threads, {shape}"
            rows.append(_row(name, (median, low, high), f"{pairs} (thread, segment) pairs"))
    return rows


def _shape(session: apr.Session, shape: str, count: int) -> list[apr.Thread]:
    if shape == "hogwild":
        prompt = session.segment([1] * 100)
        regions = [session.region(base=100) for _ in range(min(count, 16))]
        threads = []
        for own in regions:
            others = [r for r in regions if r is not own]
            threads.append(session.thread(view=[prompt, *others, own], writes=own))
    else:
        root = session.thread([1] * 1000)
        threads = root.fork(count)
        for _ in range(15 if shape == "deep" else 0):
            for thread in threads:
                thread.extend([1] * 70)
            _fill(session, threads)
            threads = [thread.fork(1)[0] for thread in threads]
    for thread in threads:
        thread.extend([1])
    _fill(session, threads)
    return threads
