"""apr: a multi-thread KV cache for any Hugging Face causal language model."""

from __future__ import annotations

from apr import ops, protocols, remote, training
from apr.cache.cache import Cache
from apr.errors import (
    BudgetExceeded,
    EngineError,
    Error,
    ForeignThread,
    InvalidInput,
    NonFiniteLogits,
    OutOfPages,
    RanksDiffer,
    ThreadReleased,
    UnsupportedModel,
    UnsupportedRope,
)
from apr.hf.compatibility import warn_if_untested
from apr.hf.vectors import PathVectors
from apr.loop.astream import astream
from apr.loop.decode import Decoded, decode
from apr.loop.stream import Stream, StreamStep, stream
from apr.loop.width import WidthCurve, measure_width
from apr.protocols import Grammar, Outcome, compare_joins, run
from apr.protocols.budget import Budget
from apr.strategies import Result
from apr.strategies.beam_search import beam_search
from apr.strategies.best_of_n import best_of_n
from apr.strategies.branching_vote import branching_vote
from apr.strategies.group_think import group_think
from apr.strategies.hogwild import hogwild
from apr.strategies.majority_vote import majority_vote
from apr.strategies.mcts import mcts
from apr.strategies.parathinker import parathinker
from apr.strategies.skeleton import skeleton
from apr.strategies.tree_search import tree_search
from apr.threads.session import Session
from apr.threads.thread import Segment, Thread, ViewEntry
from apr.threads.trace import Stats, Trace

__version__ = "0.1.0"

warn_if_untested()

__all__ = [
    "Budget",
    "BudgetExceeded",
    "Cache",
    "Decoded",
    "EngineError",
    "Error",
    "ForeignThread",
    "Grammar",
    "InvalidInput",
    "NonFiniteLogits",
    "OutOfPages",
    "Outcome",
    "PathVectors",
    "RanksDiffer",
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
    "astream",
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
    "remote",
    "run",
    "skeleton",
    "stream",
    "training",
    "tree_search",
]
