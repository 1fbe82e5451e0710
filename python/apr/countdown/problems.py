"""Countdown problems: reach a target from given numbers with + - * /, every number used once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OPERATORS = "+-*/"

Step = tuple[int, str, int, int]  # left, operator, right, result
Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Range:
    """The numbers a problem may use: draws in [1, highest], targets in [1, target], results <=
    limit.
    """

    highest: int = 16
    target: int = 100
    limit: int = 127


@dataclass(frozen=True)
class Problem:
    """One problem; `numbers` are sorted from the highest down, as the model was trained to read
    them.
    """

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"<bos> {self.target} : {' '.join(map(str, self.numbers))} <try>"


def apply(left: int, operator: str, right: int) -> int | None:
    """The exact result of one operation on integers, or None where a division leaves a
    remainder.
    """
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator == "/" and right != 0 and left % right == 0:
        return left // right
    return None


def chains(numbers: tuple[int, ...], limit: int) -> Iterator[Chain]:
    """Every way to combine all numbers, the higher operand first, with results in [1, limit]."""
    if len(numbers) == 1:
        yield ()
        return
    seen = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        left, right = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        if (left, right) in seen:
            continue
        seen.add((left, right))
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for operator in OPERATORS:
            result = apply(left, operator, right)
            if result is not None and 1 <= result <= limit:
                for tail in chains(tuple(sorted([result, *rest], reverse=True)), limit):
                    yield ((left, operator, right, result), *tail)


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether this multiset of numbers is kept out of training (one in ten, by a fixed hash)."""
    code = 0
    for n in sorted(numbers):
        code = (code * 131 + n * 7919 + 13) % 1_000_003
    return code % 10 == 0


def number_sets(count: int, span: Range, held_out: bool) -> list[tuple[int, ...]]:
    """All multisets of `count` numbers on one side of the split, each sorted from the highest
    down.
    """
    draws = itertools.combinations_with_replacement(range(span.highest, 0, -1), count)
    return [s for s in draws if is_held_out(s) == held_out]


def solved(count: int, span: Range, held_out: bool) -> Iterator[tuple[Problem, Chain]]:
    """Every (problem, solution) pair of one side of the split."""
    for numbers in number_sets(count, span, held_out):
        for chain in chains(numbers, span.limit):
            if 1 <= chain[-1][3] <= span.target:
                yield Problem(numbers, chain[-1][3]), chain


def sample_problems(
    n: int, *, seed: int, count: int = 3, span: Range | None = None, held_out: bool = True
) -> list[Problem]:
    """`n` different solvable problems, drawn uniformly from one side of the split."""
    pool = sorted(
        {problem for problem, _ in solved(count, span or Range(), held_out)},
        key=lambda p: (p.numbers, p.target),
    )
    picks = np.random.default_rng(seed).permutation(len(pool))[:n]
    return [pool[i] for i in picks]


def format_chain(chain: Chain) -> str:
    """The words that the model writes for a solution."""
    return " ".join(f"{left} {op} {right} {result}" for left, op, right, result in chain)


def verify(problem: Problem, answer: str) -> bool:
    """Replay an answer by arithmetic: each step exact, each number used once, the target
    reached.
    """
    words = answer.replace("<eos>", " ").split()
    if len(words) != 4 * (len(problem.numbers) - 1):
        return False
    pool = list(problem.numbers)
    for i in range(0, len(words), 4):
        operator = words[i + 1]
        try:
            left, right, result = (int(words[i + k]) for k in (0, 2, 3))
            pool.remove(left)
            pool.remove(right)
        except ValueError:
            return False
        if apply(left, operator, right) != result:
            return False
        pool.append(result)
    return pool == [problem.target]
