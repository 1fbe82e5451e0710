"""Layer states of the threads that a captured graph steps: tensors at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apr.hf.cache_rows import Batch, CacheRows, kind, leaves, rebuild
from apr.hf.layer_states import adopt

if TYPE_CHECKING:
    from apr.hf.attachment import Attachment
    from apr.hf.packed import PackedForward

_ALIGNED = 256  # bytes


class NotReplayable(Exception):
    """A forward leaves a cache of another kind than it was given: a graph cannot go on from it."""


class GraphStates:
    """What the forward of a graph goes on from and writes into, and a copy of what it went on from,
    for a step that is taken back.

    Graphs of one number of rows share them. States that lie here and are wanted beyond a step, as
    by forks, are copied elsewhere before they are written over.
    """

    def __init__(self, held: CacheRows, rows: int, state: int) -> None:
        """`state`: one that shows what all are made of."""
        self._held = held
        one = held.gather([state])
        self._memory, self._now = _fixed(one, rows)
        self._memory_before, self._before = _fixed(one, rows)
        self._proved = False

    def fits(self, states: Sequence[int]) -> bool:
        """Whether these states can lie here."""
        batches = self._held.batches_of(states)
        return all(batch is self._now or batch.kind == self._now.kind for batch in batches)

    def clear(self) -> None:
        """Copy elsewhere what lies here and is wanted."""
        self._held.vacate(self._now)
        self._held.vacate(self._before)

    def load(self, starts: Sequence[int]) -> None:
        """Bring here what the rows of a step go on from; until `put` it lies elsewhere too."""
        held, now, before = self._held, self._now, self._before
        if held.lie_in(now, starts):
            held.vacate(now, but=starts)
            held.vacate(before)
            self._memory_before.copy_(self._memory)
            held.place(starts, before)
            return
        given = held.gather(starts)
        held.vacate(now)
        for x, y in zip(leaves(now.cache), leaves(given), strict=True):
            x[: len(starts)] = y

    def put(self, ends: Sequence[int]) -> None:
        """What a replay has left are these states."""
        self._held.place(ends, self._now)

    def forward(
        self, attachment: Attachment, packed: PackedForward, ids: Tensor, positions: Tensor
    ) -> Tensor:
        """A forward of ids and positions [rows, 1] that changes the states in place; logits
        [rows, vocab]. Raises NotReplayable.
        """
        spec = attachment.spec
        assert spec.states is not None
        more: dict[str, Any] = {spec.states.argument: rebuild(self._now.cache, lambda x: x)}
        if spec.takes_positions:
            more["position_ids"] = positions
        with attachment.running(packed), torch.no_grad():
            out = attachment.call(input_ids=ids, use_cache=True, **more)
        packed.check_complete(attachment.model)
        after = adopt(out[spec.states.argument], spec.states.attends)
        # At the first run, which no graph captures: it waits for the device.
        if not self._proved and kind(after) != self._now.kind:
            raise NotReplayable
        self._proved = True
        for x, y in zip(leaves(self._now.cache), leaves(after), strict=True):
            if x is not y:
                x.copy_(y)
        logits: Tensor = out.logits[:, -1]
        return logits


def _fixed(one: Any, rows: int) -> tuple[Tensor, Batch]:
    """Room for `rows` states like that of the cache `one`, in one piece of memory."""
    tensors = leaves(one)
    sizes = [-(-rows * x[0].nbytes // _ALIGNED) * _ALIGNED for x in tensors]
    memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
    parts = iter(zip(torch.split(memory, sizes), tensors, strict=True))

    def leaf(_: Tensor) -> Tensor:
        part, x = next(parts)
        room: Tensor = part[: rows * x[0].nbytes].view(x.dtype)
        return room.view(rows, *x.shape[1:])

    return memory, Batch(rebuild(one, leaf), [None] * rows, fixed=True)
