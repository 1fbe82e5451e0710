"""The threads and segments of a session: made, found again, and given back when Python drops
them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from apr import _core
from apr.errors import InvalidInput, UnsupportedModel
from apr.hf.packed import keep_states
from apr.hf.spec import ModelSpec
from apr.hf.vectors import PathVectors
from apr.threads.logits import HeldLogits
from apr.threads.thread import (
    EntryTuple,
    Segment,
    Thread,
    TokenIds,
    ViewLike,
    check_ids,
    check_position,
    view_entries,
)
from apr.threads.trace import Trace

# Threads with vectors of their own that are remembered; they are small, and shared by their paths.
_MOST_VECTORS = 1 << 12


class ThreadTable:
    """What threads know of their session: the core's table, logits, vectors and trace, and whose
    turn it is.
    """

    def __init__(
        self, pages: int, page_size: int, spec: ModelSpec, seed: int, checkpoint_tokens: int = 0
    ) -> None:
        core = _core.ThreadTable(pages, page_size, spec.can_rotate)
        self.states = keep_states(core, spec, checkpoint_tokens)
        self._checkpoint_tokens = checkpoint_tokens
        self._core: _core.ThreadTable | None = core
        self.spec, self.seed = spec, seed
        self.trace = Trace()
        self.logits = HeldLogits()
        self.vectors: dict[int, PathVectors] = {}
        self.dropped_threads: list[int] = []  # by garbage collection, which may come at any time
        self.dropped_segments: list[int] = []
        self._threads: weakref.WeakValueDictionary[int, Thread] = weakref.WeakValueDictionary()
        self._segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        self._requests = 0
        self.stepping: object = None  # who steps
        self._turn = threading.Lock()

    # ---- the core's table -----------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._core is not None

    def close(self) -> None:
        """Let the core's table go; safe to call twice."""
        self._core = None
        self.logits.clear()
        self.vectors.clear()
        self.states = None

    def ask(self) -> _core.ThreadTable:
        """The core's table, for a question."""
        if self._core is None:
            raise InvalidInput("the session is closed; open a new apr.Session")
        return self._core

    def edit(self) -> _core.ThreadTable:
        """The same for a change: what garbage collection dropped meanwhile is given back first."""
        core = self.ask()
        if self.stepping is not None:
            raise InvalidInput("a step is running; change threads between steps")
        while self.dropped_threads:
            number = self.dropped_threads.pop()
            self.logits.drop([number])
            if core.alive(number):
                core.release(number)
                self.trace.release(number)
        while self.dropped_segments:
            core.release_segment(self.dropped_segments.pop())
        self.drop_states()
        return core

    def renew(self, spec: ModelSpec) -> None:
        """Go on with a model that was measured anew, when all threads are released."""
        self.spec = spec
        self.states = keep_states(self.edit(), spec, self._checkpoint_tokens)

    def drop_states(self) -> None:
        """Let the layer states go that no thread leads to any more."""
        if self.states is not None:
            self.states.drop(self.ask().take_freed_states())

    def need_keys(self, what: str) -> None:
        """Raise UnsupportedModel for what needs a model whose past is keys and values alone."""
        if self.spec.states is not None:
            by_rows = f" (it runs by rows of its own cache: {self.spec.why})"
            why = by_rows if self.spec.by_rows else ""
            raise UnsupportedModel(
                f"{what}: this model keeps a state of all that a thread has read, and it has not "
                f"read the keys of others; expected forks, trims, and joins with reencode=True{why}"
            )

    def settled(self) -> _core.ThreadTable:
        """The same for figures: up to date, where no step is running."""
        return self.ask() if self.stepping is not None else self.edit()

    def begin_step(self, who: object) -> _core.ThreadTable:
        """The same for a step; nothing may change threads until `end_step` by the same caller."""
        core = self.edit()
        with self._turn:
            if self.stepping is not None:
                raise InvalidInput(
                    "step: another Python thread is stepping this session; take turns, or give "
                    "each Python thread a session of its own on the same model"
                )
            self.stepping = who
        return core

    def end_step(self, who: object) -> None:
        """Safe to call twice, and by a caller that was refused."""
        if self.stepping is who:
            self.stepping = None
            if self.is_open:
                self.drop_states()

    # ---- threads --------------------------------------------------------------------------------

    def thread(
        self,
        ids: TokenIds,
        view: ViewLike | None,
        writes: Segment | None,
        visibility: str,
        request: int | tuple[int, ...] | None,
    ) -> Thread:
        """`Session.thread`."""
        tokens = check_ids(ids, self.spec.vocab_size)
        core = self.edit()
        if visibility not in ("previous", "current"):
            raise InvalidInput(f'visibility: got {visibility!r}; expected "previous" or "current"')
        if view is None and writes is None and visibility == "previous":
            number = core.create(tokens)
        else:
            self.need_keys("thread: view, writes and visibility")
            target = None if writes is None else self.number_of(writes)
            number = core.create_with_view(
                self.entries(view or ()), target, visibility == "current"
            )
            core.extend(number, tokens)
        key = self._requests if request is None else request
        self._requests += 1
        self.trace.thread(number, len(tokens))
        made = self.adopt(number, key if isinstance(key, tuple) else (key,))
        made.is_line = view is None and writes is None
        return made

    def adopt(self, number: int, seed_path: tuple[int, ...]) -> Thread:
        """The handle of a thread that the core made."""
        thread = self._threads[number] = Thread(self, number, seed_path)
        return thread

    def append(self, threads: Sequence[Thread], tokens: list[int]) -> None:
        """Queue one token at the end of each thread."""
        numbers = [thread._id for thread in threads]
        self.edit().extend_each(numbers, tokens)
        self.logits.drop(numbers)

    def owns(self, thread: object) -> bool:
        """Whether it is a thread of this session."""
        return isinstance(thread, Thread) and thread.table is self

    def set_vectors(self, number: int, vectors: PathVectors | None) -> None:
        """A released thread's last token may still be queued, so entries outlive their threads for
        a while.
        """
        if vectors is None:
            self.vectors.pop(number, None)
            return
        self.vectors[number] = vectors
        while len(self.vectors) > _MOST_VECTORS:
            del self.vectors[next(iter(self.vectors))]

    # ---- segments -------------------------------------------------------------------------------

    def segment(self, ids: TokenIds, base: int, after: ViewLike) -> Segment:
        """`Session.segment`."""
        self.need_keys("segment")
        tokens = check_ids(ids, self.spec.vocab_size)
        check_position("base", base)
        return self._hold(self.edit().create_segment(tokens, base, self.entries(after)))

    def region(self, ids: TokenIds, base: int, stride: int) -> Segment:
        """`Session.region`."""
        self.need_keys("region")
        tokens = check_ids(ids, self.spec.vocab_size)
        check_position("base", base)
        check_position("stride", stride)
        return self._hold(self.edit().create_region(tokens, base, stride))

    def _hold(self, number: int) -> Segment:
        segment = self._segments[number] = Segment(self, number)
        return segment

    def segment_of(self, number: int) -> Segment:
        """The handle of a segment that some view lists."""
        segment = self._segments.get(number)
        if segment is None:
            self.ask().retain_segment(number)
            segment = self._hold(number)
        return segment

    def number_of(self, segment: Segment) -> int:
        """Its number, for the core; raises InvalidInput where it is not of this session."""
        if not isinstance(segment, Segment) or segment.table is not self:
            raise InvalidInput(f"segment: got {segment!r}; expected a Segment of this session")
        if segment._id < 0:
            raise InvalidInput("segment: it was let go by refresh(); make it again")
        return segment._id

    def entries(self, view: ViewLike) -> list[EntryTuple]:
        """A view in any form, as the core takes it."""
        return [
            (self.number_of(segment), offset, hi, lo, False)
            for segment, offset, hi, lo in view_entries(view)
        ]

    # ---- starting anew --------------------------------------------------------------------------

    def release_all(self) -> None:
        """Release every thread and let every segment go."""
        core = self.edit()
        for number, thread in list(self._threads.items()):
            if core.alive(number):
                thread.release()
        for number, segment in list(self._segments.items()):
            segment._id = -1
            core.release_segment(number)
