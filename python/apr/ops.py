"""The kernels on tensors: plan, append, attention, merge. No threads, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apr import _core, gpu
from apr.errors import InvalidInput
from apr.machine import kernels as kernels

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class View(NamedTuple):
    """What one row set sees of one segment.

    `pages` hold the segment's tokens in order; slots [lo, hi) of them are visible. Slot j stands at view
    position `offset + stride * j` and was written at `base + stride * j`. With `own=True` the row set's
    queries are the last `query_len` of these slots, and each sees no slot after its own. `hi` counts the
    tokens that `append` is about to write. Equal page lists are one segment, read once for all.
    """

    pages: Sequence[int]
    lo: int
    hi: int
    offset: int
    base: int
    stride: int = 1
    own: bool = False


@dataclass(frozen=True)
class Rotation:
    """How a layer turns queries with position (RoPE, arXiv 2104.09864).

    inv_freq: angle per position of each pair of dimensions; dims: the (first, end) dimensions that turn;
    interleaved: pairs are neighbours (2i, 2i+1), else (i, i + pairs).
    """

    inv_freq: tuple[float, ...]
    dims: tuple[int, int]
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dims[1] - self.dims[0] != 2 * len(self.inv_freq):
            raise InvalidInput(
                f"Rotation: got dims {self.dims} and {len(self.inv_freq)} frequencies; "
                "expected two dimensions a frequency"
            )


class Pool:
    """Keys and values of one layer: k [pages, kv_heads, page_size, head_dim], v likewise."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        if k.dtype not in _DTYPE_CODES:
            raise InvalidInput(
                f"pool: got dtype {k.dtype}; expected float32, bfloat16 or float16; convert the model"
            )
        on_gpu = gpu.backend(k.device) is not None
        same = (v.dtype, v.device, v.shape[:3]) == (k.dtype, k.device, k.shape[:3])
        if k.ndim != 4 or v.ndim != 4 or not (same and k.is_contiguous() and v.is_contiguous()):
            raise InvalidInput(
                f"pool: got k {list(k.shape)} {k.dtype} and v {list(v.shape)} {v.dtype}; expected two "
                "contiguous [pages, kv_heads, page_size, head_dim] of one dtype on one device"
            )
        if on_gpu:
            gpu.check_pool(k, v)
        self.k, self.v = k, v
        self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = k.shape
        self.head_dim_v = int(v.shape[3])
        self.handle = (
            k.data_ptr(),
            v.data_ptr(),
            *k.shape,
            self.head_dim_v,
            _DTYPE_CODES[k.dtype],
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token in this layer."""
        return self.num_kv_heads * (self.head_dim + self.head_dim_v) * self.k.element_size()

    def populate(self, first: int, end: int) -> None:
        """Make the memory of pages [first, end) present, unchanged, while others may use it."""
        for side in (self.k, self.v):
            page_bytes = side[0].numel() * side.element_size()
            _core.populate(side.data_ptr() + first * page_bytes, (end - first) * page_bytes)


def empty_pool(
    num_pages: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    page_size: int = 64,
    head_dim_v: int | None = None,
) -> Pool:
    """A pool of uninitialised pages, on huge pages of memory where the system gives them.

    `head_dim_v` is given where values are narrower than keys.
    """
    shape = (num_pages, num_kv_heads, page_size)
    pool = Pool(
        torch.empty(*shape, head_dim, dtype=dtype, device=device),
        torch.empty(*shape, head_dim_v or head_dim, dtype=dtype, device=device),
    )
    for side in (pool.k, pool.v) if pool.k.device.type == "cpu" else ():
        _core.use_huge_pages(side.data_ptr(), side.numel() * side.element_size())
    return pool


class Plan:
    """The work of one packed forward, shared by all layers; made by `plan` or by a session's step."""

    def __init__(
        self,
        core: _core.Plan,
        window: int | None = None,
        invariant: bool = False,
        pages: tuple[int, int] | None = None,
    ) -> None:
        self.core, self.window, self.invariant = core, window, invariant
        self.pages = pages  # (num_pages, page_size) of the pool that it was made for
        self.num_rows: int = core.num_rows
        self._rotations: np.ndarray = core.rotations
        self._tables: dict[tuple[Rotation, torch.device], Tensor] = {}
        self.on_gpu = gpu.DevicePlan(core, invariant)

    def rotation_table(self, rotation: Rotation, device: torch.device) -> Tensor | None:
        """cos and sin of each re-rotation that the plan needs [rotations, pairs, 2], or None."""
        if not len(self._rotations):
            return None
        key = (rotation, device)
        if key not in self._tables:
            # Angles in float64: the difference is an exact integer, and so stays the only rounding.
            angle = np.outer(
                self._rotations.astype(np.float64), np.asarray(rotation.inv_freq, dtype=np.float64)
            )
            table = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
            self._tables[key] = torch.from_numpy(np.ascontiguousarray(table)).to(device)
        return self._tables[key]


def plan(
    row_sets: Sequence[tuple[int, Sequence[View]]],
    pool: Pool,
    num_qo_heads: int,
    window: int | None = None,
    invariant: bool = False,
) -> Plan:
    """Plan attention for row sets, each `(query_len, views)` with exactly one `own` view.

    `window` hides keys whose view position lies `window` or more before the query's. `invariant` cuts at
    fixed 512-token chunks, so that a row's bits do not depend on what else is planned.
    """
    if num_qo_heads < 1 or num_qo_heads % pool.num_kv_heads:
        raise InvalidInput(
            f"plan: got {num_qo_heads} query heads for {pool.num_kv_heads} KV heads; "
            "expected a positive multiple"
        )
    if not row_sets:
        raise InvalidInput("plan: got no row sets; expected at least one")
    for number, (query_len, views) in enumerate(row_sets):
        own = [v for v in views if v.own]
        if len(own) != 1 or query_len < 1 or query_len > own[0].hi - own[0].lo:
            raise InvalidInput(
                f"plan: row set {number} has query_len {query_len} and {len(own)} own views; expected "
                "at least one query and one own view that ends with the queries' own slots"
            )
        for view in views:
            if view.stride < 1:
                raise InvalidInput(f"plan: got stride {view.stride}; expected at least 1")
            if not 0 <= view.lo <= view.hi <= len(view.pages) * pool.page_size:
                raise InvalidInput(
                    f"plan: row set {number}: got slots [{view.lo}, {view.hi}) on {len(view.pages)} "
                    f"pages of {pool.page_size}; expected 0 <= lo <= hi <= their slots"
                )
            if view.pages and not 0 <= min(view.pages) <= max(view.pages) < pool.num_pages:
                raise InvalidInput(
                    f"plan: row set {number}: got pages {list(view.pages)}; expected numbers in "
                    f"[0, {pool.num_pages})"
                )
    sets = [(n, [(list(v.pages), *v[1:]) for v in views]) for n, views in row_sets]
    return Plan(
        _core.plan(sets, pool.page_size), window, invariant, (pool.num_pages, pool.page_size)
    )


def _rows(name: str, x: Tensor, pool: Pool, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if tuple(x.shape) != shape or x.dtype != pool.dtype or x.device != pool.k.device:
        raise InvalidInput(
            f"{name}: got {list(x.shape)} {x.dtype} on {x.device}; expected {list(shape)} "
            f"{pool.dtype} on {pool.k.device}, as the plan and the pool say"
        )
    if x.stride(2) != 1:
        raise InvalidInput(
            f"{name}: got strides {x.stride()}; expected a contiguous last dimension"
        )
    return (x.data_ptr(), x.stride(0), x.stride(1))


def _check_pool(pool: Pool, plan: Plan) -> None:
    if plan.pages not in (None, (pool.num_pages, pool.page_size)):
        raise InvalidInput(
            f"plan: made for {plan.pages} (pages, page size), used with a pool of "
            f"{(pool.num_pages, pool.page_size)}; plan for the pool that holds the tokens"
        )


def append(k: Tensor, v: Tensor, pool: Pool, plan: Plan) -> None:
    """Write the step's new keys and values [tokens, kv_heads, head_dim] to their pages.

    Keys come as the model rotated them. Call it once a layer, before `attention`.
    """
    _check_pool(pool, plan)
    rows, heads = plan.num_rows, pool.num_kv_heads
    backend = gpu.backend(pool.k.device)
    if backend is not None:
        k, v = gpu.aligned(k), gpu.aligned(v)
    k_rows = _rows("append: k", k, pool, (rows, heads, pool.head_dim))
    v_rows = _rows("append: v", v, pool, (rows, heads, pool.head_dim_v))
    if backend is not None:
        plan.on_gpu.append(backend, k_rows, v_rows, pool)
        return
    _core.append(plan.core, k_rows, v_rows, pool.handle, torch.get_num_threads())


def copy_tokens(pool: Pool, plan: Plan) -> None:
    """Do the token copies that a session's step planned, before its forward."""
    backend = gpu.backend(pool.k.device)
    if backend is None:
        _core.copy_tokens(plan.core, pool.handle)
        return
    plan.on_gpu.copy_tokens(backend, pool)


def attention(
    q: Tensor,
    pool: Pool,
    plan: Plan,
    scale: float,
    rotation: Rotation | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tree attention: each segment is read once for all rows that see it.

    q: [tokens, num_qo_heads, head_dim], rotated as written; it is turned by the plan's integer
    differences with `rotation`. softcap: scores become `softcap * tanh(score / softcap)`. sinks:
    [num_qo_heads] float32 logits added once to each row's denominator. window, chunk: as in `plan`; chunk
    shows a query only the keys of its own chunk of view positions.

    Returns out [tokens, num_qo_heads, head_dim_v] in q's dtype and the natural-log LSE
    [tokens, num_qo_heads] in float32.
    """
    _check_pool(pool, plan)
    if rotation is not None and not 0 <= rotation.dims[0] <= rotation.dims[1] <= pool.head_dim:
        raise InvalidInput(
            f"attention: got a rotation of dimensions {rotation.dims}; expected them in "
            f"[0, {pool.head_dim}]"
        )
    backend = gpu.backend(pool.k.device)
    if backend is not None and q.ndim == 3:
        q = gpu.aligned(q)
    heads = int(q.shape[1]) if q.ndim == 3 else 0
    rows = _rows("attention: q", q, pool, (plan.num_rows, max(heads, 1), pool.head_dim))
    if heads % pool.num_kv_heads:
        raise InvalidInput(
            f"attention: got {heads} query heads for {pool.num_kv_heads} KV heads; expected a multiple"
        )
    table = plan.rotation_table(rotation, q.device) if rotation is not None else None
    if rotation is None or table is None:
        turn = (0, 0, 0, False)
    else:
        turn = (table.data_ptr(), rotation.dims[0], len(rotation.inv_freq), rotation.interleaved)
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
        if sinks.shape != (heads,):
            raise InvalidInput(f"sinks: got {list(sinks.shape)}; expected [{heads}]")
    out = torch.empty(plan.num_rows, heads, pool.head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(plan.num_rows, heads, dtype=torch.float32, device=q.device)
    out_rows = (out.data_ptr(), out.stride(0), out.stride(1))
    options = (scale, softcap or 0.0)
    sink_data = sinks.data_ptr() if sinks is not None else 0
    window, chunk = window or plan.window or 0, chunk or 0
    if backend is not None:
        turns = 0 if table is None else len(table)
        tensors = (rows, out_rows, lse.data_ptr(), pool.handle, heads, *options, sink_data)
        plan.on_gpu.attention(backend, pool, heads, window, chunk, (*tensors, turn, turns))
        return out, lse
    _core.attention(
        plan.core,
        rows,
        out_rows,
        lse.data_ptr(),
        pool.handle,
        heads,
        *options,
        window,
        chunk,
        sink_data,
        turn,
        plan.invariant,
        torch.get_num_threads(),
    )
    return out, lse


def _merge_in_torch(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([x.float() for _, x in parts])
    lse = torch.logsumexp(lses, 0)
    # A part that saw nothing has weight 0 whatever its output holds; if none saw anything the sum is 0.
    weight = torch.where(lses.isneginf(), 0.0, (lses - lse).exp())[..., None]
    out = torch.where(weight == 0, 0.0, outs.float() * weight).sum(0)
    return out.to(outs.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets: parts of (out [tokens, heads, dim], lse [tokens, heads]).

    out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i) (natural logarithm), as in
    FlashAttention (arXiv 2205.14135).
    """
    if not parts:
        raise InvalidInput("merge: got no parts; expected at least one (out, lse)")
    first, _ = parts[0]
    if first.dtype not in _DTYPE_CODES or first.ndim != 3:
        raise InvalidInput(
            f"merge: got {list(first.shape)} {first.dtype}; expected [tokens, heads, dim] float32, "
            "bfloat16 or float16"
        )
    for out, lse in parts:
        if out.shape != first.shape or out.dtype != first.dtype or lse.shape != out.shape[:2]:
            raise InvalidInput(
                f"merge: got out {list(out.shape)} {out.dtype} with lse {list(lse.shape)}; expected "
                f"{list(first.shape)} {first.dtype} with {list(first.shape[:2])}"
            )
    if gpu.backend(first.device) is not None:
        return _merge_in_torch(parts)
    outs = [o.contiguous() for o, _ in parts]
    lses = [lse.to(torch.float32).contiguous() for _, lse in parts]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    _core.merge(
        [(o.data_ptr(), o.stride(0), o.stride(1)) for o in outs],
        [x.data_ptr() for x in lses],
        (out.data_ptr(), out.stride(0), out.stride(1)),
        lse.data_ptr(),
        out.shape[0],
        out.shape[1],
        out.shape[2],
        _DTYPE_CODES[out.dtype],
        torch.get_num_threads(),
    )
    return out, lse
