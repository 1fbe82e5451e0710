"""What methods share whose threads read each other while they write: who belongs together, the joint answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apr.decode import Decoded, decode
from apr.session import Session
from apr.strategies._requests import encode_plain
from apr.thread import Segment, Thread


@dataclass
class Crew:
    """Threads that work on one prompt, and the regions that they write."""

    head: Segment
    regions: list[Segment]
    threads: list[Thread]

    def release(self) -> None:
        for thread in self.threads:
            if thread.alive:
                thread.release()
        self.regions.clear()


def joint_answer(
    session: Session,
    tokenizer: Any,
    crews: Sequence[Crew],
    prompt: Any,
    tokens: int,
    options: dict[str, Any],
) -> Sequence[Decoded | None]:
    """What a reader of everything that a crew wrote writes after `prompt`; None without one.

    Readers of all crews write side by side. Each continues at the furthest position that the crew reached.
    """
    if prompt is None:
        return [None] * len(crews)
    ids = encode_plain(tokenizer, prompt)
    readers = []
    try:
        for crew in crews:
            view = [(crew.head, 0), *((region, region.base) for region in crew.regions)]
            readers.append(session.thread(ids, view=view))
        return decode(session, readers, tokenizer=tokenizer, max_new_tokens=tokens, **options)
    finally:
        for reader in readers:
            if reader.alive:
                reader.release()
