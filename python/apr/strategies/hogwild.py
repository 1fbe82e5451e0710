"""Hogwild! Inference (arXiv 2504.06261): workers that write at once and read each other as they write.

A worker's text comes in steps. What is being written is a live region that the others' views list; a finished
step moves to the common history of all views, and its keys and values stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.stream import StreamStep
from apr.strategies._live import joint_answers, take_steps
from apr.strategies._requests import Result, Writing, encode_plain, run_requests
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Segment, Thread

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
class Worker:
    """One writer of a team."""

    name: str
    thread: Thread
    region: Segment  # of the step that it is writing
    written: Decoded
    number: int = 1  # of that step
    since_check: int = 0
    step_tokens: list[int] = field(default_factory=list)


class Team:
    """The workers of one problem; they may enter and leave at any step (`each_step` of `hogwild`)."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        ids: list[int],
        board: Board,
        layout: str,
        check_every: int,
        key: tuple[int, int],
        enter: Callable[[Thread], None],
        leave: Callable[[Thread], None],
    ) -> None:
        self._session, self._tokenizer, self._board = session, tokenizer, board
        self._layout, self._check_every, self._key = layout, check_every, key
        self._enter, self._leave = enter, leave
        self._end = encode_plain(tokenizer, board.end)
        if not self._end:
            raise InvalidInput("board.end: got no tokens; expected what ends a step")
        past = encode_plain(tokenizer, board.past) if layout != "contiguous" else []
        self.head = session.segment([*ids, *past])
        shown = layout != "interleaved"
        self._others = self._header(board.others if shown else "")
        self._own = self._header(board.own)
        self.history: list[Segment] = []
        self.steps = 0
        self.workers: list[Worker] = []  # that still write
        self.recent: list[Worker] = []  # that wrote in the last step
        self.everyone: list[Worker] = []

    def _header(self, text: Any) -> list[Segment]:
        ids = encode_plain(self._tokenizer, text)
        after = [self.head]
        return [self._session.segment(ids, len(self.head), after)] if ids else []

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
        region = self._session.region(base=base)
        thread = self._session.thread(
            view=[self.head, region],
            writes=region,
            visibility="current",
            request=(*self._key, index),
        )
        thread.label = name
        worker = Worker(name, thread, region, Decoded(thread, request=self._key[1]))
        self.everyone.append(worker)
        self.workers.append(worker)
        thread.extend(self._begin(worker, check=False) or self._end)
        self._show()
        self._enter(thread)
        return worker

    def leave(self, worker: Worker, reason: str = "left") -> None:
        """The worker writes no more; what it wrote stays for the others to see."""
        if worker not in self.workers:
            raise InvalidInput(f"hogwild: {worker.name} is not writing in this team")
        if not worker.written.finish:
            self._leave(worker.thread)
            worker.written.finish = reason
        self.workers.remove(worker)
        item = worker.written
        self._session.trace.end(worker.thread._id, item.finish, len(item.tokens), worker.name)
        worker.thread.release()
        if self._layout != "contiguous":
            self.history.append(worker.region)
        self._show()

    def note(self, step: StreamStep) -> None:
        """What a step brought: tokens, finished steps of text, workers that ended."""
        ended, moving = [], []
        self.steps += any(worker.thread in step.tokens for worker in self.workers)
        self.recent = [worker for worker in self.workers if worker.thread in step.tokens]
        for worker in self.workers:
            token = step.tokens.get(worker.thread)
            if token is None:
                continue
            worker.written.tokens.append(token)
            worker.written.logprobs.append(step.logprobs[worker.thread])
            worker.step_tokens.append(token)
            worker.since_check += 1
            if worker.thread in step.finished:
                worker.written.finish = step.finished[worker.thread]
                ended.append(worker)
            elif self._step_is_over(worker):
                moving.append(worker)
        for worker in moving:
            self._turn_page(worker)
        if moving:
            self._show()
        for worker in ended:
            self.leave(worker)

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
            finished, worker.region = worker.region, self._session.region(base=worker.region.base)
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
        for worker in self.workers:
            if worker.thread.alive:
                worker.thread.release()
        # A caught exception may hold this object for long; it must not hold pages.
        for worker in self.everyone:
            del worker.region
        for segments in (self.history, self._others, self._own):
            segments.clear()
        self.workers.clear()
        self.recent.clear()
        del self.head


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

    layout: "combined" shows finished steps as a common history, then what the others are writing, then the
    own step; "interleaved" shows the history and the own step; "contiguous" shows each worker's text as one
    piece, the own last. board: the words around steps. check_every: tokens of a worker after which its next
    step begins with `board.check`; 0 never. A worker ends by `max_new_tokens`, an end token, `stop`, or when
    `done(its text so far)` holds, which ends its whole team. Then a reader of everything writes the answer
    after `answer_prompt` (None: the text is the first worker's). each_step(number, teams) is called before
    each step, and may let workers enter and leave. Samples unless told otherwise; other arguments as in
    `majority_vote`. The model must be re-rotatable: views move as they grow.
    """
    check_count(workers)
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout: got {layout!r}; expected one of {LAYOUTS}")
    words = board or Board()
    write = Writing(tokenizer, generation_config, options)

    def end_where_done(team: Team) -> None:
        if done is not None and any(
            done(write.text(worker.written.tokens)) for worker in team.recent
        ):
            for worker in list(team.workers):
                team.leave(worker, "done")

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        teams: list[Team] = []
        with write.stream(session) as writing:
            try:
                for ids, request in zip(prompts, requests, strict=True):
                    team = Team(
                        session,
                        tokenizer,
                        ids,
                        words,
                        layout,
                        check_every,
                        (seed, request),
                        lambda thread: writing.add(thread, stop=stop),
                        writing.remove,
                    )
                    teams.append(team)
                    for _ in range(workers):
                        team.enter()
                take_steps(writing, teams, each_step, on_step, end_where_done)
                views = [team.final_view() for team in teams]
                answers = joint_answers(
                    session, write, views, answer_prompt, answer_tokens, writing.config
                )
                stats = session.stats
            finally:
                for team in teams:
                    team.release()
        return [_result(t, a, write, stats, session) for t, a in zip(teams, answers, strict=True)]

    return run_requests(model_or_session, write, prompt, seed, workers, run)


def _result(
    team: Team, answer: Decoded | None, write: Writing, stats: Any, session: Session
) -> Result:
    items = [worker.written for worker in team.everyone]
    write.read(items)
    text = items[0].text if answer is None else answer.text
    answered = 0 if answer is None else len(answer.tokens)
    return Result(
        text=text,
        answer=text,
        threads=items,
        stats=stats,
        trace=session.trace,
        total_tokens=sum(len(item.tokens) for item in items) + answered,
        critical_path_tokens=team.steps + answered,
    )
