"""What sessions cost: a fork, a plan, a decode step against its width, a page's first token."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import apr
from apr import ops
from apr.bench.harness import Figure, ratios, timed
from apr.ops import View


def small_llama(hidden: int = 64, layers: int = 2, heads: int = 2, kv_heads: int = 1) -> Any:
    """A Llama with random weights."""
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


def fill(session: apr.Session, threads: list[apr.Thread]) -> None:
    """Mark the queued tokens as encoded without running the model: what a fork costs does not see
    it.

    The pages hold random numbers.
    """
    for pool in session.pools:
        pool.k.normal_()
        pool.v.normal_()
    step = session.begin_step(threads, 1 << 40, threads)
    while step.next():
        pass
    session.end_step(step, threads, commit=True)


def _report(figure: Figure) -> Figure:
    print(figure.line())
    return figure


def bench_fork(options: argparse.Namespace) -> Iterator[Figure]:
    """Fork of a long thread against a deep copy of stock transformers' cache of the same size."""
    with apr.Session(
        small_llama(), max_tokens=options.tokens + 64 * 64, self_test=False
    ) as session:
        root = session.thread([1] * options.tokens)
        fill(session, [root])
        kv_bytes = options.tokens * session.spec.bytes_per_token
        before = session.stats.used_pages
        kept: list[apr.Thread] = []
        for n in (1, 16):

            def fork(n: int = n) -> None:
                kept.extend(root.fork(n))

            figure = timed(f"fork({n}), {options.tokens} tokens", fork, options.rounds)
            moved = (session.stats.used_pages - before) * session.page_size
            moved *= session.spec.bytes_per_token
            figure.note = f"{moved} KV bytes"
            yield _report(figure)
            for thread in kept:
                thread.release()
            kept.clear()
        layers = len(session.pools)
        heads, dim = session.spec.layers[0].kv_heads, session.spec.layers[0].head_dim
    cache = DynamicCache()
    for layer in range(layers):
        x = torch.randn(1, heads, options.tokens, dim)
        cache.update(x, x.clone(), layer)
    name = "deep copy of a DynamicCache, same size"
    figure = timed(name, lambda: copy.deepcopy(cache), max(5, options.rounds // 30))
    figure.note = f"{kv_bytes} KV bytes"
    yield _report(figure)
    yield _memory()


def _memory() -> Figure:
    """Sixteen threads of 256 tokens on one prefix of 8,192: pages in use against the bound."""
    prefix, own, count = 8192, 256, 16
    with apr.Session(small_llama(), max_tokens=32768, self_test=False) as session:
        root = session.thread([1] * prefix)
        kids = root.fork(count)
        for kid in kids:
            kid.extend([2] * own)
        began = time.perf_counter()
        fill(session, kids)
        seconds = time.perf_counter() - began
        stats = session.stats
        stored = stats.used_pages * session.page_size
    floor = prefix + count * own
    note = (
        f"{stored} token slots; prefix + own {floor} ({stored / floor - 1:+.1%}); "
        f"with a copy a thread {stats.replicated_pages * 64} ({stats.seen_tokens / floor:.1f}x)"
    )
    name = f"memory of {count} threads on an {prefix}-token prefix"
    print(f"{name}: {note}")
    return Figure(name, [seconds * 1e6], note, {"slots": stored, "floor": floor})


def bench_plan(options: argparse.Namespace) -> Iterator[Figure]:
    """The plan of an ordinary decode step: one token a thread, shared prefix, own tails."""
    for shape in ("fork", "deep", "hogwild"):
        with apr.Session(small_llama(), max_tokens=1 << 19, self_test=False) as session:
            threads = _shape(session, shape, options.threads)
            times = []
            for _ in range(options.rounds):
                for thread in threads:
                    thread.extend([1])
                began = time.perf_counter()
                step = session.begin_step(threads, session.step_tokens, threads)
                step.next()
                times.append((time.perf_counter() - began) * 1e6)
                pairs = step.plan.num_pairs
                session.end_step(step, threads, commit=True)
            name = f"plan, {len(threads)} threads, {shape}"
            yield _report(Figure(name, times, f"{pairs} (thread, segment) pairs"))


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
            fill(session, threads)
            threads = [thread.fork(1)[0] for thread in threads]
    for thread in threads:
        thread.extend([1])
    fill(session, threads)
    return threads


@torch.no_grad()
def bench_threads(options: argparse.Namespace) -> Iterator[Figure]:
    """One decode step of N threads on a shared prefix, against stock transformers with N copies of
    it.

    Both run the same model (8 layers, hidden 512, 8 heads of 64, 2 KV heads, float32) on the same
    tokens, step by step in turn; the logits are compared first.
    """
    model = small_llama(hidden=512, layers=8, heads=8, kv_heads=2)
    prefix = torch.randint(0, 64, (1, options.prefix), generator=torch.Generator().manual_seed(0))
    rounds = max(10, options.rounds // 10)
    for n in (1, 4, 16):
        stock = model(prefix, use_cache=True, logits_to_keep=1).past_key_values
        stock.batch_repeat_interleave(n)
        with apr.Session(model, max_tokens=options.prefix + 64 * (4 + 2 * n)) as session:
            kids = session.thread(prefix[0]).fork(n)
            session.step(kids)
            times: dict[str, list[float]] = {"apr": [], "stock": []}
            worst = 0.0
            for i in range(rounds):
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
            figures = {
                k: Figure(f"{k}, {n} threads, prefix {options.prefix}", v) for k, v in times.items()
            }
            median, low, high = ratios(figures["stock"], figures["apr"])
            figures["apr"].note = (
                f"stock / apr {median:.2f} [{low:.2f}, {high:.2f}]; largest logit difference "
                f"{worst:.1e}; KV tokens {session.stats.stored_tokens} against "
                f"{session.stats.seen_tokens}"
            )
        yield from map(_report, figures.values())


def bench_pages(options: argparse.Namespace) -> Iterator[Figure]:
    """One token for each of 16 threads, all on fresh pages of one layer: memory present or
    untouched.
    """
    threads, kv_heads, dim, rounds = 16, 8, 128, 5 if options.smoke else 40
    # Two halves with 32 MiB between them: a huge page of one is no page of the other.
    half, gap = rounds * threads, 256
    pool = ops.empty_pool(2 * half + gap, kv_heads, dim, torch.bfloat16)
    pages = {"untouched": iter(range(half)), "kept ahead": iter(range(half + gap, 2 * half + gap))}
    pool.populate(half + gap, 2 * half + gap)
    k = torch.randn(threads, kv_heads, dim).to(torch.bfloat16)

    def fresh(name: str) -> Callable[[], None]:
        sets = [(1, [View([next(pages[name])], 0, 1, 0, 0, own=True)]) for _ in range(threads)]
        plan = ops.plan(sets, pool, kv_heads)
        return lambda: ops.append(k, k, pool, plan)

    times: dict[str, list[float]] = {name: [] for name in pages}
    for i in range(2 * rounds):
        name = ("untouched", "kept ahead")[i % 2]
        append = fresh(name)
        began = time.perf_counter()
        append()
        times[name].append((time.perf_counter() - began) * 1e6)
    size = threads * pool.page_size * pool.bytes_per_token
    for name, values in times.items():
        note = f"{size / 2**20:.0f} MiB of pages"
        yield _report(Figure(f"{threads} tokens to fresh pages, {name}", values, note))
