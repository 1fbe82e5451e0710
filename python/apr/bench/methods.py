"""Every method on Countdown with the shipped model: accuracy, tokens, seconds, pages against their
bound.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import apr
from apr import countdown, hf
from apr.bench.harness import Figure
from apr.countdown.problems import Problem
from apr.strategies import Result
from apr.threads.thread import Thread

TEMPERATURE = 2.0  # one sample is weak, which is when more of them matter
TOKENS = 12  # of an answer, its end included
PAGE = 16

Method = Callable[[apr.Session, Any, list[Problem]], list[Result]]


class WatchedSession(apr.Session):
    """Notes the most pages in use after a step, and the pages that the tokens then stored must
    take.
    """

    most_pages = 0
    bound = 0

    def advance(self, threads: Sequence[Thread], choose: Callable[[Tensor], Any]) -> Any:
        chosen = super().advance(threads, choose)
        stats = self.stats
        if stats.used_pages > self.most_pages:
            self.most_pages = stats.used_pages
            self.bound = -(-stats.stored_tokens // self.page_size)
        return chosen


def a_thought(tokens: list[int]) -> bool:
    """A step of a solution: two numbers, an operator, their result."""
    return len(tokens) % 4 == 0


def _sampled(**more: Any) -> dict[str, Any]:
    return {"do_sample": True, "temperature": TEMPERATURE, "max_new_tokens": TOKENS, **more}


def _each(run: Callable[[apr.Session, Any, Problem], Result]) -> Method:
    return lambda session, tokenizer, problems: [run(session, tokenizer, p) for p in problems]


def _vote(n: int, **options: Any) -> Method:
    def run(session: apr.Session, tokenizer: Any, problems: list[Problem]) -> list[Result]:
        prompts = [p.prompt for p in problems]
        settings = {**_sampled(), **options}
        found: list[Result] = apr.majority_vote(
            session, tokenizer, prompts, n=n, extract=lambda text: text or None, **settings
        )
        return found

    return run


def _best(session: apr.Session, tokenizer: Any, problems: list[Problem]) -> list[Result]:
    found: list[Result] = apr.best_of_n(
        session,
        tokenizer,
        [p.prompt for p in problems],
        n=16,
        verifier=lambda text, item: float(countdown.verify(problems[item.request], text)),
        **_sampled(),
    )
    return found


def _beam(session: apr.Session, tokenizer: Any, problems: list[Problem]) -> list[Result]:
    prompts = [p.prompt for p in problems]
    found: list[Result] = apr.beam_search(
        session, tokenizer, prompts, num_beams=16, max_new_tokens=TOKENS
    )
    return found


def _verified_beam(session: apr.Session, tokenizer: Any, problems: list[Problem]) -> list[Result]:
    """The beam's texts, of which arithmetic chooses."""
    results = _beam(session, tokenizer, problems)
    for problem, result in zip(problems, results, strict=True):
        right = [t.text for t in result.threads if countdown.verify(problem, t.text)]
        result.text = (right or [result.text])[0]
    return results


def _tree(order: str) -> Method:
    def run(session: apr.Session, tokenizer: Any, problem: Problem) -> Result:
        def right(text: str) -> bool:
            return countdown.verify(problem, text)

        found: Result = apr.tree_search(
            session,
            tokenizer,
            problem.prompt,
            n=4,
            width=4,
            depth=len(problem.numbers),
            order=order,
            evaluate=lambda text: float(right(text)),
            goal=right,
            most_tokens=16 * TOKENS,
            stop=a_thought,
            **_sampled(),
        )
        return found

    return _each(run)


def _mcts(session: apr.Session, tokenizer: Any, problem: Problem) -> Result:
    found: Result = apr.mcts(
        session,
        tokenizer,
        problem.prompt,
        n=4,
        parallel=4,
        iterations=64,
        depth=len(problem.numbers),
        reward=lambda text: float(countdown.verify(problem, text)),
        enough=1.0,
        rollout_tokens=TOKENS,
        most_tokens=16 * TOKENS,
        stop=a_thought,
        **_sampled(),
    )
    return found


METHODS: dict[str, Method] = {
    "sequential, greedy": _vote(1, do_sample=False, temperature=None),
    "sequential, sampled": _vote(1),
    "majority vote, 16": _vote(16),
    "majority vote, 16, stops early": _vote(16, stop_early=True),
    "best of 16, arithmetic verifier": _best,
    "beam search, 16": _beam,
    "beam search, 16, arithmetic verifier": _verified_beam,
    "tree search, breadth first, arithmetic evaluator": _tree("bfs"),
    "tree search, depth first, arithmetic evaluator": _tree("dfs"),
    "MCTS, arithmetic reward": _each(_mcts),
}


@torch.no_grad()
def bench_methods(options: argparse.Namespace) -> Iterator[Figure]:
    """One line a method, as a row of a Markdown table; the searches get at most as many tokens as
    16 samples.
    """
    model, tokenizer = hf.load(str(countdown.CHECKPOINT), dtype=torch.float32)
    count = 6 if options.smoke else 200
    problems = countdown.sample_problems(count, seed=0)
    print(
        f"{count} held-out Countdown problems; tokens are means a problem; pages of {PAGE} tokens"
    )
    print(
        "| method | right | tokens | one after the other | ms a problem | most pages, alone | "
        "bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        with apr.Session(model, max_tokens=1 << 17, page_size=PAGE) as session:
            method(session, tokenizer, problems[:2])  # not counted
            began = time.perf_counter()
            results = method(session, tokenizer, problems)
            seconds = time.perf_counter() - began
        watched = WatchedSession(model, max_tokens=1 << 14, page_size=PAGE)
        with watched:
            method(watched, tokenizer, problems[:1])
            pages, bound, left = watched.most_pages, watched.bound, watched.stats.used_pages
        right = sum(countdown.verify(p, r.text) for p, r in zip(problems, results, strict=True))
        facts = {
            "right": right / count,
            "tokens": sum(r.total_tokens for r in results) / count,
            "critical_path_tokens": sum(r.critical_path_tokens for r in results) / count,
            "most_pages": pages,
            "bound_pages": bound,
            "pages_left": left,
        }
        figure = Figure(name, [seconds / count * 1e6], facts=facts)
        print(
            f"| {name} | {facts['right']:.1%} | {facts['tokens']:.1f} | "
            f"{facts['critical_path_tokens']:.1f} | {seconds / count * 1e3:.1f} | {pages} | "
            f"{bound} |"
        )
        yield figure
