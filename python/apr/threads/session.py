"""A model with a multi-thread KV cache: sessions make threads and segments, and step them
together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from apr import _core
from apr.errors import Error, ForeignThread, InvalidInput
from apr.hf.attachment import attach
from apr.hf.graph import step_graphs
from apr.hf.packed import Ran, check_numbers, run_step
from apr.hf.ranks import Ranks
from apr.ops import Pool
from apr.ops.pages import PAGE_SIZE, check_page_size, pages_for
from apr.threads.memory import Memory
from apr.threads.offload import check_on_full
from apr.threads.saving import Named, open_saved, save
from apr.threads.table import ThreadTable
from apr.threads.thread import Segment, Thread, TokenIds, ViewLike, check_integer
from apr.threads.trace import Stats, Trace

Chosen = TypeVar("Chosen")


class Session:
    """Owns the KV pages of one model and every thread on them.

    max_tokens: size of the pool; None sizes it from free memory. start_tokens: what it begins with;
    it doubles when a step needs more (a CPU's takes memory with its use anyway). step_tokens: most
    rows of one forward; longer prefills are split and are still one transaction. invariant:
    attention bits of a thread do not depend on its neighbours. cuda_graphs: capture the model's
    decode step and replay it (hf/graph.py): its forward must be capturable, and weights must stay
    where they are while the session is open. seed: with the request index and the fork path it keys
    every thread's random numbers. checkpoint_tokens: for models with layer states (docs/models.md),
    whose trims run tokens again from the nearest state that is kept: keep one every so many tokens
    too, each of `stats.state_bytes / stats.states`; 0 keeps those at forks and ends. rank_timeout:
    seconds that a rank of a model in parts waits for the others at a step (docs/scale.md). on_full:
    where a step needs more pages than are free, "raise" OutOfPages, or "offload" what it does not
    read until it is read (docs/reliability.md). kv_dtype: torch.int8 or torch.float8_e4m3fn keeps
    keys and values in 8 bits (docs/performance.md). self_test=False skips the proof (a dozen tiny
    forwards, once a model). Raises UnsupportedModel with the reason where it cannot be attached.
    """

    def __init__(
        self,
        model: Any,
        max_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        step_tokens: int = 8192,
        invariant: bool = False,
        cuda_graphs: bool | None = None,
        seed: int = 0,
        *,
        checkpoint_tokens: int = 0,
        self_test: bool = True,
        rank_timeout: float = 60.0,
        on_full: str = "raise",
        kv_dtype: torch.dtype | None = None,
        start_tokens: int | None = None,
    ) -> None:
        for name, count in (("max_tokens", max_tokens), ("start_tokens", start_tokens)):
            if count is not None:
                check_integer(name, count, 1)
        check_page_size(page_size)
        check_integer("step_tokens", step_tokens, 1)
        check_integer("checkpoint_tokens", checkpoint_tokens, 0)
        check_integer("seed", seed)
        self.model, self.seed, self.invariant = model, seed, invariant
        self._checkpoint_tokens = checkpoint_tokens
        self.page_size = page_size
        self.attachment = attach(model, prove=self_test)
        self.spec = spec = self.attachment.spec.kept_in(kv_dtype)
        spec.check_options(self.invariant, self._checkpoint_tokens)
        check_on_full(on_full, spec)
        self.on_full = on_full
        # A model that counts its rows as positions, far out, takes no more of them.
        self.step_tokens = min(step_tokens, spec.reach.past or step_tokens)
        self.ranks = Ranks(self.attachment.rank_group, rank_timeout)
        settings = (page_size, step_tokens, invariant, seed, checkpoint_tokens, start_tokens or 0)
        self.ranks.agree_on(*map(int, settings), on_full, spec.kv_dtype)
        fitting = pages_for(max_tokens, {d: spec.bytes_on(d) for d in spec.devices}, page_size)
        most = self.ranks.least(fitting)
        pages = most if start_tokens is None else min(most, -(-start_tokens // page_size))
        self.memory = Memory(page_size, most, on_full)
        self.table = ThreadTable(pages, page_size, spec, seed, checkpoint_tokens, most)
        self._cuda_graphs = cuda_graphs
        self.waiting: list[Any] = []  # runs of tasks, and who waits for them (loop/astream.py)
        self._stats = Stats()
        self.memory.make(spec, pages)
        self._make_graphs()

    @property
    def pools(self) -> list[Pool]:
        """Keys and values, layer by layer; none in a closed session."""
        return self.memory.pools

    def _make_graphs(self) -> None:
        self._graphs = step_graphs(
            self._cuda_graphs, self.attachment, self.pools, self.invariant, self.ranks
        )
        self._captured = self.memory.grown

    @property
    def trace(self) -> Trace:
        """What happened: a thread tree as text, a Chrome-trace file."""
        return self.table.trace

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
        if self.table.is_open:
            self._stats = self.stats
            self.table.close()
            self._graphs = None
            self.memory.close()
            self.attachment.switch.put_back()

    def refresh(self) -> None:
        """Take the model as it is now, after its weights, dtype or device were changed.

        Every thread is released and every segment let go: their keys and values belong to the model
        of before. Raises InvalidInput where the model is another one, which wants a session of its
        own.
        """
        table = self.table.edit()
        # It was proved, or not, when this was opened; that rows must be kept is found by the proof.
        now, was = attach(self.model, prove=self.spec.by_rows), self.spec
        spec = now.spec.kept_in(was.kv_dtype)
        if (spec.can_rotate, spec.states is None) != (was.can_rotate, was.states is None):
            raise InvalidInput(
                "refresh: how the model's positions enter, or what is kept of a thread, changed; "
                "open a new apr.Session"
            )
        spec.check_options(self.invariant, self._checkpoint_tokens)
        self.table.release_all()
        self._graphs = None
        if spec != self.memory.spec or not self.pools:
            self.memory.make(spec, table.num_pages)
        self.attachment, self.spec = now, spec
        self.table.renew(spec)
        self._make_graphs()

    # ---- saving ----------------------------------------------------------------------------------

    def save(self, path: str | Path, named: Named, *, keys: bool = True) -> None:
        """Write threads and segments to a file, by names of yours, with all that they see: tokens,
        keys and values, what is queued, and where their random numbers stand. The file is written
        as a whole or not at all. keys=False: without keys and values, which `open` then makes anew.

        Raises InvalidInput with keys=False for all but threads that are lines; UnsupportedModel
        without it for models with layer states; ForeignThread, ThreadReleased.
        """
        save(self, path, named, keys)

    @classmethod
    def open(
        cls, path: str | Path, model: Any, *, mapped: bool = False, **options: Any
    ) -> tuple[Session, dict[str, Thread | Segment]]:
        """A session with what a file holds, by its names; they go on as they would have. `options`
        are those of a session, but for page_size, seed and kv_dtype, which are the file's.

        mapped: on the CPU, pages are the file's own, in memory that all sessions and processes that
        map it share; what is written goes to copies. The file must stay as it is meanwhile.

        Raises InvalidInput, before anything is used, where the file is cut short or altered, or was
        saved with another model; OutOfPages where the pool is too small.
        """
        session, named = open_saved(cls, path, model, mapped, options)
        return session, named

    # ---- threads and segments -------------------------------------------------------------------

    def thread(
        self,
        ids: TokenIds = (),
        *,
        view: ViewLike | None = None,
        writes: Segment | None = None,
        visibility: str = "previous",
        request: int | tuple[int, ...] | None = None,
    ) -> Thread:
        """A new thread with `ids` queued; with `view` (and `writes`) one that reads and writes
        regions.

        visibility: whether live segments show the "current" step's tokens too, or only "previous"
        ones. request: the index that keys its random numbers; by default the number of threads
        made before in this way, so give it where runs with other company must sample the same.
        """
        return self.table.thread(ids, view, writes, visibility, request)

    def segment(self, ids: TokenIds, base: int = 0, after: ViewLike = ()) -> Segment:
        """A sealed segment of `ids` from position `base` on, encoded under the view `after`."""
        return self.table.segment(ids, base, after)

    def region(self, ids: TokenIds = (), base: int = 0, stride: int = 1) -> Segment:
        """An open segment that one thread at a time may write; token i lies at base + stride *
        i.
        """
        return self.table.region(ids, base, stride)

    # ---- stepping -------------------------------------------------------------------------------

    def step(self, threads: Sequence[Thread]) -> Tensor:
        """Run the queued tokens of `threads`, and what they need, in one packed forward.

        Returns float32 logits [len(threads), vocab] of each thread's last token. On any exception
        lengths, pages and logits are as they were before.
        """

        def checked(logits: Tensor) -> Tensor:
            check_numbers(logits, threads)
            return logits.to(torch.float32, copy=True)

        return self.advance(threads, checked)

    def advance(self, threads: Sequence[Thread], choose: Callable[[Tensor], Chosen]) -> Chosen:
        """The same for a loop: what `choose` makes of the logits [len(threads), vocab], which come
        unchecked, in the model's dtype and to be read only.

        It is called before anything is committed: what it raises takes the step back.
        """
        with self.ranks.taking_part():
            return self._advance(self._numbers(threads), choose)

    def _advance(self, numbers: list[int], choose: Callable[[Tensor], Chosen]) -> Chosen:
        began = self.trace.clock()
        chosen: list[Chosen] = []

        def before_commit(ran: Ran) -> None:
            ran.check_finite(but=set(numbers))
            began = time.perf_counter()
            chosen.append(choose(self.table.logits.stack(numbers, ran.rows)))
            ran.choice_seconds = time.perf_counter() - began

        with self.table.turn:
            table = self._start_step(numbers)
            ran = self._replay(table, numbers, before_commit)
            ran = ran or self._run(table, numbers, before_commit)
            self.table.logits.take(ran.rows, numbers, table)
        self._stats.count(ran)
        self.trace.step(numbers, ran.num_rows, began)
        return chosen[-1]

    def _numbers(self, threads: Sequence[Thread]) -> list[int]:
        if isinstance(threads, Thread):
            raise InvalidInput("step: got one thread; expected a list of threads, e.g. [thread]")
        numbers = []
        for thread in threads:
            if not self.table.owns(thread):
                raise ForeignThread(
                    f"step: got {thread!r}, which is not a thread of this session; step it in the "
                    "session that made it"
                )
            numbers.append(thread._id)
        if not numbers:
            raise InvalidInput("step: got no threads; expected at least one")
        if len(set(numbers)) != len(numbers):
            raise InvalidInput("step: got a thread twice; list each once")
        return numbers

    def _start_step(self, numbers: Sequence[int]) -> _core.ThreadTable:
        table = self.table.settle()
        self.table.logits.drop_stale(table)
        self.attachment.check_unchanged("call session.refresh(), which releases its threads")
        self.memory.make_room(table, numbers)
        if self._captured != self.memory.grown:  # graphs have the addresses of smaller pools
            self._make_graphs()
        return table

    def _run(
        self, table: _core.ThreadTable, numbers: list[int], before_commit: Callable[[Ran], None]
    ) -> Ran:
        held = [number in self.table.logits for number in numbers]
        step = _core.Step(table, numbers, held, self.step_tokens)
        vectors = self.table.vectors
        states = self.table.states
        ran = run_step(
            step,
            self.attachment,
            self.pools,
            self.invariant,
            vectors,
            before_commit,
            states,
            self.ranks,
        )
        self.memory.keep_ahead(table)
        return ran

    def _replay(
        self, table: _core.ThreadTable, numbers: list[int], before_commit: Callable[[Ran], None]
    ) -> Ran | None:
        """An ordinary step by a captured graph; None where this is none."""
        if self._graphs is None or len(numbers) > self.step_tokens or self.table.vectors:
            return None
        if any(number in self.table.logits for number in numbers):
            return None
        return self._graphs.step(table, numbers, before_commit, self.table.states)

    def restore_states(self, threads: Sequence[Thread]) -> None:
        """Run again what is needed for the layer states of threads, after trims and the like."""
        core = self.table.edit()
        lacking = [t for t in threads if core.nearest_state(t._id, len(t)) < len(t)]
        if lacking:
            self.table.logits.drop([t._id for t in lacking])  # a thread that has some is not run
            self.step(lacking)

    def begin_step(self, threads: Sequence[Thread], step_tokens: int, who: object) -> _core.Step:
        """A step whose forward the caller runs (`apr.Cache`): it must `end_step`, always."""
        self.table.turn.take(who)
        with self.ranks.taking_part():
            numbers = [t._id for t in threads]
            table = self._start_step(numbers)
            return _core.Step(table, numbers, [False] * len(threads), step_tokens, ragged=True)

    def next_forward(self, step: _core.Step) -> None:
        """Plan the one forward of such a step, which all ranks are about to run."""
        with self.ranks.taking_part():
            step.next()
            self.ranks.agree(lambda: step.plan.digest)

    def end_step(self, step: _core.Step | None, who: object, commit: bool) -> None:
        """Close a step of `begin_step`; rolling back is safe to do twice."""
        try:
            if step is None or not commit:
                if step is not None:
                    step.rollback()
                return
            step.commit()
            self.memory.keep_ahead(self.table.ask())
        finally:
            self.table.turn.leave(who)

    def check(self) -> None:
        """Look whether everything is whole: pages, references, writers, handles, and the model as
        its user put it. It takes time in proportion to what is held.

        Raises Error with what it found, which is a fault of apr's; InvalidInput in a closed
        session, or while a step runs.
        """
        found = self.table.check()
        if self.attachment.switch.is_stuck():
            found.append("the model stands on apr's attention, and no forward runs")
        if found:
            raise Error("check: " + "; ".join(found) + "; please report this")

    # ---- figures --------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counters so far, and the pages in use now."""
        if not self.table.is_open:
            return self._stats
        page_bytes = self.page_size * self.spec.bytes_per_token
        stats = self._stats.with_sharing(self.table.ask_now(), page_bytes)
        held = self.table.states
        if held is None:
            return stats
        attention = "rows" if self.spec.by_rows else "plan"
        return replace(stats, attention=attention, states=len(held), state_bytes=held.nbytes)
