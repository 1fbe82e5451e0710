"""What a run wrote, as pieces: tokens of one thread under one view; the form that training and
replays read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from apr.errors import InvalidInput


class Seen(NamedTuple):
    """One line of a piece's view: the first `hi` tokens of another piece, `shift` positions later
    than written.
    """

    piece: int
    hi: int
    shift: int = 0


@dataclass
class Piece:
    """Tokens that one thread wrote under one view; each sees `sees` and its own predecessors."""

    thread: int
    position: int  # of its first token
    sees: list[Seen] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)  # False where a token was put in, not chosen
    follows: tuple[int, int] | None = None  # (piece, index): the token whose logits chose the first

    def write(self, ids: Sequence[int], sampled: bool) -> None:
        self.ids += ids
        self.sampled += [sampled] * len(ids)

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.position + len(self.ids)


class Record:
    """The pieces of one request, in the order in which they were begun."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        # False where the first piece is not one line of tokens that all see each other.
        self.begins_as_line = True

    def start(self, ids: Sequence[int], thread: int = 0) -> int:
        """A piece of given tokens that sees nothing before it; returns its number."""
        self.pieces.append(Piece(thread, 0))
        self.pieces[-1].write(ids, sampled=False)
        return len(self.pieces) - 1

    def after(self, piece: int, hi: int | None = None, thread: int = 0) -> int:
        """A new piece that goes on after the first `hi` tokens of another, as a fork or a cut
        does.
        """
        before = self.pieces[piece]
        hi = len(before.ids) if hi is None else hi
        if not 0 <= hi <= len(before.ids):
            raise InvalidInput(f"record: got token {hi} of a piece of {len(before.ids)}")
        made = Piece(thread, before.position + hi)
        made.sees = [*before.sees, *([Seen(piece, hi)] if hi else [])]
        made.follows = (piece, hi - 1) if hi else before.follows
        self.pieces.append(made)
        return len(self.pieces) - 1

    def write(self, piece: int, ids: Sequence[int], sampled: bool) -> None:
        """Add tokens to a piece; sampled: the model chose them."""
        self.pieces[piece].write(ids, sampled)

    @property
    def total_tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(sum(piece.sampled) for piece in self.pieces)

    def parts_after(self, piece: int, parts: Sequence[Seen], position: int, thread: int = 0) -> int:
        """A new piece that sees all of another and joined parts beside it, from `position` on."""
        made = self.pieces[self.after(piece, thread=thread)]
        made.sees += [part for part in parts if part.hi]
        made.position, made.follows = position, None
        return len(self.pieces) - 1

    def move_last(self, source: int, target: int) -> None:
        """Hand the last token over, which had not been run when its thread's view or place
        changed.
        """
        before, after = self.pieces[source], self.pieces[target]
        after.ids.insert(0, before.ids.pop())
        after.sampled.insert(0, before.sampled.pop())
        after.follows = (source, len(before.ids) - 1) if before.ids else before.follows
        after.sees = [
            Seen(p, hi - 1, shift) if p == source else Seen(p, hi, shift)
            for p, hi, shift in after.sees
        ]
        after.sees = [part for part in after.sees if part.hi]

    def part_end(self, part: Seen) -> int:
        """The position after the last token of a part, as its reader sees it."""
        return self.pieces[part.piece].position + part.shift + part.hi
