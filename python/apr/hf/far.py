"""Measures what changes far out: queries that are scaled by their position, or by what the model's
own cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

# Where it is looked, but for positions that the model has no embedding or frequencies for.
_FAR = (1 << 7, 1 << 10, 1 << 13, 1 << 16, 1 << 20)

# Queries that differ by less than this part of their size are the same, rounded.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}

# Positions [rows] -> each layer's queries [rows, heads, head_dim]; with a cache, as after a past.
Queries = Callable[[list[int], Any], list[Tensor]]


class Reach(NamedTuple):
    """The first positions, if any, at which something else begins to count."""

    turning: int | None  # queries are scaled by their position, which re-rotation cannot follow
    past: int | None  # queries depend on the length of the model's own cache


NEVER = Reach(None, None)


class _Past(DynamicCache):  # type: ignore[misc]
    """A cache that says how long it is, and holds nothing."""

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config)
        self._length = length

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, self._length


def measure_reach(model: Any, queries: Queries, limit: int | None, turns: list[bool]) -> Reach:
    """Compare queries far out with those at position 0, and with those that follow a past.

    limit: the position from which all is different anyway; turns: of each layer, whether keys of it
    can be read away from where they were written.
    """
    if not all(turns):
        return NEVER  # a table of positions, past whose end no place may be asked
    places = [0, *(p for p in _FAR if limit is None or p < limit - 1)]
    places += [] if limit is None else [limit - 1]
    try:
        far = queries(places, None)
    except IndexError:
        return NEVER
    tolerance = _TOLERANCE.get(far[0].dtype, 2e-2)

    def same(a: Tensor, b: Tensor) -> bool:
        size = float(b.abs().max().clamp_min(1e-30))
        return float((a.float() - b.float()).abs().max()) <= tolerance * size

    def turned_only(rows: list[Tensor], row: int) -> bool:
        return all(
            same(x[row].float().norm(dim=-1), y[0].float().norm(dim=-1))
            for x, y in zip(rows, far, strict=True)
        )

    def same_after_past(place: int, alone: list[Tensor]) -> bool:
        return all(map(same, queries([place], _Past(model.config, place)), alone))

    turning = _first(places, [turned_only(far, i) for i in range(len(places))])
    past = None
    try:
        rows = [[x[i : i + 1] for x in far] for i in range(len(places))]
        if not same_after_past(places[-1], rows[-1]):
            past = _first(places, list(map(same_after_past, places, rows)))
    except IndexError:
        pass  # it takes no cache that holds nothing, and does not count from one
    return Reach(
        _bisect(turning, lambda p: turned_only(queries([p], None), 0)),
        _bisect(past, lambda p: same_after_past(p, queries([p], None))),
    )


def _first(places: list[int], good: list[bool]) -> tuple[int, int] | None:
    """(the last place before the first one that is not good, that one)."""
    bad = next((i for i, fine in enumerate(good) if not fine), None)
    if bad is None:
        return None
    return (places[bad - 1] if bad else 0, places[bad])


def _bisect(between: tuple[int, int] | None, good: Callable[[int], bool]) -> int | None:
    """The first place that is not good."""
    if between is None:
        return None
    low, high = between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return high
