"""Logits become tokens: processors where a thread has some, then the sampler, for all threads at
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apr import ops
from apr.errors import InvalidInput, NonFiniteLogits
from apr.loop.history import History
from apr.loop.sampling import Rules
from apr.threads.thread import Thread


class Choice(NamedTuple):
    """A token for each thread of a step, in order."""

    tokens: list[int]
    sampled: ops.Sampled  # in host memory
    logits: Tensor  # [threads, vocab] as the model gave them
    scores: Tensor  # the same after the processors of their own history; else the logits


class Chooser:
    """Chooses tokens for the threads of a run."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._threads: list[Thread] = []  # that `_draws` is for
        self._draws = ops.Draws(0)

    def choose(self, rules: Mapping[Thread, Rules], logits: Tensor, step: int) -> Choice:
        """A token for each thread, of logits [threads, vocab] of the run's `step`.

        It waits for a GPU once. Raises NonFiniteLogits or InvalidInput where a thread has nothing
        to choose from.
        """
        scores = self._processed(rules, logits)
        sampled = ops.sample(scores, self._draws_of(rules), logits=logits).cpu()
        tokens: list[int] = sampled.tokens.tolist()
        if min(tokens) < 0 or bool(sampled.logprobs.isnan().any()):
            raise _why(list(rules), logits, scores, sampled, step)
        return Choice(tokens, sampled, logits, scores)

    def _draws_of(self, rules: Mapping[Thread, Rules]) -> ops.Draws:
        threads = list(rules)
        if threads != self._threads:
            every = [one.draw or {} for one in rules.values()]
            self._draws = ops.Draws(
                len(threads),
                temperature=[one.get("temperature", 1.0) for one in every],
                top_k=[int(one.get("top_k", 0)) for one in every],
                top_p=[one.get("top_p", 1.0) for one in every],
                min_p=[one.get("min_p", 0.0) for one in every],
                key=[thread.key for thread in threads],
            )
            self._threads = threads
        self._draws.table["count"] = [thread.draws for thread in threads]
        return self._draws

    def _processed(self, rules: Mapping[Thread, Rules], logits: Tensor) -> Tensor:
        """Float32 scores where some thread has processors, or warpers that the sampler has not."""
        if not any(one.shared or one.own or one.draw is None for one in rules.values()):
            return logits
        self._history.catch_up()
        scores = logits.to(torch.float32, copy=True)
        threads = list(rules)
        for rows in self._alike(rules):
            ids = self._history.ids([threads[row] for row in rows])
            everyone = len(rows) == len(threads)
            part = scores if everyone else scores[rows]
            for processor in rules[threads[rows[0]]].shared:
                part = processor(ids, part)
            if everyone:
                scores = part
            else:
                scores[rows] = part
        for row, (thread, one) in enumerate(rules.items()):
            for processor in one.own:
                ids = self._history.ids([thread])
                scores[row : row + 1] = processor(ids, scores[row : row + 1])
            if one.draw is None:
                scores[row : row + 1] = one.warpers(None, scores[row : row + 1])
        return scores

    def _alike(self, rules: Mapping[Thread, Rules]) -> Iterator[list[int]]:
        """Rows of threads of one length that share processors."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (thread, one) in enumerate(rules.items()):
            if one.shared:
                key = (id(one.shared), self._history.length(thread))
                groups.setdefault(key, []).append(row)
        yield from groups.values()


def _why(
    threads: list[Thread], logits: Tensor, scores: Tensor, sampled: ops.Sampled, step: int
) -> InvalidInput | NonFiniteLogits:
    """What is wrong with the first row that has nothing to choose from."""
    row = int(((sampled.tokens < 0) | sampled.logprobs.isnan()).int().argmax())
    where = f"{threads[row]!r}, step {step} of this run"
    given, best = float(logits[row].amax()), float(scores[row].amax())
    if given != given or given in (float("inf"), float("-inf")):
        return NonFiniteLogits(
            f"{where}: the model's logits hold {given}; the step was taken back. Check the model's "
            "dtype and weights (float16 overflows where bfloat16 does not)"
        )
    if best == float("-inf"):
        return InvalidInput(
            f"{where}: no token is left, all scores are -inf; the logits processors (a grammar, "
            "bad words, suppressed tokens) forbid everything: let them allow an end token"
        )
    if best - best == 0:
        return InvalidInput(
            f"{where}: the temperature makes scores infinite; expected a higher one"
        )
    return NonFiniteLogits(
        f"{where}: a logits processor made scores of {best}; expected numbers, or -inf for what is "
        "forbidden"
    )
