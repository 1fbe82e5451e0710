"""Oracle for views that stock transformers cannot express: a loop over explicit lists of visible
tokens.

The model itself computes everything but attention. It is run with all position ids 0, so RoPE is
the identity and keys are kept as they are before rotation; each row then attends to the tokens that
the test lists, rotated at the positions that the test states, with formulas of this file alone.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from models import Family

_LOOP: ContextVar[TokenLoop | None] = ContextVar("token_loop", default=None)


@dataclass(frozen=True)
class Row:
    """One token written to `block`; it sees `sees`: (block, position of its first token,
    tokens).
    """

    block: str
    token: int
    at: int
    sees: list[tuple[str, int, int]]


def _turn(x: Tensor, positions: Tensor, theta: float, interleaved: bool) -> Tensor:
    """x [heads, tokens, dim] rotated at positions [tokens]."""
    half = x.shape[-1] // 2
    inv_freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions.double()[:, None] * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    left, right = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        return torch.stack([left, right], -1).flatten(-2)
    return torch.cat([left, right], -1)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:
    loop = _LOOP.get()
    assert loop is not None
    return loop.attend(query[0], key[0], value[0], kw["scaling"])[None], None


AttentionInterface.register("token_loop", _attention)


class TokenLoop:
    def __init__(self, model: Any, family: Family) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("token_loop")
        self.family = family
        self.keys: dict[tuple[str, int], list[Tensor]] = {}
        self.values: dict[tuple[str, int], list[Tensor]] = {}

    @torch.no_grad()
    def step(self, rows: list[Row]) -> Tensor:
        """Write all rows, then let each attend; logits [rows, vocab]."""
        self.rows, self.layer = rows, -1
        token = _LOOP.set(self)
        try:
            ids = torch.tensor([[r.token for r in rows]])
            out = self.model(ids, position_ids=torch.zeros_like(ids), use_cache=False)
        finally:
            _LOOP.reset(token)
        logits: Tensor = out.logits[0].float()
        return logits

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        self.layer += 1
        for i, row in enumerate(self.rows):
            self.keys.setdefault((row.block, self.layer), []).append(k[:, i])
            self.values.setdefault((row.block, self.layer), []).append(v[:, i])
        outs = []
        for i, row in enumerate(self.rows):
            keys, values, places = [], [], []
            for block, offset, count in row.sees:
                keys += self.keys[block, self.layer][:count]
                values += self.values[block, self.layer][:count]
                places += range(offset, offset + count)
            place = torch.tensor(places)
            theta, interleaved = self.family.theta, self.family.interleaved
            assert theta is not None
            turned = _turn(torch.stack(keys, 1), place, theta, interleaved)
            query = _turn(q[:, i : i + 1], torch.tensor([row.at]), theta, interleaved)
            group = q.shape[0] // turned.shape[0]
            scores = query @ turned.repeat_interleave(group, 0).transpose(1, 2) * scaling
            if self.family.window:
                hidden = row.at - place >= self.family.window
                scores = scores.masked_fill(hidden, float("-inf"))
            weights = scores.double().softmax(-1).to(v.dtype)
            outs.append((weights @ torch.stack(values, 1).repeat_interleave(group, 0))[:, 0])
        return torch.stack(outs)
