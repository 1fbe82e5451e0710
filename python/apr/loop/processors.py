"""Logits processors that users and methods give to threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

from apr.errors import InvalidInput


class Processors:
    """Processors for each thread of a run, of one list or of a factory: a stateful one (a grammar's
    matcher) must see the tokens of one thread alone.

    given: a list, of which the first thread gets the members themselves and every other copies; or
    a callable on the thread that returns a list. allowed: generate()'s prefix_allowed_tokens_fn, on
    the thread's number in the run and its tokens.
    """

    def __init__(
        self, given: Any = (), allowed: Callable[[int, Tensor], Any] | None = None
    ) -> None:
        self._factory = None
        if callable(given) and not isinstance(given, (LogitsProcessor, Sequence)):
            self._factory, given = given, ()
        self._first = [given] if isinstance(given, LogitsProcessor) else list(given)
        self._allowed, self._count = allowed, 0
        self._kept: list[LogitsProcessor] | Exception = []
        try:  # before the first use writes into them
            self._kept = [_copied(processor) for processor in self._first]
        except Exception as error:
            self._kept = error

    def of(self, thread: Any) -> list[LogitsProcessor]:
        """The processors of a thread that enters the run."""
        number, self._count = self._count, self._count + 1
        made = self._first if number == 0 else self._copies()
        if self._factory is not None:
            made = list(self._factory(thread))
        if self._allowed is None:
            return made
        allowed = self._allowed
        return [*made, PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(number, ids), 1)]

    def _copies(self) -> list[LogitsProcessor]:
        if isinstance(self._kept, Exception):
            raise InvalidInput(
                f"logits_processor: one of {self._first} cannot be copied for a second thread "
                f"({self._kept}); give a factory that makes them: logits_processor=lambda thread: "
                "[...]"
            ) from self._kept
        return [_copied(processor) for processor in self._kept]


def _copied(processor: LogitsProcessor) -> LogitsProcessor:
    """A processor of the same state as now; models that it holds are shared."""
    shared = {id(x): x for x in vars(processor).values() if isinstance(x, torch.nn.Module)}
    return copy.deepcopy(processor, shared)


def forbid(words: Sequence[Sequence[int]]) -> LogitsProcessor:
    """Keeps a thread from completing any of the token sequences."""
    return NoBadWordsLogitsProcessor([list(word) for word in words])


def forbid_first(token: int, length: int) -> LogitsProcessor:
    """Keeps a thread that now has `length` visible tokens from taking `token` next; later it
    may.
    """
    return SuppressTokensAtBeginLogitsProcessor([token], length)
