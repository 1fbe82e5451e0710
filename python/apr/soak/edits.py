"""Edits of threads and segments, each compared with plain lists."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import apr
from apr.soak.faults import Injected, Signalled, fault
from apr.soak.plain import Cell, Cells, Item, Line, World, end_of

MOST_THREADS, PAGES, PAGE_SIZE, STEP_TOKENS = 20, 24, 16, 48
SIZES: dict[str, Any] = {
    "max_tokens": PAGES * PAGE_SIZE,
    "start_tokens": PAGES * PAGE_SIZE // 8,
    "step_tokens": STEP_TOKENS,
}
EXPECTED = (Injected, Signalled, apr.NonFiniteLogits, apr.OutOfPages)


class Failure(AssertionError):
    """A session that does not do what the plain lists and the oracle say."""


@dataclass
class Tally:
    """What was done, and how it compared."""

    operations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    rows: int = 0  # of logits, compared
    worst: float = 0.0  # of them, in standard deviations of the logits


def _draw(number: int) -> Callable[[int], int]:
    """An order of lines that is another for each number, and stays where some are left out."""
    return lambda line: ((line ^ number) * 0x9E3779B97F4A7C15 >> 20) & 0xFFFFFFFF


class Edits:
    """One session, and what it should be."""

    def __init__(self, model: Any, tally: Tally, on_full: str) -> None:
        self.model, self.tally, self.sizes = model, tally, {**SIZES, "on_full": on_full}
        if on_full == "offload":  # half the room, so that it comes to that
            self.sizes["max_tokens"] //= 2
        self.session = apr.Session(model, page_size=PAGE_SIZE, **self.sizes)
        self.cells, self.world = Cells(), World()
        self.threads: dict[int, apr.Thread] = {}
        self.segments: list[tuple[apr.Segment, list[Cell]]] = []

    # ---- what is there --------------------------------------------------------------------------

    def line(self, number: int) -> int | None:
        """One of the lines, or none where there are none."""
        return min(self.threads, key=_draw(number), default=None)

    def some(self, number: int, most: int) -> list[int]:
        """Some of the lines, each once."""
        return sorted(self.threads, key=_draw(number))[: 1 + number % most]

    def tokens(self, number: int, most: int) -> list[int]:
        rng = random.Random(number)
        return [rng.randrange(64) for _ in range(1 + number % most)]

    # ---- what is done, and whether it was -------------------------------------------------------

    def differs(self, world: World) -> str:
        """How the session's lines differ from those of a world; nothing where they do not."""
        for number, line in world.lines.items():
            thread = self.threads[number]
            if not thread.alive:
                return f"line {number} is gone"
            if (got := thread.tokens) != line.tokens:
                return f"line {number} has tokens {got}, expected {line.tokens}"
            if (got := thread.own_tokens) != (own := world.own_tokens(number)):
                return f"line {number} wrote {got}, expected {own}"
            if (at := thread.position) != line.position:
                return f"line {number} is at {at}, expected {line.position}"
        gone = [n for n in self.threads.keys() - world.lines.keys() if self.threads[n].alive]
        return f"lines {gone} are still there" if gone else ""

    def attempt(self, call: Callable[[], Any], after: World, kind: str, where: int) -> Any:
        """Do what makes `after` of the world, or what is interrupted before or behind it; what it
        returned, None where it did not.
        """
        out = None
        with_fault = fault(self.model, kind, where) if kind else nullcontext()
        try:
            with with_fault:
                out = call()
        except EXPECTED as error:
            self.tally.faults[kind or type(error).__name__] += 1
            out = None
            if not (wrong := self.differs(self.world)):
                return None
            if self.differs(after):
                raise Failure(
                    f"{error!r} left neither what was nor what should be: {wrong}"
                ) from error
        else:
            if wrong := self.differs(after):
                raise Failure(wrong)
        self.world = after
        for number in self.threads.keys() - after.lines.keys():
            del self.threads[number]
        return out

    def refused(
        self, call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...]
    ) -> None:
        """What must be refused, with nothing changed."""
        try:
            call()
        except error:
            if wrong := self.differs(self.world):
                raise Failure(f"a refusal changed something: {wrong}") from None
            return
        raise Failure(f"expected {error}")

    def adopt(self, name: int, threads: Sequence[apr.Thread], lines: Sequence[Line]) -> list[int]:
        """Take the threads of an operation in, by numbers of its own: without another operation
        they are the same.
        """
        numbers = [name * MOST_THREADS + i for i in range(len(threads))]
        self.threads.update(zip(numbers, threads, strict=True))
        self.world.lines.update(zip(numbers, lines, strict=True))
        return numbers

    # ---- operations -----------------------------------------------------------------------------

    def do_thread(self, a: int, b: int, c: int, kind: str) -> None:
        if len(self.threads) >= MOST_THREADS:
            return
        ids = self.tokens(a, 60 if b % 4 == 0 else 12) if b % 8 else []
        made = self.attempt(lambda: self.session.thread(ids), self.world, kind, c)
        if made is not None:
            (number,) = self.adopt(a, [made], [Line()])
            self.world.extend(number, ids, self.cells)

    def do_extend(self, a: int, b: int, c: int, kind: str) -> None:
        number = self.line(a)
        if number is None:
            return
        ids, after = self.tokens(b, 9), self.world.copy()
        after.extend(number, ids, self.cells)
        self.attempt(lambda: self.threads[number].extend(ids), after, kind, c)

    def do_fork(self, a: int, b: int, c: int, kind: str) -> None:
        number, count = self.line(a), 1 + b % 4
        if number is None or len(self.threads) + count > MOST_THREADS:
            return
        kids = self.attempt(lambda: self.threads[number].fork(count), self.world, kind, c)
        if kids is not None:
            children = self.adopt(a, kids, [Line() for _ in kids])
            self.world.fork(number, children)

    def do_join(self, a: int, b: int, c: int, kind: str) -> None:
        number = self.line(a)
        if number is None:
            return
        parents = [n for n, line in self.world.lines.items() if line.children]
        number = min(parents, key=_draw(a)) if parents and a % 8 else number
        kids = [k for k in self.world.lines[number].children if self.world.lines[k].joinable]
        kids.sort(key=_draw(b))
        kids = self.some(b, 3) if b % 8 == 0 else kids[: 1 + b % 3]
        how = ("max", "sum", "keep", "text")[c % 4]
        if how == "keep" and any(self.world.lines[k].moved for k in kids):
            how = "max"
        threads = [self.threads[k] for k in kids]

        def call() -> None:
            positions = "max" if how == "text" else how
            self.threads[number].join(threads, positions, reencode=how == "text")

        if not self.world.can_join(number, kids):
            return self.refused(call, apr.ForeignThread)
        after = self.world.copy()
        after.join(number, kids, how, self.cells)
        self.attempt(call, after, kind, c)

    def do_trim(self, a: int, b: int, c: int, kind: str) -> None:
        number = self.line(a)
        if number is None:
            return
        thread, held = self.threads[number], len(self.world.lines[number].items)
        if b % 16 == 0:
            return self.refused(lambda: thread.trim(held + 1), apr.InvalidInput)
        length = max(0, held - b % 6) if b % 3 else b % (held + 1)
        after = self.world.copy()
        after.trim(number, length)
        self.attempt(lambda: thread.trim(length), after, kind, c)

    def do_drop(self, a: int, b: int, c: int, kind: str) -> None:
        number = self.line(a)
        if number is None or any(e.offset is None for e in self.threads[number].view):
            return
        thread, held = self.threads[number], len(self.world.lines[number].items)
        if b % 16 == 0:
            return self.refused(lambda: thread.drop(1, held + 1), apr.InvalidInput)
        start = b % (held + 1)
        stop = start + c % (held - start + 1)
        after = self.world.copy()
        after.drop(number, start, stop, thread.queued, self.cells)
        self.attempt(lambda: thread.drop(start, stop), after, kind, c)

    def do_release(self, a: int, b: int, c: int, kind: str) -> None:
        number = self.line(a)
        if number is None:
            return
        after = self.world.copy()
        after.release(number)
        self.attempt(self.threads[number].release, after, kind, c)

    def do_let_go(self, a: int, b: int, c: int, kind: str) -> None:
        """What Python lets go is released; several lines, or a segment."""
        for number in self.some(a, 4) if self.threads else ():
            self.world.release(number)
            del self.threads[number]
        if self.segments and b % 2:
            self.segments.pop(b % len(self.segments))

    def do_segment(self, a: int, b: int, c: int, kind: str) -> None:
        ids, base = self.tokens(a, 20), b % 40
        view, items = self.view_of(c, 2)
        made = self.attempt(lambda: self.session.segment(ids, base, view), self.world, kind, c)
        if made is not None:
            first = end_of(items) if view else base
            own: list[Cell] = []
            for i, token in enumerate(ids):
                cell = self.cells.new(token, first + i, items)
                items = [*items, (cell, first + i)]
                own.append(cell)
            self.segments.append((made, own))
            del self.segments[:-6]

    def view_of(self, number: int, most: int) -> tuple[list[Any], list[Item]]:
        """A view of some of the segments, and what it shows."""
        rng = random.Random(number)
        chosen = rng.sample(self.segments, min(len(self.segments), rng.randrange(most + 1)))
        view: list[Any] = []
        items: list[Item] = []
        for segment, own in chosen:
            offset = rng.choice([None, rng.randrange(60)])
            hi = rng.choice([None, 1 + rng.randrange(len(own))])
            view.append((segment, offset, hi))
            first = end_of(items) if offset is None else offset
            items += [(cell, first + i) for i, cell in enumerate(own[:hi])]
        return view, items

    def do_reader(self, a: int, b: int, c: int, kind: str) -> None:
        view, items = self.view_of(a, 3)
        if not view or len(self.threads) >= MOST_THREADS:
            return
        ids = self.tokens(b, 6)
        made = self.attempt(lambda: self.session.thread(ids, view=view), self.world, kind, c)
        if made is not None:
            (number,) = self.adopt(a, [made], [Line(items=items)])
            self.world.extend(number, ids, self.cells)
