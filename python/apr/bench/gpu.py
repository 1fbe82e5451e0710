"""Tree attention on a GPU beside its peers and the byte floor, prefill, and steps by captured
graphs with their host work.

Without a GPU `--smoke` runs everything on the emulated one, where times mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import apr
from apr import ops
from apr.bench import problems
from apr.bench.gpu_peers import PEERS, CannotRun, Step
from apr.bench.harness import Figure
from apr.bench.problems import Problem
from apr.bench.sessions import small_llama
from apr.errors import InvalidInput
from apr.ops import View, machine
from apr.ops import device as gpu

SHAPES = [(4096, 4, 256), (8192, 16, 512), (32768, 16, 1024), (32768, 64, 2048), (131072, 16, 2048)]
HEADS = [(32, 8, 128), (28, 4, 128)]
LAYERS = 4  # pools in rotation: the smallest shape's then exceed an L2 cache of 50 MB
ROUNDS = 200
FLEX_SHAPE = (8192, 16, 512)  # FlexAttention compiles anew for each


class Clock:
    """Times launches: events around replays of a captured graph, or calls where there is no GPU."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def captured(self, action: Callable[[], Any]) -> Callable[[], Any]:
        """The action as a graph's replay; on the emulated GPU itself."""
        if self.device.type != "cuda":
            return action
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            action()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph.replay

    def times(self, action: Callable[[], Any]) -> list[float]:
        """Microseconds of each round, on the GPU's own clock."""
        action()
        if self.device.type != "cuda":
            began = time.perf_counter()
            action()
            return [(time.perf_counter() - began) * 1e6]
        pairs = []
        for _ in range(self.rounds):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            pair[0].record()
            action()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]


def copy_rate(clock: Clock) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 1 << 30 if clock.device.type == "cuda" else 1 << 22
    x = torch.empty(size, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    return 2 * size / (sorted(clock.times(lambda: y.copy_(x)))[0] / 1e6)


def product_rate(clock: Clock) -> float:
    """Multiplications and additions a second of torch's matrix product in bfloat16."""
    n = 8192 if clock.device.type == "cuda" else 64
    x = torch.randn(n, n, device=clock.device).bfloat16()
    return 2 * n**3 / (sorted(clock.times(lambda: x @ x))[0] / 1e6)


def exact(problem: Problem, rows: int = 2) -> Tensor:
    """float32 attention of the first rows of layer 0, without re-rotation: [rows, q_heads, D]."""
    q_heads, kv_heads, dim = problem.heads
    outs = []
    for q, (_, views) in zip(problem.q[0][:rows], problem.sets[:rows], strict=True):
        k, v = problems.dense(problem, 0, views)
        grouped = q.float().view(kv_heads, q_heads // kv_heads, dim)
        weight = (grouped @ k.float().transpose(1, 2) * problem.scale).softmax(-1)
        outs.append((weight @ v.float()).reshape(q_heads, dim))
    return torch.stack(outs)


def _figure(problem: Problem, name: str, clock: Clock, step: Step) -> Figure:
    """Times of one layer's attention, all layers in turn; captured where that works."""

    def layers() -> None:
        for layer in range(len(problem.pools)):
            step(layer)

    note = "graph"
    try:
        action = clock.captured(layers)
    except RuntimeError as error:
        note, action = f"not captured ({str(error).splitlines()[0][:60]})", layers
    times = [t / len(problem.pools) for t in clock.times(action)]
    return Figure(f"{problem.name}: {name}", times, note)


def _methods(problem: Problem) -> Iterator[tuple[str, Step]]:
    yield "apr", problems.ours(problem, rotated=True)[0]
    if problem.rotation is not None:
        yield "apr, not rotated", problems.ours(problem, rotated=False)[0]
    for name, make in PEERS.items():
        if name == "FlexAttention" and problem.shape != FLEX_SHAPE and problem.q[0].is_cuda:
            continue
        try:
            step = make(problem)
            step(0)
        except (CannotRun, RuntimeError, ImportError) as error:
            print(f"  {name}: left out: {str(error).splitlines()[0]}")
            continue
        yield name, step


def _planner(problem: Problem, clock: Clock) -> list[float]:
    """Microseconds of the device planner, once a step for all layers of a kind."""
    step, plan = problems.ours(problem, rotated=False)
    step(0)
    (passes,) = plan.on_gpu._passes.values()

    def prepare() -> None:
        for core, tables, _ in passes:
            core.prepare(tables.data_ptr(), gpu.stream(clock.device))

    return clock.times(clock.captured(prepare))


def _attention(problem: Problem, clock: Clock, rates: tuple[float, float]) -> Iterator[Figure]:
    floors = (problem.bytes() / rates[0] * 1e6, problem.operations() / rates[1] * 1e6)
    floor = max(floors)
    print(
        f"{problem.name}: {problem.bytes() / 1e6:.1f} MB, {problem.operations() / 1e9:.2f} GFLOP; "
        f"floor {floors[0]:.1f} us by bytes, {floors[1]:.1f} us by operations"
    )
    want = exact(problem)
    planner = sorted(_planner(problem, clock))[0]
    for name, step in _methods(problem):
        rotated = name == "apr" and problem.rotation is not None
        error = None if rotated else float((step(0)[: len(want)].float() - want).abs().max())
        figure = _figure(problem, name, clock, step)
        figure.facts = {
            "shape": list(problem.shape),
            "kind": problem.kind,
            "heads": list(problem.heads),
            "method": name,
            "bytes": problem.bytes(),
            "flop": problem.operations(),
            "floor_us": round(floor, 2),
            "times_floor": round(figure.median / floor, 3),
            "of_copy_rate": round(problem.bytes() / (figure.median / 1e6) / rates[0], 3),
            "error": error,
        }
        if name.startswith("apr"):
            figure.facts["planner_us"] = round(planner, 2)
        figure.note += f", x floor {figure.median / floor:.2f}, error {error}"
        print("  " + figure.line())
        yield figure


def _prefill(clock: Clock, tokens: int, heads: tuple[int, int, int]) -> Iterator[Figure]:
    """Causal attention of a prompt, against SDPA's flash kernel."""
    q_heads, kv_heads, dim = heads
    device, rows = clock.device, min(tokens, 8192)
    pages = list(range(-(-tokens // problems.PAGE)))
    pool = ops.empty_pool(len(pages), kv_heads, dim, torch.bfloat16, device)
    pool.k.normal_()
    pool.v.normal_()
    q = torch.randn(rows, q_heads, dim, device=device).bfloat16()
    plan = ops.plan([(rows, [View(pages, 0, tokens, 0, 0, own=True)])], pool, q_heads)
    k, v = (x.transpose(0, 1).flatten(1, 2)[None, :, :tokens] for x in (pool.k, pool.v))
    k, v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))
    first = q.transpose(0, 1)[None].contiguous()
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(rows, tokens)
    methods: dict[str, Callable[[], Tensor]] = {
        "apr": lambda: ops.attention(q, pool, plan, dim**-0.5)[0],
        "SDPA flash": lambda: F.scaled_dot_product_attention(first, k, v, attn_mask=bias),
    }
    work = 4 * q_heads * dim * sum(tokens - rows + i + 1 for i in range(rows))
    difference = float((methods["apr"]() - methods["SDPA flash"]()[0].transpose(0, 1)).abs().max())
    for name, action in methods.items():
        figure = Figure(
            f"last {rows} rows of {tokens}, {q_heads}/{kv_heads}/{dim}: {name}", clock.times(action)
        )
        figure.facts = {"kind": "prefill", "method": name, "flop": work, "heads": list(heads)}
        figure.note = f"{work / figure.median / 1e6:.0f} TFLOP/s, difference {difference:.1e}"
        print(figure.line())
        yield figure


def _steps(clock: Clock, threads: int, steps: int) -> Iterator[Figure]:
    """A session's ordinary steps, planned and replayed, with edits between: what a fork costs,
    captures.
    """
    model = small_llama(hidden=512, layers=8, heads=8, kv_heads=2).to(clock.device).bfloat16()
    for graphs in (None, True):
        with apr.Session(model, 1 << 16, cuda_graphs=graphs, self_test=False) as session:
            kids = session.thread(list(range(32))).fork(threads)
            times: list[float] = []
            forks: list[float] = []
            joins: list[float] = []
            for t in range(steps):
                for i, kid in enumerate(kids):
                    kid.extend([(t + i) % 64])
                began = time.perf_counter()
                session.step(kids)
                times.append((time.perf_counter() - began) * 1e6)
                if t % 8 == 7:
                    began = time.perf_counter()
                    (child,) = kids[0].fork(1)
                    forks.append((time.perf_counter() - began) * 1e6)
                    began = time.perf_counter()
                    kids[0].join([child])
                    joins.append((time.perf_counter() - began) * 1e6)
            if session._graphs is not None:
                yield _host_part(session, kids)
            name = "replayed" if graphs else "planned"
            figure = Figure(f"step of {threads} threads, {name}", times[2:])
            captures = session._graphs.captures if session._graphs else 0
            figure.facts = {"kind": "steps", "method": name, "captures": captures}
            figure.note = f"{captures} captures"
            print(figure.line())
            yield figure
            for what, taken in (("fork(1)", forks), ("join of one", joins)):
                edit = Figure(f"{what} between steps, {name}", taken, "0 KV bytes moved")
                print(edit.line())
                yield edit


def _host_part(session: apr.Session, kids: list[apr.Thread]) -> Figure:
    """What `Session.step` itself does for a replayed step, in Python and in the core: the replay is
    left out.
    """
    graphs = session._graphs
    assert graphs is not None
    logits, times = torch.zeros(len(kids), session.spec.vocab_size), []
    current = graphs._current
    assert current is not None
    kept = current.run
    try:
        current.run = lambda ids: logits  # type: ignore[method-assign]
        for t in range(200):
            for kid in kids:
                kid.extend([t % 64])
            began = time.perf_counter()
            session.step(kids)
            times.append((time.perf_counter() - began) * 1e6)
    finally:
        current.run = kept  # type: ignore[method-assign]
    figure = Figure(f"Session.step of {len(kids)} threads, replay left out", times)
    figure.facts = {"kind": "host"}
    print(figure.line())
    return figure


def _problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    """Those that are named, or ours: trees and all-to-all views, one thread, a deep tree."""
    layers = 2 if options.smoke else LAYERS
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
    for name, named in problems.choose(options.problem or ()).items():
        for pair in named.heads:
            size = named.pool_bytes(pair[1]) * layers
            if size > room:
                print(f"{name}, {pair[0]}/{pair[1]}: left out: {size / 1e9:.0f} GB of pools")
                continue
            yield named.make(name, pair, device, layers)
    if options.problem:
        return
    shapes, heads_list, deep = SHAPES, HEADS, (SHAPES[0][0] // 4, 32, 0)
    if options.smoke:
        shapes, heads_list, deep = [(256, 3, 64)], [(4, 2, 64)], (128, 4, 0)
    for heads in heads_list:
        kinds = [(kind, shape) for shape in shapes for kind in ("tree", "hogwild")]
        kinds += [("alone", (shapes[0][0] * 8, 1, 0)), ("deep", deep)]
        for kind, shape in kinds:
            yield problems.make(kind, shape, heads, torch.bfloat16, device, layers)


@torch.no_grad()
def bench_gpu(options: argparse.Namespace) -> Iterator[Figure]:
    """All of it: a decode step's attention at each shape, prefill, steps."""
    on_gpu = torch.cuda.is_available() and gpu.built() is not None
    if not on_gpu and not (options.smoke and gpu.built(emulated=True) is not None):
        raise InvalidInput(
            "bench gpu: no GPU, or no CUDA kernels in this build (python -m apr info); with "
            "--smoke a build with APR_EMULATION=ON shows that it runs"
        )
    device = torch.device("cuda:0" if on_gpu else "cpu")
    clock = Clock(device, 20 if options.smoke else ROUNDS)
    machine.use_kernels("" if on_gpu else gpu.EMULATED)
    try:
        rates = copy_rate(clock), product_rate(clock)
        print(
            f"copy {rates[0] / 1e9:.0f} GB/s, matrix product {rates[1] / 1e12:.1f} TFLOP/s "
            "(bfloat16)"
        )
        for problem in _problems(options, device):
            yield from _attention(problem, clock, rates)
        if options.problem:
            return
        for tokens in (256,) if options.smoke else (8192, 32768):
            yield from _prefill(clock, tokens, (4, 2, 64) if options.smoke else HEADS[0])
        yield from _steps(clock, 4 if options.smoke else 64, 10 if options.smoke else 200)
    finally:
        machine.use_kernels()
