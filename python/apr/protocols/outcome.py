"""What a run returns for a prompt: the text, the tree of threads, and its figures."""

from __future__ import annotations

from dataclasses import dataclass, field

from apr.protocols.grammar import Grammar
from apr.protocols.markers import Words
from apr.protocols.record import Record
from apr.protocols.worker import Request, Worker
from apr.threads.thread import Thread
from apr.threads.trace import Stats, Trace


@dataclass
class Branch:
    """One thread of an outcome: the root's is the whole answer."""

    n: int
    depth: int
    outline: str
    text: str
    tokens: list[int]
    finish: str  # "end", "eos", "length", "cancelled", "cut", or the limit that was reached
    sampled: int
    path: tuple[tuple[int, int], ...]
    pieces: list[int]  # of the record, that it wrote
    children: list[Branch] = field(default_factory=list)


@dataclass
class Outcome:
    """The result of one request.

    total_tokens counts what was sampled, in cancelled threads too; critical_path_tokens what had to
    be sampled one after the other; injected_tokens what the runtime put in.
    """

    text: str
    root: Branch
    thread: Thread  # the caller's; it stays alive
    finish: str
    grammar: Grammar
    total_tokens: int
    injected_tokens: int
    critical_path_tokens: int
    seconds: float
    threads: int  # children that were started
    depth: int  # of the deepest
    events: list[str]
    prompt_tokens: int
    record: Record
    stats: Stats
    trace: Trace

    @property
    def parallel_ratio(self) -> float:
        """Sampled tokens for each one of the critical path; 1 is sequential."""
        return self.total_tokens / max(1, self.critical_path_tokens)

    @property
    def acceleration(self) -> float:
        """1 - critical / total, as ThreadWeaver and NPR reward it."""
        return 1 - self.critical_path_tokens / max(1, self.total_tokens)

    def beside(self, sequential: Outcome) -> dict[str, float]:
        """This run's cost as parts of a sequential run's: below 1 is less."""
        return {
            "critical_path": self.critical_path_tokens / max(1, sequential.critical_path_tokens),
            "total": self.total_tokens / max(1, sequential.total_tokens),
            "seconds": self.seconds / max(1e-9, sequential.seconds),
        }


def _branch(worker: Worker) -> Branch:
    return Branch(
        n=worker.n,
        depth=worker.depth,
        outline=worker.outline,
        text=worker.text,
        tokens=worker.written(),
        finish=worker.finish,
        sampled=worker.sampled,
        path=worker.path,
        pieces=worker.pieces,
        children=[_branch(child) for child in worker.children],
    )


def outcome(
    grammar: Grammar, words: Words, request: Request, stats: Stats, trace: Trace
) -> Outcome:
    """The figures of a request that has ended."""
    root = request.root
    assert root is not None
    given = sum(len(piece.ids) for piece in request.record.pieces)
    cut_off = bool(request.limit)
    return Outcome(
        text=words.plain(root.written()),
        root=_branch(root),
        thread=root.thread,
        finish=root.finish,
        grammar=grammar,
        total_tokens=request.tokens,
        injected_tokens=given - request.prompt - request.record.total_tokens,
        critical_path_tokens=max(w.critical for w in (root.family() if cut_off else [root])),
        seconds=request.seconds,
        threads=request.started,
        depth=request.depth,
        events=request.events,
        prompt_tokens=request.prompt,
        record=request.record,
        stats=stats,
        trace=trace,
    )
