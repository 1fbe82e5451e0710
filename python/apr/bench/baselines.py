"""What a user of torch would write instead: attention of forked threads in torch operators.

All take one step of N threads that share a prefix of P tokens and have S tokens of their own each,
and return [N, q_heads, head_dim]. Whatever can be prepared before the step is prepared and not
timed: copies of the prefix, masks, layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Problem:
    """q [N, q_heads, D]; prefix [kv_heads, P, D] twice; own [N, kv_heads, S, D] twice."""

    q: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    own_k: Tensor
    own_v: Tensor

    @property
    def group(self) -> int:
        return int(self.q.shape[1]) // int(self.prefix_k.shape[0])

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1])

    def grouped(self) -> Tensor:
        """q as [N, kv_heads, group, D]."""
        n, heads, dim = self.q.shape
        return self.q.view(n, heads // self.group, self.group, dim)

    def replicated(self) -> tuple[Tensor, Tensor]:
        """Keys and values with a copy of the prefix for each thread: [N, kv_heads, P + S, D]."""
        n = len(self.q)
        pairs = ((self.prefix_k, self.own_k), (self.prefix_v, self.own_v))
        k, v = (torch.cat([p.expand(n, -1, -1, -1), own], 2).contiguous() for p, own in pairs)
        return k, v

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix and all own tokens side by side: k, v [1, kv_heads, P + N S, D]; who sees what
        [1, 1, N group, P + N S]."""
        n, _, own, _ = self.own_k.shape
        prefix = self.prefix_k.shape[1]
        k = torch.cat([self.prefix_k, *self.own_k], 1)[None].contiguous()
        v = torch.cat([self.prefix_v, *self.own_v], 1)[None].contiguous()
        sees = torch.zeros(n, prefix + n * own, dtype=torch.bool)
        sees[:, :prefix] = True
        for i in range(n):
            sees[i, prefix + i * own : prefix + (i + 1) * own] = True
        return k, v, sees.repeat_interleave(self.group, 0)[None, None]

    def rows_of_a_head(self) -> Tensor:
        """All query rows of a KV head together: [1, kv_heads, N group, D]."""
        q = self.grouped().transpose(0, 1)
        return q.reshape(1, q.shape[0], -1, q.shape[-1]).contiguous()

    def back(self, out: Tensor) -> Tensor:
        """[1, kv_heads, N group, D] as [N, q_heads, D]."""
        n, heads, dim = self.q.shape
        return out.view(-1, n, self.group, dim).transpose(0, 1).reshape(n, heads, dim)


Step = Callable[[], Tensor]


def replicated_gqa(p: Problem) -> Step:
    """SDPA on a copy of the prefix a thread, grouped heads by `enable_gqa`: what a batched cache
    does.
    """
    k, v = p.replicated()
    q = p.q[:, :, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]


def replicated_folded(p: Problem) -> Step:
    """The same with the group folded into the query length, so that keys are not repeated."""
    k, v = p.replicated()
    q = p.grouped()
    return lambda: F.scaled_dot_product_attention(q, k, v).reshape(p.q.shape)


def packed_mask(p: Problem) -> Step:
    """SDPA over the shared layout with a dense mask: each key is read once, masked scores are
    computed.
    """
    k, v, sees = p.packed()
    q = p.rows_of_a_head()
    return lambda: p.back(F.scaled_dot_product_attention(q, k, v, attn_mask=sees))


def prefix_suffix(p: Problem) -> Step:
    """Prefix and own tokens apart, merged by log-sum-exp (Hydragen, arXiv 2402.05099), in torch
    operators.
    """
    rows, q = p.rows_of_a_head()[0], p.grouped()

    def part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = torch.matmul(q, k.transpose(-1, -2)).float() * p.scale
        top = score.amax(-1, keepdim=True)
        weight = (score - top).exp_()
        out = torch.matmul(weight.to(v.dtype), v).float()
        return out, top, weight.sum(-1, keepdim=True)

    def per_thread(x: Tensor) -> Tensor:
        return x.view(x.shape[0], len(p.q), p.group, -1).transpose(0, 1)

    def step() -> Tensor:
        if p.own_k.shape[2] == 0:
            out, _, total = part(rows, p.prefix_k, p.prefix_v)
            return per_thread(out / total).to(p.q.dtype).reshape(p.q.shape)
        first, top1, sum1 = (per_thread(x) for x in part(rows, p.prefix_k, p.prefix_v))
        second, top2, sum2 = part(q, p.own_k, p.own_v)
        top = torch.maximum(top1, top2)
        a, b = (top1 - top).exp(), (top2 - top).exp()
        out = (first * a + second * b) / (sum1 * a + sum2 * b)
        return out.to(p.q.dtype).reshape(p.q.shape)

    return step


def flex(p: Problem) -> Step:
    """FlexAttention, compiled, over the shared layout with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    k, v, sees = p.packed()
    q, table = p.rows_of_a_head(), sees[0, 0]

    def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
        return table[row, column]

    blocks = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: p.back(compiled(q, k, v, block_mask=blocks))


COMPILED = {"FlexAttention, packed"}
BASELINES: dict[str, Callable[[Problem], Step]] = {
    "SDPA, replicated, enable_gqa": replicated_gqa,
    "SDPA, replicated, group folded": replicated_folded,
    "SDPA, packed, dense mask": packed_mask,
    "prefix + suffix in torch ops": prefix_suffix,
    "FlexAttention, packed": flex,
}
