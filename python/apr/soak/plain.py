"""Threads as plain lists of (token, position), by the rules of docs/semantics.md."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Cell:
    """A token as it was written: what it saw, and where; both are settled for the threads here that
    read no live segment.
    """

    number: int
    token: int
    at: int
    writer: int | None  # the line that wrote it
    sees: list[Item] = field(default_factory=list)
    run: bool = False  # whether a step has run it, which matters to live readers alone


Item = tuple[Cell, int]  # a token and the position at which a reader sees it


class Cells:
    """Makes cells, numbered."""

    def __init__(self) -> None:
        self.all: list[Cell] = []

    def new(self, token: int, at: int, before: Sequence[Item], writer: int | None = None) -> Cell:
        """A cell that sees those before it, and itself."""
        cell = Cell(len(self.all), token, at, writer)
        cell.sees = [*before, (cell, at)]
        self.all.append(cell)
        return cell


def end_of(items: Iterable[Item]) -> int:
    """The position after all of them."""
    return max((at + 1 for _, at in items), default=0)


@dataclass(eq=False)
class Line:
    """A thread that reads no live segment."""

    items: list[Item] = field(default_factory=list)
    ready: bool = False  # whether it has, or can have, the logits of its last item
    parent: int | None = None
    joinable: bool = False
    inherited: int = 0  # items that came with the fork
    fork_at: int = 0  # where its own part begins, as it sees it itself
    shift: int = 0  # what joins of its ancestors added to that for its parent of now
    fork_last: Cell | None = None  # the last item that came with the fork
    moved: bool = False  # whether it may write elsewhere than it sees: tails go on behind a drop
    children: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return end_of(self.items)

    @property
    def tokens(self) -> list[int]:
        return [cell.token for cell, _ in self.items]


class World:
    """All lines by their number."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}

    def copy(self) -> World:
        """Another that can be changed; cells are shared, as they never change."""
        other = World()
        for number, line in self.lines.items():
            twin = other.lines[number] = copy.copy(line)
            twin.items, twin.children = list(line.items), list(line.children)
        return other

    def own_tokens(self, number: int) -> list[int]:
        """What a line wrote itself, and has not lost."""
        return [cell.token for cell, _ in self.lines[number].items if cell.writer == number]

    def extend(self, number: int, tokens: Sequence[int], cells: Cells) -> None:
        line = self.lines[number]
        for token in tokens:
            cell = cells.new(token, line.position, line.items, number)
            line.items.append((cell, cell.at))
            line.ready = True

    def fork(self, number: int, children: Sequence[int]) -> None:
        parent = self.lines[number]
        for child in children:
            self.lines[child] = Line(
                items=list(parent.items),
                ready=parent.ready,
                parent=number,
                joinable=True,
                inherited=len(parent.items),
                fork_at=parent.position,
                fork_last=parent.items[-1][0] if parent.items else None,
                moved=parent.moved,
            )
            parent.children.append(child)

    def release(self, number: int) -> None:
        line = self.lines.pop(number)
        for child in line.children:
            self.lines[child].joinable, self.lines[child].parent = False, None
        if line.parent is not None:
            self.lines[line.parent].children.remove(number)

    def trim(self, number: int, length: int) -> None:
        line = self.lines[number]
        if length == len(line.items):
            return
        del line.items[length:]
        line.ready = bool(line.items)
        if length < line.inherited:
            line.inherited = length
            line.fork_at = min(line.fork_at, line.position)
            line.fork_last = line.items[-1][0] if line.items else None
        seen = {cell.number for cell, _ in line.items}
        for child in (self.lines[c] for c in line.children):
            if child.fork_last is not None and child.fork_last.number not in seen:
                child.joinable = False

    def drop(self, number: int, start: int, stop: int, queued: int, cells: Cells) -> None:
        """Items [start, stop) go, of a line that has `queued` tokens at its end yet to run."""
        line = self.lines[number]
        if start == stop:
            return
        if stop == len(line.items):
            return self.trim(number, start)
        kept, gone, behind = line.items[:start], line.items[start:stop], line.items[stop:]
        kept_end, gap_end = end_of(kept), end_of(gone)
        closed = max(0, min(gap_end, *(at for _, at in behind)) - kept_end)

        def moved(at: int) -> int:
            return at - closed if at >= gap_end else min(at, kept_end)

        first = len(line.items) - queued
        while first < len(line.items) and self._shows_elsewhere(number, line.items[first:]):
            first += 1  # what another shows runs as it would have
        line.items = kept + [(cell, at - closed) for cell, at in behind]
        line.moved = True
        first -= sum(start <= i < stop for i in range(first))
        for i in range(first, len(line.items)):
            cell, at = line.items[i]
            line.items[i] = (cells.new(cell.token, at, line.items[:i], number), at)
        line.inherited -= max(0, min(stop, line.inherited) - start)
        line.fork_at, before = moved(line.fork_at), line.fork_at
        line.shift += before - line.fork_at
        seen = {cell.number for cell, _ in line.items}
        for child in (self.lines[c] for c in line.children):
            at = child.fork_at + child.shift
            child.shift += moved(at) - at
            if child.fork_last is not None and child.fork_last.number not in seen:
                child.joinable = False

    def _shows_elsewhere(self, number: int, items: Sequence[Item]) -> bool:
        """Whether another line shows one of the items, or what has seen one."""
        others = [cell for n, line in self.lines.items() if n != number for cell, _ in line.items]
        shown = {seen.number for cell in others for seen, _ in cell.sees}
        return any(cell.number in shown for cell, _ in items)

    def can_join(self, number: int, children: Sequence[int]) -> bool:
        lines = [self.lines[child] for child in children]
        return len(set(children)) == len(children) and all(
            line.parent == number and line.joinable for line in lines
        )

    def join(self, number: int, children: Sequence[int], how: str, cells: Cells) -> None:
        parent = self.lines[number]
        for child in children:
            line = self.lines[child]
            own = line.items[line.inherited :]
            if how == "text":
                shift = parent.position - line.fork_at
                self.extend(number, [cell.token for cell, _ in own], cells)
            else:
                shift = parent.position - line.fork_at if how == "sum" else line.shift
                places = [c.at if how == "keep" else at + shift for c, at in own]
                parent.items += [(c, at) for (c, _), at in zip(own, places, strict=True)]
            for grandchild in line.children:
                grand = self.lines[grandchild]
                grand.parent, grand.shift = number, grand.shift + shift
                if how == "text" and own:
                    grand.fork_last = parent.items[-1][0]
                parent.children.append(grandchild)
            line.children = []
            self.release(child)
        if children and how != "text":
            parent.ready = False


@dataclass(eq=False)
class Writer:
    """One of a crew: it writes a region of its own and reads the others' live."""

    own: int  # which of the crew's regions
    current: bool
    places: list[int | None]  # offset of each region in its view


class Crew:
    """Threads over regions that all of them read."""

    def __init__(self, writers: list[Writer]) -> None:
        self.writers = writers
        self.regions: list[list[Cell]] = [[] for _ in writers]

    def sees(self, writer: Writer, steps: set[int], upto: int) -> tuple[list[Item], int]:
        """What a writer's row sees that writes token `upto` of its own, in a step in which cells
        `steps` run; and the row's own position.
        """
        items: list[Item] = []
        after = mine = 0
        for i, region in enumerate(self.regions):
            shown = [
                c
                for c in region
                if c.run or (c.number in steps and (writer.current or i == writer.own))
            ]
            place = writer.places[i]
            offset = after if place is None else place
            # Rows of one step see their own up to themselves, but stand by where all of it ends.
            after = max(after, offset + len(shown))
            if i == writer.own:
                shown, mine = shown[: upto + 1], offset + upto
            items += [(cell, offset + j) for j, cell in enumerate(shown)]
        return items, mine
