"""The token ids that processors and stopping criteria read, kept as tensors that grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apr.ops.device import lasting, uploaded
from apr.threads.thread import Thread


@dataclass
class _Line:
    """One thread's row."""

    row: int
    length: int
    own: int  # the thread's own tokens that are in it, or were before it began
    trims: int


class History:
    """Rows of token ids: what a thread saw when it entered a run, and its own tokens since.

    What others write into a region that it sees stays out: it would come between. After a trim the
    row begins anew with what the thread sees then.
    """

    def __init__(self, device: torch.device) -> None:
        with lasting():
            self._ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._lines: dict[Thread, _Line] = {}
        self._free: list[int] = []

    def enter(self, thread: Thread) -> None:
        """Keep a row for a thread, from what it sees now."""
        row = self._free[-1] if self._free else len(self._lines)
        line = self._write(thread, row)
        if self._free:
            self._free.pop()
        self._lines[thread] = line

    def _write(self, thread: Thread, row: int) -> _Line:
        tokens, own = thread.tokens, thread.table.ask().own_length(thread._id)
        self._make_room(row + 1, len(tokens) + 1)
        self._ids[row, : len(tokens)] = uploaded(tokens, self._ids.device)
        return _Line(row, len(tokens), own, thread.trims)

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
        news: list[tuple[_Line, list[int]]] = []
        for thread, line in self._lines.items():
            if line.trims != thread.trims:
                line = self._lines[thread] = self._write(thread, line.row)
            new = thread.table.ask().own_tokens(thread._id, line.own)
            if new:
                news.append((line, new))
        if not news:
            return
        self._make_room(0, max(line.length + len(new) for line, new in news) + 1)
        rows = [line.row for line, new in news for _ in new]
        places = [line.length + i for line, new in news for i in range(len(new))]
        tokens = [token for _, new in news for token in new]
        at_rows, at_places, given = uploaded([rows, places, tokens], self._ids.device)
        self._ids[at_rows, at_places] = given
        for line, new in news:
            line.length, line.own = line.length + len(new), line.own + len(new)

    def length(self, thread: Thread) -> int:
        """Tokens of its row."""
        return self._lines[thread].length

    def ids(self, threads: Sequence[Thread]) -> Tensor:
        """[threads, length] of threads of one length: of neighbours in the table no copy."""
        lines = [self._lines[thread] for thread in threads]
        rows, length = [line.row for line in lines], lines[0].length
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self._ids[rows[0] : rows[0] + len(rows), :length]
        return self._ids[uploaded(rows, self._ids.device), :length]

    def ids_with(self, thread: Thread, token: int) -> Tensor:
        """[1, length + 1], a copy: with a token that it is about to write."""
        line = self._lines[thread]
        self._ids[line.row, line.length] = token
        return self._ids[line.row : line.row + 1, : line.length + 1].clone()

    def _make_room(self, rows: int, length: int) -> None:
        have_rows, have_length = self._ids.shape
        if rows <= have_rows and length <= have_length:
            return
        size = (max(have_rows, 2 * rows), have_length if length <= have_length else 2 * length)
        with lasting():
            grown = self._ids.new_zeros(size)
        grown[:have_rows, :have_length] = self._ids
        self._ids = grown
