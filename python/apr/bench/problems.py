"""Steps of many threads, as row sets and pools: trees, all-to-all views, one thread, deep trees.

And the problems that others measure themselves by, under their names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apr import ops
from apr.errors import InvalidInput
from apr.ops import Rotation, View

PAGE = 64
RowSet = tuple[int, list[View]]


@dataclass
class Problem:
    """One decode step: row sets on pools of several layers, all of the same shape.

    More than one layer, so that a layer's keys are not in the L2 cache when its turn comes again.
    """

    name: str
    kind: str  # "tree", "hogwild", "alone" or "deep"
    sets: list[RowSet]
    pools: list[ops.Pool]
    q: list[Tensor]  # [rows, q_heads, head_dim] a layer
    rotation: Rotation | None
    shape: tuple[int, int, int]  # P, N, S; of "deep": 0, threads, 0

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        return int(self.q[0].shape[1]), self.pools[0].num_kv_heads, self.pools[0].head_dim

    @property
    def scale(self) -> float:
        return float(self.pools[0].head_dim ** -0.5)

    def unique_tokens(self) -> int:
        """Tokens that some row sees, each counted once."""
        seen: dict[tuple[int, ...], tuple[int, int]] = {}
        for _, views in self.sets:
            for view in views:
                key = tuple(view.pages)
                lo, hi = seen.get(key, (view.lo, view.hi))
                seen[key] = (min(lo, view.lo), max(hi, view.hi))
        return sum(hi - lo for lo, hi in seen.values())

    def seen_tokens(self) -> int:
        """The same, counted for every row that sees them."""
        return sum(view.hi - view.lo for _, views in self.sets for view in views)

    def bytes(self) -> int:
        """What a layer must read and write: keys and values once, queries and outputs."""
        _, kv_heads, dim = self.heads
        size = self.q[0].element_size()
        return size * (2 * kv_heads * dim * self.unique_tokens() + 2 * self.q[0].numel())

    def operations(self) -> int:
        """Multiplications and additions of a layer, without any padding."""
        q_heads, _, dim = self.heads
        return 4 * q_heads * dim * self.seen_tokens()

    def plan(self, layer: int = 0) -> ops.Plan:
        return ops.plan(self.sets, self.pools[layer], self.heads[0])


class _Pages:
    """Hands out pages in random order."""

    def __init__(self, count: int) -> None:
        self._order = random.Random(0).sample(range(count), count)

    def take(self, tokens: int) -> list[int]:
        count = -(-tokens // PAGE)
        taken, self._order = self._order[:count], self._order[count:]
        return taken


def _tree(nodes: Sequence[int], tokens: Sequence[int], pages: _Pages) -> list[RowSet]:
    """A balanced tree: `nodes` of each level, which have `tokens` each; a thread for every leaf."""
    levels = [
        [pages.take(size) for _ in range(count)] for count, size in zip(nodes, tokens, strict=True)
    ]
    sets: list[RowSet] = []
    for leaf in range(nodes[-1]):
        views, at = [], 0
        for level, size in zip(levels, tokens, strict=True):
            node = level[leaf * len(level) // nodes[-1]]
            views.append(View(node, 0, size, at, at, own=level is levels[-1]))
            at += size
        sets.append((1, views))
    return sets


def _hogwild(shared: Sequence[int], threads: int, own: int, pages: _Pages) -> list[RowSet]:
    """Each thread sees what is shared, then all others' tokens, then its own."""
    common, prefix = [], 0
    for size in shared:
        common.append(View(pages.take(size), 0, size, prefix, prefix))
        prefix += size
    tails = [pages.take(own) for _ in range(threads)]
    sets: list[RowSet] = []
    for i in range(threads):
        views = list(common)
        order = [j for j in range(threads) if j != i] + [i]
        for place, j in enumerate(order):
            views.append(View(tails[j], 0, own, prefix + place * own, prefix, own=j == i))
        sets.append((1, views))
    return sets


def _alone(prefix: int, pages: _Pages) -> list[RowSet]:
    return [(1, [View(pages.take(prefix), 0, prefix, 0, 0, own=True)])]


def _deep(threads: int, longest: int, pages: _Pages) -> list[RowSet]:
    """A random tree, some of whose leaves also see parts that were joined into an ancestor."""
    draw = random.Random(1)

    def segment() -> tuple[list[int], int]:
        tokens = draw.randint(longest // 16, longest)
        return pages.take(tokens), tokens

    paths: list[list[tuple[list[int], int]]] = [[segment()]]
    while len(paths) < threads:
        base = draw.choice(paths)
        keep = base[: draw.randint(1, len(base))]
        joined = [draw.choice(draw.choice(paths))] if draw.random() < 0.3 else []
        part = [s for s in joined if all(s[0] != k[0] for k in keep)]
        paths.append([*keep, *part, segment()])
    sets: list[RowSet] = []
    for path in paths:
        at, views = 0, []
        for taken, tokens in path:
            views.append(View(taken, 0, tokens, at, at))
            at += tokens
        tail = pages.take(longest // 16)
        sets.append((1, [*views, View(tail, 0, longest // 16, at, at, own=True)]))
    return sets


def make(
    kind: str,
    shape: tuple[int, int, int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
) -> Problem:
    """A problem of random numbers; `shape` is (P, N, S), for "deep" (longest segment, N, 0)."""
    prefix, threads, own = shape
    room = 4 * threads * (prefix + own) if kind == "deep" else prefix + threads * (own + PAGE)
    pages = _Pages(-(-room // PAGE) + 1)
    if kind == "tree":
        sets = _tree((1, threads), (prefix, own), pages)
    elif kind == "hogwild":
        sets = _hogwild((prefix,), threads, own, pages)
    elif kind == "alone":
        sets = _alone(prefix, pages)
    else:
        sets = _deep(threads, prefix, pages)
    q_heads, kv_heads, dim = heads
    title = f"{kind} P {prefix} N {threads} S {own}, {q_heads}/{kv_heads}/{dim}"
    return _filled(title, kind, sets, heads, dtype, device, layers, shape)


def _filled(
    title: str,
    kind: str,
    sets: list[RowSet],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
    shape: tuple[int, int, int],
) -> Problem:
    q_heads, kv_heads, dim = heads
    count = 1 + max(page for _, views in sets for view in views for page in view.pages)
    pools, queries = [], []
    for _ in range(layers):
        pool = ops.empty_pool(count, kv_heads, dim, dtype, device, PAGE)
        pool.k.normal_()
        pool.v.normal_()
        pools.append(pool)
        queries.append(torch.randn(len(sets), q_heads, dim, dtype=dtype, device=device))
    rotation = None
    if kind == "hogwild":
        rotation = Rotation(tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2)), (0, dim))
    return Problem(title, kind, sets, pools, queries, rotation, shape)


@dataclass(frozen=True)
class Named:
    """A problem that others measure themselves by.

    nodes, tokens: of each level of a tree; with `workers`, fragments that all workers see before
    as many of their own, which all see too.
    """

    source: str
    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]  # query heads, KV heads; head_dim is 128
    dtype: torch.dtype = torch.bfloat16
    workers: int = 0

    @property
    def pages(self) -> int:
        """Of its pools: whole ones for every node."""
        return sum(n * -(-t // PAGE) for n, t in zip(self.nodes, self.tokens, strict=True))

    def pool_bytes(self, kv_heads: int) -> int:
        """Bytes of keys and values of a layer, 16 bits a number."""
        return self.pages * PAGE * 4 * kv_heads * 128

    def make(self, name: str, heads: tuple[int, int], device: torch.device, layers: int) -> Problem:
        pages = _Pages(self.pages)
        kind = "tree" if len(self.nodes) == 2 and self.nodes[0] == 1 else "deep"
        if self.workers:
            kind = "hogwild"
            sets = _hogwild(self.tokens[:-1], self.workers, self.tokens[-1], pages)
        else:
            sets = _tree(self.nodes, self.tokens, pages)
        shape = (self.tokens[0], self.nodes[-1], self.tokens[-1])
        title = f"{name}, {heads[0]}/{heads[1]}/128"
        every = (*heads, 128)
        return _filled(title, kind, sets, every, self.dtype, device, layers, shape)


def _trees(text: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """ "nodes of each level_tokens of each" for each word."""
    for word in text.split():
        nodes, tokens = (tuple(map(int, side.split(","))) for side in word.split("_"))
        yield nodes, tokens


# PAT, arXiv 2511.22333, benchmark/run_kernel_bench.sh of its repository.
_PAT = """1,10_4096,416 1,256_256,32 1,1024_2048,32 1,2,64_1024,256,256 1,4,256_32,256,32
    1,8,512_32,512,256 1,8,512_32,2048,256 1,8,512_512,512,256 1,4,8,256_32,256,256,32
    1,4,16,512_1024,256,128,32 1,4,16,64,256,1024_256,32,256,64,32,256
    1,16,32,64,128,1024_256,128,64,32,32,32 1,16,32,64,256,1024_256,128,64,32,32,32
    1,8,16,32,64,128,1024_256,128,64,32,32,32,32 1,8,16,32,64,256,1024_256,128,64,32,32,32,32
    2,8,16,256_256,256,32,32 4,16,256,512_512,32,128,32 8,16,32,256_512,512,256,32
    256_1024 256_4096"""
# FastTree, MLSys 2025, kernel_bench/run_benchmark.sh of its artifact.
_FASTTREE = """1,2,64_8,256,32 1,4,256_8,256,32 1,4,8,256_8,256,256,32 1,256_256,32 1,1024_2048,32
    1,16,64_1024,256,32 1,4,16,512_1024,256,128,32 1,4,16,64,256,1024_256,8,256,64,32,256
    1,10_4000,400 1,2,4,8,16,32,64,128,1024_16,16,16,16,16,16,16,16,16
    1,2,4,8,16,32,64,128,1024_256,128,64,16,16,16,16,16,16
    1,8,16,32,64,128,1024_256,128,64,16,16,16,16 1,8,16,32,64,256,1024_256,128,64,16,16,16,16
    1,16,32,64,128,1024_256,128,64,16,16,16 1,16,32,64,256,1024_256,128,64,16,16,16"""


def _named() -> Iterator[tuple[str, Named]]:
    for prefix in (128, 256, 1024, 2048, 4096):
        yield (
            f"trtllm-{prefix}",
            Named("TensorRT-LLM #14396: 128 beams", (1, 128), (prefix, 3), ((16, 8),)),
        )
    heads = ((32, 8), (16, 8), (64, 8), (32, 32))
    for i, (nodes, tokens) in enumerate(_trees(_PAT), 1):
        yield f"pat-{i}", Named("PAT", nodes, tokens, heads, torch.float16)
    for i, (nodes, tokens) in enumerate(_trees(_FASTTREE), 1):
        several = ((32, 8), (16, 1), (32, 32))
        yield f"fasttree-{i}", Named("FastTree", nodes, tokens, several, torch.float16)
    for batch, prefix in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)):
        for own in (16, 256, 512):  # of its sweep 0, 16 … 512
            shape = (1, batch), (prefix, own)
            yield f"hydragen-{batch}-{prefix}-{own}", Named("Hydragen", *shape, ((8, 1),))
    yield (
        "hogwild",
        Named("AsyncReasoning, 2 workers", (1, 1, 2), (4096, 5, 20), ((40, 8),), workers=2),
    )
    yield "deft", Named("DeFT: few-shot", (1, 50), (4000, 400), ((32, 8),))


NAMED = dict(_named())


def choose(names: Sequence[str]) -> dict[str, Named]:
    """The problems of these names, or of the families that names begin with ("pat").

    Raises InvalidInput where a name is no problem's.
    """
    chosen: dict[str, Named] = {}
    for name in names:
        found = {k: v for k, v in NAMED.items() if k == name or k.startswith(f"{name}-")}
        if not found:
            families = sorted({k.split("-")[0] for k in NAMED})
            raise InvalidInput(
                f"--problem {name}: no such problem; expected one of {', '.join(families)}, or a "
                f"name such as pat-1 … pat-20, trtllm-4096, hydragen-512-1024-16"
            )
        chosen |= found
    return chosen


def ours(problem: Problem, rotated: bool) -> tuple[Callable[[int], Tensor], ops.Plan]:
    """A layer's attention by number, and its plan."""
    plan = problem.plan()
    rotation = problem.rotation if rotated else None

    def step(layer: int) -> Tensor:
        return ops.attention(problem.q[layer], problem.pools[layer], plan, problem.scale, rotation)[
            0
        ]

    return step, plan


def dense(problem: Problem, layer: int, views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Keys and values of some views side by side: two [kv_heads, tokens, head_dim]."""
    pool = problem.pools[layer]
    parts: list[list[Tensor]] = [[], []]
    for view in views:
        pages = torch.tensor(list(view.pages), device=pool.k.device)
        for side, x in zip(parts, (pool.k, pool.v), strict=True):
            tokens = x[pages].transpose(0, 1).flatten(1, 2)  # [kv_heads, slots, head_dim]
            side.append(tokens[:, view.lo : view.hi])
    k, v = (torch.cat(side, 1) for side in parts)
    return k, v
