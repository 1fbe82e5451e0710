"""Group Think (arXiv 2505.11107): thinkers that see each other's tokens up to the step before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.sampling import new_token_limit
from apr.loop.stream import Stream, StreamStep
from apr.strategies._live import Crew, Joint, Member, run_crews
from apr.strategies._requests import Result, Writing, encode_plain, run_requests
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Segment, Thread, ViewLike

LAYOUTS = ("slots", "interleaved")
Start = Callable[[int], Any]  # of a thinker's number, from 0 on: text or token ids


def numbered(number: int) -> str:
    """What a thinker begins with, unless told otherwise."""
    return f"\nThinker {number + 1}:"


class Group(Crew[Member]):
    """The thinkers of one prompt; they may enter and leave at any step (`each_step` of
    `group_think`).
    """

    def __init__(
        self,
        *crew: Any,
        places: Callable[[int], tuple[int, int]],
        begins: Sequence[list[int]],
    ) -> None:
        super().__init__(*crew)
        self._places, self._begins = places, begins

    @property
    def thinkers(self) -> list[Thread]:
        """Those that still write."""
        return [member.thread for member in self.workers]

    @property
    def written(self) -> list[Decoded]:
        """What all have written, those that left too."""
        return [member.written for member in self.everyone]

    def _view(self, own: Segment | None) -> ViewLike:
        """Everybody at the positions where it was written, the own region last."""
        others = [m.region for m in self.everyone if m.region is not own]
        regions = others + ([own] if own is not None else [])
        return [(self.head, 0), *((r, r.base) for r in regions)]

    def enter(self) -> Thread:
        """A new thinker, from the next step on."""
        number = len(self.everyone)
        if number >= len(self._begins):
            raise InvalidInput(
                f"group_think: {number} thinkers have entered, and positions are kept for no more; "
                "pass a larger `most`"
            )
        base, stride = self._places(number)
        region = self.session.region(base=base, stride=stride)
        view, key = self._view(region), (*self.key, number)
        thread = self.session.thread(self._begins[number], view=view, writes=region, request=key)
        others = list(self.workers)
        self._add(Member("", thread, region, Decoded(thread, request=self.key[1])))
        for other in others:
            other.thread.view = self._view(other.region)
        self._start(self.workers[-1])
        return thread

    def leave(self, member: Member | Thread, reason: str = "left") -> None:
        """The thinker writes no more; what it wrote stays for the others to see."""
        for mine in self.workers:
            if member in (mine, mine.thread):
                return super().leave(mine, reason)
        raise InvalidInput(f"group_think: {member!r} is not thinking in this group")

    def note(self, step: StreamStep) -> list[Member]:
        wrote = super().note(step)
        for member in wrote:
            if member.written.finish:
                self.leave(member)
        return wrote

    def final_view(self) -> ViewLike:
        return self._view(None)


def group_think(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 4,
    generation_config: Any = None,
    seed: int = 0,
    *,
    layout: str = "slots",
    start: Start = numbered,
    most: int | None = None,
    answer_prompt: Any = "\nFinal answer:",
    answer_tokens: int = 64,
    each_step: Callable[[int, list[Group]], None] | None = None,
    on_step: Callable[[StreamStep], None] | None = None,
    stop: Any = None,
    **options: Any,
) -> Any:
    """`n` thinkers write at once; each sees the prompt, what the others wrote before this step, and
    itself.

    layout: "slots" gives each thinker a range of positions of its own behind the prompt;
    "interleaved" lets token i of thinker k stand at prompt + i * most + k. Positions are those of
    the writing, so models without re-rotation do too. start(number): what a thinker begins with,
    text or token ids. most: thinkers that may ever enter (n if not given); each_step(number,
    groups) is called before each step, and may let them enter and leave. When all have ended, a
    reader of all of them writes the answer after `answer_prompt` (None: the text is the first
    thinker's). Samples unless told otherwise; other arguments: as in `majority_vote`.
    """
    check_count(n)
    most = n if most is None else most
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout: got {layout!r}; expected one of {LAYOUTS}")
    if most < n:
        raise InvalidInput(f"most: got {most} for {n} thinkers; expected at least as many")
    begins = [encode_plain(tokenizer, start(i)) for i in range(most)]
    if not all(begins):
        raise InvalidInput("start: got no tokens; expected at least one for each thinker")
    writing = Writing(tokenizer, generation_config, options)
    joint = Joint(answer_prompt, answer_tokens, each_step, on_step)

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        def make(run: Stream, ids: list[int], request: int) -> Group:
            p, slot = len(ids), max(map(len, begins)) + new_token_limit(run.config, 0)

            def places(k: int) -> tuple[int, int]:
                return (p + k * slot, 1) if layout == "slots" else (p + k, most)

            key = (seed, request)
            return Group(session, ids, key, run, stop, places=places, begins=begins)

        return run_crews(session, writing, prompts, requests, made, joint, n, make)

    return run_requests(model_or_session, writing, prompt, seed, most, run)
