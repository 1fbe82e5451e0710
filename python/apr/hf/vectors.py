"""Vectors that a thread's tokens add to their keys, before rotation, and values (ParaThinker, arXiv
2509.04475).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from apr.errors import InvalidInput, UnsupportedModel
from apr.hf.spec import ModelSpec
from apr.ops import Plan
from apr.ops.device import Copies, uploaded
from apr.ops.reference import rotate


class PathVectors(NamedTuple):
    """keys [layers, kv_heads, head_dim] and values [layers, kv_heads, head_dim_v], added to every
    token that a thread writes; keys before they are rotated.
    """

    keys: Tensor
    values: Tensor

    def check(self, spec: ModelSpec) -> None:
        """Raise InvalidInput where they are not of this model's shapes, UnsupportedModel where keys
        and values are kept as latents, to which nothing can be added head by head.
        """
        layers = spec.layers
        if any(layer.latent is not None for layer in layers):
            raise UnsupportedModel(
                "vectors: this model's keys and values are kept as latents of all heads (MLA); "
                "expected a model with keys of its own for each head"
            )
        for name, x, dim in (
            ("keys", self.keys, layers[0].head_dim),
            ("values", self.values, layers[0].head_dim_v),
        ):
            want = (len(layers), layers[0].kv_heads, dim)
            if tuple(x.shape) != want:
                raise InvalidInput(
                    f"vectors: got {name} {list(x.shape)}; expected {list(want)}: "
                    "[layers, kv_heads, head_dim] of the model"
                )


class RowVectors:
    """What the rows of one forward add, layer by layer."""

    def __init__(self, plan: Plan, vectors: Mapping[int, PathVectors], spec: ModelSpec) -> None:
        writers = plan.core.writers.tolist()
        rows = [i for i, writer in enumerate(writers) if writer in vectors]
        self._rows = Copies(torch.tensor(rows, dtype=torch.long, device="cpu"))
        self._owners = [vectors[writers[i]] for i in rows]
        self._positions = torch.from_numpy(plan.core.positions)[rows][:, None]
        self._spec = spec

    def __bool__(self) -> bool:
        return bool(self._owners)

    @cached_property
    def _host(self) -> PathVectors:
        """Of each row [rows, layers, kv_heads, head_dim], float32 in host memory."""
        distinct = {id(x): x for x in self._owners}
        place = {key: i for i, key in enumerate(distinct)}
        which = [place[id(x)] for x in self._owners]
        keys, values = (
            torch.stack([x.to("cpu", torch.float32) for x in side])[which]
            for side in zip(*distinct.values(), strict=True)
        )
        return PathVectors(keys, values)

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k [rows, kv_heads, head_dim], rotated, and v, with the rows' vectors added. Rotation is
        linear, so that a vector is turned like the key that it would have been added to.
        """
        keys, values = self._host.keys[:, layer], self._host.values[:, layer]
        rotation = self._spec.layers[layer].rotation
        if rotation is not None:
            keys = rotate(keys, self._positions, rotation)
        k, v, rows = k.clone(), v.clone(), self._rows.on(k.device)
        k[rows] = (k[rows].float() + uploaded(keys, k.device)).to(k.dtype)
        v[rows] = (v[rows].float() + uploaded(values, v.device)).to(v.dtype)
        return k, v
