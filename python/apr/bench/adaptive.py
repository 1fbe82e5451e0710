"""The adaptive Countdown model beside its own sequential arm, votes and a verifier: tokens,
critical path, clock.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch

import apr
from apr import Budget, countdown, hf
from apr.bench.harness import Figure
from apr.countdown.lessons import EASY, HARD, draw_problem
from apr.countdown.problems import Problem, Range, verify
from apr.countdown.search import solutions
from apr.countdown.solve import MOST_TOKENS, Solved, solve

RANGES = {
    "numbers to 20, targets to 100": Range(20, 100),
    "numbers to 9, targets to 50": Range(9, 50),
}
STRATA: dict[str, Callable[[int], bool]] = {
    "all": lambda count: True,
    f"hard: at most {HARD} solutions": lambda count: count <= HARD,
    "between": lambda count: HARD < count < EASY,
    f"easy: at least {EASY} solutions": lambda count: count >= EASY,
}


@dataclass
class Arm:
    """One way to answer the same problems; numbers are per problem."""

    name: str
    right: list[bool]
    total: list[int]
    critical: list[int]
    spawned: list[bool]
    children: list[int]
    seconds: float

    def part(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Means over some of the problems."""
        if not chosen:
            return {"problems": 0}
        return {
            "problems": len(chosen),
            "right": mean(self.right[i] for i in chosen),
            "spawned": mean(self.spawned[i] for i in chosen),
            "children": mean(self.children[i] for i in chosen),
            "total_tokens": mean(self.total[i] for i in chosen),
            "critical_path_tokens": mean(self.critical[i] for i in chosen),
        }


def held_out(count: int, numbers: int, span: Range, seed: int) -> list[Problem]:
    """Problems of number sets that no training row has; drawn as the training problems are."""
    rng = random.Random(seed)
    return [draw_problem(rng, numbers, span, held_out=True) for _ in range(count)]


def _arm(name: str, solved: Sequence[Solved], seconds: float) -> Arm:
    outcomes = [item.outcome for item in solved]
    return Arm(
        name,
        [item.right for item in solved],
        [o.total_tokens for o in outcomes],
        [o.critical_path_tokens for o in outcomes],
        [o.threads > 0 for o in outcomes],
        [o.threads for o in outcomes],
        seconds,
    )


def _timed(name: str, *arguments: Any, **options: Any) -> tuple[Arm, list[Solved]]:
    began = time.perf_counter()
    solved = solve(*arguments, **options)
    return _arm(name, solved, time.perf_counter() - began), solved


def _groups(
    session: apr.Session, tokenizer: Any, problems: list[Problem], widths: Sequence[int]
) -> Iterator[Arm]:
    """Majority vote and best of n over samples of the sequential arm, n of them for each width."""
    widest = max(widths)
    began = time.perf_counter()
    sampled = solve(
        session,
        tokenizer,
        problems,
        "sequential",
        copies=widest,
        together=max(1, 128 // widest),
        do_sample=True,
        temperature=0.7,
    )
    seconds = time.perf_counter() - began
    rows = [sampled[i : i + widest] for i in range(0, len(sampled), widest)]
    for n in widths:
        for name, choose in (("majority vote", _vote), ("best of n, arithmetic verifier", _best)):
            yield Arm(
                f"{name}, {n} sequential samples",
                [choose(problem, row[:n]) for problem, row in zip(problems, rows, strict=True)],
                [sum(x.outcome.total_tokens for x in row[:n]) for row in rows],
                [max(x.outcome.critical_path_tokens for x in row[:n]) for row in rows],
                [False] * len(rows),
                [0] * len(rows),
                seconds * n / widest,
            )


def _vote(problem: Problem, row: Sequence[Solved]) -> bool:
    votes = Counter(item.answer for item in row if item.answer)
    return bool(votes) and verify(problem, votes.most_common(1)[0][0])


def _best(problem: Problem, row: Sequence[Solved]) -> bool:
    return any(item.right for item in row)


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(_line(header))
    print(_line(["---"] * len(header)))
    for row in rows:
        print(_line(row))
    print()


def _strata(problems: Sequence[Problem]) -> dict[str, list[int]]:
    counts = [solutions(p) for p in problems]
    return {name: [i for i, c in enumerate(counts) if test(c)] for name, test in STRATA.items()}


def _show_arms(span: str, arms: Sequence[Arm], strata: dict[str, list[int]]) -> None:
    print(f"\n### {span}: {len(arms[0].right)} held-out problems of four numbers\n")
    rows = []
    for arm in arms:
        part = arm.part(strata["all"])
        rows.append(
            [
                arm.name,
                f"{part['right']:.1%}",
                f"{part['total_tokens']:.0f}",
                f"{part['critical_path_tokens']:.0f}",
                f"{1000 * arm.seconds / len(arm.right):.0f}",
            ]
        )
    _table(["method", "right", "tokens", "one after the other", "ms a problem, batched"], rows)
    adaptive, sequential = arms[0], arms[1]
    rows = []
    for name, chosen in strata.items():
        if not chosen:
            continue
        ours, line = adaptive.part(chosen), sequential.part(chosen)
        rows.append(
            [
                name,
                ours["problems"],
                f"{ours['spawned']:.1%}",
                f"{ours['children']:.1f}",
                f"{ours['right']:.1%}",
                f"{line['right']:.1%}",
                f"{ours['critical_path_tokens']:.0f}",
                f"{line['critical_path_tokens']:.0f}",
                f"{line['critical_path_tokens'] / ours['critical_path_tokens']:.2f}",
            ]
        )
    _table(
        [
            "stratum",
            "problems",
            "spawns",
            "children",
            "right, adaptive",
            "right, sequential",
            "critical path, adaptive",
            "sequential",
            "ratio",
        ],
        rows,
    )


def _alone(
    session: apr.Session, tokenizer: Any, problems: Sequence[Problem]
) -> dict[str, list[float]]:
    """Seconds of one problem at a time, both arms in turn."""
    found: dict[str, list[float]] = {"parallel": [], "sequential": []}
    for problem in problems:
        for mode, seconds in found.items():
            began = time.perf_counter()
            solve(session, tokenizer, [problem], mode)
            seconds.append(time.perf_counter() - began)
    return found


def _nested(session: apr.Session, tokenizer: Any, count: int) -> dict[str, Any]:
    """Five numbers: children that spawn; every run within its budget."""
    problems = held_out(count, 5, RANGES["numbers to 20, targets to 100"], seed=11)
    budget = Budget(threads=64, depth=2, tokens=20_000, tokens_per_thread=MOST_TOKENS)
    arm, solved = _timed("nested", session, tokenizer, problems, budget=budget, together=8)
    spawned = [s.outcome for s in solved if s.outcome.threads]
    return {
        "problems": count,
        "right": mean(arm.right),
        "spawned": mean(arm.spawned),
        "deepest": max(s.outcome.depth for s in solved),
        "threads_of_spawning": mean([o.threads for o in spawned] or [0]),
        "total_tokens": mean(arm.total),
        "most_tokens": max(arm.total),
        "critical_path_tokens": mean(arm.critical),
        "over_budget": sum(s.outcome.finish == "tokens" for s in solved),
    }


@torch.no_grad()
def bench_adaptive(options: argparse.Namespace) -> Iterator[Figure]:
    """Markdown tables on standard output; a figure for each arm, with its curve, for the
    picture.
    """
    model, tokenizer = hf.load(str(countdown.ADAPTIVE), dtype=torch.float32)
    count = 6 if options.smoke else 400
    widths = (1, 2) if options.smoke else (1, 2, 4)
    with apr.Session(model, max_tokens=1 << 19, page_size=16) as session:
        for span, values in RANGES.items():
            problems = held_out(count, 4, values, seed=7)
            strata = _strata(problems)
            arms = [
                _timed("adaptive, greedy", session, tokenizer, problems)[0],
                _timed("sequential, greedy", session, tokenizer, problems, "sequential")[0],
            ]
            few = problems[: max(2, count // 3)]
            groups = list(_groups(session, tokenizer, few, widths))
            _show_arms(span, arms, strata)
            print(
                f"Samples of the sequential arm at temperature 0.7, the first {len(few)} "
                "problems:\n"
            )
            rows = [
                [a.name, f"{mean(a.right):.1%}", f"{mean(a.total):.0f}", f"{mean(a.critical):.0f}"]
                for a in [Arm("adaptive, greedy", *_first(arms[0], len(few))), *groups]
            ]
            _table(["method", "right", "tokens", "one after the other"], rows)
            for arm in (*arms, *groups):
                parts = {
                    name: arm.part([i for i in chosen if i < len(arm.right)])
                    for name, chosen in strata.items()
                }
                curve = {"right": arm.right, "total": arm.total, "critical": arm.critical}
                yield Figure(
                    f"{span}: {arm.name}",
                    [1e6 * arm.seconds / len(arm.right)],
                    facts={"strata": parts, "curve": curve},
                )
            hard = [problems[i] for i in strata[list(STRATA)[1]]][: 2 if options.smoke else 40]
            seconds = _alone(session, tokenizer, hard)
            print("One hard problem at a time, wall-clock (median, both arms in turn):")
            for mode, times in seconds.items():
                print(f"- {mode}: {1000 * median(times):.0f} ms")
                yield Figure(f"{span}: alone, {mode}", [1e6 * s for s in times])
        nested = _nested(session, tokenizer, 2 if options.smoke else 60)
        print("\n### Five numbers, children of children\n")
        _table(list(nested), [[f"{v:.3g}" if isinstance(v, float) else v for v in nested.values()]])
        yield Figure("five numbers, depth 2", [0.0], facts=nested)
        steps = apr.measure_width(session, widths=(1, 2, 4, 8, 16, 32, 64, 128))
        print(
            "A decode step of this model against its width; nearly free up to "
            f"{steps.free_width()}:\n{steps}"
        )
        yield Figure(
            "width",
            [1e6 * s for s in steps.seconds],
            facts={"widths": steps.widths, "seconds": steps.seconds, "free": steps.free_width()},
        )


def _first(arm: Arm, n: int) -> tuple[Any, ...]:
    return (
        arm.right[:n],
        arm.total[:n],
        arm.critical[:n],
        arm.spawned[:n],
        arm.children[:n],
        arm.seconds * n / len(arm.right),
    )
