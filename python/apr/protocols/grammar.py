"""A control grammar as data: which words of the model fork, end and join threads, and what they
hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import regex  # type: ignore[import-untyped]  # comes with transformers; it can give up

from apr.errors import InvalidInput

Context = Literal["fresh", "prefix", "outline"]
Returns = Literal["nothing", "message", "text", "max", "sum", "keep"]
Until = Literal["all", "success", "first"]

CONTEXTS = ("fresh", "prefix", "outline")
RETURNS = ("nothing", "message", "text", "max", "sum", "keep")
UNTIL = ("all", "success", "first")
MOST_RESERVED = 1 << 16  # positions; a model may write any number
LONGEST_SEARCH = 1.0  # seconds; some patterns take quadratic time, or worse, on some texts

Say = Callable[[str], None]


class Part(NamedTuple):
    """A part of what is put into a thread."""

    text: str
    written: bool  # by some thread; else it is the grammar's


_WRITTEN = ("{outline}", "{message}")  # fields that hold what a thread wrote


@dataclass(frozen=True)
class Grammar:
    """How one method writes its control flow. All words are text; how a tokenizer splits them is
    its matter.

    A block: the model writes `open`, then a head, then `launch`; every match of `outline` in the
    head is a child. Without `launch` the block has no head and `width` children. Without `open` the
    driver opens one block where the prompt ends.

    A child starts with the words `child`, in which {n} is its number from 1 on, {index} from 0 on,
    {outline} its outline and {depth} its depth, and ends with `end` (the same fields) or with the
    model's EOS. It sees, by `context`: "prefix" all that its parent sees, the head and the words
    `between` included; "outline" the parent up to and with `open`; "fresh" nothing.

    The block ends, by `until`, when "all" children have ended; at the first "success" (`success` is
    found in the child's text), the rest is cancelled and the winner alone comes back (the first
    child, if none wins); or at the "first" end, the rest is taken as it is. Then the parent takes,
    by `returns`: "max", "sum", "keep": the children's keys and values, side by side, one after the
    other, or where they were written; "text": their tokens, run again; "message": what group 1 of
    `message` finds in their text (all of it by default), put into `each` (into `otherwise`, where
    there is one and `success` is not found); "nothing". With `rollback` the block is first cut out
    of the parent. It goes on after the words `before`, what was taken, and `after`.

    A child cannot write the words `forbidden`, nor `open` where `nested` is false.

    With `blocking=False` the parent goes on at once, `reserve` positions further (a number, or a
    pattern whose group 1 is one, to be found in the outline), and takes what has been written at
    the word `sync`.
    """

    name: str
    source: str
    open: str | None
    launch: str | None
    child: str
    end: str | None
    outline: str = r"(.+)"
    width: int = 0
    context: Context = "prefix"
    between: str = ""
    until: Until = "all"
    success: str | None = None
    returns: Returns = "text"
    message: str | None = None
    before: str = ""
    each: str = "{message}"
    otherwise: str | None = None
    after: str = ""
    rollback: bool = False
    blocking: bool = True
    reserve: int | str = 0
    sync: str | None = None
    nested: bool = True
    forbidden: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("context", self.context, CONTEXTS),
            ("returns", self.returns, RETURNS),
            ("until", self.until, UNTIL),
        ):
            if value not in allowed:
                raise InvalidInput(
                    f"grammar {self.name}: {field}={value!r}; expected one of {allowed}"
                )
        if self.launch is None and self.width < 1:
            self._refuse("no launch word and no width: it cannot know how many children to start")
        if self.open is None and (self.launch is not None or not self.blocking):
            self._refuse(
                "without an open word the driver opens one block; it has no launch, and blocks"
            )
        if self.returns == "keep" and self.context == "outline":
            self._refuse("returns='keep' needs children that go on where their parent's head ends")
        if self.until == "success" and self.success is None:
            self._refuse("until='success' needs the pattern `success`")
        silent = self.returns in ("max", "sum", "keep", "nothing") and not self.after
        if silent and self.blocking:
            self._refuse(
                f"returns={self.returns!r} leaves the parent without a token to go on from; name "
                "the words `after`"
            )
        if self.context == "fresh" and self.returns in ("max", "sum", "keep"):
            self._refuse("children of a fresh context have no place in their parent's positions")
        if self.rollback and self.returns in ("max", "sum", "keep"):
            self._refuse("a rollback would cut off what the children were forked from")
        if not self.blocking and (self.sync is None or self.rollback):
            self._refuse("blocking=False needs the word `sync`, and excludes rollback")
        if not self.blocking and self.returns in ("max", "sum"):
            self._refuse(
                "a parent that went on has filled those positions; returns='keep' or 'text'"
            )
        for field in ("outline", "message", "success"):
            self._pattern(field)
        if isinstance(self.reserve, str):
            self._pattern("reserve")

    def _refuse(self, why: str) -> None:
        raise InvalidInput(f"grammar {self.name}: {why}")

    def _pattern(self, field: str) -> None:
        pattern = getattr(self, field)
        if pattern is None:
            return
        try:
            groups = regex.compile(pattern, regex.DOTALL).groups
        except regex.error as error:
            raise InvalidInput(f"grammar {self.name}: {field} {pattern!r}: {error}") from error
        if field != "success" and groups != 1:
            self._refuse(f"{field} {pattern!r} has {groups} groups; expected one")

    @property
    def needs_keys(self) -> bool:
        """Whether joined keys are read, or positions kept free for them."""
        return self.returns in ("max", "sum", "keep") or bool(self.reserve)

    def _look(self, how: Any, field: str, text: str, say: Say) -> Any:
        """What a search of one of the patterns finds; nothing, and said so, where it takes too
        long.
        """
        pattern = getattr(self, field)
        try:
            return how(pattern, text, regex.DOTALL, timeout=LONGEST_SEARCH)
        except TimeoutError:
            say(
                f"{field} {pattern!r} was given up after {LONGEST_SEARCH:g} s on {len(text)} "
                "characters, as if it were not found"
            )
            return None

    def outlines(self, head: str, say: Say) -> list[str]:
        """The outlines in a head's text; `width` empty ones where the grammar has no heads."""
        if self.launch is None:
            return [""] * self.width
        found = [m.strip() for m in self._look(regex.findall, "outline", head, say) or ()]
        # Of an empty outline nothing could be made where it is all that a child begins with.
        return [outline for outline in found if outline or self.child.strip() != "{outline}"]

    def filled(
        self, words: str, n: int, outline: str, depth: int, message: str | None = None
    ) -> list[Part]:
        """Words of a child with its fields put in; {message} is one where there is a message."""
        fields = {"{n}": str(n), "{index}": str(n - 1), "{depth}": str(depth), "{outline}": outline}
        if message is not None:
            fields["{message}"] = message
        parts = regex.split(r"(\{(?:n|index|depth|outline|message)\})", words)
        return [Part(fields.get(x, x), x in fields and x in _WRITTEN) for x in parts if x]

    def reserved(self, outline: str, say: Say) -> int:
        """Positions that a parent leaves free for a child; 0 where what is found is no number."""
        if isinstance(self.reserve, int):
            return self.reserve
        found = self._look(regex.search, "reserve", outline, say)
        digits = ((found and found[1]) or "").strip().lstrip("0")
        if not digits.isdecimal():
            return 0
        return MOST_RESERVED if len(digits) > 9 else min(int(digits), MOST_RESERVED)

    def message_of(self, text: str, say: Say) -> str:
        """What a child hands on of its text."""
        if self.message is None:
            return text.strip()
        found = self._look(regex.search, "message", text, say)
        return ((found and found[1]) or "").strip()

    def succeeded(self, text: str, say: Say) -> bool:
        """Whether `success` is found in the text of a child."""
        return self.success is not None and bool(self._look(regex.search, "success", text, say))
