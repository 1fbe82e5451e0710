"""What happened in a session: counters, a thread tree as text, and a Chrome-trace file."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr.hf.packed import Ran


@dataclass
class Stats:
    """Counters of a session, and what its living threads hold and share."""

    steps: int = 0
    forwards: int = 0
    rows: int = 0  # tokens run through the model
    copied_tokens: int = 0  # short inherited tails, copied so that views stay short
    plan_seconds: float = 0.0
    forward_seconds: float = 0.0
    # Processors and sampling of `decode` and its like; on a GPU also the wait for the forward.
    choice_seconds: float = 0.0
    threads: int = 0
    used_pages: int = 0
    peak_pages: int = 0
    used_bytes: int = 0
    stored_tokens: int = 0  # encoded tokens, each counted once
    seen_tokens: int = 0  # the same, once for every thread that sees them
    shared_pages: int = 0  # pages that more than one thread reads
    replicated_pages: int = 0  # pages that one copy of the cache per thread would take
    # "plan", or "rows": by the model itself on rows of its own cache, which is slower
    attention: str = "plan"
    states: int = 0  # layer states, for models that have some: forks share one until they run
    state_bytes: int = 0
    offloaded_pages: int = 0  # whose keys and values wait outside of the pool

    def count(self, ran: Ran) -> None:
        """Add a step that ran."""
        self.steps += 1
        self.rows += ran.num_rows
        self.forwards += ran.forwards
        self.copied_tokens += ran.copied_tokens
        self.plan_seconds += ran.plan_seconds
        self.forward_seconds += ran.forward_seconds
        self.choice_seconds += ran.choice_seconds

    def with_sharing(self, table: Any, page_bytes: int) -> Stats:
        """The counters, with what the threads of `table` hold now; page_bytes: bytes of a page, all
        layers.
        """
        stored, seen, shared, replicated = table.sharing()
        return replace(
            self,
            threads=table.num_threads,
            used_pages=table.used_pages,
            peak_pages=table.peak_pages,
            used_bytes=table.used_pages * page_bytes,
            stored_tokens=stored,
            seen_tokens=seen,
            shared_pages=shared,
            replicated_pages=replicated,
            offloaded_pages=table.offloaded_pages,
        )


def visible(text: str) -> str:
    """A text for a terminal: control characters, that models may write, as Python spells them."""
    plain = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(plain)


@dataclass
class _Node:
    parent: int | None
    forked_at: int
    born: float
    tokens: int = 0
    label: str = ""
    ended: str = ""
    end: float | None = None


# A session may live for days: the oldest events and threads are forgotten beyond so many, or where
# the events name more threads than these in all.
MOST_EVENTS = 1 << 16
MOST_NAMES = 1 << 20


def _names(event: dict[str, Any]) -> int:
    return 1 + len(event.get("threads", ())) + len(event.get("children", ()))


class Trace:
    """Events of a session, in seconds since it was opened; the last MOST_EVENTS of them, or fewer
    where many threads take part in each.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._nodes: dict[int, _Node] = {}
        self.events: deque[dict[str, Any]] = deque()
        self._names = 0  # of threads, in all events

    def clock(self) -> float:
        """Seconds since the session was opened."""
        return time.perf_counter() - self._began

    def _event(self, name: str, began: float, **details: Any) -> None:
        self.events.append({"name": name, "at": began, "seconds": self.clock() - began, **details})
        self._names += _names(details)
        while len(self.events) > MOST_EVENTS or self._names > MOST_NAMES:
            self._names -= _names(self.events.popleft())

    def _add(self, number: int, node: _Node) -> None:
        self._nodes[number] = node
        if len(self._nodes) > MOST_EVENTS:
            del self._nodes[next(iter(self._nodes))]

    def thread(self, number: int, tokens: int) -> None:
        """Note a new thread."""
        self._add(number, _Node(None, 0, self.clock(), tokens))
        self._event("thread", self.clock(), thread=number, tokens=tokens)

    def fork(self, parent: int, children: Sequence[int], length: int, began: float) -> None:
        """Note a fork at `length` tokens."""
        for child in children:
            self._add(child, _Node(parent, length, self.clock()))
        self._event("fork", began, thread=parent, children=list(children), length=length)

    def join(
        self,
        parent: int,
        children: Sequence[int],
        sizes: Sequence[int],
        positions: str,
        reencode: bool,
        began: float,
    ) -> None:
        """Note a join, and that the children ended with it; sizes: their own tokens."""
        how = "re-encoded" if reencode else f"joined at {positions}"
        for child, size in zip(children, sizes, strict=True):
            self.end(child, how, size)
        self._event("join", began, thread=parent, children=list(children), how=how)

    def step(self, threads: Sequence[int], rows: int, began: float) -> None:
        """Note a step of so many rows."""
        self._event("step", began, threads=list(threads), rows=rows)

    def release(self, number: int) -> None:
        """Note that a thread was released."""
        self.end(number, "released")

    def end(self, number: int, how: str, tokens: int | None = None, label: str = "") -> None:
        """Note how a thread ended; the first reason stays."""
        node = self._nodes.get(number)
        if node is None:
            return
        node.tokens = node.tokens if tokens is None else tokens
        node.label = visible(label) or node.label
        if not node.ended:
            node.ended, node.end = how, self.clock()

    def tree(self, root: int | None = None, width: int = 100) -> str:
        """The threads as a text tree: tokens written, where they were forked, how they ended."""
        children: dict[int | None, list[int]] = {}
        for number, node in self._nodes.items():
            parent = node.parent if node.parent in self._nodes else None
            children.setdefault(parent, []).append(number)
        lines: list[str] = []
        # (thread, what stands before its branch, its branch, what stands below it); the next is
        # last.
        roots = children.get(None, []) if root is None else [root]
        waiting = [(number, "", "", "") for number in reversed(roots)]
        while waiting:
            number, lead, branch, below = waiting.pop()
            node = self._nodes[number]
            parts = [f"thread {number}", f"{node.tokens} tokens"]
            if node.parent is not None:
                parts.append(f"forked at {node.forked_at}")
            if node.ended:
                parts.append(node.ended)
            if node.label:
                parts.append(node.label)
            lines.append((lead + branch + " · ".join(parts))[:width])
            kids, under = children.get(number, []), (lead + below)[:width]
            if kids:
                waiting.append((kids[-1], under, "└─ ", "   "))
            waiting += [(kid, under, "├─ ", "│  ") for kid in reversed(kids[:-1])]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a Chrome-trace file: open it in chrome://tracing or https://ui.perfetto.dev."""
        rows: list[dict[str, Any]] = []
        for event in self.events:
            where = event.get("threads", [event.get("thread", 0)])
            details = {k: v for k, v in event.items() if k not in ("name", "at", "seconds")}
            for thread in where:
                rows.append(
                    {
                        "name": event["name"],
                        "ph": "X",
                        "ts": event["at"] * 1e6,
                        "dur": max(event["seconds"] * 1e6, 1.0),
                        "pid": 0,
                        "tid": thread,
                        "args": details,
                    }
                )
        for number, node in self._nodes.items():
            name = f"thread {number} {node.label}".strip()
            rows.append(
                {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}}
            )
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
