"""Runs of asyncio tasks: those that wait for their next token share one step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig

from apr.errors import InvalidInput, OutOfPages
from apr.loop.choice import Choice
from apr.loop.stream import Stream, StreamStep, stream
from apr.threads.session import Session
from apr.threads.thread import Thread

if TYPE_CHECKING:
    Waiting = tuple[Stream, asyncio.Future[StreamStep]]


async def astream(
    session: Session,
    threads: Sequence[Thread],
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> AsyncIterator[StreamStep]:
    """`stream` for a task: `async for step in apr.astream(s, threads): ...`.

    Tasks on one session take turns: all that wait for their next tokens are run by one batched
    step, in the event loop, which it holds up for as long as it takes. Between its own steps a task
    may change threads of the session as it likes. An error of one run, in its processors or stop
    rules, reaches its task alone; one of the model all tasks of the step, none of which has taken a
    token. Cancellation comes between steps: the run ends, the threads stay their owner's.

    On a served engine requests of all tasks run at once.

    Raises what `stream` raises, and InvalidInput where tasks of several event loops meet.
    """
    served = getattr(session, "astream", None)
    if served is not None:  # an engine, whose tasks share no step
        async with contextlib.aclosing(served(threads, generation_config, **options)) as steps:
            async for step in steps:
                yield step
        return
    if not isinstance(session, Session):
        raise InvalidInput(
            f"astream: got {type(session).__name__}; expected a Session or an Engine"
        )
    with stream(session, threads, generation_config, **options) as run:
        while run.threads:
            yield await _next(run)


async def _next(run: Stream) -> StreamStep:
    loop, waiting = asyncio.get_running_loop(), run.session.waiting
    # Of tasks that were cancelled, or whose event loop was closed, nothing is left to do.
    waiting[:] = [w for w in waiting if not (w[1].done() or w[1].get_loop().is_closed())]
    if any(future.get_loop() is not loop for _, future in waiting):
        raise InvalidInput(
            "astream: tasks of another event loop wait on this session; give each event loop a "
            "session of its own"
        )
    future: asyncio.Future[StreamStep] = loop.create_future()
    waiting.append((run, future))
    if len(waiting) == 1:  # when those that can ask have asked
        loop.call_soon(_step, run.session)
    return await future


def _step(session: Session) -> None:
    """One step of all runs that wait; who is at fault gets the error, and the others go on."""
    # Those that found no room come last, and go on when others have ended.
    waiting = sorted(session.waiting, key=lambda one: one[0].patient)
    session.waiting.clear()
    while waiting := [(run, future) for run, future in waiting if not future.done()]:
        guilty: list[Waiting] = []
        try:
            steps = _together(session, waiting, guilty)
        except BaseException as error:
            for _, future in guilty or waiting:
                _answer(future, error)
            if not isinstance(error, Exception):  # an interrupt: nobody is left to wait for ever
                for _, future in waiting:
                    _answer(future, error)
                raise
        else:
            for (run, future), step in zip(waiting, steps, strict=False):
                run.patient = False
                _answer(future, step)
            if left := waiting[len(steps) :]:  # when the others have asked again, or ended
                session.waiting += left
                left[0][1].get_loop().call_soon(_step, session)
            return


def _answer(future: asyncio.Future[StreamStep], step: StreamStep | BaseException) -> None:
    """Wake a task, if it was not woken otherwise meanwhile."""
    if future.done():
        return
    if isinstance(step, StopIteration):  # which futures do not carry
        step = RuntimeError(f"astream: a processor or stop rule raised {step!r}")
    if isinstance(step, BaseException):
        future.set_exception(step)
    else:
        future.set_result(step)


def _going(run: Stream, others: set[Thread]) -> list[Thread]:
    """The threads of a run's next step; raises where one was released, or is another run's."""
    threads = run.going()
    for thread in threads:
        len(thread)
        if thread in others:
            raise InvalidInput(f"astream: {thread!r} is in the run of another task")
    return threads


def _together(
    session: Session, waiting: Sequence[Waiting], guilty: list[Waiting]
) -> list[StreamStep | Exception]:
    """A step of several runs in one forward; what one of them raises before anything is committed
    takes it back, and puts that one among the guilty. The last runs are left out where not all find
    room, and the session offloads.
    """
    parts: list[list[Thread]] = []

    def collect() -> None:
        parts.clear()
        for one in waiting:
            try:
                parts.append(_going(one[0], {thread for part in parts for thread in part}))
            except BaseException:
                guilty.append(one)
                raise

    collect()

    def choose(logits: Tensor) -> list[Choice]:
        choices, at = [], 0
        for one, part in zip(waiting, parts, strict=True):
            try:
                choices.append(one[0].choose(logits[at : at + len(part)]))
            except BaseException:
                guilty.append(one)
                raise
            at += len(part)
        return choices

    while True:
        try:
            choices = session.advance([thread for part in parts for thread in part], choose)
            break
        except OutOfPages:
            longest = max(range(len(parts)), key=lambda i: len(parts[i]))
            if not waiting[longest][0].make_wait():
                if len(waiting) < 2 or session.on_full != "offload":
                    raise
                waiting[-1][0].patient = True
                waiting = waiting[:-1]
            collect()
    steps: list[StreamStep | Exception] = []
    for (run, _), part, choice in zip(waiting, parts, choices, strict=True):
        try:
            steps.append(run.give(part, choice))
        except Exception as error:  # of a stop rule: its own threads have taken nothing
            steps.append(error)
    return steps
