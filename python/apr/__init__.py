"""apr: a multi-thread KV cache for any Hugging Face causal language model."""

from __future__ import annotations

from apr import ops
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
from apr.session import Session
from apr.thread import Segment, Thread, ViewEntry
from apr.trace import Stats, Trace

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "Error",
    "ForeignThread",
    "InvalidInput",
    "NonFiniteLogits",
    "OutOfPages",
    "Segment",
    "Session",
    "Stats",
    "Thread",
    "ThreadReleased",
    "Trace",
    "UnsupportedModel",
    "UnsupportedRope",
    "ViewEntry",
    "ops",
]
