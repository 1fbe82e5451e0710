"""What methods share whose threads read each other while they write: the crew, its steps, the
answer from all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from apr.errors import InvalidInput
from apr.loop.decode import Decoded, decode
from apr.loop.stream import Stream, StreamStep
from apr.strategies._requests import Result, Writing, encode_plain, let_go, released
from apr.threads.session import Session
from apr.threads.thread import Segment, Thread, ViewLike


@dataclass(eq=False)
class Member:
    """One writer of a crew."""

    name: str
    thread: Thread
    region: Segment  # that it is writing
    written: Decoded


MemberT = TypeVar("MemberT", bound=Member)


class Crew(Generic[MemberT]):
    """The writers of one prompt; they may enter and leave at any step."""

    def __init__(
        self, session: Session, ids: list[int], key: tuple[int, int], run: Stream, stop: Any
    ) -> None:
        self.session, self.key = session, key
        self._run, self._stop = run, stop
        self.head = session.segment(ids)
        self.everyone: list[MemberT] = []
        self.workers: list[MemberT] = []  # that still write
        self.steps = 0

    def enter(self) -> Any:
        """A new writer, from the next step on."""
        raise NotImplementedError

    def final_view(self) -> ViewLike:
        """Everything that was written."""
        raise NotImplementedError

    def _add(self, member: MemberT) -> None:
        self.everyone.append(member)
        self.workers.append(member)

    def _start(self, member: MemberT) -> None:
        self._run.add(member.thread, stop=self._stop)

    def leave(self, member: MemberT, reason: str = "left") -> None:
        """It writes no more; what it wrote stays for the others to see."""
        if member not in self.workers:
            who = f"{type(self).__name__}.leave: {member.name or member.thread!r}"
            raise InvalidInput(f"{who} is not writing (any more)")
        item = member.written
        if not item.finish:
            self._run.remove(member.thread)
            item.finish = reason
        self.workers.remove(member)
        self.session.trace.end(member.thread._id, item.finish, len(item.tokens), member.name)
        member.thread.release()

    def note(self, step: StreamStep) -> list[MemberT]:
        """Write down what a step brought; those who wrote. Who ended has still to leave."""
        wrote = [member for member in self.workers if member.thread in step.tokens]
        self.steps += bool(wrote)
        for member in wrote:
            member.written.tokens.append(step.tokens[member.thread])
            member.written.logprobs.append(step.logprobs[member.thread])
            member.written.finish = step.finished.get(member.thread, "")
        return wrote

    def result(self, answer: Decoded | None, writing: Writing, stats: Any) -> Result:
        """The answer, or else the first text."""
        items = [member.written for member in self.everyone]
        writing.read(items)
        text = items[0].text if answer is None else answer.text
        answered = 0 if answer is None else len(answer.tokens)
        return Result(
            text=text,
            answer=text,
            threads=items,
            stats=stats,
            trace=self.session.trace,
            total_tokens=sum(len(item.tokens) for item in items) + answered,
            critical_path_tokens=self.steps + answered,
        )

    def release(self) -> None:
        """A caught exception may hold this object for long; it must not hold pages."""
        for member in self.workers:
            let_go(member.thread)
        for member in self.everyone:
            del member.region
        self.workers.clear()
        del self.head


CrewT = TypeVar("CrewT", bound=Crew[Any])


@dataclass(frozen=True)
class Joint:
    """What a crew's method takes beside its own: the answer from all, and what is called on the
    way.
    """

    answer_prompt: Any
    answer_tokens: int
    each_step: Callable[[int, list[Any]], None] | None
    on_step: Callable[[StreamStep], None] | None


def run_crews(
    session: Session,
    writing: Writing,
    prompts: list[list[int]],
    requests: list[int],
    made: list[Any],
    joint: Joint,
    n: int,
    make: Callable[[Stream, list[int], int], CrewT],
    after: Callable[[CrewT], None] | None = None,
) -> list[Result]:
    """A crew of `n` a prompt, made by make(run, prompt, its number), until nobody writes; then the
    answers.

    after(crew) is called when a crew has noted a step.
    """
    session.table.need_keys("threads that read one another")
    crews: list[CrewT] = []
    with writing.stream(session) as run:
        for ids, request in zip(prompts, requests, strict=True):
            crews.append(make(run, ids, request))
            made.append(crews[-1])
            for _ in range(n):
                crews[-1].enter()
        _take_steps(run, crews, joint, after)
        views = [crew.final_view() for crew in crews]
        answers = _joint_answers(
            session, writing, views, joint.answer_prompt, joint.answer_tokens, run.config
        )
        stats = session.stats
    return [crew.result(a, writing, stats) for crew, a in zip(crews, answers, strict=True)]


def _take_steps(
    run: Stream, crews: list[CrewT], joint: Joint, after: Callable[[CrewT], None] | None
) -> None:
    """Step until nobody writes: each_step(number, crews) before a step, then every crew notes what
    it brought, then `after` for each crew, then on_step.
    """
    number = 0
    if joint.each_step is not None:
        joint.each_step(number, crews)
    for step in run:
        for crew in crews:
            crew.note(step)
            if after is not None:
                after(crew)
        if joint.on_step is not None:
            joint.on_step(step)
        number += 1
        if joint.each_step is not None:
            joint.each_step(number, crews)


def _joint_answers(
    session: Session,
    writing: Writing,
    views: Sequence[ViewLike],
    prompt: Any,
    tokens: int,
    config: Any,
) -> Sequence[Decoded | None]:
    """What readers of these views write after `prompt`, greedily; None each without one.

    All readers write side by side. Of the crews' configuration the end tokens are kept.
    """
    if prompt is None:
        return [None] * len(views)
    ids = encode_plain(writing.tokenizer, prompt)
    with released() as readers:
        for view in views:
            readers.append(session.thread(ids, view=view))
        return decode(
            session,
            readers,
            tokenizer=writing.tokenizer,
            skip_special_tokens=writing.skip_special_tokens,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=config.eos_token_id,
        )
