"""Attention of forked threads against what a user of torch would write; prefill; threads beside
torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apr import ops
from apr.bench import problems, rates
from apr.bench.baselines import BASELINES, COMPILED, Problem
from apr.bench.gpu_peers import CannotRun, replicated
from apr.bench.harness import Figure, in_turn, ratios
from apr.bench.sessions import small_llama
from apr.ops import View, machine

SHAPES = [(2048, 4, 128), (8192, 8, 256), (16384, 16, 256), (8192, 1, 0)]  # P, N, S
HEADS = [(32, 8, 128), (14, 2, 64)]  # query heads, KV heads, head_dim
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REFERENCE = (8192, 8, 256)  # also with each instruction set and with FlexAttention
PAGE = 64
_MOST_POOL_BYTES = 3 << 30


def make_problem(shape: tuple[int, ...], heads: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """Random queries, keys and values of one step."""
    (prefix, n, own), (q_heads, kv_heads, dim) = shape, heads
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    return Problem(
        random(n, q_heads, dim),
        random(kv_heads, prefix, dim),
        random(kv_heads, prefix, dim),
        random(n, kv_heads, own, dim),
        random(n, kv_heads, own, dim),
    )


def tree_attention(p: Problem) -> Callable[[], Tensor]:
    """`ops.attention` of the problem on a pool whose pages lie in random order."""
    n, kv_heads, own, dim = p.own_k.shape
    prefix = p.prefix_k.shape[1]
    prefix_pages, own_pages = -(-prefix // PAGE), -(-own // PAGE)
    pool = ops.empty_pool(prefix_pages + n * own_pages, kv_heads, dim, p.q.dtype)
    order = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(0)).tolist()

    def fill(pages: list[int], k: Tensor, v: Tensor) -> None:
        for side, x in ((pool.k, k), (pool.v, v)):
            for page, part in zip(pages, torch.split(x, PAGE, 1), strict=True):
                side[page, :, : part.shape[1]] = part

    shared = order[:prefix_pages]
    fill(shared, p.prefix_k, p.prefix_v)
    sets = []
    for i in range(n):
        begin = prefix_pages + i * own_pages
        pages = order[begin : begin + own_pages]
        if own == 0:
            sets.append((1, [View(shared, 0, prefix, 0, 0, own=True)]))
            continue
        fill(pages, p.own_k[i], p.own_v[i])
        view = View(pages, 0, own, prefix, prefix, own=True)
        sets.append((1, [View(shared, 0, prefix, 0, 0), view]))
    plan = ops.plan(sets, pool, p.q.shape[1])
    return lambda: ops.attention(p.q, pool, plan, p.scale)[0]


def with_kernels(name: str, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step on one instruction set; `step` must call `ops` directly."""

    def run() -> Tensor:
        machine.use_kernels(name)
        try:
            return step()
        finally:
            machine.use_kernels()

    return run


def exact(p: Problem) -> Tensor:
    """The same attention in float64, thread by thread: [N, q_heads, D]."""
    outs = []
    for q, k, v in zip(p.grouped(), p.own_k, p.own_v, strict=True):
        keys = torch.cat([p.prefix_k, k], 1).double()
        values = torch.cat([p.prefix_v, v], 1).double()
        weight = (q.double() @ keys.transpose(1, 2) * p.scale).softmax(-1)
        outs.append((weight @ values).reshape(p.q.shape[1:]))
    return torch.stack(outs)


def steps_of(p: Problem, everything: bool) -> dict[str, Callable[[], Tensor]]:
    steps = {"apr": tree_attention(p)}
    if everything:
        for name in machine.kernels().cpu:
            if name not in (machine.kernels().chosen, "portable"):
                steps[f"apr, {name}"] = with_kernels(name, tree_attention(p))
    for name, make in BASELINES.items():
        if name in COMPILED and not everything:
            continue
        step = make(p)
        try:
            step()
        except RuntimeError as error:  # a compiler may be missing, or not know the operator
            print(f"  {name}: left out: {str(error).splitlines()[0]}")
            continue
        steps[name] = step
    return steps


@torch.no_grad()
def bench_attention(options: argparse.Namespace) -> Iterator[Figure]:
    """One decode step of N threads, each on a prefix of P tokens with S of its own; or the problems
    that are named.
    """
    if options.problem:
        yield from _named_problems(options)
        return
    counts = sorted({1, torch.get_num_threads()})
    shapes, heads_list = SHAPES, HEADS
    if options.smoke:
        shapes, heads_list = [(256, 2, 64), (256, 1, 0)], [(4, 2, 64)]
    before = torch.get_num_threads()
    for (name, dtype), heads, threads in product(DTYPES.items(), heads_list, counts):
        torch.set_num_threads(threads)
        rate = rates.operations_per_second(dtype) / 1e9
        for shape in shapes:
            problem = make_problem(shape, heads, dtype)
            prefix, n, own = shape
            size = 2 * heads[1] * (prefix + n * own) * heads[2] * problem.q.element_size()
            work = 4 * heads[0] * n * (prefix + own) * heads[2]
            bandwidth = rates.bytes_per_second(max(size, 1 << 20)) / 1e9
            title = f"P {prefix}, N {n}, S {own}, heads {heads[0]}/{heads[1]}/{heads[2]}, {name}"
            print(
                f"{title}, {threads} threads: {size / 1e6:.1f} MB, {work / 1e9:.2f} GFLOP; the "
                f"machine reads {bandwidth:.0f} GB/s and does {rate:.0f} GFLOP/s"
            )
            want = exact(problem)
            steps = steps_of(problem, shape == REFERENCE and heads == HEADS[0])
            errors = {k: float((step().double() - want).abs().max()) for k, step in steps.items()}
            figures = in_turn(steps, options.seconds)
            for method, figure in figures.items():
                ratio = ratios(figure, figures["apr"])
                seconds = figure.median / 1e6
                figure.facts = {
                    "shape": list(shape),
                    "heads": list(heads),
                    "dtype": name,
                    "threads": threads,
                    "bytes": size,
                    "flop": work,
                    "machine_gb_per_s": round(bandwidth, 1),
                    "machine_gflop_per_s": round(rate, 1),
                    "times_apr": [round(x, 3) for x in ratio],
                    "error": errors[method],
                }
                figure.note = (
                    f"x {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}], min {figure.minimum:.0f} "
                    f"us, {size / seconds / 1e9:.1f} GB/s, {work / seconds / 1e9:.0f} GFLOP/s, "
                    f"error {errors[method]:.1e}"
                )
                print("  " + figure.line())
                yield figure
    torch.set_num_threads(before)


def _named_problems(options: argparse.Namespace) -> Iterator[Figure]:
    """A layer's attention of each, beside SDPA on keys copied for every thread where they fit."""
    for name, named in problems.choose(options.problem).items():
        for heads in named.heads:
            if named.pool_bytes(heads[1]) > _MOST_POOL_BYTES:
                print(f"{name}, {heads[0]}/{heads[1]}: left out: its pool does not fit")
                continue
            problem = named.make(name, heads, torch.device("cpu"), layers=1)
            step, _ = problems.ours(problem, rotated=True)
            steps: dict[str, Callable[[], Tensor]] = {"apr": partial(step, 0)}
            try:
                steps["SDPA, a copy each"] = partial(replicated(problem, _MOST_POOL_BYTES), 0)
            except CannotRun as reason:
                print(f"  SDPA, a copy each: left out: {reason}")
            # Of whatever this machine multiplies fastest: float16 may be converted.
            rate = max(map(rates.operations_per_second, (problem.q[0].dtype, *DTYPES.values())))
            bandwidth = rates.bytes_per_second(max(problem.bytes(), 1 << 20))
            floor = max(problem.bytes() / bandwidth, problem.operations() / rate) * 1e6
            print(
                f"{problem.name} ({named.source}): {problem.bytes() / 1e6:.1f} MB, "
                f"{problem.operations() / 1e9:.2f} GFLOP; floor {floor:.0f} us"
            )
            figures = in_turn(steps, options.seconds, least=3)
            for method, figure in figures.items():
                ratio = ratios(figure, figures["apr"])
                figure.name = f"{problem.name}: {method}"
                figure.facts = {
                    "problem": name,
                    "heads": list(problem.heads),
                    "dtype": str(problem.q[0].dtype).removeprefix("torch."),
                    "bytes": problem.bytes(),
                    "flop": problem.operations(),
                    "floor_us": round(floor, 1),
                    "times_apr": [round(x, 3) for x in ratio],
                }
                figure.note = (
                    f"x {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}], "
                    f"x floor {figure.median / floor:.2f}"
                )
                print("  " + figure.line())
                yield figure


@torch.no_grad()
def bench_prefill(options: argparse.Namespace) -> Iterator[Figure]:
    """Causal attention of a whole prompt, against SDPA's flash kernel on heads repeated
    beforehand.
    """
    tokens = 256 if options.smoke else 8192
    for (name, dtype), (q_heads, kv_heads, dim) in product(DTYPES.items(), HEADS):
        generator = torch.Generator().manual_seed(0)
        shape = (tokens, q_heads + 2 * kv_heads, dim)
        packed = torch.randn(shape, generator=generator).to(dtype)
        q, k, v = (x.contiguous() for x in torch.split(packed, [q_heads, kv_heads, kv_heads], 1))
        pages = list(range(-(-tokens // PAGE)))
        pool = ops.empty_pool(len(pages), kv_heads, dim, dtype)
        plan = ops.plan([(tokens, [View(pages, 0, tokens, 0, 0, own=True)])], pool, q_heads)

        def ours(q: Any = q, k: Any = k, v: Any = v, pool: Any = pool, plan: Any = plan) -> Tensor:
            ops.append(k, v, pool, plan)
            return ops.attention(q, pool, plan, q.shape[-1] ** -0.5)[0]

        group = q_heads // kv_heads
        heads_first = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        repeated = (heads_first[0], *(x.repeat_interleave(group, 1) for x in heads_first[1:]))

        def flash(x: tuple[Tensor, ...] = repeated) -> Tensor:
            return F.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True)

        difference = float((ours() - flash()[0].transpose(0, 1)).abs().max())
        figures = in_turn({"apr": ours, "SDPA flash": flash}, options.seconds, least=3)
        work = 2 * tokens * tokens * q_heads * dim
        for method, figure in figures.items():
            ratio = ratios(figure, figures["apr"])
            figure.name = f"prefill {tokens}, {q_heads}/{kv_heads}/{dim}, {name}: {method}"
            figure.facts = {"dtype": name, "times_apr": [round(x, 3) for x in ratio], "flop": work}
            figure.note = (
                f"x {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}], "
                f"{work / figure.median / 1e3:.0f} GFLOP/s, difference {difference:.1e}"
            )
            print(figure.line())
            yield figure


@torch.no_grad()
def bench_workers(options: argparse.Namespace) -> Iterator[Figure]:
    """Attention and a forward of a model in torch, alone and in turn: do their threads hinder each
    other?

    With the runtime's default waiting, where idle OpenMP threads spin; OMP_WAIT_POLICY=passive
    stops that.
    """
    problem = make_problem((512, 2, 64) if options.smoke else SHAPES[0], HEADS[0], torch.float32)
    step = tree_attention(problem)
    model = small_llama(hidden=512, layers=8, heads=8, kv_heads=2)
    ids = torch.zeros(4, 8, dtype=torch.long)
    both: dict[str, Callable[[], Any]] = {"model": lambda: model(ids), "attention": step}
    for whose in ("torch's threads", "own threads"):
        machine.use_own_workers(whose == "own threads")
        try:
            alone = {k: in_turn({k: v}, options.seconds / 4)[k] for k, v in both.items()}
            turns = in_turn(both, options.seconds / 2)
        finally:
            machine.use_own_workers(False)
        for when, figures in (("alone", alone), ("in turn", turns)):
            for name, figure in figures.items():
                figure.name = f"{whose}, {when}: {name}"
                print(figure.line())
                yield figure


@torch.no_grad()
def bench_width(options: argparse.Namespace) -> Iterator[Figure]:
    """Attention of one step against its width, at a fixed prefix: what `bench/plot.py` draws."""
    prefix, own, heads = 8192, 256, HEADS[0]
    widths = [1, 2, 4, 8, 16, 32]
    if options.smoke:
        prefix, own, heads, widths = 256, 64, (4, 2, 64), [1, 2]
    for (name, dtype), n in product(DTYPES.items(), widths):
        problem = make_problem((prefix, n, own), heads, dtype)
        figures = in_turn(steps_of(problem, everything=False), options.seconds / 2, least=3)
        for figure in figures.values():
            figure.facts = {"dtype": name, "threads": n, "prefix": prefix, "own": own}
            ratio = ratios(figure, figures["apr"])
            figure.note = f"{name}, {n} threads, x {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"
            print(figure.line())
            yield figure
