"""Who holds which logits: rows of the last step's tensor, or a row of a thread's own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apr.ops.device import uploaded

if TYPE_CHECKING:
    from apr import _core

Row = tuple[Tensor, int]  # a tensor [rows, vocab], and which row of it


class HeldLogits:
    """Logits [vocab] of the last tokens of threads, as the model gave them, by their numbers;
    children inherit them.

    Threads that take part in every step hold a row of its tensor. One that leaves, or waits, keeps
    a copy of its row, not the whole tensor. Which are still those of a thread's last token is the
    core's to say, by the number of its edits: an interrupt may come between an edit and here.
    """

    def __init__(self) -> None:
        # A tensor, which row of it, and how many edits the thread had had then.
        self._rows: dict[int, tuple[Tensor, int, int]] = {}
        self._shared: set[int] = set()  # those whose row is one of the last step's tensor

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def of(self, number: int, core: _core.ThreadTable) -> Tensor | None:
        """[vocab], a view; None where none are held."""
        held = self._rows.get(number)
        if held is None or core.edits([number]) != [held[2]]:
            return None
        return held[0][held[1]]

    def drop(self, numbers: Iterable[int]) -> None:
        """They are no longer those of the threads' last tokens."""
        for number in numbers:
            self._shared.discard(number)
            self._rows.pop(number, None)

    def drop_stale(self, core: _core.ThreadTable) -> None:
        """Hold only those of the last tokens of living threads."""
        if self._rows:
            edits = core.edits(list(self._rows))
            held = zip(self._rows.items(), edits, strict=True)
            self.drop([number for (number, (_, _, then)), now in held if then != now])

    def clear(self) -> None:
        """Hold none any more."""
        self._shared.clear()
        self._rows.clear()

    def inherit(self, parent: int, children: Iterable[int]) -> None:
        """Children of a fork have what their parent has."""
        held = self._rows.get(parent)
        if held is not None:
            self._rows.update(dict.fromkeys(children, held))
            if parent in self._shared:
                self._shared.update(children)

    def take(
        self, fresh: Mapping[int, Row], stepped: Collection[int], core: _core.ThreadTable
    ) -> None:
        """Take a step's rows; threads that got one without being stepped were waiting for it."""
        self._keep_copies(self._shared.difference(fresh))
        edits = core.edits(list(fresh))
        for (number, (tensor, row)), now in zip(fresh.items(), edits, strict=True):
            self._rows[number] = (tensor, row, now)
        self._shared = set(fresh)
        waiting = self._shared.difference(stepped)
        self._keep_copies(waiting)
        self._shared -= waiting

    def _keep_copies(self, numbers: Iterable[int]) -> None:
        copies: dict[tuple[int, int], Tensor] = {}
        for number in numbers:
            if number not in self._rows:  # dropped meanwhile, by garbage collection
                continue
            tensor, row, edits = self._rows[number]
            key = (id(tensor), row)
            if key not in copies:
                copies[key] = tensor[row : row + 1].clone()
            self._rows[number] = (copies[key], 0, edits)

    def stack(self, numbers: Sequence[int], fresh: Mapping[int, Row]) -> Tensor:
        """[len(numbers), vocab] of fresh rows, else of held ones, to be read only; KeyError where
        there is none.
        """
        rows = [fresh.get(number) or self._rows[number][:2] for number in numbers]
        first = rows[0][0]
        if all(tensor is first for tensor, _ in rows):
            places = [row for _, row in rows]
            whole = places == list(range(len(first)))
            return first if whole else first[uploaded(places, first.device)]
        return torch.stack([tensor[row] for tensor, row in rows])
