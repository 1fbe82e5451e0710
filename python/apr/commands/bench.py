"""Measure: what a fork costs, what a plan costs, what a decode step costs against its width."""

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
    parser.add_argument("what", choices=["fork", "plan", "threads"])
    parser.add_argument("--tokens", type=int, default=131072, help="length of the forked thread")
    parser.add_argument("--threads", type=int, default=64, help="threads of the planned step")
    parser.add_argument("--prefix", type=int, default=4096, help="shared tokens of `threads`")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see it run")


def main(options: argparse.Namespace) -> None:
    if options.smoke:
        options.tokens, options.rounds, options.prefix = 8192, 20, 256
    if options.what == "threads":
        options.rounds = max(10, options.rounds // 10)
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores, {apr.ops.kernels().chosen}, torch {torch.__version__}"
    print(f"{machine}; load {load:.2f}; medians of {options.rounds}, with p10 and p90")
    benches = {"fork": bench_fork, "plan": bench_plan, "threads": bench_threads}
    rows = benches[options.what](options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine, "load": load, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _time(action: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median, p10 and p90 of one call, in microseconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e6)
    median, low, high = np.percentile(times, [50, 10, 90])
    return float(median), float(low), float(high)


def _model(hidden: int = 64, layers: int = 2, heads: int = 2, kv_heads: int = 1) -> Any:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
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


@torch.no_grad()
def bench_threads(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One decode step of N threads on a shared prefix, against stock transformers with N copies of it.

    Both run the same model (8 layers, hidden 512, 8 heads of 64, 2 KV heads, float32) on the same tokens,
    step by step in turn; the logits are compared first.
    """
    rows = []
    model = _model(hidden=512, layers=8, heads=8, kv_heads=2)
    prefix = torch.randint(0, 64, (1, options.prefix), generator=torch.Generator().manual_seed(0))
    for n in (1, 4, 16):
        stock = model(prefix, use_cache=True, logits_to_keep=1).past_key_values
        stock.batch_repeat_interleave(n)
        with apr.Session(model, max_tokens=options.prefix + 64 * (4 + 2 * n)) as session:
            kids = session.thread(prefix[0]).fork(n)
            session.step(kids)
            times: dict[str, list[float]] = {"apr": [], "stock": []}
            worst = 0.0
            for i in range(options.rounds):
                ids = torch.arange(i, i + n) % 64
                began = time.perf_counter()
                for kid, token in zip(kids, ids.tolist(), strict=True):
                    kid.extend([token])
                ours = session.step(kids)
                middle = time.perf_counter()
                theirs = model(ids[:, None], past_key_values=stock, use_cache=True).logits[:, -1]
                times["apr"].append((middle - began) * 1e6)
                times["stock"].append((time.perf_counter() - middle) * 1e6)
                worst = max(worst, float((ours - theirs).abs().max()))
            ratios = np.array(times["stock"]) / np.array(times["apr"])
            median, low, high = (float(x) for x in np.percentile(ratios, [50, 10, 90]))
            note = (
                f"stock / apr {median:.2f} [{low:.2f}, {high:.2f}]; largest logit difference "
                f"{worst:.1e}; KV tokens {session.stats.stored_tokens} against "
                f"{session.stats.seen_tokens}"
            )
        for name, values in times.items():
            mid, p10, p90 = (float(x) for x in np.percentile(values, [50, 10, 90]))
            label = f"{name}, {n} threads, prefix {options.prefix}"
            rows.append(_row(label, (mid, p10, p90), note if name == "apr" else ""))
    return rows
