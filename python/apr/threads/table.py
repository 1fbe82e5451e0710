"""The threads and segments of a session: made, found again, and given back when Python drops
them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

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
    check_request,
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
        self,
        pages: int,
        page_size: int,
        spec: ModelSpec,
        seed: int,
        checkpoint_tokens: int = 0,
        most_pages: int = 0,
    ) -> None:
        core = _core.ThreadTable(pages, page_size, spec.can_rotate, most_pages)
        self.states = keep_states(core, spec, checkpoint_tokens)
        self._checkpoint_tokens = checkpoint_tokens
        self._core: _core.ThreadTable | None = core
        self.spec, self.seed = spec, seed
        self.trace = Trace()
        self.logits = HeldLogits()
        self.vectors: dict[int, PathVectors] = {}
        self._segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        self.requests = 0  # root threads that were made: the next one's number
        self.turn = _core.Turn()  # who steps; nothing may change threads meanwhile
        # Whether a line's tokens tell its keys: not where vectors, images or the like went in.
        self.tokens_tell = True

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
        """The same for a change: what Python let go meanwhile is given back first."""
        if self.turn.taken:
            self.ask()
            raise InvalidInput("a step is running; change threads between steps")
        return self.settle()

    def settle(self) -> _core.ThreadTable:
        """The same for whoever has the turn."""
        core = self.ask()
        released = core.release_dropped()
        for number in released:
            self.trace.release(number)
        if released:
            self.logits.drop_stale(core)
        if self.states is not None:
            self.states.drop_freed(core)
        return core

    def renew(self, spec: ModelSpec) -> None:
        """Go on with a model that was measured anew, when all threads are released."""
        self.spec = spec
        self.states = keep_states(self.edit(), spec, self._checkpoint_tokens)

    def state_bytes(self, threads: Iterable[Thread]) -> int:
        """Bytes of the layer states that threads can go on from, or go back to."""
        if self.states is None:
            return 0
        return self.states.bytes_of(self.ask().states_of([thread._id for thread in threads]))

    def need_keys(self, what: str) -> None:
        """Raise UnsupportedModel for what needs a model whose past is keys and values alone."""
        if self.spec.no_keys:
            raise UnsupportedModel(f"{what}: {self.spec.no_keys}")

    def need_logits(self, what: str) -> None:
        """Raise UnsupportedModel for what looks at logits, where nobody tells them."""
        if self.spec.no_logits:
            raise UnsupportedModel(f"{what}: {self.spec.no_logits}")

    def need_logprobs(self, what: str) -> None:
        """Raise InvalidInput for what needs log-probabilities of texts, where they are not told."""
        if self.spec.no_logprobs:
            raise InvalidInput(f"{what}: {self.spec.no_logprobs}")

    def ask_now(self) -> _core.ThreadTable:
        """The same for figures: up to date, where no step is running."""
        return self.ask() if self.turn.taken else self.settle()

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
        path = None if request is None else check_request(request)
        core = self.edit()
        if visibility not in ("previous", "current"):
            raise InvalidInput(f'visibility: got {visibility!r}; expected "previous" or "current"')
        if view is None and writes is None and visibility == "previous":
            handle = core.create(tokens)
        else:
            self.need_keys("thread: view, writes and visibility")
            target = None if writes is None else self.number_of(writes)
            handle = core.create_with_view(
                self.entries(view or ()), target, visibility == "current", tokens
            )
        key = self.requests if path is None else path
        self.requests += 1
        self.trace.thread(handle.number, len(tokens))
        return Thread(self, handle, key if isinstance(key, tuple) else (key,))

    def append(
        self,
        threads: Sequence[Thread],
        tokens: list[int],
        drawn: list[bool],
        notes: Sequence[list[int]] = (),
    ) -> None:
        """Queue one token at the end of each thread, that was drawn at random or not, and append it
        to that thread's list of `notes`, all or nothing.
        """
        numbers = [thread._id for thread in threads]
        self.edit().extend_each(numbers, tokens, drawn, notes)
        self.logits.drop(numbers)

    def draws(self, threads: Iterable[Thread]) -> list[int]:
        """How many tokens were drawn at random for each thread."""
        return self.ask().draws([thread._id for thread in threads])

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
        self.tokens_tell = False
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

    def _hold(self, handle: _core.SegmentHandle) -> Segment:
        segment = self._segments[handle.number] = Segment(self, handle)
        return segment

    def segment_of(self, number: int) -> Segment:
        """The handle of a segment that some view lists."""
        segment = self._segments.get(number)
        if segment is None:
            segment = self._hold(self.ask().hold_segment(number))
        return segment

    def number_of(self, segment: Segment) -> int:
        """Its number, for the core; raises InvalidInput where it is not of this session."""
        if not isinstance(segment, Segment) or segment.table is not self:
            raise InvalidInput(f"segment: got {segment!r}; expected a Segment of this session")
        return segment._id

    def entries(self, view: ViewLike) -> list[EntryTuple]:
        """A view in any form, as the core takes it."""
        return [
            (self.number_of(segment), offset, hi, lo, False)
            for segment, offset, hi, lo in view_entries(view)
        ]

    # ---- whether it is whole --------------------------------------------------------------------

    def check(self) -> list[str]:
        """What is not as it should be."""
        core = self.edit()
        found = core.check(len(self._segments))
        self.logits.drop_stale(core)
        if self.states is not None and len(self.states) != core.num_states:
            found.append(f"{len(self.states)} layer states are kept, and {core.num_states} known")
        return found

    # ---- starting anew --------------------------------------------------------------------------

    def release_all(self) -> None:
        """Release every thread and let every segment go."""
        for number in self.edit().clear():
            self.trace.release(number)
        self.logits.clear()
        self._segments.clear()
