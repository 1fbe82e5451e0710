"""Logits become tokens: processors where a thread has some, then the sampler, for all threads at
once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apr import ops
from apr.errors import InvalidInput, NonFiniteLogits
from apr.hf.ranks import Ranks
from apr.loop.history import History
from apr.loop.sampling import Rules
from apr.ops.device import uploaded
from apr.threads.table import ThreadTable
from apr.threads.thread import Thread


class Choice(NamedTuple):
    """A token for each thread of a step, in order."""

    tokens: list[int]
    sampled: ops.Sampled  # in host memory
    logits: Tensor  # [threads, vocab] as the model gave them
    scores: Tensor  # the same after the processors of their own history; else the logits


class Chooser:
    """Chooses tokens for the threads of a run."""

    def __init__(self, table: ThreadTable, history: History, ranks: Ranks) -> None:
        self._table, self._history, self._ranks = table, history, ranks
        self._rules: list[Rules] = []  # that `_draws` is for
        self._draws = ops.Draws(0)

    def choose(self, rules: Mapping[Thread, Rules], logits: Tensor, step: int) -> Choice:
        """A token for each thread, of logits [threads, vocab] of the run's `step`.

        It waits for a GPU once. Raises NonFiniteLogits or InvalidInput where a thread has nothing
        to choose from.
        """
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        scores = self._processed(rules, logits)
        sampled = ops.sample(scores, self._draws_of(rules), logits=logits).cpu()
        sampled = ops.Sampled.of(self._ranks.first(sampled.memory))
        tokens: list[int] = sampled.tokens.tolist()
        odd = (sampled.tokens < 0) | sampled.logprobs.isnan()
        if bool(odd.any()):
            _check(list(rules), logits, scores, tokens, odd, step)
        return Choice(tokens, sampled, logits, scores)

    def _draws_of(self, rules: Mapping[Thread, Rules]) -> ops.Draws:
        every = list(rules.values())
        if every != self._rules:
            how = [one.draw or {} for one in every]
            self._draws = ops.Draws(
                len(every),
                temperature=[one.get("temperature", 1.0) for one in how],
                top_k=[int(one.get("top_k", 0)) for one in how],
                top_p=[one.get("top_p", 1.0) for one in how],
                min_p=[one.get("min_p", 0.0) for one in how],
                key=[thread.key for thread in rules],
            )
            self._rules = every
        self._draws.table["count"] = self._table.draws(rules)
        return self._draws

    def _processed(self, rules: Mapping[Thread, Rules], logits: Tensor) -> Tensor:
        """Float32 scores where some thread has processors, or warpers that the sampler has not."""
        if not any(one.shared or one.own or one.draw is None for one in rules.values()):
            return logits
        self._history.catch_up()
        scores = logits.to(torch.float32, copy=True)
        threads, every = list(rules), list(rules.values())
        lengths = [self._history.length(t) if r.shared else 0 for t, r in rules.items()]
        for rows in _alike(
            [(id(r.shared), n) if r.shared else None for r, n in zip(every, lengths, strict=True)]
        ):
            ids = self._history.ids([threads[row] for row in rows])
            scores = _apply(every[rows[0]].shared, ids, scores, rows)
        for row, (thread, one) in enumerate(rules.items()):
            if one.own:  # they may keep what they are given, or write into it
                ids = self._history.ids([thread]).clone()
                scores = _apply(one.own, ids, scores, [row])
        for rows in _alike([id(r.warpers) if r.draw is None else None for r in every]):
            scores = _apply(every[rows[0]].warpers, None, scores, rows)
        return scores


def _alike(keys: Sequence[Hashable]) -> Iterator[list[int]]:
    """The rows of each key; those of None are left out."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(row)
    yield from groups.values()


def _apply(
    processors: Iterable[Any], ids: Tensor | None, scores: Tensor, rows: list[int]
) -> Tensor:
    """The scores with some rows of them processed."""
    at = None if len(rows) == len(scores) else uploaded(rows, scores.device)
    part = scores if at is None else scores[at]
    for processor in processors:
        part = processor(ids, part)
    if at is None:
        return part
    scores[at] = part
    return scores


def _check(
    threads: list[Thread],
    logits: Tensor,
    scores: Tensor,
    tokens: list[int],
    odd: Tensor,
    step: int,
) -> None:
    """Raise for the first of the `odd` rows that has nothing to choose from, or NaN in its logits.

    (Infinite logits that a processor repaired have a token, and no log-probability.)
    """
    for row in odd.nonzero()[:, 0].tolist():
        where = f"{threads[row]!r}, step {step} of this run"
        given, best = float(logits[row].amax()), float(scores[row].amax())
        if math.isnan(given) or (tokens[row] < 0 and math.isinf(given) and math.isinf(best)):
            raise NonFiniteLogits(
                f"{where}: the model's logits hold {given}; the step was taken back. Check the "
                "model's dtype and weights (float16 overflows where bfloat16 does not)"
            )
        if tokens[row] >= 0:
            continue
        if best == -math.inf:
            raise InvalidInput(
                f"{where}: no token is left, all scores are -inf; the logits processors (a "
                "grammar, bad words, suppressed tokens) forbid everything: let them allow an end "
                "token"
            )
        if math.isfinite(best):
            raise InvalidInput(f"{where}: the temperature makes scores infinite; raise it")
        raise NonFiniteLogits(
            f"{where}: a logits processor made scores of {best}; expected numbers, or -inf for "
            "what is forbidden"
        )
