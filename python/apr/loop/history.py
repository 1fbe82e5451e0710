"""The token ids that processors and stopping criteria read, kept as tensors that grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apr.threads.thread import Thread


@dataclass
class _Line:
    """One thread's row: what it saw when it entered, then its own tokens since."""

    row: int
    seen: int  # tokens that it saw, the own ones included
    own_before: int  # own tokens of these
    length: int
    own: int  # own tokens that are in the row
    rewrites: int


class History:
    """Rows of token ids: what a thread saw when it entered a run, and its own tokens since.

    What others write into a region that it sees stays out: it would come between.
    """

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._lines: dict[Thread, _Line] = {}
        self._free: list[int] = []

    def enter(self, thread: Thread) -> None:
        """Keep a row for a thread, from what it sees now."""
        tokens, own = thread.tokens, thread.table.ask().own_length(thread._id)
        row = self._free.pop() if self._free else len(self._lines)
        self._make_room(row + 1, len(tokens) + 1)
        line = _Line(row, len(tokens), own, len(tokens), own, thread.rewrites)
        self._lines[thread] = line
        self._ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)

    def leave(self, thread: Thread) -> None:
        """Give its row back, if it has one."""
        line = self._lines.pop(thread, None)
        if line is not None:
            self._free.append(line.row)

    def clear(self) -> None:
        """Forget all of them."""
        for thread in list(self._lines):
            self.leave(thread)

    def catch_up(self) -> None:
        """Take in what the threads wrote since."""
        rows: list[int] = []
        places: list[int] = []
        tokens: list[int] = []
        for thread, line in self._lines.items():
            if line.rewrites != thread.rewrites:
                line.rewrites, line.own, line.length = thread.rewrites, line.own_before, line.seen
            new = thread.table.ask().own_tokens(thread._id, line.own)
            rows += [line.row] * len(new)
            places += range(line.length, line.length + len(new))
            tokens += new
            line.own += len(new)
            line.length += len(new)
        if tokens:
            self._make_room(0, max(places) + 2)
            self._ids[rows, places] = torch.tensor(tokens, device=self._ids.device)

    def length(self, thread: Thread) -> int:
        """Tokens of its row."""
        return self._lines[thread].length

    def ids(self, threads: Sequence[Thread]) -> Tensor:
        """[threads, length] of threads of one length: of neighbours in the table no copy."""
        lines = [self._lines[thread] for thread in threads]
        rows, length = [line.row for line in lines], lines[0].length
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self._ids[rows[0] : rows[0] + len(rows), :length]
        return self._ids[rows, :length]

    def ids_with(self, thread: Thread, token: int) -> Tensor:
        """[1, length + 1]: with a token that it is about to write."""
        line = self._lines[thread]
        self._ids[line.row, line.length] = token
        return self._ids[line.row : line.row + 1, : line.length + 1]

    def _make_room(self, rows: int, length: int) -> None:
        have_rows, have_length = self._ids.shape
        if rows <= have_rows and length <= have_length:
            return
        size = (max(have_rows, 2 * rows), have_length if length <= have_length else 2 * length)
        grown = self._ids.new_zeros(size)
        grown[:have_rows, :have_length] = self._ids
        self._ids = grown
