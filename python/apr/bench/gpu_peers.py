"""What else could compute a step of many threads on a GPU, each beside its reason where it cannot.

Whatever a method can prepare before the step is prepared and not timed: copies of keys, masks,
layouts. Only apr, and FlashInfer driven by hand on segments, turn queries by the distances of the
views; on all-to-all views the other peers do less work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apr.bench.problems import PAGE, Problem, dense
from apr.ops import View

Step = Callable[[int], Tensor]  # of a layer: [rows, q_heads, head_dim]

_MOST_COPIED_BYTES = 24 << 30


class CannotRun(Exception):
    """Why a peer is left out of a table."""


def replicated(problem: Problem, most_bytes: int = _MOST_COPIED_BYTES) -> Step:
    """SDPA on keys copied for each thread: what a batched cache does."""
    q_heads, kv_heads, dim = problem.heads
    lengths = {sum(v.hi - v.lo for v in views) for _, views in problem.sets}
    if len(lengths) > 1:
        raise CannotRun("threads of different lengths")
    layers = len(problem.pools)
    size = 4 * problem.seen_tokens() * kv_heads * dim * layers
    if size > most_bytes:
        raise CannotRun(f"the copies take {size / 1e9:.0f} GB")
    copies = []
    for layer in range(layers):
        pairs = [dense(problem, layer, views) for _, views in problem.sets]
        copies.append(tuple(torch.stack(side) for side in zip(*pairs, strict=True)))

    def step(layer: int) -> Tensor:
        k, v = copies[layer]
        q = problem.q[layer].view(len(k), kv_heads, q_heads // kv_heads, dim)
        return F.scaled_dot_product_attention(q, k, v).reshape(len(k), q_heads, dim)

    return step


def flash_and_merge(problem: Problem) -> Step:
    """torch's flash kernel on the prefix and on the own parts, merged by LSE (Hydragen, arXiv
    2402.05099).
    """
    if problem.kind != "tree":
        raise CannotRun("made for one shared prefix")
    if problem.q[0].device.type != "cuda":
        raise CannotRun("torch's flash kernel is asked for as the GPU has it")
    q_heads, kv_heads, dim = problem.heads
    group, threads = q_heads // kv_heads, len(problem.sets)
    parts = []
    for layer in range(len(problem.pools)):
        prefix = [x[None] for x in dense(problem, layer, problem.sets[0][1][:1])]
        own = zip(*(dense(problem, layer, views[1:]) for _, views in problem.sets), strict=True)
        parts.append((*prefix, *(torch.stack(side) for side in own)))
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention

    def step(layer: int) -> Tensor:
        k, v, own_k, own_v = parts[layer]
        q = problem.q[layer].view(threads, kv_heads, group, dim)
        rows = q.transpose(0, 1).reshape(1, kv_heads, threads * group, dim)
        a, lse_a = flash(rows, k, v, scale=problem.scale)[:2]
        b, lse_b = flash(q, own_k, own_v, scale=problem.scale)[:2]
        a = a.view(kv_heads, threads, group, dim).transpose(0, 1)
        lse_a = lse_a.view(kv_heads, threads, group).transpose(0, 1)
        weight = torch.sigmoid(lse_a - lse_b)[..., None]
        merged: Tensor = a * weight + b * (1 - weight)
        return merged.to(q.dtype).reshape(threads, q_heads, dim)

    return step


def flex(problem: Problem) -> Step:
    """FlexAttention over the keys side by side, with a mask of who sees what (one compilation a
    shape).
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = problem.q[0].device
    if device.type != "cuda":
        raise CannotRun("compiled for GPUs")
    segments: dict[tuple[int, ...], Any] = {}
    for _, views in problem.sets:
        for view in views:
            segments.setdefault(tuple(view.pages), view)
    owner = torch.cat(
        [torch.full((v.hi - v.lo,), i, device=device) for i, v in enumerate(segments.values())]
    )
    sees = torch.zeros(len(problem.sets), len(segments), dtype=torch.bool, device=device)
    order = {pages: i for i, pages in enumerate(segments)}
    for row, (_, views) in enumerate(problem.sets):
        for view in views:
            sees[row, order[tuple(view.pages)]] = True
    keys = [
        [x[None] for x in dense(problem, i, list(segments.values()))]
        for i in range(len(problem.pools))
    ]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees[q, owner[k]]

    mask = create_block_mask(visible, None, None, len(problem.sets), len(owner), device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def step(layer: int) -> Tensor:
        q = problem.q[layer].transpose(0, 1)[None]
        k, v = keys[layer]
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=problem.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return step


def _flashinfer() -> Any:
    if importlib.util.find_spec("flashinfer") is None:
        raise CannotRun("flashinfer is not installed")
    import flashinfer  # type: ignore[import-not-found]

    return flashinfer


def _tables(rows: list[list[tuple[list[int], int]]], device: torch.device) -> tuple[Tensor, ...]:
    """(indptr, indices, last_page_len) of rows of (pages, tokens)."""
    indptr, indices, last = [0], [], []
    for parts in rows:
        for pages, _ in parts:
            indices += pages
        indptr.append(len(indices))
        last.append((parts[-1][1] - 1) % PAGE + 1)
    return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (indptr, indices, last))


def flashinfer_cascade(problem: Problem) -> Step:
    """FlashInfer's cascade of two levels: the shared prefix, then each thread's own pages."""
    if problem.kind != "tree":
        raise CannotRun("levels partition the rows")
    library = _flashinfer()
    device = problem.q[0].device
    q_heads, kv_heads, dim = problem.heads
    threads = len(problem.sets)
    wrapper = library.MultiLevelCascadeAttentionWrapper(
        2, torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND"
    )
    shared, prefix = list(problem.sets[0][1][0].pages), problem.sets[0][1][0].hi
    levels = [
        _tables([[(shared, prefix)]], device),
        _tables([[(list(v[1].pages), v[1].hi)] for _, v in problem.sets], device),
    ]
    rows = [
        torch.tensor([0, threads], dtype=torch.int32, device=device),
        torch.arange(threads + 1, dtype=torch.int32, device=device),
    ]
    wrapper.plan(
        rows,
        [level[0] for level in levels],
        [level[1] for level in levels],
        [level[2] for level in levels],
        q_heads,
        kv_heads,
        dim,
        PAGE,
        q_data_type=problem.q[0].dtype,
    )
    pools = [(pool.k, pool.v) for pool in problem.pools]
    return lambda layer: wrapper.run(problem.q[layer], pools[layer])


def flashinfer_decode(problem: Problem) -> Step:
    """FlashInfer's paged decode, shared pages in every thread's table: what servers do today."""
    library = _flashinfer()
    if any((v.hi - v.lo) % PAGE for _, views in problem.sets for v in views[:-1]):
        raise CannotRun("only the last page of a thread may be part full")
    device = problem.q[0].device
    q_heads, kv_heads, dim = problem.heads
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=device), "HND", use_tensor_cores=True
    )
    tables = _tables([[(list(v.pages), v.hi) for v in views] for _, views in problem.sets], device)
    wrapper.plan(*tables, q_heads, kv_heads, dim, PAGE, q_data_type=problem.q[0].dtype)
    pools = [(pool.k, pool.v) for pool in problem.pools]
    return lambda layer: wrapper.run(problem.q[layer], pools[layer])


def flashinfer_segments(problem: Problem) -> Step:
    """FlashInfer's batch attention driven by hand: each segment is a request of all rows that see
    it, and the rows' partial results are merged by LSE (base 2) in torch. The gather and the
    turning of queries count.
    """
    library = _flashinfer()
    device = problem.q[0].device
    q_heads, kv_heads, dim = problem.heads
    readers: dict[tuple[int, ...], list[tuple[int, View]]] = {}
    for row, (_, views) in enumerate(problem.sets):
        for view in views:
            readers.setdefault(tuple(view.pages), []).append((row, view))
    tokens = [max(view.hi for _, view in seen) for seen in readers.values()]
    if any(
        view.hi != n for seen, n in zip(readers.values(), tokens, strict=True) for _, view in seen
    ):
        raise CannotRun("rows see different parts of a segment")
    pairs = [pair for seen in readers.values() for pair in seen]
    rows = torch.tensor([row for row, _ in pairs], device=device)
    starts = torch.tensor([0] + [len(seen) for seen in readers.values()]).cumsum(0)
    tables = _tables([[(list(pages), n)] for pages, n in zip(readers, tokens, strict=True)], device)
    wrapper = library.BatchAttention("HND", device=str(device))
    wrapper.plan(
        starts.to(device, torch.int32),
        tables[0],
        tables[1],
        torch.tensor(tokens, dtype=torch.int32, device=device),
        q_heads,
        kv_heads,
        dim,
        dim,
        PAGE,
        sm_scale=problem.scale,
        q_data_type=problem.q[0].dtype,
        kv_data_type=problem.q[0].dtype,
    )
    # Places of a row's pairs, padded by a pair of weight 0.
    most = max(len(views) for _, views in problem.sets)
    places = torch.full((len(problem.sets), most), len(pairs), device=device)
    filled = [0] * len(problem.sets)
    for place, (row, _) in enumerate(pairs):
        places[row, filled[row]] = place
        filled[row] += 1
    turn = None
    if problem.rotation is not None:
        own = {row: view for row, view in pairs if view.own}
        difference = [own[r].offset - own[r].base - (v.offset - v.base) for r, v in pairs]
        angle = torch.tensor(difference, dtype=torch.float64)[:, None] * torch.tensor(
            problem.rotation.inv_freq, dtype=torch.float64
        )
        turn = [f(angle).float().to(device)[:, None] for f in (torch.cos, torch.sin)]

    def step(layer: int) -> Tensor:
        pool = problem.pools[layer]
        q = problem.q[layer][rows]
        if turn is not None:
            a, b = q.float().chunk(2, -1)
            q = torch.cat([a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], -1).to(q.dtype)
        out, lse = wrapper.run(q, (pool.k, pool.v))
        lse = F.pad(lse, (0, 0, 0, 1), value=float("-inf"))[places]  # [rows, most, q_heads]
        weight = (lse * 0.6931471805599453).softmax(1)[..., None]
        parts = F.pad(out, (0, 0, 0, 0, 0, 1))[places].float()
        merged: Tensor = (parts * weight).sum(1)
        return merged.to(q.dtype)

    return step


PEERS: dict[str, Callable[[Problem], Step]] = {
    "SDPA, replicated": replicated,
    "flash + merge in torch": flash_and_merge,
    "FlexAttention": flex,
    "FlashInfer cascade": flashinfer_cascade,
    "FlashInfer paged decode": flashinfer_decode,
    "FlashInfer on segments": flashinfer_segments,
}
