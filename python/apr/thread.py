"""What users hold: threads that read views and append to a tail, and the segments that views list."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from apr.errors import ForeignThread, InvalidInput

if TYPE_CHECKING:
    from apr.session import Session
    from apr.vectors import PathVectors

TokenIds = Sequence[int] | Tensor
JOIN_POSITIONS = ("max", "sum", "keep")


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


def check_position(name: str, value: Any) -> int:
    """A position or length as an integer that 32-bit kernels can hold; raises InvalidInput."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 30:
        raise InvalidInput(f"{name}: got {value!r}; expected an integer between -2^30 and 2^30")
    return value


class ViewEntry(NamedTuple):
    """One line of a view: the segment, the view position of its token 0, and how much of it is seen.

    offset None: it starts where everything before it ends, and moves as that grows. hi None: all of it,
    growing if it is still being written. `lo` is negative where a thread's own tail begins with a copy of
    a short inherited part.
    """

    segment: Segment
    offset: int | None = None
    hi: int | None = None
    lo: int = 0


ViewLike = Sequence[
    "Segment | ViewEntry | tuple[Segment, int | None] | tuple[Segment, int | None, int | None]"
]


def view_entries(view: ViewLike) -> list[ViewEntry]:
    """The entries of a view given in any form; raises InvalidInput."""
    entries = []
    for item in view:
        parts: tuple[Any, ...] = item if isinstance(item, tuple) else (item,)
        if not 1 <= len(parts) <= 4:
            raise InvalidInput(
                f"view: got {item!r}; expected a segment, (segment, offset) or (segment, offset, hi)"
            )
        entry = ViewEntry(*parts)
        for name in ("offset", "hi", "lo"):
            value = getattr(entry, name)
            if value is not None:
                check_position(f"view: {name}", value)
        entries.append(entry)
    return entries


# Threads with vectors of their own that a session remembers; they are small, and shared by its paths.
_MOST_VECTORS = 1 << 12


class Segment:
    """A run of tokens that any number of views may list; written by one thread at a time."""

    def __init__(self, session: Session, number: int) -> None:
        self.session, self._id = session, number

    def __del__(self) -> None:
        if self._id >= 0:
            self.session._dropped_segments.append(self._id)

    def _forget(self) -> None:
        """Hold nothing any more: the session lets the segment go."""
        self._id = -1

    def __reduce__(self) -> Any:
        raise InvalidInput("copy: a segment is one run of keys and values; list it in another view")

    def __len__(self) -> int:
        """Tokens, queued ones included."""
        return self.session._open_table().segment_length(self._id)

    def __repr__(self) -> str:
        return f"<Segment {self._id}>"

    @property
    def base(self) -> int:
        """Position at which token 0 is written."""
        return self.session._open_table().segment_base(self._id)

    @property
    def stride(self) -> int:
        """Positions from one token to the next."""
        return self.session._open_table().segment_stride(self._id)

    @property
    def sealed(self) -> bool:
        return self.session._open_table().segment_sealed(self._id)

    @property
    def tokens(self) -> list[int]:
        return self.session._open_table().segment_tokens(self._id)

    def seal(self) -> None:
        """End writing for good; raises InvalidInput while a thread still writes it."""
        self.session._edit().seal(self._id)


class Thread:
    """One line of reasoning: an ordered view of segments, and a tail that it alone appends to."""

    def __init__(self, session: Session, number: int, seed_path: tuple[int, ...]) -> None:
        self.session, self._id = session, number
        self.seed_path = seed_path
        self.label: str | None = None
        # Whether its tokens are one line, each seeing all before it: no view but by forks, no joined keys.
        self.is_line = True
        self._forks = 0
        self._step_logits: Tensor | None = None  # [threads, vocab] of a step, of which _row is ours
        self._row = 0
        self._generator: torch.Generator | None = None

    def __del__(self) -> None:
        self.session._dropped_threads.append(self._id)

    def __reduce__(self) -> Any:
        raise InvalidInput(
            "copy: a thread is a handle of its session; thread.fork() makes another, thread.tokens are data"
        )

    def __repr__(self) -> str:
        if not self.alive:
            return f"<Thread {self._id}, released>"
        return f"<Thread {self._id}, {len(self)} tokens, position {self.position}>"

    @property
    def _logits(self) -> Tensor | None:
        """[vocab], where they are held; a view, made only when it is asked for."""
        return None if self._step_logits is None else self._step_logits[self._row]

    @_logits.setter
    def _logits(self, logits: Tensor | None) -> None:
        self._step_logits, self._row = None if logits is None else logits[None], 0

    # ---- edits ----------------------------------------------------------------------------------

    def extend(self, ids: TokenIds) -> None:
        """Queue tokens at the end; the next step that is given this thread runs them."""
        tokens = check_ids(ids, self.session.spec.vocab_size)
        self.session._edit().extend(self._id, tokens)
        if tokens:
            self._logits = None

    def fork(self, n: int = 1) -> list[Thread]:
        """`n` children that see what this thread sees now. No key or value is copied."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise InvalidInput(f"fork: got {n!r}; expected a positive integer")
        began = self.session.trace.clock()
        numbers = self.session._edit().fork(self._id, n)
        children = []
        for number in numbers:
            child = self.session._adopt(number, (*self.seed_path, self._forks))
            child._logits = self._logits
            child.label, child.is_line = self.label, self.is_line
            self._forks += 1
            children.append(child)
        self.session.trace.fork(self._id, numbers, len(self), began)
        return children

    def join(
        self, children: Sequence[Thread], positions: str = "max", reencode: bool = False
    ) -> None:
        """Take the children's own parts in, and release them.

        positions "max": side by side at the fork point, this thread goes on after the longest
        (Multiverse, arXiv 2506.09991); "sum": one after the other; "keep": where they were written. Keys
        and values are reused as they are; with `reencode` the children's tokens are queued here instead.
        Raises ForeignThread for a thread that was not forked from this one.
        """
        if positions not in JOIN_POSITIONS:
            raise InvalidInput(
                f"join: got positions={positions!r}; expected one of {JOIN_POSITIONS}"
            )
        children = list(children)
        table = self.session._edit()
        for child in children:
            if not isinstance(child, Thread) or child.session is not self.session:
                raise ForeignThread(
                    f"join: got {child!r}, which is not a thread of this session; expected threads "
                    "forked from this one"
                )
        began = self.session.trace.clock()
        numbers = [c._id for c in children]
        sizes = [len(c.own_tokens) if c.alive else 0 for c in children]
        table.join(self._id, numbers, positions, reencode)
        if numbers:
            self._logits = None
            self.is_line = self.is_line and reencode
            self.session.trace.join(self._id, numbers, sizes, positions, reencode, began)

    def trim(self, n: int) -> None:
        """Keep the first `n` visible tokens in view order."""
        before = len(self)
        self.session._edit().trim(self._id, check_position("trim", n))
        if n != before:
            self._logits = None

    def release(self) -> None:
        """Give the thread's pages back, except what other views still list."""
        self.session._edit().release(self._id)
        self._logits = None
        self.session.trace.release(self._id)

    # ---- questions ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.session._table is not None and self.session._table.alive(self._id)

    def __len__(self) -> int:
        """Visible tokens, queued ones included."""
        return self.session._open_table().length(self._id)

    @property
    def position(self) -> int:
        """View position of the next token; below `len` after a join at max positions."""
        return self.session._open_table().position(self._id)

    @property
    def tokens(self) -> list[int]:
        """All visible tokens in view order."""
        return self.session._open_table().tokens(self._id)

    @property
    def own_tokens(self) -> list[int]:
        """Tokens that this thread wrote since it was made."""
        return self.session._open_table().own_tokens(self._id)

    @property
    def queued(self) -> int:
        """Tokens of the own tail that no step has run yet."""
        return self.session._open_table().queued(self._id)

    @property
    def logits(self) -> Tensor | None:
        """A copy of the float32 logits [vocab] of the last token, where they are held.

        Children inherit them.
        """
        held = self._logits
        return None if held is None else held.clone()

    @property
    def visibility(self) -> str:
        """What of live segments is seen in a step: "previous" steps only, or the "current" one too."""
        return "current" if self.session._open_table().is_current(self._id) else "previous"

    @property
    def tail(self) -> Segment:
        """The segment that this thread appends to."""
        return self.session._segment(self.session._open_table().tail(self._id))

    @property
    def writes(self) -> Segment:
        """The same as `tail`; set it to go on in another open region."""
        return self.tail

    @writes.setter
    def writes(self, segment: Segment) -> None:
        self.session._edit().set_writes(self._id, self.session._own_segment(segment))
        self._logits, self.is_line = None, False

    @property
    def view(self) -> list[ViewEntry]:
        """The entries, in order. Set it to segments, (segment, offset) or (segment, offset, hi)."""
        entries = self.session._open_table().view(self._id)
        return [ViewEntry(self.session._segment(s), off, hi, lo) for s, off, hi, lo, _ in entries]

    @view.setter
    def view(self, entries: ViewLike) -> None:
        self.session._edit().set_view(self._id, self.session._entries(entries))
        self._logits, self.is_line = None, False

    @property
    def vectors(self) -> PathVectors | None:
        """What this thread's tokens add to their keys and values; children do not inherit it.

        Set it before the tokens are run. Steps of a session with such threads are planned, not replayed.
        """
        return self.session._vectors.get(self._id)

    @vectors.setter
    def vectors(self, vectors: PathVectors | None) -> None:
        self.session._edit()
        if vectors is None:
            self.session._vectors.pop(self._id, None)
            return
        vectors.check(self.session.spec)
        # A released thread's last token may still be queued, so entries outlive their threads for a while.
        self.session._vectors[self._id] = vectors
        while len(self.session._vectors) > _MOST_VECTORS:
            del self.session._vectors[next(iter(self.session._vectors))]

    def forget_vectors(self) -> None:
        """Let its vectors go; also for a released thread, whose last token has run by then."""
        self.session._vectors.pop(self._id, None)

    @property
    def generator(self) -> torch.Generator:
        """This thread's own random generator, keyed by (session seed, request, fork path)."""
        if self._generator is None:
            key = repr((self.session.seed, self.seed_path)).encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            self._generator = torch.Generator(self.session.spec.device)
            self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return self._generator
