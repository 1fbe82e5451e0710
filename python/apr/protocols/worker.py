"""One thread under a grammar: what it has written, the block that it has open, whom it waits
for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from apr.protocols.budget import Budget
from apr.protocols.grammar import Grammar
from apr.protocols.markers import Watcher
from apr.protocols.record import Record, Seen
from apr.threads.table import ThreadTable
from apr.threads.thread import Thread

State = Literal["ready", "writing", "head", "waiting", "ended"]


@dataclass
class Block:
    """Where a block was opened, and its children."""

    opened: int  # tokens of the parent before the opening word
    head: int  # and up to and with it
    children: list[Worker] = field(default_factory=list)


@dataclass(eq=False)
class Worker:
    """A thread, its place in the tree, and its figures; `text` is complete when it has ended."""

    thread: Thread
    request: Request
    watcher: Watcher
    piece: int
    parent: Worker | None = None
    n: int = 0  # number among its siblings, from 1 on
    depth: int = 0
    outline: str = ""
    end: str | None = None
    path: tuple[tuple[int, int], ...] = ()  # (block, child) from the root on: its name in a replay
    state: State = "ready"
    block: Block | None = None
    blocks: int = 0  # that it opened so far
    joins: int = 0  # that came back to it so far
    processors: list[Any] | None = None  # the caller's, made when it first writes
    born: int = 0  # step since which it could write
    critical: int = 0  # sampled tokens that had to come one after the other, up to its last
    sampled: int = 0
    finish: str = ""
    text: str = ""
    children: list[Worker] = field(default_factory=list)  # of all its blocks
    parts: list[Seen] = field(default_factory=list)  # what a join takes besides its last piece
    pieces: list[int] = field(default_factory=list)  # all that it wrote, in order
    reserved: int = 0  # positions that its next token leaves free
    given: int = 0  # lines of its view that it was born with
    # tokens of its first piece that are not its own text: the prompt, or a child's first words
    head: int = 0
    inherited: frozenset[int] = frozenset()  # segments, by number: a handle would keep their pages

    @property
    def record(self) -> Record:
        return self.request.record

    def move_to(self, piece: int) -> None:
        self.piece = piece
        self.pieces.append(piece)

    def seen(self) -> list[Seen]:
        """All that it sees, its own last piece included."""
        last = self.record.pieces[self.piece]
        return [*last.sees, Seen(self.piece, len(last.ids))]

    def own_parts(self) -> list[Seen]:
        """What a join of keys and values takes from it."""
        return [*self.parts, Seen(self.piece, len(self.record.pieces[self.piece].ids))]

    def put_in(self, ids: list[int]) -> None:
        """Tokens that the runtime writes for it."""
        if ids:
            self.thread.extend(ids)
            self.record.write(self.piece, ids, sampled=False)
            self.watcher.forget()

    def note(self, token: int) -> None:
        """A token that it sampled, which the stream has queued on its thread already."""
        self.record.write(self.piece, [token], sampled=True)
        self.sampled += 1
        self.critical += 1
        self.request.tokens += 1

    def written(self) -> list[int]:
        """Its own tokens as they stand, joined parts included."""
        tokens: list[int] = []
        for part in self.seen()[self.given :]:
            ids = self.record.pieces[part.piece].ids[: part.hi]
            tokens += ids[self.head :] if part.piece == self.pieces[0] else ids
        return tokens

    def succeeded(self, grammar: Grammar) -> bool:
        """Whether its text, when it has ended, is a success."""
        return grammar.succeeded(self.text, self.request.say)

    def family(self) -> list[Worker]:
        """Itself and all below."""
        return [self, *(w for child in self.children for w in child.family())]


@dataclass(eq=False)
class Request:
    """One prompt of a run: its root, its record, and what it has used of its budget."""

    budget: Budget
    threads: int  # most at once
    record: Record
    prompt: int = 0  # tokens that the root had when the run began
    root: Worker | None = None
    tokens: int = 0
    live: int = 0
    waiting: list[Worker] = field(default_factory=list)  # who could write, but has no place yet
    depth: int = 0  # deepest child
    started: int = 0  # children
    events: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0  # from its beginning to its end; other requests of the run share them
    limit: str = ""

    def _bytes(self, table: ThreadTable) -> int:
        """Keys, values and layer states that its living threads see."""
        family = self.root.family() if self.root else []
        living = [worker for worker in family if worker.thread.alive]
        held: dict[int, int] = {}  # of each piece that one of them sees, how much
        for part in (part for worker in living for part in worker.seen()):
            held[part.piece] = max(held.get(part.piece, 0), part.hi)
        states = table.state_bytes(worker.thread for worker in living)
        return sum(held.values()) * table.spec.bytes_per_token + states

    def over(self, table: ThreadTable, seconds: float) -> str:
        """The limit that is reached after so many seconds, or nothing."""
        budget = self.budget
        if budget.tokens is not None and self.tokens >= budget.tokens:
            return "tokens"
        if budget.seconds is not None and seconds > budget.seconds:
            return "seconds"
        if budget.bytes is not None and self._bytes(table) > budget.bytes:
            return "bytes"
        return ""

    def say(self, event: str) -> None:
        """Something out of the ordinary that the outcome reports; a run-away says it once."""
        if event not in self.events:
            self.events.append(event)
