"""Runs in which the model decides: any checkpoint under a preset, or the adaptive Countdown
model.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

import apr
from apr import countdown, hf, protocols
from apr.bench.adaptive import STRATA, held_out
from apr.commands._models import opened
from apr.countdown.problems import Problem, Range
from apr.countdown.search import solutions
from apr.countdown.solve import Solved, solve
from apr.errors import InvalidInput
from apr.hf.world import num_ranks
from apr.protocols import Branch, Grammar, Outcome
from apr.threads.trace import visible

_WIDEST = 240  # characters of a thread's text in the tree


def show(console: Console, outcome: Outcome) -> None:
    """The threads as a tree, and the figures."""

    def label(branch: Branch) -> Text:
        name = "the answer" if not branch.depth else f"child {branch.n}"
        text = branch.text if len(branch.text) <= _WIDEST else f"{branch.text[:_WIDEST]} ..."
        return Text(f"{name} · {branch.sampled} tokens · {branch.finish} · {visible(text)}")

    def grow(tree: Tree, branch: Branch) -> None:
        for child in branch.children:
            grow(tree.add(label(child)), child)

    tree = Tree(label(outcome.root))
    grow(tree, outcome.root)
    console.print(tree, highlight=False)
    console.print(
        f"{outcome.total_tokens} tokens sampled, {outcome.critical_path_tokens} one after the "
        f"other (parallel ratio {outcome.parallel_ratio:.2f}, acceleration "
        f"{outcome.acceleration:.2f}), {outcome.injected_tokens} put in, {outcome.threads} "
        f"children, depth {outcome.depth}, {outcome.seconds:.2f} s",
        highlight=False,
    )
    for event in outcome.events:
        console.print(f"note: {event}", highlight=False)


def run_protocol(options: argparse.Namespace, console: Console) -> None:
    """`--model M --protocol NAME --prompt TEXT`."""
    grammar = protocols.PRESETS[options.protocol]
    if grammar.width:
        grammar = dataclasses.replace(grammar, width=options.n)
    with opened(options) as (session, tokenizer):
        _run_protocol(options, console, grammar, session, tokenizer)


def _run_protocol(
    options: argparse.Namespace, console: Console, grammar: Grammar, session: Any, tokenizer: Any
) -> None:
    if options.chat:
        message = [{"role": "user", "content": options.prompt}]
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInput("--chat: the tokenizer has no chat template; leave it out")
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = tokenizer(options.prompt).input_ids
    outcome = apr.run(
        session,
        session.thread(ids),
        grammar,
        tokenizer=tokenizer,
        budget=apr.Budget(tokens_per_thread=options.max_new_tokens),
        do_sample=True,
        temperature=options.temperature or 1.0,
    )
    show(console, outcome)
    if options.trace:
        session.trace.save(options.trace)


def run_adaptive(options: argparse.Namespace, problem: Problem | None, console: Console) -> None:
    """A table over held-out problems, or one problem, by the model that decides by itself."""
    folder = (
        countdown.ADAPTIVE if options.checkpoint == countdown.CHECKPOINT else options.checkpoint
    )
    if not (folder / "model.safetensors").exists():
        raise InvalidInput(
            f"--checkpoint: no model in {folder}; make one with: python -m apr train countdown"
        )
    if problem is not None and len(problem.numbers) not in (4, 5):
        raise InvalidInput(
            f"--prompt: got {len(problem.numbers)} numbers; the adaptive model takes four or five"
        )
    model, tokenizer = hf.load(str(folder), torch.float32, num_ranks())
    with apr.Session(model, max_tokens=1 << 18, page_size=16, seed=options.seed) as session:
        if problem is None:
            problem = _table(options, session, tokenizer, console)
        console.print(
            f"\nMake {problem.target} from {', '.join(map(str, problem.numbers))}; the search "
            "space has "
            f"{solutions(problem)} solutions",
            style="bold",
            highlight=False,
        )
        for mode in ("parallel", "sequential") if len(problem.numbers) == 4 else ("parallel",):
            found = solve(session, tokenizer, [problem], mode)[0]
            verdict = "right" if found.right else "wrong"
            console.print(f"\n{mode}: {found.answer} ({verdict})", style="bold", highlight=False)
            show(console, found.outcome)
        if options.trace:
            session.trace.save(options.trace)


def _table(
    options: argparse.Namespace, session: apr.Session, tokenizer: Any, console: Console
) -> Problem:
    """Print both arms by strata; return a hard problem that the adaptive arm solved."""
    count = 12 if options.smoke else options.problems
    problems = held_out(count, 4, Range(20, 100), seed=options.seed + 1)
    table = Table(
        title=f"Countdown, four numbers to 20, targets to 100: {count} held-out problems, greedy"
    )
    for name in (
        "stratum",
        "problems",
        "arm",
        "right",
        "spawns",
        "children",
        "tokens",
        "critical path",
    ):
        table.add_column(name, justify="left" if name in ("stratum", "arm") else "right")
    arms: dict[str, list[Solved]] = {}
    seconds = {}
    for mode in ("parallel", "sequential"):
        began = time.perf_counter()
        arms[mode] = solve(session, tokenizer, problems, mode)
        seconds[mode] = time.perf_counter() - began
    for stratum, test in STRATA.items():
        for mode, solved in arms.items():
            part = [s for s in solved if test(solutions(s.problem))]
            if part:
                table.add_row(stratum, str(len(part)), mode, *_cells(part))
    console.print(table)
    console.print(", ".join(f"{mode}: {s:.1f} s for all" for mode, s in seconds.items()))
    hard = [s for s in arms["parallel"] if s.right and s.outcome.threads]
    return min(hard or arms["parallel"], key=lambda s: solutions(s.problem)).problem


def _cells(part: list[Solved]) -> list[str]:
    n = len(part)
    return [
        f"{sum(s.right for s in part) / n:.1%}",
        f"{sum(s.outcome.threads > 0 for s in part) / n:.1%}",
        f"{sum(s.outcome.threads for s in part) / n:.1f}",
        f"{sum(s.outcome.total_tokens for s in part) / n:.0f}",
        f"{sum(s.outcome.critical_path_tokens for s in part) / n:.0f}",
    ]
