"""Keys and values that wait outside of the pool while other threads need its pages: in the memory
of the host, or beside a CPU's pool in files that are mapped into memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput, OutOfPages
from apr.hf.spec import ModelSpec
from apr.ops import Pool
from apr.ops.device import Copies, lasting

ON_FULL = ("raise", "offload")
_SLAB = 64 << 20  # bytes that are taken at once


def check_on_full(on_full: object, spec: ModelSpec) -> None:
    """Raise InvalidInput for what is no policy, or cannot be honoured for this model."""
    if on_full not in ON_FULL:
        raise InvalidInput(f"on_full: got {on_full!r}; expected one of {list(ON_FULL)}")
    if on_full == "offload" and (spec.by_rows or not spec.layers):
        raise InvalidInput(
            'on_full: got "offload" for a model whose keys and values lie in no pages; leave it '
            '"raise"'
        )


class _Slab:
    """Room for so many pages, of every layer's pool."""

    def __init__(self, sides: Sequence[Tensor], pages: int) -> None:
        size = pages * sum(side[0].nbytes for side in sides)
        with lasting():
            if sides[0].device.type == "cpu":
                memory = torch.frombuffer(_mapped(size), dtype=torch.uint8)
            else:
                memory = torch.empty(size, dtype=torch.uint8, device="cpu")
            parts = torch.split(memory, [pages * side[0].nbytes for side in sides])
            self.sides = [
                part.view(side.dtype).view(pages, *side.shape[1:])
                for part, side in zip(parts, sides, strict=True)
            ]
        self.free = set(range(pages))
        self.pages = pages


def _mapped(size: int) -> mmap.mmap:
    """Memory of a file without a name, whose blocks are there: a full disk is told of now, and ends
    no process later.
    """
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutOfPages(
                f"offload: {tempfile.gettempdir()} has no {size >> 20} MiB for keys and values "
                f"({error}); free some, or set TMPDIR to another folder"
            ) from error


@dataclass
class _Kept:
    """Where the pages of a segment lie: by their number in it."""

    slab: _Slab
    slots: dict[int, int]


class Offload:
    """Moves segments out of the pool and back, those first that were read longest ago."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools  # which may grow
        self._page_bytes = sum(side[0].nbytes for side in self._sides)
        self._slabs: list[_Slab] = []
        self._kept: dict[int, _Kept] = {}

    @property
    def _sides(self) -> list[Tensor]:
        return [side for pool in self._pools for side in pool.sides.values()]

    def make_room(
        self, core: _core.ThreadTable, threads: Sequence[int], saved: Sequence[int] | None = None
    ) -> None:
        """Have all in the pool that a step of these threads reads, and pages for what it writes, as
        far as that is possible; with segments `saved`, all that a file of both holds. Nothing is
        lost wherever an interrupt comes. Raises OutOfPages where what is away has no room.
        """
        asked = threads, saved or (), saved is not None
        pages, away = core.needs_of(*asked)
        if self._kept:
            self._prune(core)
        if pages > core.free_pages:
            core.make_room(pages)
            pages, away = core.needs_of(*asked)  # what nobody sees needs no way back
        for number in core.idle_segments() if pages > core.free_pages else ():
            self._send(core, number)
            if pages <= core.free_pages:
                break
        for number in away:
            self._bring(core, number)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken outside of the pool."""
        return sum(slab.pages for slab in self._slabs) * self._page_bytes

    def _prune(self, core: _core.ThreadTable) -> None:
        for number in [n for n in self._kept if not core.away_pages(n)]:
            kept = self._kept[number]  # it went, came back, or was not sent after all
            kept.slab.free.update(kept.slots.values())
            del self._kept[number]
        self._slabs = [slab for slab in self._slabs if len(slab.free) < slab.pages]

    def _send(self, core: _core.ThreadTable, number: int) -> None:
        if core.away_pages(number):  # it was on its way back, when something came between
            core.send_away(number)
            return
        here = [(i, page) for i, page in enumerate(core.segment_pages(number)) if page >= 0]
        slab = self._slab_for(len(here))
        slots = sorted(slab.free)[: len(here)]
        self._kept[number] = _Kept(slab, dict(zip((i for i, _ in here), slots, strict=True)))
        slab.free.difference_update(slots)
        from_, to = Copies([page for _, page in here]), torch.tensor(slots, device="cpu")
        for side, place in zip(self._sides, slab.sides, strict=True):
            place[to] = side[from_.on(side.device)].to(place.device)
        core.send_away(number)

    def _bring(self, core: _core.ThreadTable, number: int) -> None:
        pages, kept = Copies(core.make_place(number)), self._kept[number]
        away = [i for i, page in enumerate(core.segment_pages(number)) if page == _core.AWAY_PAGE]
        slots = torch.tensor([kept.slots[i] for i in away], device="cpu")
        for side, place in zip(self._sides, kept.slab.sides, strict=True):
            side[pages.on(side.device)] = place[slots].to(side.device)
        core.bring_back(number)

    def _slab_for(self, pages: int) -> _Slab:
        for slab in self._slabs:
            if len(slab.free) >= pages:
                return slab
        # A small pool wants little, and one that lends much few files.
        usual = self._pools[0].num_pages + sum(slab.pages for slab in self._slabs)
        slab = _Slab(self._sides, max(pages, min(usual, _SLAB // self._page_bytes)))
        self._slabs.append(slab)
        return slab
