"""The search space of Countdown as the adaptive model walks it: edges, bodies of a search,
solutions.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter

from apr.countdown.problems import Chain, Problem, Step

ORDER = "+-*/"  # of operators within a pair, and of the results that a body lists
LARGEST_RESULT = 100


@functools.cache
def results(left: int, right: int) -> tuple[int | None, int | None, int | None, int | None]:
    """Sum, difference, product, quotient of left >= right; None where the space has no such step.

    Left out are results outside of 1 to LARGEST_RESULT and steps that change nothing (times or
    divided by one), so that no sub-problem is searched twice for one reason.
    """
    total, product = left + right, left * right
    return (
        total if total <= LARGEST_RESULT else None,
        left - right if left != right else None,
        product if right > 1 and product <= LARGEST_RESULT else None,
        left // right if right > 1 and left % right == 0 else None,
    )


@functools.cache
def edges(numbers: tuple[int, ...]) -> tuple[tuple[int, Step, tuple[int, ...]], ...]:
    """Every first step: (edge number = 4 * pair + operator, step, the numbers that are left,
    sorted).
    """
    found, seen = [], set()
    for pair, (i, j) in enumerate(itertools.combinations(range(len(numbers)), 2)):
        left, right = numbers[i], numbers[j]
        if (left, right) in seen:
            continue
        seen.add((left, right))
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for place, result in enumerate(results(left, right)):
            if result is not None:
                after = tuple(sorted([result, *rest], reverse=True))
                found.append((4 * pair + place, (left, ORDER[place], right, result), after))
    return tuple(found)


@functools.cache
def solution_counts(numbers: tuple[int, ...]) -> Counter[int]:
    """How many chains of the space reach each target; steps in another order count as another
    chain.
    """
    if len(numbers) == 1:
        return Counter(numbers)
    counts: Counter[int] = Counter()
    for _, _, after in edges(numbers):
        counts.update(solution_counts(after))
    return counts


def solutions(problem: Problem) -> int:
    """Number of chains of the space that solve the problem."""
    return solution_counts(problem.numbers)[problem.target]


@functools.cache
def first_solution(numbers: tuple[int, ...], target: int) -> Chain | None:
    """The chain that a search in the order of `edges` finds first."""
    if len(numbers) == 1:
        return () if numbers[0] == target else None
    for _, step, after in edges(numbers):
        if solution_counts(after)[target]:
            rest = first_solution(after, target)
            assert rest is not None
            return (step, *rest)
    return None


def _line(left: int, right: int) -> list[str]:
    """A pair and its four results, `x` for those that the space leaves out."""
    values = results(left, right)
    return [str(left), str(right), *("x" if v is None else str(v) for v in values)]


def body(numbers: tuple[int, int, int], target: int) -> tuple[list[str], Chain | None]:
    """Words of a search over three numbers up to its first hit, and the chain that it found.

    Each pair is a line of six words (the pair, its four results), followed by such a line for every
    result together with the number that was left over. A hit ends its line: what the model has to
    see is whether the word that it has just written is the target.
    """
    words: list[str] = []
    seen = set()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        left, right = numbers[i], numbers[j]
        if (left, right) in seen:
            continue
        seen.add((left, right))
        words += _line(left, right)
        for place, result in enumerate(results(left, right)):
            if result is None:
                continue
            high, low = max(result, numbers[3 - i - j]), min(result, numbers[3 - i - j])
            line, last = _line(high, low), results(high, low)
            words += line[: 3 + last.index(target)] if target in last else line
            if target in last:
                step = (left, ORDER[place], right, result)
                return words, (step, (high, ORDER[last.index(target)], low, target))
    return words, None


def a_solution(numbers: tuple[int, ...], target: int, rng: random.Random) -> Chain:
    """One of the chains that reach the target, all equally likely; raises where there is none."""
    if len(numbers) == 1:
        return ()
    steps = edges(numbers)
    weights = [solution_counts(after)[target] for _, _, after in steps]
    _, step, after = rng.choices(steps, weights)[0]
    return (step, *a_solution(after, target, rng))


def a_chain(numbers: tuple[int, ...], rng: random.Random) -> Chain:
    """A random legal chain, whatever it reaches."""
    if len(numbers) == 1:
        return ()
    _, step, after = rng.choice(edges(numbers))
    return (step, *a_chain(after, rng))
