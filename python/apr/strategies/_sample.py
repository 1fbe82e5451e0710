"""Forks n threads a request, lets all of them write in one batch, and hands back what each
wrote.
"""

from __future__ import annotations

from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.width import measure_width
from apr.strategies._requests import Writing, as_session, released
from apr.threads.session import Session
from apr.threads.thread import Thread
from apr.threads.trace import Stats


def check_count(n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidInput(f"n: got {n!r}; expected a positive number of threads")


def resolve_width(model_or_session: Any, n: int | str, seed: int) -> int:
    """`n`, or for "auto" as many threads as this machine steps nearly for free with this model."""
    if n != "auto":
        check_count(n)
        return int(n)
    with as_session(model_or_session, seed) as session:
        return measure_width(session).free_width()


def sample(
    session: Session,
    writing: Writing,
    prompts: list[list[int]],
    requests: list[int],
    n: int,
    seed: int,
    **more: Any,
) -> tuple[list[list[Decoded]], Stats]:
    """n samples of each prompt, and the session's figures while all threads still lived.

    The prompt is run and stored once; the threads are released after. more: arguments of
    `apr.decode`.
    """
    everyone: list[Thread] = []
    with released() as made:
        for prompt, request in zip(prompts, requests, strict=True):
            made.append(session.thread(prompt, request=(seed, request)))
            everyone += made[-1].fork(n)
            made += everyone[-n:]
        decoded = writing.decode(session, everyone, **more)
        stats = session.stats
    for i, item in enumerate(decoded):
        item.request = requests[i // n]
    return [decoded[i : i + n] for i in range(0, len(decoded), n)], stats
