"""apr: a multi-thread KV cache for any Hugging Face causal language model."""

from __future__ import annotations

from apr import ops, protocols, training
from apr.budget import Budget, WidthCurve, measure_width
from apr.cache import Cache
from apr.compatibility import warn_if_untested
from apr.decode import Decoded, Stream, StreamStep, decode, stream
from apr.errors import (
    BudgetExceeded,
    Error,
    ForeignThread,
    InvalidInput,
    NonFiniteLogits,
    OutOfPages,
    ThreadReleased,
    UnsupportedModel,
    UnsupportedRope,
)
from apr.protocols import Grammar, Outcome, compare_joins, run
from apr.session import Session
from apr.strategies import (
    Result,
    beam_search,
    best_of_n,
    branching_vote,
    group_think,
    hogwild,
    majority_vote,
    mcts,
    parathinker,
    skeleton,
    tree_search,
)
from apr.thread import Segment, Thread, ViewEntry
from apr.trace import Stats, Trace
from apr.vectors import PathVectors

__version__ = "0.1.0"

warn_if_untested()

__all__ = [
    "Budget",
    "BudgetExceeded",
    "Cache",
    "Decoded",
    "Error",
    "ForeignThread",
    "Grammar",
    "InvalidInput",
    "NonFiniteLogits",
    "OutOfPages",
    "Outcome",
    "PathVectors",
    "Result",
    "Segment",
    "Session",
    "Stats",
    "Stream",
    "StreamStep",
    "Thread",
    "ThreadReleased",
    "Trace",
    "UnsupportedModel",
    "UnsupportedRope",
    "ViewEntry",
    "WidthCurve",
    "beam_search",
    "best_of_n",
    "branching_vote",
    "compare_joins",
    "decode",
    "group_think",
    "hogwild",
    "majority_vote",
    "mcts",
    "measure_width",
    "ops",
    "parathinker",
    "protocols",
    "run",
    "skeleton",
    "stream",
    "training",
    "tree_search",
]
