"""Group Think (arXiv 2505.11107): thinkers that see each other's tokens up to the step before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.sampling import new_token_limit
from apr.loop.stream import StreamStep
from apr.strategies._live import joint_answers, take_steps
from apr.strategies._requests import Result, Writing, encode_plain, run_requests
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Segment, Thread, ViewLike

LAYOUTS = ("slots", "interleaved")
Start = Callable[[int], Any]  # of a thinker's number, from 0 on: text or token ids


def numbered(number: int) -> str:
    """What a thinker begins with, unless told otherwise."""
    return f"\nThinker {number + 1}:"


class Group:
    """The thinkers of one prompt; they may enter and leave at any step (`each_step` of `group_think`)."""

    def __init__(
        self,
        session: Session,
        ids: list[int],
        places: Callable[[int], tuple[int, int]],
        begin: Callable[[int], list[int]],
        most: int,
        key: tuple[int, int],
        enter: Callable[[Thread], None],
        leave: Callable[[Thread], None],
    ) -> None:
        self._session, self._places, self._begin = session, places, begin
        self._most, self._key = most, key
        self._enter, self._leave = enter, leave
        self.head: Segment = session.segment(ids)
        self.regions: list[Segment] = []
        self.thinkers: list[Thread] = []  # that still write
        self.written: list[Decoded] = []
        self._of: dict[Thread, Decoded] = {}
        self.steps = 0

    def _view(self, own: Segment | None) -> ViewLike:
        """Everybody at the positions where it was written, the own region last."""
        regions = [r for r in self.regions if r is not own] + ([own] if own is not None else [])
        return [(self.head, 0), *((r, r.base) for r in regions)]

    def enter(self) -> Thread:
        """A new thinker, from the next step on."""
        number = len(self.regions)
        if number >= self._most:
            raise InvalidInput(
                f"group_think: {self._most} thinkers have entered, and positions are kept for no more; "
                "pass a larger `most`"
            )
        base, stride = self._places(number)
        region = self._session.region(base=base, stride=stride)
        self.regions.append(region)
        key = (*self._key, number)
        thread = self._session.thread(
            self._begin(number), view=self._view(region), writes=region, request=key
        )
        for other in self.thinkers:
            other.view = self._view(other.tail)
        self.thinkers.append(thread)
        self._of[thread] = Decoded(thread, request=self._key[1])
        self.written.append(self._of[thread])
        self._enter(thread)
        return thread

    def leave(self, thread: Thread, reason: str = "left") -> None:
        """The thinker writes no more; what it wrote stays for the others to see."""
        if thread not in self.thinkers:
            raise InvalidInput(f"group_think: {thread!r} is not thinking in this group")
        if not self._of[thread].finish:
            self._leave(thread)
            self._of[thread].finish = reason
        self.thinkers.remove(thread)
        item = self._of[thread]
        self._session.trace.end(thread._id, item.finish, len(item.tokens))
        thread.release()

    def note(self, step: StreamStep) -> None:
        """What a step brought."""
        self.steps += any(thread in step.tokens for thread in self.thinkers)
        for thread in list(self.thinkers):
            if thread in step.tokens:
                self._of[thread].tokens.append(step.tokens[thread])
                self._of[thread].logprobs.append(step.logprobs[thread])
            if thread in step.finished:
                self._of[thread].finish = step.finished[thread]
                self.leave(thread)

    def final_view(self) -> ViewLike:
        """Everything that was written."""
        return self._view(None)

    def release(self) -> None:
        for thread in self.thinkers:
            if thread.alive:
                thread.release()
        # A caught exception may hold this object for long; it must not hold pages.
        self.thinkers.clear()
        self.regions.clear()
        del self.head


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
    """`n` thinkers write at once; each sees the prompt, what the others wrote before this step, and itself.

    layout: "slots" gives each thinker a range of positions of its own behind the prompt; "interleaved" lets
    token i of thinker k stand at prompt + i * most + k. Positions are those of the writing, so models without
    re-rotation do too. start(number): what a thinker begins with, text or token ids. most: thinkers that may
    ever enter (n if not given); each_step(number, groups) is called before each step, and may let them enter
    and leave. When all have ended, a reader of all of them writes the answer after `answer_prompt` (None: the
    text is the first thinker's). Samples unless told otherwise; other arguments: as in `majority_vote`.
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
    write = Writing(tokenizer, generation_config, options)

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        groups: list[Group] = []
        with write.stream(session) as writing:
            slot = max(map(len, begins)) + new_token_limit(writing.config, 0)

            def places(p: int) -> Callable[[int], tuple[int, int]]:
                if layout == "slots":
                    return lambda k: (p + k * slot, 1)
                return lambda k: (p + k, most)

            try:
                for ids, request in zip(prompts, requests, strict=True):
                    group = Group(
                        session,
                        ids,
                        places(len(ids)),
                        begins.__getitem__,
                        most,
                        (seed, request),
                        lambda thread: writing.add(thread, stop=stop),
                        writing.remove,
                    )
                    groups.append(group)
                    for _ in range(n):
                        group.enter()
                take_steps(writing, groups, each_step, on_step)
                views = [group.final_view() for group in groups]
                answers = joint_answers(
                    session, write, views, answer_prompt, answer_tokens, writing.config
                )
                stats = session.stats
            finally:
                for group in groups:
                    group.release()
        return [_result(g, a, write, stats, session) for g, a in zip(groups, answers, strict=True)]

    return run_requests(model_or_session, write, prompt, seed, most, run)


def _result(
    group: Group, answer: Decoded | None, write: Writing, stats: Any, session: Session
) -> Result:
    write.read(group.written)
    text = group.written[0].text if answer is None else answer.text
    answered = 0 if answer is None else len(answer.tokens)
    return Result(
        text=text,
        answer=text,
        threads=group.written,
        stats=stats,
        trace=session.trace,
        total_tokens=sum(len(item.tokens) for item in group.written) + answered,
        critical_path_tokens=group.steps + answered,
    )
