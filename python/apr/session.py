"""A model with a multi-thread KV cache: sessions make threads and segments, and step them together."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from apr import _core
from apr._self_test import self_test as run_self_test
from apr.arena import Arena, make_pools, pages_for
from apr.errors import Error, ForeignThread, InvalidInput
from apr.graph import step_graphs
from apr.hf import Attachment, run_forwards
from apr.model_state import undisturbed
from apr.probe import ModelSpec
from apr.thread import (
    Segment,
    Thread,
    TokenIds,
    ViewLike,
    check_ids,
    check_position,
    view_entries,
)
from apr.trace import Stats, Trace
from apr.vectors import PathVectors

_EntryTuple = tuple[int, int | None, int | None, int, bool]


class Session:
    """Owns the KV pages of one model and every thread on them.

    max_tokens: size of the pool; None sizes it from free memory. step_tokens: most rows of one forward;
    longer prefills are split and are still one transaction. invariant: attention bits of a thread do not
    depend on its neighbours. cuda_graphs: capture the model's decode step and replay it (graph.py): its
    forward must be capturable, and weights must stay where they are while the session is open. seed: with the request index and the fork path it keys every thread's
    generator. Raises UnsupportedModel with the reason where the model cannot be attached; `self_test=False`
    skips the proof (three tiny forwards, once a model).
    """

    def __init__(
        self,
        model: Any,
        max_tokens: int | None = None,
        page_size: int = 64,
        step_tokens: int = 8192,
        invariant: bool = False,
        cuda_graphs: bool | None = None,
        seed: int = 0,
        *,
        self_test: bool = True,
    ) -> None:
        self._table: _core.ThreadTable | None = None
        self._dropped_threads: list[int] = []
        self._dropped_segments: list[int] = []
        if max_tokens is not None and max_tokens < 1:
            raise InvalidInput(f"max_tokens: got {max_tokens}; expected at least 1, or None")
        if page_size < 16 or page_size & (page_size - 1):
            raise InvalidInput(f"page_size: got {page_size}; expected a power of two from 16 on")
        if step_tokens < 1:
            raise InvalidInput(f"step_tokens: got {step_tokens}; expected at least 1")
        self.model, self.seed, self.invariant = model, seed, invariant
        self.page_size, self.step_tokens = page_size, step_tokens
        self.trace = Trace()
        self._max_tokens, self._cuda_graphs, self._self_test = max_tokens, cuda_graphs, self_test
        self._requests = 0
        self._stepping: object = None  # who steps the session
        self._turn = threading.Lock()
        self._stats = Stats()
        self._attach()

    def _attach(self) -> None:
        """Measure the model as it is now, and open an empty pool for it."""
        self.attachment = Attachment(self.model)
        if self._self_test and not self.attachment.tested:
            small = Session(self.model, 32 * self.page_size, self.page_size, self_test=False)
            with undisturbed(self.spec.device), small:
                run_self_test(small)
            self.attachment.tested = True
        pages = pages_for(self.spec, self._max_tokens, self.page_size)
        self.pools = make_pools(self.spec, pages, self.page_size)
        self._graphs = step_graphs(self._cuda_graphs, self.attachment, self.pools, self.invariant)
        self._table = _core.ThreadTable(pages, self.page_size, self.spec.can_rotate)
        self._arena = Arena(self.pools)
        self._arena.keep_ahead(0, 0)
        self._threads: weakref.WeakValueDictionary[int, Thread] = weakref.WeakValueDictionary()
        self._segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        self._replayed: list[int] = []
        self._vectors: dict[int, PathVectors] = {}

    @property
    def spec(self) -> ModelSpec:
        """What was measured of the model."""
        return self.attachment.spec

    def __reduce__(self) -> Any:
        raise InvalidInput(
            "copy: a session owns memory and threads; open another with apr.Session(model)"
        )

    # ---- opening and closing --------------------------------------------------------------------

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the pages; safe to call twice."""
        if self._table is not None:
            self._stats = self.stats
            self._table = None
            self._graphs = None
            self.pools = []
            self._arena.close()

    def refresh(self) -> None:
        """Take the model as it is now, after its weights, dtype or device were changed.

        Every thread is released and every segment let go: their keys and values belong to the model of
        before. Raises InvalidInput where the model is another one, which wants a session of its own.
        """
        table = self._edit()
        attachment = Attachment(
            self.model
        )  # its self-test was passed, or left out, when this was opened
        if attachment.spec.can_rotate != self.spec.can_rotate:
            raise InvalidInput("refresh: the model's positions changed; open a new apr.Session")
        for number in list(self._threads):
            if table.alive(number):
                self._threads[number].release()
        for number, segment in list(self._segments.items()):
            segment._forget()
            table.release_segment(number)
        if attachment.spec != self.spec:
            self.pools = make_pools(attachment.spec, table.num_pages, self.page_size)
            self._arena.close()
            self._arena = Arena(self.pools)
            self._arena.keep_ahead(0, 0)
        self.attachment = attachment
        self._graphs = step_graphs(self._cuda_graphs, attachment, self.pools, self.invariant)
        self._replayed = []

    def _open_table(self) -> _core.ThreadTable:
        if self._table is None:
            raise InvalidInput("the session is closed; open a new apr.Session")
        return self._table

    def _edit(self) -> _core.ThreadTable:
        """The table, for a change: what garbage collection dropped meanwhile is given back first."""
        table = self._open_table()
        if self._stepping is not None:
            raise InvalidInput("a step is running; change threads between steps")
        while self._dropped_threads:
            number = self._dropped_threads.pop()
            if table.alive(number):
                table.release(number)
                self.trace.release(number)
        while self._dropped_segments:
            table.release_segment(self._dropped_segments.pop())
        return table

    # ---- threads and segments -------------------------------------------------------------------

    def _adopt(self, number: int, seed_path: tuple[int, ...]) -> Thread:
        thread = Thread(self, number, seed_path)
        self._threads[number] = thread
        return thread

    def _segment(self, number: int) -> Segment:
        segment = self._segments.get(number)
        if segment is None:
            self._open_table().retain_segment(number)
            segment = self._segments[number] = Segment(self, number)
        return segment

    def _own_segment(self, segment: Segment) -> int:
        if not isinstance(segment, Segment) or segment.session is not self:
            raise InvalidInput(f"segment: got {segment!r}; expected a Segment of this session")
        if segment._id < 0:
            raise InvalidInput("segment: it was let go by refresh(); make it again")
        return segment._id

    def _entries(self, view: ViewLike) -> list[_EntryTuple]:
        return [
            (self._own_segment(segment), offset, hi, lo, False)
            for segment, offset, hi, lo in view_entries(view)
        ]

    def thread(
        self,
        ids: TokenIds = (),
        *,
        view: ViewLike | None = None,
        writes: Segment | None = None,
        visibility: str = "previous",
        request: int | tuple[int, ...] | None = None,
    ) -> Thread:
        """A new thread with `ids` queued; with `view` (and `writes`) one that reads and writes regions.

        visibility: whether live segments show the "current" step's tokens too, or only "previous" ones.
        request: the index that keys its random generator; by default the number of threads made before
        in this way, so give it where runs with other company must sample the same.
        """
        tokens = check_ids(ids, self.spec.vocab_size)
        table = self._edit()
        if visibility not in ("previous", "current"):
            raise InvalidInput(f'visibility: got {visibility!r}; expected "previous" or "current"')
        if view is None and writes is None and visibility == "previous":
            number = table.create(tokens)
        else:
            target = None if writes is None else self._own_segment(writes)
            entries = self._entries(view or ())
            number = table.create_with_view(entries, target, visibility == "current")
            table.extend(number, tokens)
        key = self._requests if request is None else request
        self._requests += 1
        self.trace.thread(number, len(tokens))
        made = self._adopt(number, key if isinstance(key, tuple) else (key,))
        made.is_line = view is None and writes is None
        return made

    def segment(self, ids: TokenIds, base: int = 0, after: ViewLike = ()) -> Segment:
        """A sealed segment of `ids` from position `base` on, encoded under the view `after`."""
        tokens = check_ids(ids, self.spec.vocab_size)
        check_position("base", base)
        number = self._edit().create_segment(tokens, base, self._entries(after))
        segment = self._segments[number] = Segment(self, number)
        return segment

    def region(self, ids: TokenIds = (), base: int = 0, stride: int = 1) -> Segment:
        """An open segment that one thread at a time may write; token i lies at base + stride * i."""
        tokens = check_ids(ids, self.spec.vocab_size)
        check_position("base", base)
        check_position("stride", stride)
        number = self._edit().create_region(tokens, base, stride)
        segment = self._segments[number] = Segment(self, number)
        return segment

    # ---- stepping -------------------------------------------------------------------------------

    def _check_step(self, threads: Sequence[Thread]) -> list[int]:
        for thread in threads:
            if not isinstance(thread, Thread) or thread.session is not self:
                raise ForeignThread(
                    f"step: got {thread!r}, which is not a thread of this session; step it in the "
                    "session that made it"
                )
        numbers = [thread._id for thread in threads]
        if not numbers:
            raise InvalidInput("step: got no threads; expected at least one")
        if len(set(numbers)) != len(numbers):
            raise InvalidInput("step: got a thread twice; list each once")
        return numbers

    def step(self, threads: Sequence[Thread]) -> Tensor:
        """Run the queued tokens of `threads`, and what they need, in one packed forward.

        Returns float32 logits [len(threads), vocab] of each thread's last token. On any exception lengths,
        pages, logits and generators are as they were before.
        """
        if isinstance(threads, Thread):
            raise InvalidInput("step: got one thread; expected a list of threads, e.g. [thread]")
        threads = list(threads)
        numbers = self._check_step(threads)
        try:
            table = self._start_stepping(numbers)
            held = [t._step_logits is not None for t in threads]
            began = self.trace.clock()
            logits = None if any(held) else self._replay_step(table, numbers)
            if logits is not None:
                self._let_rows_go(numbers)
                for place, stepped in enumerate(threads):
                    stepped._step_logits, stepped._row = logits, place
                self.trace.step(numbers, len(numbers), began)
                return logits.clone()  # the caller's own: samplers write into it
            fresh, rows_run = self._run_step(table, numbers, held)
        finally:
            self._stop_stepping(numbers)
        stepping = set(numbers)
        for number, row in fresh.items():
            thread = self._threads.get(number)
            if thread is not None:
                # A thread that waits keeps a row of its own, not the whole step's tensor.
                waits = number not in stepping and len(fresh) > 1
                thread._logits = row.clone() if waits else row
        self._stats.steps += 1
        self.trace.step(numbers, rows_run, began)
        rows = [t._logits for t in threads if t._logits is not None]
        if len(rows) != len(threads):
            raise Error("step: a thread came out without logits; please report this")
        return torch.stack(rows)

    def _let_rows_go(self, numbers: list[int]) -> None:
        """Threads that were in the last replayed step and are not in this one keep a row of their own, not
        the whole step's tensor."""
        if numbers == self._replayed:
            return
        for number in set(self._replayed).difference(numbers):
            thread = self._threads.get(number)
            if thread is not None:
                thread._logits = thread.logits
        self._replayed = numbers

    def _start_stepping(self, who: object) -> _core.ThreadTable:
        """The table, for a step; nothing may change threads until `_stop_stepping` by the same caller."""
        table = self._edit()
        self.attachment.check_unchanged("call session.refresh(), which releases its threads")
        with self._turn:
            if self._stepping is not None:
                raise InvalidInput(
                    "step: another Python thread is stepping this session; take turns, or give each Python "
                    "thread a session of its own on the same model"
                )
            self._stepping = who
        return table

    def _stop_stepping(self, who: object) -> None:
        """Safe to call twice, and by a caller that was refused."""
        if self._stepping is who:
            self._stepping = None

    def _begin(self, threads: Sequence[Thread], step_tokens: int, who: object) -> _core.Step:
        """A step for a caller that runs the forward itself (`apr.Cache`); it must `_end` it, whatever happens."""
        table = self._start_stepping(who)
        return _core.Step(table, [t._id for t in threads], [False] * len(threads), step_tokens)

    def _end(self, step: _core.Step | None, who: object, commit: bool) -> None:
        """Close a step of `_begin`; rolling back is safe to do twice."""
        try:
            if step is None or not commit:
                if step is not None:
                    step.rollback()
                return
            step.commit()
            table = self._open_table()
            self._arena.keep_ahead(table.peak_pages, table.num_threads)
        finally:
            self._stop_stepping(who)

    def _run_step(
        self, table: _core.ThreadTable, numbers: list[int], held: list[bool]
    ) -> tuple[dict[int, Tensor], int]:
        began = time.perf_counter()
        step = _core.Step(table, numbers, held, self.step_tokens)
        try:
            ran = run_forwards(step, self.attachment, self.pools, self.invariant, self._vectors)
            step.commit()
        except BaseException:
            step.rollback()
            raise
        self._arena.keep_ahead(table.peak_pages, table.num_threads)
        stats = self._stats
        stats.rows += ran.rows
        stats.forwards += ran.forwards
        stats.copied_tokens += step.copied_tokens
        stats.plan_seconds += time.perf_counter() - began - ran.forward_seconds
        stats.forward_seconds += ran.forward_seconds
        return ran.logits, ran.rows

    def _replay_step(self, table: _core.ThreadTable, numbers: list[int]) -> Tensor | None:
        """Logits of an ordinary step by a captured graph; None where this is none."""
        if self._graphs is None or len(numbers) > self.step_tokens or self._vectors:
            return None
        began = time.perf_counter()
        logits = self._graphs.step(table, numbers)
        if logits is None:
            return None
        self._stats.steps += 1
        self._stats.rows += len(numbers)
        self._stats.forwards += 1
        self._stats.forward_seconds += time.perf_counter() - began
        return logits

    # ---- figures --------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counters so far, and the pages in use now."""
        if self._table is None:
            return self._stats
        table = self._table if self._stepping is not None else self._edit()
        page_bytes = self.page_size * self.spec.bytes_per_token
        return self._stats.with_sharing(table, page_bytes)
