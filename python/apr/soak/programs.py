"""Random operations on a session, as programs that can be played again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from apr.soak.edits import Tally
from apr.soak.faults import KINDS
from apr.soak.oracle import tiny_model
from apr.soak.steps import Operation, Player
from apr.threads.offload import ON_FULL

# How often each comes.
OPERATIONS = {
    "thread": 2, "extend": 6, "fork": 3, "join": 3, "trim": 3, "drop": 3, "release": 2, "let go": 1,
    "step": 8, "stream": 2, "segment": 1, "reader": 1, "crew": 1, "crew writes": 3,
    "save": 0.5,
}  # fmt: skip


def program(seed: int, count: int, faults: float = 0.1) -> list[Operation]:
    """Operations that make sense in any order: their numbers are taken modulo what is there."""
    rng = random.Random(seed)
    names = rng.choices(list(OPERATIONS), list(OPERATIONS.values()), k=count)
    return [
        (
            name,
            rng.randrange(1 << 30),
            rng.randrange(1 << 30),
            rng.randrange(1 << 30),
            rng.choice(KINDS) if rng.random() < faults else "",
        )
        for name in names
    ]


def play(operations: Sequence[Operation], model: Any = None, tally: Tally | None = None) -> Tally:
    """Play operations on a session of their own. Raises Failure, and what a session raises that it
    should not.
    """
    tally = Tally() if tally is None else tally
    on_full = ON_FULL[operations[0][1] % 2] if operations else ON_FULL[0]
    player = Player(tiny_model() if model is None else model, tally, on_full)
    for i, operation in enumerate(operations):
        player.play(operation)
        if i % 8 == 0:
            player.session.check()
    player.finish()
    return tally


def replay(operations: Sequence[Operation]) -> None:
    """The same, for a script that `python -m apr soak` wrote."""
    tally = play(operations)
    print(f"{sum(tally.operations.values())} operations, no failure")
