"""Control grammars as data, and the scheduler that obeys them: `apr.run(s, thread, apr.protocols.multiverse)`."""

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
from apr.protocols.run import run

__all__ = [
    "PRESETS",
    "Branch",
    "Grammar",
    "Outcome",
    "apr",
    "multiverse",
    "npr",
    "parallel_r1",
    "parathinker",
    "pasta",
    "recursive",
    "run",
    "sprint",
    "threadweaver",
]
