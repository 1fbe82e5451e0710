"""Every exception that apr raises on purpose; each message says what, got, expected and remedy."""

from __future__ import annotations


class Error(Exception):
    """Base of all apr errors. The session or cache that raised it stays usable."""


class InvalidInput(Error, ValueError):
    """An argument is out of its range, of the wrong type, dtype or device."""


class OutOfPages(Error, MemoryError):
    """The KV pool has no free page left; release threads or open a larger session."""


class ThreadReleased(Error):
    """The thread was released, by `release()` or by the join that took it in."""


class ForeignThread(Error):
    """The thread belongs elsewhere: another session, another parent, or a fork point that is
    gone.
    """


class UnsupportedModel(Error):
    """The model cannot be attached; the message says what was measured."""


class UnsupportedRope(Error):
    """The model's positions cannot be re-rotated, and the request needs it."""


class BudgetExceeded(Error):
    """A hard limit of a run was reached."""


class EngineError(Error):
    """A served engine refused, or did not answer after all retries; what came is on its threads."""


class RanksDiffer(Error):
    """A rank of a model in parts is gone, or about to do something else than the others."""


class NonFiniteLogits(Error, ArithmeticError):
    """The model returned NaN logits; the step was rolled back."""
