"""Control grammars as data, and the scheduler that obeys them: `apr.run(s, thread,
apr.protocols.multiverse)`.
"""

from apr.protocols.compare import JoinDifference, compare_joins
from apr.protocols.grammar import Grammar
from apr.protocols.outcome import Branch, Outcome
from apr.protocols.presets import (
    PRESETS,
    apr,
    multiverse,
    npr,
    parallel_r1,
    parathinker,
    pasta,
    recursive,
    sprint,
    threadweaver,
)
from apr.protocols.replays import Replay, replay
from apr.protocols.runtime import run

__all__ = [
    "PRESETS",
    "Branch",
    "Grammar",
    "JoinDifference",
    "Outcome",
    "Replay",
    "apr",
    "compare_joins",
    "multiverse",
    "npr",
    "parallel_r1",
    "parathinker",
    "pasta",
    "recursive",
    "replay",
    "run",
    "sprint",
    "threadweaver",
]
