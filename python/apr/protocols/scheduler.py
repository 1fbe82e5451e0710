"""Obeys a grammar: forks when the model says so, joins when its children have ended, within a
budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from apr.errors import BudgetExceeded, Error
from apr.loop.processors import forbid
from apr.loop.stream import Stream, StreamStep
from apr.protocols import joins
from apr.protocols.grammar import Grammar
from apr.protocols.markers import Watcher, Words
from apr.protocols.worker import Block, Request, Worker
from apr.threads.session import Session
from apr.threads.thread import Thread

Processors = Callable[[Worker], Sequence[Any]]


class Scheduler:
    """All requests of one run; every thread that can write takes part in every step."""

    def __init__(
        self,
        session: Session,
        run: Stream,
        grammar: Grammar,
        words: Words,
        processors: Processors,
    ) -> None:
        self.session, self.run, self.grammar, self.words = session, run, grammar, words
        self.processors = processors
        self.requests: list[Request] = []
        self._workers: dict[Thread, Worker] = {}
        self._unsettled: list[Worker] = []  # parents that may have to be joined after this step
        self._clock = 0
        self._open_spellings = words.spellings(grammar.open) if grammar.open else []

    # ---- starting and ending --------------------------------------------------------------------

    def admit(self, root: Thread, request: Request) -> None:
        """Let a root write from the next step on."""
        request.prompt, request.record.begins_as_line = len(root), root.is_line
        worker = Worker(root, request, Watcher(self.words), request.record.start(root.tokens))
        worker.pieces, worker.head = [worker.piece], request.prompt
        request.root = worker
        self.requests.append(request)
        self._workers[root] = worker
        if self.grammar.open is None and self._may_open(worker):
            worker.block = Block(request.prompt, request.prompt)
            self._launch(worker)
        else:
            self._start(worker)

    def _start(self, worker: Worker) -> None:
        worker.state = "writing"
        worker.request.live += 1
        closed = []
        if self.grammar.open is not None and not self._may_open(worker):
            closed += self._open_spellings
        if worker.depth:
            closed += [ids for word in self.grammar.forbidden for ids in self.words.spellings(word)]
        # Where no processor can, a word that opens nothing is read as text.
        keep_closed = [forbid(closed)] if closed and self.run.takes_processors else []
        if worker.processors is None:
            worker.processors = list(self.processors(worker))
        self.run.add(worker.thread, logits_processor=[*keep_closed, *worker.processors])

    def _pause(self, worker: Worker) -> None:
        if worker.state in ("writing", "head"):
            worker.request.live -= 1
            if worker.thread in self.run:
                self.run.remove(worker.thread)

    def _may_open(self, worker: Worker) -> bool:
        deep = worker.depth >= worker.request.budget.depth
        return not deep and (self.grammar.nested or worker.depth == 0)

    def _drop(self, worker: Worker, how: str) -> None:
        """End a worker and all below it; their threads are given back, the root's excepted."""
        for child in worker.children:
            self._drop(child, how)
        self._pause(worker)
        if worker.state == "ready" and worker in worker.request.waiting:
            worker.request.waiting.remove(worker)
        if worker.state != "ended":
            worker.state, worker.finish = "ended", how
            worker.text = self.words.plain(worker.written())
        if worker.parent is not None and worker.thread.alive:
            self.session.trace.end(worker.thread._id, how, worker.sampled)
            worker.thread.release()

    def abandon(self) -> None:
        """Give every thread back that the run has made."""
        for request in self.requests:
            if request.root is not None:
                self._drop(request.root, "abandoned")

    # ---- one step -------------------------------------------------------------------------------

    def steps(self, on_step: Callable[[StreamStep], None] | None) -> None:
        """Run until every request has ended."""
        self._settle_all()
        self._fill()
        while self.run.threads:
            step = next(iter(self.run))
            self._clock += bool(step.tokens)  # an engine may have none yet
            writers = [(self._workers[thread], token) for thread, token in step.tokens.items()]
            for worker, token in writers:
                worker.note(token)
                if worker.reserved:
                    joins.skip(self.session, worker)
            for worker, token in writers:
                self._react(worker, token, step.finished.get(worker.thread, ""))
            self._settle_all()
            for request in self.requests:
                self._check(request)
            self._fill()
            if on_step is not None:
                on_step(step)
        if any(request.root is None or request.root.state != "ended" for request in self.requests):
            raise Error("run: a request came to a halt before its end; please report this")

    def _fill(self) -> None:
        """Who waits for a place takes those that are free: parents that go on first, then
        children.
        """
        for request in self.requests:
            while request.waiting and request.live < request.threads:
                worker = request.waiting.pop(0)
                worker.critical += self._clock - worker.born
                self._start(worker)

    def _check(self, request: Request) -> None:
        root = request.root
        if root is None or root.state == "ended":
            return
        seconds = 0.0
        if request.budget.seconds is not None:
            seconds = self.session.ranks.first_number(time.perf_counter() - request.began)
        limit = request.over(self.session.table, seconds)
        if not limit:
            return
        request.limit, request.seconds = limit, time.perf_counter() - request.began
        request.say(f"the budget of {limit} ended the request")
        self._drop(root, limit)
        if request.budget.at_limit == "raise":
            raise BudgetExceeded(
                f"run: a request reached its budget of {limit} after {request.tokens} tokens; "
                f"raise Budget({limit}=...), or take what there is with at_limit='stop'"
            )

    def _react(self, worker: Worker, token: int, reason: str) -> None:
        grammar, found = self.grammar, worker.watcher.feed(token)
        if worker.end is not None and worker.end in found:
            self._finish(worker, "end")
        elif reason:
            self._finish(worker, reason)
        elif worker.sampled >= self._limit(worker):
            self._finish(worker, "length")
        elif grammar.launch is not None and grammar.launch in found and worker.state == "head":
            self._launch(worker)
        elif grammar.open is not None and grammar.open in found:
            self._open(worker)
            if worker.state == "head" and grammar.launch in found:
                self._launch(worker)  # one token was the whole block
        elif grammar.sync is not None and grammar.sync in found and worker.block is not None:
            self._wait(worker, "")

    def _limit(self, worker: Worker) -> int:
        limit = worker.request.budget.tokens_per_thread
        return limit if limit is not None else 1 << 30

    # ---- blocks ---------------------------------------------------------------------------------

    def _open(self, worker: Worker) -> None:
        request, word = worker.request, self.grammar.open
        assert word is not None
        if worker.state == "head":
            request.say(f"{word} inside the head of a block: it was read as text")
        elif not self._may_open(worker):
            request.say(f"{word} at depth {worker.depth}: the budget keeps it closed")
        else:
            end = len(worker.thread)
            start = end - worker.watcher.length(word)
            if worker.block is None:
                worker.block = Block(start, end)
            worker.block.opened, worker.block.head = start, end
            worker.state = "head"
            if self.grammar.launch is None:
                self._launch(worker)

    def _outlines(self, worker: Worker, block: Block) -> list[str]:
        if self.grammar.launch is None:
            return self.grammar.outlines("", worker.request.say)
        # From the opening word on: the token that ends it may be the beginning of the next.
        written = len(worker.thread) - block.opened
        head = self.words.decode(worker.thread.tokens[-written:])
        head = head.partition(self.grammar.open or "")[2]
        return self.grammar.outlines(head.rpartition(self.grammar.launch)[0], worker.request.say)

    def _launch(self, worker: Worker) -> None:
        """Fork the children of the block; they write in the next step."""
        grammar, request, block = self.grammar, worker.request, worker.block
        assert block is not None
        outlines = self._outlines(worker, block)
        if not outlines:
            request.say("a block without outlines: it was closed at once")
            if block.children:  # others of the parent's still write
                worker.state = "writing"
                return
        parent_writes_on = not grammar.blocking and bool(outlines)
        block_number = worker.blocks
        worker.blocks += 1
        worker.put_in(self.words.encode(grammar.between))
        if not parent_writes_on:
            self._pause(worker)
            worker.state = "waiting"
        numbered = len(block.children)
        for n, outline in enumerate(outlines, numbered + 1):
            child = joins.fork_child(self.session, self.words, grammar, worker, block, n, outline)
            child.path, child.born = (*worker.path, (block_number, n - numbered)), self._clock
            block.children.append(child)
            worker.children.append(child)
            self._workers[child.thread] = child
            request.waiting.append(child)
            request.started += 1
            request.depth = max(request.depth, child.depth)
        if parent_writes_on:
            worker.state = "writing"
            worker.reserved = sum(grammar.reserved(text, request.say) for text in outlines)
        elif not outlines:
            self._resume(worker)

    def _finish(self, worker: Worker, reason: str) -> None:
        """A thread has ended; one whose children still write waits for them first."""
        if worker.block is not None and worker.block.children:
            self._wait(worker, reason)
            return
        if worker.state == "head":
            worker.request.say("a block that was never launched: its thread ended in the head")
        self._pause(worker)
        worker.state, worker.finish = "ended", reason
        if worker.parent is None:
            worker.request.seconds = time.perf_counter() - worker.request.began
        worker.text = joins.close_text(self.words, self.grammar, worker, reason)
        self.session.trace.end(worker.thread._id, reason, worker.sampled, worker.text[:60])
        parent = worker.parent
        if parent is not None and parent.block is not None:
            self._unsettled.append(parent)

    def _wait(self, worker: Worker, reason: str) -> None:
        self._pause(worker)
        worker.state, worker.finish = "waiting", reason
        self._unsettled.append(worker)

    def _settle_all(self) -> None:
        """Joins come after the ends of a whole step, so that their order does not matter."""
        while self._unsettled:
            self._settle(self._unsettled.pop(0))

    def _settle(self, parent: Worker) -> None:
        """Join the block of a waiting parent if its rule says that it is over."""
        block, until = parent.block, self.grammar.until
        if block is None or parent.state != "waiting":
            return
        ended = [child for child in block.children if child.state == "ended"]
        over = len(ended) == len(block.children)
        if until == "success":
            over = over or any(child.succeeded(self.grammar) for child in ended)
        elif until == "first":
            over = over or bool(ended)
        if not over:
            return
        for child in block.children:
            if child.state == "ended":
                continue
            if until == "success":
                self._drop(child, "cancelled")
            else:
                self._cut_short(child)
        self._resume(parent)

    def _cut_short(self, child: Worker) -> None:
        """End a child that is not the first to end; what it has is taken."""
        for below in child.children:
            self._drop(below, "cut")
        if child in child.request.waiting:
            child.request.waiting.remove(child)
        self._pause(child)
        child.state, child.finish = "ended", "cut"
        child.text = joins.close_text(self.words, self.grammar, child, "cut")

    def _resume(self, parent: Worker) -> None:
        """Give the parent what its children made, and let it go on."""
        block = parent.block
        assert block is not None
        taken = [c for c in block.children if c.finish != "cancelled"]
        won = [c for c in taken if c.succeeded(self.grammar)]
        awaited = won if self.grammar.until == "success" and won else taken
        parent.critical = max([parent.critical, *(c.critical for c in awaited)])
        if self.grammar.until == "success":
            taken = awaited[:1]
        joins.take(self.session, self.words, self.grammar, parent, block, taken)
        for child in block.children:
            if child.thread.alive:
                child.thread.release()
        parent.block = None
        parent.joins += 1
        if parent.finish:
            reason, parent.finish = parent.finish, ""
            self._finish(parent, reason)
        else:
            parent.state, parent.born = "ready", self._clock
            parent.request.waiting.insert(0, parent)
