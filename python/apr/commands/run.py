"""Run a method on a prompt with any model, or on Countdown problems with the shipped one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import apr
from apr import countdown, hf
from apr.commands._control import run_adaptive, run_protocol
from apr.commands._methods import METHODS, run_method
from apr.commands._models import add_model_arguments, check_model_arguments, opened
from apr.countdown.problems import Problem
from apr.errors import InvalidInput
from apr.hf.world import is_first_rank, num_ranks
from apr.loop.stream import StreamStep
from apr.loop.text import GrowingText
from apr.protocols import PRESETS
from apr.strategies import Result
from apr.threads.trace import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", help='a text; for Countdown "TARGET : NUMBERS", e.g. "24 : 8 6 4"'
    )
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's chat message"
    )
    parser.add_argument(
        "--method",
        choices=(*METHODS, "adaptive"),
        help="majority_vote for --model, best_of_n for Countdown; adaptive: a model that forks",
    )
    parser.add_argument(
        "--protocol",
        choices=list(PRESETS),
        help="with --model: obey these control words of the model",
    )
    parser.add_argument("--n", type=int, default=16, help="threads, beams, points or iterations")
    parser.add_argument("--workers", type=int, default=3, help="of hogwild and group_think")
    parser.add_argument(
        "--live", action="store_true", help="show threads side by side as they write"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="1 for --model, 2 for Countdown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=200, help="Countdown problems of the table")
    parser.add_argument("--checkpoint", type=Path, default=countdown.CHECKPOINT)
    parser.add_argument("--trace", type=Path, help="write a Chrome-trace file of the run")
    parser.add_argument("--smoke", action="store_true", help="a few problems, to see it run")


class _Console(Console):
    """A terminal that shows the control characters that a model writes, and does not obey them."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


class LiveThreads:
    """Shows what each thread has written so far, while it writes."""

    def __init__(self, tokenizer: Any, console: Console, side_by_side: bool) -> None:
        self.tokenizer, self.side_by_side = tokenizer, side_by_side
        self.live = Live(console=console, refresh_per_second=12)
        self.written: dict[apr.Thread, GrowingText] = {}
        self.ended: dict[apr.Thread, str] = {}

    def __call__(self, step: StreamStep) -> None:
        for thread, token in step.tokens.items():
            if thread not in self.written:
                self.written[thread] = GrowingText(self.tokenizer, not self.side_by_side)
            self.written[thread].add(token)
        self.ended.update(step.finished)
        self.live.update(self._columns() if self.side_by_side else self._rows())

    def _texts(self) -> list[tuple[str, str, str]]:
        """(name, text, how it ended) of each thread."""
        found = []
        for i, (thread, written) in enumerate(self.written.items()):
            text = visible(written.text)
            found.append((thread.label or str(i), text, self.ended.get(thread, "")))
        return found

    def _rows(self) -> Table:
        table = Table("thread", "text", "end", box=None, pad_edge=False)
        for row in self._texts():
            table.add_row(*(Text(cell) for cell in row))
        return table

    def _columns(self) -> Table:
        table = Table(expand=True)
        texts = self._texts()
        for name, _, end in texts:
            table.add_column(Text(f"{name} ({end})" if end else name), ratio=1, overflow="fold")
        table.add_row(*(Text(text) for _, text, _ in texts))
        return table


def main(options: argparse.Namespace) -> None:
    for name in ("n", "problems", "workers"):
        if getattr(options, name) < 1:
            raise InvalidInput(f"--{name}: got {getattr(options, name)}; expected at least 1")
    if options.temperature is not None and options.temperature <= 0:
        raise InvalidInput(f"--temperature: got {options.temperature}; expected above 0")
    if not is_first_rank():
        options.trace = None  # the first one writes it
    check_model_arguments(options)
    console = _Console(markup=False)  # what models write may look like markup
    if options.protocol and not (options.model and options.prompt):
        raise InvalidInput(
            "--protocol: needs --model and --prompt; the Countdown model has words of its own"
        )
    if options.protocol:
        run_protocol(options, console)
    elif options.method == "adaptive":
        problem = parse_problem(options.prompt) if options.prompt else None
        run_adaptive(options, problem, console)
    elif options.model:
        _run_prompt(options, console)
    else:
        _run_countdown(options, console)


def _report(console: Console, result: Result, seconds: float, options: argparse.Namespace) -> None:
    written, stats = result.total_tokens, result.stats
    console.print(f"\nanswer: {result.answer}", style="bold", highlight=False)
    if result.votes:
        console.print("votes: " + ", ".join(f"{a} x{v:g}" for a, v in result.votes.items()))
    stored = (
        f"{stats.requests} requests, {stats.cancelled} of them cancelled"
        if isinstance(stats, apr.remote.Usage)
        else f"KV tokens stored {stats.stored_tokens}, with a copy a thread {stats.seen_tokens}; "
        f"pages read by several threads: {stats.shared_pages}"
    )
    console.print(
        f"{written} tokens, {result.critical_path_tokens} one after the other, in {seconds:.2f} s "
        f"({written / seconds:.0f} tokens/s); {stored}",
        highlight=False,
    )
    console.print(result.trace.tree(), highlight=False, markup=False)
    if options.trace:
        result.trace.save(options.trace)
        console.print(f"trace: {options.trace} (open it at https://ui.perfetto.dev)")


def _run_prompt(options: argparse.Namespace, console: Console) -> None:
    if not options.prompt:
        raise InvalidInput("--prompt: missing; expected a text for --model")
    options.method = options.method or "majority_vote"
    options.temperature = options.temperature or 1.0
    with opened(options) as (session, tokenizer):
        show = LiveThreads(tokenizer, console, options.live)
        began = time.perf_counter()
        with show.live:
            result = run_method(options, session, tokenizer, None, show)
        _report(console, result, time.perf_counter() - began, options)


# ---- Countdown ---------------------------------------------------------------------------------


def parse_problem(text: str) -> Problem:
    """The problem of a text, as `--prompt` takes it."""
    target, _, numbers = text.partition(":")
    try:
        return Problem(tuple(sorted(map(int, numbers.split()), reverse=True)), int(target))
    except ValueError as error:
        raise InvalidInput(
            f'--prompt: got {text!r}; expected "TARGET : NUMBERS", e.g. "24 : 8 6 4"'
        ) from error


def _run_countdown(options: argparse.Namespace, console: Console) -> None:
    if not (options.checkpoint / "model.safetensors").exists():
        raise InvalidInput(
            f"--checkpoint: no model in {options.checkpoint}; make one with: python -m apr train "
            "guess"
        )
    model, tokenizer = hf.load(str(options.checkpoint), torch.float32, num_ranks())
    options.max_new_tokens = 16
    options.method = options.method or "best_of_n"
    # Hot enough that a single sample is weak, which is when threads and a verifier matter.
    options.temperature = options.temperature or 2.0
    if options.prompt:
        problem = parse_problem(options.prompt)
    else:
        problem = _table(options, console, model, tokenizer)
    options.prompt = problem.prompt
    console.print(
        f"\nOne problem, {options.n} threads: make {problem.target} from "
        f"{', '.join(map(str, problem.numbers))} ({options.method})",
        style="bold",
        highlight=False,
    )
    with apr.Session(model, seed=options.seed) as session:
        show = LiveThreads(tokenizer, console, options.live)
        began = time.perf_counter()
        with show.live:
            result = run_method(options, session, tokenizer, problem, show)
        seconds = time.perf_counter() - began
        right = sum(countdown.verify(problem, t.text) for t in result.threads)
        _report(console, result, seconds, options)
        verdict = "right" if countdown.verify(problem, result.text) else "wrong"
        console.print(
            f"replayed by arithmetic: the answer is {verdict}; {right} of {len(result.threads)} "
            "threads are",
            highlight=False,
        )


def _table(options: argparse.Namespace, console: Console, model: Any, tokenizer: Any) -> Problem:
    """Print the table; return the hardest problem that a quarter of the widest run's threads
    solved.
    """
    count = 12 if options.smoke else options.problems
    widths = (1, 4) if options.smoke else (1, 4, 16)
    problems = countdown.sample_problems(count, seed=options.seed)
    prompts = [p.prompt for p in problems]
    table = Table(
        title=f"Countdown: {len(problems)} held-out problems, three numbers to 16, targets to 100; "
        f"sampled at temperature {options.temperature:g}"
    )
    for name in ("threads", "vote", "verifier", "tokens/s", "KV stored", "KV copied", "seconds"):
        table.add_column(name, justify="right")
    sampled = {"do_sample": True, "temperature": options.temperature}
    with apr.Session(model, seed=options.seed) as session, Progress(console=console) as progress:
        for label, n in [("1, greedy", 1), *((str(w), w) for w in widths)]:
            bar = progress.add_task(f"{label} a problem", total=n * len(problems))

            def advance(step: StreamStep, bar: Any = bar) -> None:
                progress.advance(bar, len(step.finished))

            began = time.perf_counter()
            results = apr.majority_vote(
                session,
                tokenizer,
                prompts,
                n=n,
                seed=options.seed,
                **({"do_sample": False} if label == "1, greedy" else sampled),
                max_new_tokens=options.max_new_tokens,
                extract=lambda text: text or None,
                on_step=advance,
            )
            seconds = time.perf_counter() - began
            table.add_row(label, *_figures(problems, results, seconds))
    console.print(table)
    console.print(
        "vote: the most common answer is right. verifier: arithmetic finds a right answer among "
        "the threads. KV: tokens stored for one problem's threads, and what a copy a thread would "
        "store."
    )

    def right(pair: tuple[Problem, Result]) -> int:
        return sum(countdown.verify(pair[0], t.text) for t in pair[1].threads)

    pairs = zip(problems, results, strict=True)
    solved = [pair for pair in pairs if right(pair) * 4 >= widths[-1]]
    return min(solved, key=right)[0] if solved else problems[0]


def _figures(problems: list[Problem], results: list[Result], seconds: float) -> list[str]:
    pairs = list(zip(problems, results, strict=True))
    vote = sum(countdown.verify(p, r.text) for p, r in pairs) / len(pairs)
    found = sum(any(countdown.verify(p, t.text) for t in r.threads) for p, r in pairs) / len(pairs)
    written = sum(len(t.tokens) for r in results for t in r.threads)
    # A thread's last token is never run, so it is not stored.
    own = sum(len(t.tokens) - 1 for r in results for t in r.threads) / len(pairs)
    prompt = len(problems[0].prompt.split())
    threads = len(results[0].threads)
    return [
        f"{vote:.1%}",
        f"{found:.1%}",
        f"{written / seconds:,.0f}",
        f"{prompt + own:.0f}",
        f"{threads * prompt + own:.0f}",
        f"{seconds:.1f}",
    ]
