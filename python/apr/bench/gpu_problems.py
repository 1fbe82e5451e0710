"""Steps of many threads on a GPU, as row sets and pools: trees, all-to-all views, one thread, deep
trees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apr import ops
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


def _tree(prefix: int, threads: int, own: int, pages: _Pages) -> list[RowSet]:
    shared = pages.take(prefix)
    return [
        (
            1,
            [
                View(shared, 0, prefix, 0, 0),
                View(pages.take(own), 0, own, prefix, prefix, own=True),
            ],
        )
        for _ in range(threads)
    ]


def _hogwild(prefix: int, threads: int, own: int, pages: _Pages) -> list[RowSet]:
    """Each thread sees the prefix, then all others' tokens, then its own."""
    shared = pages.take(prefix)
    tails = [pages.take(own) for _ in range(threads)]
    sets: list[RowSet] = []
    for i in range(threads):
        views = [View(shared, 0, prefix, 0, 0)]
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
    q_heads, kv_heads, dim = heads
    room = 4 * threads * (prefix + own) if kind == "deep" else prefix + threads * (own + PAGE)
    count = -(-room // PAGE) + 1
    pages = _Pages(count)
    if kind == "tree":
        sets = _tree(prefix, threads, own, pages)
    elif kind == "hogwild":
        sets = _hogwild(prefix, threads, own, pages)
    elif kind == "alone":
        sets = _alone(prefix, pages)
    else:
        sets = _deep(threads, prefix, pages)
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
    title = f"{kind} P {prefix} N {threads} S {own}, {q_heads}/{kv_heads}/{dim}"
    return Problem(title, kind, sets, pools, queries, rotation, shape)


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
