"""What users hold: threads that read views and append to a tail, and the segments that views
list.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from apr import _core
from apr.errors import ForeignThread, InvalidInput

if TYPE_CHECKING:
    from apr.hf.vectors import PathVectors
    from apr.threads.table import ThreadTable

TokenIds = Sequence[int] | Tensor
JOIN_POSITIONS = dict(_core.JoinPositions.__members__)  # "max", "sum", "keep"


def check_ids(ids: TokenIds, vocab_size: int) -> list[int]:
    """Token ids as plain integers in the vocabulary; raises InvalidInput."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
            raise InvalidInput(
                f"ids: got a tensor {list(ids.shape)} of {ids.dtype}; expected one dimension of "
                "integers (one thread takes one sequence)"
            )
        tokens = ids.tolist()
    else:
        try:
            tokens = [operator.index(i) for i in ids]
        except TypeError as error:
            raise InvalidInput(
                f"ids: got {ids!r:.80}; expected token ids: integers, as in "
                "tokenizer(text).input_ids"
            ) from error
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        bad = next(i for i in tokens if not 0 <= i < vocab_size)
        raise InvalidInput(f"ids: got token {bad}; expected 0 to {vocab_size - 1}, the vocabulary")
    return tokens


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise InvalidInput for what is not an integer, or below `least`."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise InvalidInput(f"{name}: got {value!r}; expected an integer{at_least}")


def check_request(request: Any) -> tuple[int, ...]:
    """What keys a thread's random numbers, as plain integers; raises InvalidInput."""
    try:
        return tuple(map(operator.index, request if isinstance(request, tuple) else (request,)))
    except TypeError as error:
        raise InvalidInput(
            f"request: got {request!r}; expected an integer, or a tuple of integers"
        ) from error


def check_position(name: str, value: Any) -> int:
    """A position or length as an integer that 32-bit kernels can hold; raises InvalidInput."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 30:
        raise InvalidInput(f"{name}: got {value!r}; expected an integer between -2^30 and 2^30")
    return value


class ViewEntry(NamedTuple):
    """One line of a view: the segment, the view position of its token 0, and how much of it is
    seen.

    Tokens [lo, hi) are seen. offset None: they start where everything before them ends, and move as
    that grows. hi None: all of it, growing if it is still being written. `lo` is negative where a
    thread's own tail begins with a copy of a short inherited part.
    """

    segment: Segment
    offset: int | None = None
    hi: int | None = None
    lo: int = 0


EntryTuple = tuple[int, int | None, int | None, int, bool]  # as the core takes it

ViewLike = Sequence[
    "Segment | ViewEntry | tuple[Segment, int | None] | tuple[Segment, int | None, int | None]"
    " | tuple[Segment, int | None, int | None, int]"
]


def view_entries(view: ViewLike) -> list[ViewEntry]:
    """The entries of a view given in any form; raises InvalidInput."""
    entries = []
    for item in view:
        parts: tuple[Any, ...] = item if isinstance(item, tuple) else (item,)
        if not 1 <= len(parts) <= 4:
            raise InvalidInput(
                f"view: got {item!r}; expected a segment, (segment, offset), (segment, offset, hi) "
                "or (segment, offset, hi, lo)"
            )
        entry = ViewEntry(*parts)
        for name in ("offset", "hi", "lo"):
            value = getattr(entry, name)
            if value is not None:
                check_position(f"view: {name}", value)
        entries.append(entry)
    return entries


class Segment:
    """A run of tokens that any number of views may list; written by one thread at a time."""

    def __init__(self, table: ThreadTable, handle: _core.SegmentHandle) -> None:
        self.table, self._handle, self._id = table, handle, handle.number

    def __reduce__(self) -> Any:
        raise InvalidInput("copy: a segment is one run of keys and values; list it in another view")

    def __len__(self) -> int:
        """Tokens, queued ones included."""
        return self.table.ask().segment_length(self._id)

    def __repr__(self) -> str:
        return f"<Segment {self._id}>"

    @property
    def base(self) -> int:
        """Position at which token 0 is written."""
        return self.table.ask().segment_base(self._id)

    @property
    def stride(self) -> int:
        """Positions from one token to the next."""
        return self.table.ask().segment_stride(self._id)

    @property
    def sealed(self) -> bool:
        """Whether nobody can add to it any more."""
        return self.table.ask().segment_sealed(self._id)

    @property
    def tokens(self) -> list[int]:
        """Its token ids, queued ones included."""
        return self.table.ask().segment_tokens(self._id)

    def seal(self) -> None:
        """End writing for good; raises InvalidInput while a thread still writes it."""
        self.table.edit().seal(self._id)


class Thread:
    """One line of reasoning: an ordered view of segments, and a tail that it alone appends to."""

    def __init__(
        self, table: ThreadTable, handle: _core.ThreadHandle, seed_path: tuple[int, ...]
    ) -> None:
        self.table, self._handle, self._id = table, handle, handle.number
        self.seed_path = seed_path
        self.label: str | None = None
        self._key: int | None = None

    def __reduce__(self) -> Any:
        raise InvalidInput(
            "copy: a thread is a handle of its session; thread.fork() makes another, thread.tokens "
            "are data"
        )

    def __repr__(self) -> str:
        if not self.alive:
            return f"<Thread {self._id}, released>"
        return f"<Thread {self._id}, {len(self)} tokens, position {self.position}>"

    # ---- edits ----------------------------------------------------------------------------------

    def extend(self, ids: TokenIds) -> None:
        """Queue tokens at the end; the next step that is given this thread runs them."""
        tokens = check_ids(ids, self.table.spec.vocab_size)
        self.table.edit().extend(self._id, tokens)

    def fork(self, n: int = 1) -> list[Thread]:
        """`n` children that see what this thread sees now. No key or value is copied."""
        check_integer("fork", n, 1)
        began = self.table.trace.clock()
        table = self.table.edit()
        first = table.forks(self._id)
        children = []
        for i, handle in enumerate(table.fork(self._id, n)):
            child = Thread(self.table, handle, (*self.seed_path, first + i))
            child.label = self.label
            children.append(child)
        numbers = [child._id for child in children]
        self.table.logits.inherit(self._id, numbers)
        self.table.trace.fork(self._id, numbers, len(self), began)
        return children

    def join(
        self, children: Sequence[Thread], positions: str = "max", reencode: bool = False
    ) -> None:
        """Take the children's own parts in, and release them.

        positions "max": side by side at the fork point, this thread goes on after the longest
        (Multiverse, arXiv 2506.09991); "sum": one after the other; "keep": where they were written.
        Keys and values are reused as they are; with `reencode` the children's tokens are queued
        here instead. Raises ForeignThread for a thread that was not forked from this one.
        """
        if positions not in JOIN_POSITIONS:
            raise InvalidInput(
                f"join: got positions={positions!r}; expected one of {list(JOIN_POSITIONS)}"
            )
        children = list(children)
        if not reencode:
            self.table.need_keys("join without reencode=True")
        table = self.table.edit()
        for child in children:
            if not self.table.owns(child):
                raise ForeignThread(
                    f"join: got {child!r}, which is not a thread of this session; expected threads "
                    "forked from this one"
                )
        began = self.table.trace.clock()
        numbers = [c._id for c in children]
        sizes = [len(c.own_tokens) if c.alive else 0 for c in children]
        table.join(self._id, numbers, JOIN_POSITIONS[positions], reencode)
        if numbers:
            self.table.trace.join(self._id, numbers, sizes, positions, reencode, began)

    def trim(self, n: int) -> None:
        """Keep the first `n` visible tokens in view order."""
        self.table.edit().trim(self._id, check_position("trim", n))

    def drop(self, start: int, stop: int) -> None:
        """Let the visible tokens [start, stop) go, and close the gap in positions.

        What stands behind keeps its keys and values, which have seen what goes, and is read as many
        positions earlier (StreamingLLM, arXiv 2309.17453); pages that nobody sees are free. Queued
        tokens run under the new view. Raises InvalidInput for what is no range of the thread, or
        cuts a region that is written and read live; UnsupportedRope where positions cannot be
        re-rotated; UnsupportedModel where layers keep states.
        """
        if self.table.states is not None:
            self.table.need_keys("drop")
        start, stop = check_position("drop: start", start), check_position("drop: stop", stop)
        self.table.edit().drop(self._id, start, stop)

    def release(self) -> None:
        """Give the thread's pages back, except what other views still list."""
        self.table.edit().release(self._id)
        self.table.logits.drop([self._id])
        self.table.trace.release(self._id)

    # ---- questions ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it was neither released nor taken in by a join, in a session that is open."""
        return self.table.is_open and self.table.ask().alive(self._id)

    def __len__(self) -> int:
        """Visible tokens, queued ones included."""
        return self.table.ask().length(self._id)

    @property
    def position(self) -> int:
        """View position of the next token; below `len` after a join at max positions."""
        return self.table.ask().position(self._id)

    @property
    def tokens(self) -> list[int]:
        """All visible tokens in view order."""
        return self.table.ask().tokens(self._id)

    @property
    def own_tokens(self) -> list[int]:
        """Tokens that this thread wrote since it was made."""
        return self.table.ask().own_tokens(self._id)

    @property
    def queued(self) -> int:
        """Tokens of the own tail that no step has run yet."""
        return self.table.ask().queued(self._id)

    @property
    def is_line(self) -> bool:
        """Whether its tokens are one line, each seeing all before it: no view but by forks, no
        joined keys.
        """
        return self.table.ask().is_line(self._id)

    @property
    def draws(self) -> int:
        """Tokens that were drawn for it at random."""
        return self.table.draws([self])[0]

    @property
    def trims(self) -> int:
        """How often tokens were taken from it."""
        return self.table.ask().trims(self._id)

    @property
    def logits(self) -> Tensor | None:
        """A copy of the float32 logits [vocab] of the last token, where they are held.

        Children inherit them.
        """
        held = self.table.logits.of(self._id, self.table.ask())
        return None if held is None else held.to(torch.float32, copy=True)

    @property
    def visibility(self) -> str:
        """What of live segments is seen in a step: "previous" steps only, or the "current" one
        too.
        """
        return "current" if self.table.ask().is_current(self._id) else "previous"

    @property
    def tail(self) -> Segment:
        """The segment that this thread appends to."""
        return self.table.segment_of(self.table.ask().tail(self._id))

    @property
    def writes(self) -> Segment:
        """The same as `tail`; set it to go on in another open region."""
        return self.tail

    @writes.setter
    def writes(self, segment: Segment) -> None:
        self.table.need_keys("thread.writes")
        self.table.edit().set_writes(self._id, self.table.number_of(segment))

    @property
    def view(self) -> list[ViewEntry]:
        """The entries, in order. Set it to segments, (segment, offset), (segment, offset, hi) or
        (segment, offset, hi, lo).
        """
        entries = self.table.ask().view(self._id)
        return [ViewEntry(self.table.segment_of(s), off, hi, lo) for s, off, hi, lo, _ in entries]

    @view.setter
    def view(self, entries: ViewLike) -> None:
        self.table.need_keys("thread.view")
        self.table.edit().set_view(self._id, self.table.entries(entries))

    @property
    def vectors(self) -> PathVectors | None:
        """What this thread's tokens add to their keys and values; children do not inherit it.

        Set it before the tokens are run. Steps of a session with such threads are planned, not
        replayed.
        """
        return self.table.vectors.get(self._id)

    @vectors.setter
    def vectors(self, vectors: PathVectors | None) -> None:
        self.table.edit()
        if vectors is not None:
            self.table.need_keys("thread.vectors")
            vectors.check(self.table.spec)
        self.table.set_vectors(self._id, vectors)

    def forget_vectors(self) -> None:
        """Let its vectors go; also for a released thread, whose last token has run by then."""
        self.table.set_vectors(self._id, None)

    @property
    def key(self) -> int:
        """64 bits of (session seed, request, fork path); with `draws` they key a random number."""
        if self._key is None:
            text = repr((self.table.seed, self.seed_path)).encode()
            self._key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return self._key
