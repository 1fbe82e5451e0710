"""The dense oracle: attention over an explicit set of visible tokens, in float64, with no
cleverness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apr.ops import Pool, Rotation, View


def rotate(x: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    """Turn x [..., head_dim] by `positions` (broadcast over the leading dimensions), in x's
    dtype.
    """
    first, end = rotation.dims
    inv_freq = torch.tensor(rotation.inv_freq, dtype=torch.float64, device=x.device)
    angle = positions.to(x.device, torch.float64)[..., None] * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    part = x[..., first:end]
    pairs = (end - first) // 2
    if rotation.interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
    else:
        a, b = part[..., :pairs], part[..., pairs:]
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if rotation.interleaved:
        turned = torch.stack([turned_a, turned_b], -1).flatten(-2)
    else:
        turned = torch.cat([turned_a, turned_b], -1)
    return torch.cat([x[..., :first], turned, x[..., end:]], -1)


def attention(
    q: Tensor,
    pool: Pool,
    row_sets: Sequence[tuple[int, Sequence[View]]],
    scale: float,
    rotation: Rotation | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    turned_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.attention` of the row sets that a plan was made of, row by row, in float64.

    q: [tokens, num_qo_heads, head_dim]. Returns out [tokens, num_qo_heads, head_dim_v] and the
    natural-log LSE [tokens, num_qo_heads], both float64.
    """
    heads = q.shape[1]
    group = heads // pool.num_kv_heads
    outs, lses = [], []
    row = 0
    for query_len, views in row_sets:
        own = next(v for v in views if v.own)
        own_difference = own.offset - own.base
        for i in range(query_len):
            slot = own.hi - query_len + i
            at = own.offset + own.stride * slot
            scores, values = [], []
            for view in views:
                hi = slot + 1 if view.own else view.hi
                keep = []
                for j in range(view.lo, hi):
                    key_at = view.offset + view.stride * j
                    if window and at - key_at >= window:
                        continue
                    if chunk and at // chunk != key_at // chunk:
                        continue
                    keep.append(j)
                index = torch.tensor(keep, dtype=torch.long, device=q.device)
                pages = torch.tensor(list(view.pages), dtype=torch.long, device=q.device)
                pages = pages[index // pool.page_size]
                k, v = (x.double() for x in pool.read(pages, index % pool.page_size))
                turn = own_difference - (view.offset - view.base)
                query = q[row].double()
                if rotation is not None and turn:
                    query = rotate(query, torch.full((heads,), turn, device=q.device), rotation)
                    query = query.to(turned_dtype or query.dtype).double()
                k = k.repeat_interleave(group, 1)
                scores.append(torch.einsum("hd,thd->ht", query, k) * scale)
                values.append(v.repeat_interleave(group, 1))
            score, value = torch.cat(scores, 1), torch.cat(values, 0)
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            extra = score if sinks is None else torch.cat([score, sinks.double()[:, None]], 1)
            lse = torch.logsumexp(extra, 1)
            weight = torch.where(lse[:, None].isinf(), 0.0, (score - lse[:, None]).exp())
            outs.append(torch.einsum("ht,thd->hd", weight, value))
            lses.append(lse)
            row += 1
    return torch.stack(outs), torch.stack(lses)
