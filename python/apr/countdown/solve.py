"""Lets the adaptive model solve Countdown problems, in parallel or in one line, and replays its
answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apr.countdown.lessons import prompt
from apr.countdown.problems import Problem, verify
from apr.protocols.budget import Budget
from apr.protocols.grammar import Grammar
from apr.protocols.outcome import Outcome
from apr.protocols.runtime import run
from apr.threads.session import Session

# The model's own control flow: `<spawn> e3 e7 ... <join>` starts a child for each first operation;
# the first that finds a solution ends the others, and its chain is what the parent reads.
GRAMMAR = Grammar(
    name="countdown",
    source="this package: countdown/lessons.py",
    open="<spawn>",
    outline=r"(e\d+)",
    launch="<join>",
    context="outline",
    child="# {outline}",
    end=None,
    until="success",
    success=r"<found>[^<]*$",
    returns="message",
    message=r".*(<(?:found|none)>.*)",
)

MOST_TOKENS = (
    1800  # of one thread; the longest sequential search in the ranges that are taught takes 1,530
)


@dataclass
class Solved:
    """One problem, what the model did, and whether arithmetic agrees with its answer."""

    problem: Problem
    outcome: Outcome
    answer: str
    right: bool


def answer_of(text: str) -> str:
    """The chain that a line of reasoning stands by: its last guess or find."""
    found = re.findall(r"<(?:try|found)>([^<]*)", text)
    return found[-1].strip() if found else ""


def solve(
    session: Session,
    tokenizer: Any,
    problems: Sequence[Problem],
    mode: str = "parallel",
    *,
    budget: Budget | None = None,
    together: int = 32,
    copies: int = 1,
    **options: Any,
) -> list[Solved]:
    """Solve problems, `together` of them at once; mode "parallel" or "sequential". Greedy by
    default.

    copies: threads of each problem's prompt, for votes; their results stand next to each other.
    """
    options = {"do_sample": False, **options}
    limits = budget or Budget(threads=64, depth=2, tokens_per_thread=MOST_TOKENS)
    solved: list[Solved] = []
    for first in range(0, len(problems), together):
        wave = [p for p in problems[first : first + together] for _ in range(copies)]
        roots = []
        for i, problem in enumerate(wave):
            ids = tokenizer(prompt(problem, mode)).input_ids
            roots.append(session.thread(ids, request=first * copies + i))
        try:
            outcomes = run(session, roots, GRAMMAR, tokenizer=tokenizer, budget=limits, **options)
        finally:
            for root in roots:
                root.release()
        for problem, outcome in zip(wave, outcomes, strict=True):
            answer = answer_of(outcome.text)
            solved.append(Solved(problem, outcome, answer, verify(problem, answer)))
    return solved
