"""Keys and values that wait outside of the pool while other threads need its pages: in the memory
of the host, or beside a CPU's pool in a file that is mapped into memory.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.hf.spec import ModelSpec
from apr.ops import Pool

ON_FULL = ("raise", "offload")


def check_on_full(on_full: object, spec: ModelSpec) -> None:
    """Raise InvalidInput for what is no policy, or cannot be honoured for this model."""
    if on_full not in ON_FULL:
        raise InvalidInput(f"on_full: got {on_full!r}; expected one of {list(ON_FULL)}")
    if on_full == "offload" and spec.states is not None:
        raise InvalidInput(
            'on_full: got "offload" for a model that keeps layer states, which lie outside of the '
            'pool; leave it "raise"'
        )


class Offload:
    """Moves whole segments out of the pool and back, those first that were read longest ago."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._kept: dict[int, list[Tensor]] = {}  # a tensor for each side of each layer's pool

    def make_room(
        self, core: _core.ThreadTable, threads: Sequence[int], handles: Sequence[int] = ()
    ) -> None:
        """Have all in the pool that a step of these threads reads, and what those segments need,
        and pages for what is written. Nothing is lost wherever an interrupt comes. Raises
        OutOfPages where what is away has no room.
        """
        for number in [n for n in self._kept if not core.away_pages(n)]:
            del self._kept[number]  # it went, or came back
        segments, pages = core.needs_of(threads, handles)
        away = [number for number in segments if core.away_pages(number)]
        if not away and pages <= core.free_pages:
            return
        core.make_room(pages)
        for number in core.idle_segments(segments) if pages > core.free_pages else ():
            self._send(core, number)
            if pages <= core.free_pages:
                break
        for number in away:
            self._bring(core, number)

    @property
    def nbytes(self) -> int:
        """Bytes that lie outside of the pool."""
        return sum(x.nbytes for kept in self._kept.values() for x in kept)

    def _sides(self) -> list[Tensor]:
        sides = {id(side): side for pool in self._pools for side in (pool.k, pool.v)}
        return list(sides.values())

    def _send(self, core: _core.ThreadTable, number: int) -> None:
        if core.away_pages(number):  # it was on its way back, when something came between
            core.send_away(number)
            return
        pages = torch.tensor(core.segment_pages(number), dtype=torch.long)
        sides = self._sides()
        room = _Room(len(pages) * sum(side[0].nbytes for side in sides), sides[0].device.type)
        kept = []
        for side in sides:
            place = room.take((len(pages), *side.shape[1:]), side.dtype)
            place.copy_(side[pages.to(side.device)])
            kept.append(place)
        self._kept[number] = kept
        core.send_away(number)

    def _bring(self, core: _core.ThreadTable, number: int) -> None:
        pages = torch.tensor(core.make_place(number), dtype=torch.long)
        for side, kept in zip(self._sides(), self._kept[number], strict=True):
            side[pages.to(side.device)] = kept[: len(pages)].to(side.device)
        core.bring_back(number)
        del self._kept[number]


class _Room:
    """Bytes outside of a pool; beside one on the CPU, in a file without a name."""

    def __init__(self, size: int, device: str) -> None:
        if device == "cpu":
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                self._bytes = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        else:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = dtype.itemsize * torch.Size(shape).numel()
        part = self._bytes[self._taken : self._taken + count]
        self._taken += count
        return part.view(dtype).view(shape)
