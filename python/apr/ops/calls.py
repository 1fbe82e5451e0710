"""The kernels on tensors: append, attention, merge. No threads, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops import device as gpu
from apr.ops.plans import Plan, Rotation, check_spans
from apr.ops.pools import Pool, dtype_of


def _rows_of(x: Tensor) -> _core.Rows:
    return _core.Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _rows(name: str, x: Tensor, pool: Pool, shape: tuple[int, int, int]) -> _core.Rows:
    if tuple(x.shape) != shape or x.dtype != pool.dtype or x.device != pool.k.device:
        raise InvalidInput(
            f"{name}: got {list(x.shape)} {x.dtype} on {x.device}; expected {list(shape)} "
            f"{pool.dtype} on {pool.k.device}, as the plan and the pool say"
        )
    if x.stride(2) != 1:
        raise InvalidInput(
            f"{name}: got strides {x.stride()}; expected a contiguous last dimension"
        )
    return _rows_of(x)


def _check_pool(pool: Pool, plan: Plan) -> None:
    if not plan.fits(pool.num_pages, pool.page_size):
        core = plan.core
        raise InvalidInput(
            f"plan: made for {plan.pages or (core.pages_needed, core.page_size)} (pages, page "
            f"size), used with a pool of {(pool.num_pages, pool.page_size)}; plan for the pool "
            "that holds the tokens"
        )
    pool.check_memory()


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
    _core.append(plan.core, k_rows, v_rows, pool.core, torch.get_num_threads())


def copy_tokens(pool: Pool, plan: Plan) -> None:
    """Do the token copies that a session's step planned, before its forward."""
    _check_pool(pool, plan)
    backend = gpu.backend(pool.k.device)
    if backend is None:
        _core.copy_tokens(plan.core, pool.core)
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
    [num_qo_heads] float32 logits added once to each row's denominator. window, chunk: as in `plan`;
    chunk shows a query only the keys of its own chunk of view positions.

    Returns out [tokens, num_qo_heads, head_dim_v] in q's dtype and the natural-log LSE
    [tokens, num_qo_heads] in float32.
    """
    _check_pool(pool, plan)
    if rotation is not None and not 0 <= rotation.dims[0] <= rotation.dims[1] <= pool.head_dim:
        raise InvalidInput(
            f"attention: got a rotation of dimensions {rotation.dims}; expected them in "
            f"[0, {pool.head_dim}]"
        )
    if not (math.isfinite(scale) and math.isfinite(softcap or 0.0) and (softcap or 0.0) >= 0):
        raise InvalidInput(
            f"attention: got scale {scale} and softcap {softcap}; expected finite numbers, and a "
            "softcap of 0 (none) or more"
        )
    check_spans(window=window, chunk=chunk)
    backend = gpu.backend(pool.k.device)
    if backend is not None and q.ndim == 3:
        q = gpu.aligned(q)
    heads = int(q.shape[1]) if q.ndim == 3 else 0
    rows = _rows("attention: q", q, pool, (plan.num_rows, max(heads, 1), pool.head_dim))
    if heads % pool.num_kv_heads:
        raise InvalidInput(
            f"attention: got {heads} query heads for {pool.num_kv_heads} KV heads; expected a "
            "multiple"
        )
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
        if sinks.shape != (heads,) or sinks.device != q.device:
            raise InvalidInput(
                f"sinks: got {list(sinks.shape)} on {sinks.device}; expected [{heads}] on "
                f"{q.device}, where the queries are"
            )
    window, chunk = window or plan.window or 0, chunk or 0
    out = torch.empty(plan.num_rows, heads, pool.head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(plan.num_rows, heads, dtype=torch.float32, device=q.device)
    if not plan.num_rows:  # of a step that has not begun
        return out, lse
    call = _core.AttentionCall(
        q=rows,
        out=_rows_of(out),
        lse=lse.data_ptr(),
        q_heads=heads,
        scale=scale,
        softcap=softcap or 0.0,
        window=window,
        chunk=chunk,
        sinks=0 if sinks is None else sinks.data_ptr(),
        rotation=plan.turn(rotation, q.device),
        invariant=plan.invariant,
        threads=torch.get_num_threads(),
    )
    if backend is not None:
        kind = gpu.kind_of(pool, heads, window, chunk, plan.invariant)
        plan.on_gpu.attention(backend, pool, kind, call)
    else:
        _core.attention(plan.core, pool.core, call)
    return out, lse


def _merge_in_torch(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([x.float() for _, x in parts])
    lse = torch.logsumexp(lses, 0)
    # A part that saw nothing has weight 0 whatever its output holds; if none saw anything the sum
    # is 0.
    weight = torch.where(lses.isneginf(), 0.0, (lses - lse).exp())[..., None]
    out = torch.where(weight == 0, 0.0, outs.float() * weight).sum(0)
    return out.to(outs.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets: parts of (out [tokens, heads, dim], lse [tokens,
    heads]).

    out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i) (natural logarithm), as in
    FlashAttention (arXiv 2205.14135).
    """
    if not parts:
        raise InvalidInput("merge: got no parts; expected at least one (out, lse)")
    first, _ = parts[0]
    dtype = dtype_of(first.dtype, "merge")
    if first.ndim != 3:
        raise InvalidInput(f"merge: got {list(first.shape)}; expected [tokens, heads, dim]")
    for out, lse in parts:
        if out.shape != first.shape or out.dtype != first.dtype or lse.shape != out.shape[:2]:
            raise InvalidInput(
                f"merge: got out {list(out.shape)} {out.dtype} with lse {list(lse.shape)}; "
                f"expected {list(first.shape)} {first.dtype} with {list(first.shape[:2])}"
            )
        if {out.device, lse.device} != {first.device}:
            raise InvalidInput(
                f"merge: got out on {out.device} with lse on {lse.device}; expected all on "
                f"{first.device}, as the first"
            )
    if gpu.backend(first.device) is not None:
        return _merge_in_torch(parts)
    outs = [o.contiguous() for o, _ in parts]
    lses = [lse.to(torch.float32).contiguous() for _, lse in parts]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    _core.merge(
        parts=[_rows_of(o) for o in outs],
        part_lse=[x.data_ptr() for x in lses],
        out=_rows_of(out),
        lse=lse.data_ptr(),
        rows=out.shape[0],
        heads=out.shape[1],
        dim=out.shape[2],
        dtype=dtype,
        threads=torch.get_num_threads(),
    )
    return out, lse
