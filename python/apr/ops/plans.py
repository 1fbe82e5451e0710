"""What a forward's rows see: views of segments, how keys turn, and the plan that all layers
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops import device as gpu
from apr.ops.pools import Pool


class View(NamedTuple):
    """What one row set sees of one segment.

    `pages` hold the segment's tokens in order; slots [lo, hi) of them are visible. Slot j stands at
    view position `offset + stride * j` and was written at `base + stride * j`. With `own=True` the
    row set's queries are the last `query_len` of these slots, and each sees no slot after its own.
    `hi` counts the tokens that `append` is about to write. Equal page lists are one segment, read
    once for all.
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

    inv_freq: angle per position of each pair of dimensions; dims: the (first, end) dimensions that
    turn; interleaved: pairs are neighbours (2i, 2i+1), else (i, i + pairs).
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


class Plan:
    """The work of one packed forward, shared by all layers; made by `plan` or by a session's
    step.
    """

    def __init__(
        self,
        core: _core.Plan,
        window: int | None = None,
        invariant: bool = False,
        pages: tuple[int, int] | None = None,
    ) -> None:
        self.core, self.window, self.invariant = core, window, invariant
        self.pages = pages  # (num_pages, page_size) of the pool that it was made for, where known
        self.num_rows: int = core.num_rows
        self._rotations: np.ndarray = core.rotations
        self._tables: dict[tuple[Rotation, torch.device], Tensor] = {}
        self.on_gpu = gpu.DevicePlan(core, invariant)

    def fits(self, num_pages: int, page_size: int) -> bool:
        """Whether a pool of this size holds the pages that the plan names."""
        if self.pages is not None:
            return self.pages[0] <= num_pages and self.pages[1] == page_size
        return self.core.page_size == page_size and self.core.pages_needed <= num_pages

    @property
    def turns(self) -> bool:
        """Whether some segment is read away from where it was written."""
        return bool(len(self._rotations))

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
            self._tables[key] = gpu.uploaded(table, device)
        return self._tables[key]

    def turn(self, rotation: Rotation | None, device: torch.device) -> _core.RotationTable | None:
        """The same for the extension; the plan keeps its memory."""
        table = None if rotation is None else self.rotation_table(rotation, device)
        if rotation is None or table is None:
            return None
        return _core.RotationTable(
            cos_sin=table.data_ptr(),
            rotations=len(table),
            first=rotation.dims[0],
            pairs=len(rotation.inv_freq),
            interleaved=rotation.interleaved,
        )


def check_spans(**spans: int | None) -> None:
    """Raise InvalidInput for a window or chunk that shows nothing."""
    for name, tokens in spans.items():
        if tokens is not None and tokens < 1:
            raise InvalidInput(f"{name}: got {tokens}; expected at least 1, or None")


def plan(
    row_sets: Sequence[tuple[int, Sequence[View]]],
    pool: Pool,
    num_qo_heads: int,
    window: int | None = None,
    invariant: bool = False,
) -> Plan:
    """Plan attention for row sets, each `(query_len, views)` with exactly one `own` view.

    `window` hides keys whose view position lies `window` or more before the query's. `invariant`
    cuts at fixed 512-token chunks, so that a row's bits do not depend on what else is planned.
    """
    if num_qo_heads < 1 or num_qo_heads % pool.num_kv_heads:
        raise InvalidInput(
            f"plan: got {num_qo_heads} query heads for {pool.num_kv_heads} KV heads; "
            "expected a positive multiple"
        )
    check_spans(window=window)
    if not row_sets:
        raise InvalidInput("plan: got no row sets; expected at least one")
    for number, (query_len, views) in enumerate(row_sets):
        own = [v for v in views if v.own]
        if len(own) != 1 or query_len < 1 or query_len > own[0].hi - own[0].lo:
            raise InvalidInput(
                f"plan: row set {number} has query_len {query_len} and {len(own)} own views; "
                "expected at least one query and one own view that ends with the queries' own "
                "slots"
            )
        for view in views:
            if view.stride < 1:
                raise InvalidInput(f"plan: got stride {view.stride}; expected at least 1")
            if not 0 <= view.lo <= view.hi <= len(view.pages) * pool.page_size:
                raise InvalidInput(
                    f"plan: row set {number}: got slots [{view.lo}, {view.hi}) on "
                    f"{len(view.pages)} pages of {pool.page_size}; expected 0 <= lo <= hi <= their "
                    "slots"
                )
            if view.pages and not 0 <= min(view.pages) <= max(view.pages) < pool.num_pages:
                raise InvalidInput(
                    f"plan: row set {number}: got pages {list(view.pages)}; expected numbers in "
                    f"[0, {pool.num_pages})"
                )
    sets = [_core.RowSet(n, [_core.SeenPages(*view) for view in views]) for n, views in row_sets]
    pages = (pool.num_pages, pool.page_size)
    return Plan(_core.plan(sets, pool.page_size), window, invariant, pages)
