"""A Llama in float64 whose rows say which tokens they see, and at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

Array = npt.NDArray[np.float64]


def tiny_model() -> LlamaForCausalLM:
    """A model of two layers whose attention is far from uniform."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class Row(NamedTuple):
    """A token at position `at` that sees the cells `sees` at `places`, itself among them; its keys
    and values are kept as cell `number`, where there is one.
    """

    token: int
    at: int
    number: int | None
    sees: Sequence[int]
    places: Sequence[int]


class Oracle:
    """Keeps keys as they are before rotation: what a row sees is turned by its distance from it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config: Any = model.config
        self._weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
        self._layers: int = config.num_hidden_layers
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._dim: int = config.hidden_size // config.num_attention_heads
        self._eps: float = config.rms_norm_eps
        self._frequencies = model.model.rotary_emb.inv_freq.double().numpy()
        self._keys = np.zeros((self._layers, 256, self._kv_heads, self._dim))
        self._values = self._keys.copy()
        self._there: set[int] = set()

    def has(self, number: int) -> bool:
        """Whether a cell's keys and values are kept."""
        return number in self._there

    def run(self, rows: Sequence[Row]) -> Array:
        """Logits [rows, vocab]; in each layer all keys and values are kept before any is read."""
        kept = [(i, row.number) for i, row in enumerate(rows) if row.number is not None]
        fresh, cells = [i for i, _ in kept], [number for _, number in kept]
        self._make_room(max(cells, default=0) + 1)
        most = max(len(row.sees) for row in rows)
        sees = np.zeros((len(rows), most), int)
        distance = np.zeros((len(rows), most))
        hidden = np.ones((len(rows), most), bool)
        for i, row in enumerate(rows):
            sees[i, : len(row.sees)] = row.sees
            distance[i, : len(row.sees)] = np.asarray(row.places) - row.at
            hidden[i, : len(row.sees)] = False
        angle = self._angles(distance, sees, [row.at for row in rows])
        turn = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
        x = self._weights["model.embed_tokens.weight"][[row.token for row in rows]]
        for layer in range(self._layers):
            x = self._layer(layer, x, fresh, cells, sees, hidden, turn)
        self._there.update(cells)
        x = self._norm(x, "model.norm.weight")
        logits: Array = x @ self._weights["lm_head.weight"].T
        return logits

    def _angles(self, distance: Array, sees: Any, at: list[int]) -> Array:
        """[rows, seen, pairs] by how much each key is turned for each row that sees it."""
        angles: Array = distance[..., None] * self._frequencies
        return angles

    def _make_room(self, cells: int) -> None:
        while cells > self._keys.shape[1]:
            self._keys = np.concatenate([self._keys, np.zeros_like(self._keys)], 1)
            self._values = np.concatenate([self._values, np.zeros_like(self._values)], 1)

    def _norm(self, x: Array, weight: str) -> Array:
        size = np.sqrt((x * x).mean(-1, keepdims=True) + self._eps)
        normed: Array = x / size * self._weights[weight]
        return normed

    def _project(self, x: Array, name: str) -> Array:
        projected: Array = x @ self._weights[name + ".weight"].T
        return projected

    def _layer(
        self,
        layer: int,
        x: Array,
        fresh: list[int],
        cells: list[int],
        sees: Array,
        hidden: Array,
        turn: tuple[Array, Array],
    ) -> Array:
        name, count = f"model.layers.{layer}.", len(x)
        normed = self._norm(x, name + "input_layernorm.weight")
        q = self._project(normed, name + "self_attn.q_proj")
        k = self._project(normed, name + "self_attn.k_proj")
        v = self._project(normed, name + "self_attn.v_proj")
        self._keys[layer, cells] = k.reshape(count, self._kv_heads, self._dim)[fresh]
        self._values[layer, cells] = v.reshape(count, self._kv_heads, self._dim)[fresh]
        keys, values = self._keys[layer, sees], self._values[layer, sees]  # [rows, seen, kv, dim]
        (cos, sin), half = turn, self._dim // 2
        a, b = keys[..., :half], keys[..., half:]
        keys = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        q = q.reshape(count, self._kv_heads, -1, self._dim)
        scores = np.einsum("rkgd,rnkd->rkgn", q, keys) / np.sqrt(self._dim)
        scores[np.broadcast_to(hidden[:, None, None], scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("rkgn,rnkd->rkgd", weights, values).reshape(count, -1)
        x = x + self._project(out, name + "self_attn.o_proj")
        normed = self._norm(x, name + "post_attention_layernorm.weight")
        gate = self._project(normed, name + "mlp.gate_proj")
        up = self._project(normed, name + "mlp.up_proj")
        out = gate / (1 + np.exp(-gate)) * up
        return x + self._project(out, name + "mlp.down_proj")
