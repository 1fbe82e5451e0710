"""What the adaptive model is taught: records of a guess, a spawn, children and a join, or one
sequential search.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from apr.countdown.problems import Chain, Problem, Range, Step, format_chain, is_held_out
from apr.countdown.search import (
    a_chain,
    a_solution,
    body,
    edges,
    first_solution,
    solution_counts,
    solutions,
)
from apr.countdown.tokenizer import WORDS
from apr.protocols.record import Record

# Problems of so many solutions are hard: the model should not lose time on a guess. Fixed before
# training.
HARD = 2
EASY = 9  # and of so many or more are easy

_IDS = {word: i for i, word in enumerate(WORDS)}
_ANY_FIRST = 10  # targets are drawn from here on


def encode(words: Sequence[str]) -> list[int]:
    """Token ids of words of the Countdown vocabulary."""
    return [_IDS[word] for word in words]


def prompt(problem: Problem, mode: str = "parallel") -> str:
    """The words before the model's own: the mode, the target, the numbers."""
    return f"<bos> <{mode}> {problem.target} : {' '.join(map(str, problem.numbers))}"


def draw_problem(rng: random.Random, count: int, span: Range, held_out: bool = False) -> Problem:
    """A solvable problem: its numbers uniform, then its target among those that can be reached."""
    while True:
        numbers = tuple(sorted((rng.randint(1, span.highest) for _ in range(count)), reverse=True))
        if is_held_out(numbers) != held_out:
            continue
        counts = solution_counts(numbers)
        targets = [t for t in range(_ANY_FIRST, span.target + 1) if counts[t]]
        if targets:
            return Problem(numbers, rng.choice(targets))


def _step_words(step: Step, after: tuple[int, ...]) -> list[str]:
    left, operator, right, result = step
    return [str(left), operator, str(right), str(result), ":", *map(str, after)]


def _found(chain: Chain | None) -> list[str]:
    return ["<none>"] if chain is None else ["<found>", *format_chain(chain).split()]


class _Lesson:
    """Writes pieces of a record in words."""

    def __init__(self) -> None:
        self.record = Record()

    def write(self, piece: int, words: Sequence[str], sampled: bool = True) -> None:
        self.record.write(piece, encode(words), sampled)

    def guess(self, piece: int, problem: Problem, chain: Chain, decided: bool) -> None:
        """A try and its verdict. Of a wrong guess only the arithmetic is taught, not the
        choices.
        """
        right = chain[-1][3] == problem.target
        self.write(piece, ["<try>"], sampled=decided)
        for left, operator, right_hand, result in chain:
            self.write(piece, [str(left), operator, str(right_hand)], sampled=right)
            self.write(piece, [str(result)])
        self.write(piece, ["<ok>", "<eos>"] if right else ["<miss>"])

    def spawn(
        self,
        piece: int,
        numbers: tuple[int, ...],
        target: int,
        rng: random.Random,
        children: int,
        decided: bool = True,
    ) -> Chain | None:
        """The block, some of its children, and what the join puts in; returns the chain that comes
        back.

        One of the children finds a solution if any does; the others are random.
        """
        self.write(piece, ["<spawn>"], sampled=decided)
        opened = len(self.record.pieces[piece].ids)
        steps = edges(numbers)
        self.write(piece, [f"e{number}" for number, _, _ in steps])
        self.write(piece, ["<join>"])
        hits = [i for i, (_, _, after) in enumerate(steps) if solution_counts(after)[target]]
        picks = {rng.randrange(len(steps)) for _ in range(children - 1)}
        picks.add(rng.choice(hits) if hits else rng.randrange(len(steps)))
        for i in picks:
            number, step, after = steps[i]
            child = self.record.after(piece, opened, thread=len(self.record.pieces))
            self.write(child, ["#", f"e{number}"], sampled=False)
            self.child(child, step, after, target, rng, children)
        chain: Chain | None = None
        if hits:
            _, step, after = steps[rng.choice(hits)]  # whichever child is the first to end
            rest = first_solution(after, target)
            chain = None if rest is None else (step, *rest)
        self.write(piece, _found(chain), sampled=False)
        return chain

    def child(
        self,
        piece: int,
        step: Step,
        after: tuple[int, ...],
        target: int,
        rng: random.Random,
        children: int,
    ) -> None:
        self.write(piece, _step_words(step, after))
        rest: Chain | None
        if len(after) == 3:
            words, rest = body((after[0], after[1], after[2]), target)
            self.write(piece, words)
        else:
            rest = self.spawn(piece, after, target, rng, children)
        self.write(piece, [*_found(None if rest is None else (step, *rest)), "<eos>"])


def _misses(problem: Problem, rng: random.Random, decisions: bool) -> list[Chain]:
    """Wrong chains to begin with: one, or up to three where the lesson leaves open how often to
    try.
    """
    count = 1 if decisions else rng.choice((1, 1, 2, 3))
    drawn = [a_chain(problem.numbers, rng) for _ in range(20)]
    return [chain for chain in drawn if chain[-1][3] != problem.target][:count]


def parallel_record(
    problem: Problem, rng: random.Random, children: int = 2, decisions: bool = True
) -> Record:
    """One problem as a tree of lessons on its prompt: a right guess, and a spawn after a miss or at
    once.

    decisions: whether it is taught when to guess and when to spawn, or only how.
    """
    lesson = _Lesson()
    root = lesson.record.start(encode(prompt(problem).split()))
    hard = solutions(problem) <= HARD
    if not hard:
        lesson.guess(
            lesson.record.after(root, thread=1),
            problem,
            a_solution(problem.numbers, problem.target, rng),
            decided=decisions,
        )
    if hard and rng.random() < 0.75:
        piece = lesson.record.after(root, thread=2)
    else:
        piece = lesson.record.after(root, thread=2)
        misses = _misses(problem, rng, decisions)
        if not misses:
            return lesson.record
        for miss in misses:
            lesson.guess(piece, problem, miss, decided=decisions and not hard)
    lesson.spawn(piece, problem.numbers, problem.target, rng, children, decisions)
    lesson.write(piece, ["<eos>"])
    return lesson.record


def guesses_record(problem: Problem, rng: random.Random, branches: int = 3) -> Record:
    """Right guesses alone, side by side on one prompt; whether to guess is not taught here."""
    lesson = _Lesson()
    root = lesson.record.start(encode(prompt(problem).split()))
    for _ in range(branches):
        chain = a_solution(problem.numbers, problem.target, rng)
        lesson.guess(lesson.record.after(root), problem, chain, decided=False)
    return lesson.record


def sequential_record(problem: Problem, rng: random.Random, decisions: bool = True) -> Record:
    """The same problem in one line: the guess, then the children's searches one after the other."""
    lesson = _Lesson()
    piece = lesson.record.start(encode(prompt(problem, "sequential").split()))
    hard = solutions(problem) <= HARD
    if not hard and rng.random() < 0.5:
        chain = a_solution(problem.numbers, problem.target, rng)
        lesson.guess(piece, problem, chain, decided=decisions)
        return lesson.record
    if not (hard and rng.random() < 0.75):
        for miss in _misses(problem, rng, decisions):
            lesson.guess(piece, problem, miss, decided=decisions and not hard)
    for place, (number, step, after) in enumerate(edges(problem.numbers)):
        lesson.write(piece, ["#"], sampled=decisions or place > 0)
        lesson.write(piece, [f"e{number}", *_step_words(step, after)])
        words, rest = body((after[0], after[1], after[2]), problem.target)
        lesson.write(piece, words)
        if rest is not None:
            lesson.write(piece, [*_found((step, *rest)), "<eos>"])
            return lesson.record
    lesson.write(piece, [*_found(None), "<eos>"])
    return lesson.record
