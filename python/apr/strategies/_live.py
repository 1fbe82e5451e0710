"""What methods share whose threads read each other while they write: their steps, the answer from all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from apr.loop.decode import Decoded, decode
from apr.loop.stream import Stream, StreamStep
from apr.strategies._requests import Writing, encode_plain, released
from apr.threads.session import Session
from apr.threads.thread import ViewLike


class Crew(Protocol):
    """Threads that work on one prompt."""

    def note(self, step: StreamStep) -> None: ...


CrewT = TypeVar("CrewT", bound=Crew)


def take_steps(
    writing: Stream,
    crews: list[CrewT],
    each_step: Callable[[int, list[CrewT]], None] | None,
    on_step: Callable[[StreamStep], None] | None,
    after: Callable[[CrewT], None] | None = None,
) -> None:
    """Step until nobody writes: each_step(number, crews) before a step, then every crew notes what it brought,
    then `after` for each crew, then on_step."""
    number = 0
    if each_step is not None:
        each_step(number, crews)
    for step in writing:
        for crew in crews:
            crew.note(step)
            if after is not None:
                after(crew)
        if on_step is not None:
            on_step(step)
        number += 1
        if each_step is not None:
            each_step(number, crews)


def joint_answers(
    session: Session,
    write: Writing,
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
    ids = encode_plain(write.tokenizer, prompt)
    with released([]) as readers:
        for view in views:
            readers.append(session.thread(ids, view=view))
        return decode(
            session,
            readers,
            tokenizer=write.tokenizer,
            skip_special_tokens=write.skip_special_tokens,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=config.eos_token_id,
        )
