"""Measures how a layer turns its queries with position, from captured queries alone."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor, nn

from apr.ops import Rotation
from apr.ops.reference import rotate

# Positions of the probe rows; the first is the reference. Small steps tell frequencies apart, the
# larger ones make a wrong frequency visible.
PROBE_POSITIONS = (0, 1, 2, 4, 16, 64, 100)

# A fit must explain the queries to this part of their largest value: float32 and half-precision
# noise.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class Positions(Enum):
    """What a layer does with positions when it does not rotate."""

    NONE = "none"  # queries do not change with position
    ABSOLUTE = "absolute"  # they change, and not by a rotation that could be undone


def frequency_candidates(model: nn.Module) -> list[tuple[float, ...]]:
    """The distinct `inv_freq` buffers of a model."""
    found: dict[tuple[float, ...], None] = {}
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and "original" not in name and buffer.ndim == 1:
            found[tuple(buffer.double().tolist())] = None
    return list(found)


def _layouts(head_dim: int, inv_freq: tuple[float, ...]) -> Iterable[Rotation]:
    size = 2 * len(inv_freq)
    if size > head_dim:
        return
    for first in dict.fromkeys((0, head_dim - size)):
        for interleaved in (False, True):
            yield Rotation(inv_freq, (first, first + size), interleaved)
            backwards = tuple(-f for f in inv_freq)
            yield Rotation(backwards, (first, first + size), interleaved)


def fit(queries: Tensor, candidates: list[tuple[float, ...]]) -> Rotation | Positions:
    """Explain queries [probe rows, heads, head_dim] of one token at PROBE_POSITIONS.

    With a single visible key every hidden state is free of position, so in a RoPE model each
    layer's query obeys q(p) = R(p) q(0). Candidates are the model's own frequencies in every
    layout; the winner must explain all rows.
    """
    q = queries.double()
    first, positions = q[0], torch.tensor(PROBE_POSITIONS, device="cpu")
    size = q.abs().max().clamp_min(1e-30)
    tolerance = _TOLERANCE.get(queries.dtype, 1e-3)
    if ((q - first).abs().max() / size).item() < tolerance * 0.1:
        return Positions.NONE
    best: tuple[float, Rotation | None] = (float("inf"), None)
    for inv_freq in candidates:
        for rotation in _layouts(q.shape[2], inv_freq):
            turned = rotate(first.expand_as(q), positions[:, None], rotation)
            error = ((turned - q).abs().max() / size).item()
            if error < best[0]:
                best = (error, rotation)
    if best[1] is not None and best[0] < tolerance:
        return best[1]
    return Positions.ABSOLUTE


def position_limit(model: nn.Module) -> int | None:
    """The position from which a model turns everything by other frequencies than before, or None.

    longrope and dynamic change all of them with the longest position of a forward, so that cached
    keys, and threads in company, would be turned wrongly.
    """
    limits = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        config = getattr(module, "config", None)
        if "dynamic" in kinds:
            limits.append(getattr(module, "original_max_seq_len", None))
        if "longrope" in kinds:
            original = getattr(config, "original_max_position_embeddings", None)
            parameters = getattr(config, "rope_parameters", None)
            if original is None and isinstance(parameters, dict):
                original = parameters.get("original_max_position_embeddings")
            limits.append(original)
    return min((int(limit) for limit in limits if limit), default=None)
