"""Hogwild! Inference (arXiv 2504.06261): workers that write at once and read each other as they
write.

A worker's text comes in steps. What is being written is a live region that the others' views list;
a finished step moves to the common history of all views, and its keys and values stay where they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.stream import Stream, StreamStep
from apr.strategies._live import Crew, Joint, Member, run_crews
from apr.strategies._requests import Result, Writing, encode_plain, run_requests
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Segment

LAYOUTS = ("contiguous", "interleaved", "combined")
NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")


@dataclass(frozen=True)
class Board:
    """The words around the workers' steps, as text or as token ids; "" leaves one out.

    step is formatted with the worker's `name` and the `number` of its step; a step ends with `end`.
    """

    past: Any = "\n\n### Past steps\n\n"
    others: Any = "\n\n### Work in progress (others)\n\n"
    own: Any = "\n\n### Work in progress (own)\n\n"
    step: str | Callable[[str, int], Sequence[int]] = "**{name} [{number}]:** "
    end: Any = "\n\n"
    check: Any = "Quick check: am I doing redundant work? (yes/no): "


@dataclass(eq=False)
class Worker(Member):
    """One writer of a team; its region is that of the step that it is writing."""

    number: int = 1  # of that step
    since_check: int = 0
    step_tokens: list[int] = field(default_factory=list)


class Team(Crew[Worker]):
    """The workers of one problem; they may enter and leave at any step (`each_step` of
    `hogwild`).
    """

    def __init__(
        self,
        session: Session,
        ids: list[int],
        *crew: Any,
        tokenizer: Any,
        board: Board,
        layout: str,
        check_every: int,
    ) -> None:
        self._tokenizer, self._board = tokenizer, board
        self._layout, self._check_every = layout, check_every
        self._end = encode_plain(tokenizer, board.end)
        if not self._end:
            raise InvalidInput("board.end: got no tokens; expected what ends a step")
        past = encode_plain(tokenizer, board.past) if layout != "contiguous" else []
        super().__init__(session, [*ids, *past], *crew)
        self._others = self._header("" if layout == "interleaved" else board.others)
        self._own = self._header(board.own)
        self.history: list[Segment] = []
        self.recent: list[Worker] = []  # that wrote in the last step

    def _header(self, text: Any) -> list[Segment]:
        ids = encode_plain(self._tokenizer, text)
        after = [self.head]
        return [self.session.segment(ids, len(self.head), after)] if ids else []

    def _begin(self, worker: Worker, check: bool) -> list[int]:
        """The tokens that a step begins with."""
        made = self._board.step
        if callable(made):
            ids = list(made(worker.name, worker.number))
        else:
            text = made.format(name=worker.name, number=worker.number)
            ids = encode_plain(self._tokenizer, text)
        return ids + (encode_plain(self._tokenizer, self._board.check) if check else [])

    def _view(self, worker: Worker) -> list[Segment]:
        others = [w.region for w in self.everyone if w is not worker]
        if self._layout == "contiguous":
            return [self.head, *self._others, *others, *self._own, worker.region]
        if self._layout == "interleaved":
            return [self.head, *self.history, *self._own, worker.region]
        seen = [r for r in others if r not in self.history]
        return [self.head, *self.history, *self._others, *seen, *self._own, worker.region]

    def _show(self) -> None:
        """Give every worker the view that it has now."""
        for worker in self.workers:
            worker.thread.view = self._view(worker)

    def enter(self, name: str | None = None) -> Worker:
        """A new worker, from the next step on."""
        index = len(self.everyone)
        name = name or (NAMES[index] if index < len(NAMES) else f"Worker {index + 1}")
        base = len(self.head) + sum(len(s) for s in self._own)
        region = self.session.region(base=base)
        thread = self.session.thread(
            view=[self.head, region],
            writes=region,
            visibility="current",
            request=(*self.key, index),
        )
        thread.label = name
        worker = Worker(name, thread, region, Decoded(thread, request=self.key[1]))
        self._add(worker)
        thread.extend(self._begin(worker, check=False) or self._end)
        self._show()
        self._start(worker)
        return worker

    def leave(self, member: Worker, reason: str = "left") -> None:
        super().leave(member, reason)
        if self._layout != "contiguous":
            self.history.append(member.region)
        self._show()

    def note(self, step: StreamStep) -> list[Worker]:
        """What a step brought: tokens, finished steps of text, workers that ended."""
        self.recent = super().note(step)
        moving = []
        for worker in self.recent:
            worker.step_tokens.append(worker.written.tokens[-1])
            worker.since_check += 1
            if not worker.written.finish and self._step_is_over(worker):
                moving.append(worker)
        for worker in moving:
            self._turn_page(worker)
        if moving:
            self._show()
        for worker in self.recent:
            if worker.written.finish:
                self.leave(worker)
        return self.recent

    def _step_is_over(self, worker: Worker) -> bool:
        if isinstance(self._board.end, str):
            # A token may hold more than the end of a step, or a part of it.
            tail = worker.step_tokens[-len(self._end) - 2 :]
            return bool(self._tokenizer.decode(tail).endswith(self._board.end))
        return worker.step_tokens[-len(self._end) :] == self._end

    def _turn_page(self, worker: Worker) -> None:
        check = bool(self._check_every) and worker.since_check >= self._check_every
        worker.number += 1
        worker.step_tokens.clear()
        if check:
            worker.since_check = 0
        if self._layout != "contiguous":
            finished, worker.region = worker.region, self.session.region(base=worker.region.base)
            worker.thread.writes = worker.region
            finished.seal()
            self.history.append(finished)
        worker.thread.extend(self._begin(worker, check) or self._end)

    def final_view(self) -> list[Segment]:
        """Everything that was written: the history, then what is unfinished."""
        return [
            self.head,
            *self.history,
            *(w.region for w in self.everyone if w.region not in self.history),
        ]

    def release(self) -> None:
        super().release()
        for segments in (self.history, self._others, self._own):
            segments.clear()
        self.recent = []


def hogwild(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    workers: int = 2,
    generation_config: Any = None,
    seed: int = 0,
    *,
    layout: str = "combined",
    board: Board | None = None,
    check_every: int = 256,
    answer_prompt: Any = "\n\nFinal answer:",
    answer_tokens: int = 64,
    done: Callable[[str], bool] | None = None,
    each_step: Callable[[int, list[Team]], None] | None = None,
    on_step: Callable[[StreamStep], None] | None = None,
    stop: Any = None,
    **options: Any,
) -> Any:
    """`workers` write at once; each sees all others' tokens, those of the same step too.

    layout: "combined" shows finished steps as a common history, then what the others are writing,
    then the own step; "interleaved" shows the history and the own step; "contiguous" shows each
    worker's text as one piece, the own last. board: the words around steps. check_every: tokens of
    a worker after which its next step begins with `board.check`; 0 never. A worker ends by
    `max_new_tokens`, an end token, `stop`, or when `done(its text so far)` holds, which ends its
    whole team. Then a reader of everything writes the answer after `answer_prompt` (None: the text
    is the first worker's). each_step(number, teams) is called before each step, and may let workers
    enter and leave. Samples unless told otherwise; other arguments as in `majority_vote`. The model
    must be re-rotatable: views move as they grow.
    """
    check_count(workers)
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout: got {layout!r}; expected one of {LAYOUTS}")
    words = board or Board()
    writing = Writing(tokenizer, generation_config, options)
    joint = Joint(answer_prompt, answer_tokens, each_step, on_step)

    def end_where_done(team: Team) -> None:
        if done is not None and any(done(writing.text(w.written.tokens)) for w in team.recent):
            for worker in list(team.workers):
                team.leave(worker, "done")

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        def make(run: Stream, ids: list[int], request: int) -> Team:
            return Team(
                session,
                ids,
                (seed, request),
                run,
                stop,
                tokenizer=tokenizer,
                board=words,
                layout=layout,
                check_every=check_every,
            )

        return run_crews(
            session, writing, prompts, requests, made, joint, workers, make, end_where_done
        )

    return run_requests(model_or_session, writing, prompt, seed, workers, run)
