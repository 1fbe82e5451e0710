"""`apr.run`: lets threads write under a control grammar, many requests at once, within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from apr.errors import InvalidInput
from apr.loop.sampling import UNSET_LENGTH as _UNSET_LENGTH
from apr.loop.sampling import new_token_limit
from apr.loop.stream import StreamStep, stream
from apr.loop.width import measure_width
from apr.protocols.budget import Budget
from apr.protocols.grammar import Grammar
from apr.protocols.markers import Words
from apr.protocols.outcome import Outcome, outcome
from apr.protocols.record import Record
from apr.protocols.scheduler import Scheduler
from apr.protocols.worker import Request, Worker
from apr.threads.session import Session
from apr.threads.thread import Thread

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessor

_ENDLESS = 1 << 30  # the stream's own limit; the budget's is what counts


def run(
    session: Session,
    threads: Thread | Sequence[Thread],
    grammar: Grammar,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any,
    budget: Budget | None = None,
    width: int | Literal["auto"] | None = None,
    logits_processor: Callable[[Worker], Sequence[LogitsProcessor]] | None = None,
    on_step: Callable[[StreamStep], None] | None = None,
    **options: Any,
) -> Any:
    """Let each thread write, and fork, join and go on as its own words say; an Outcome a thread, in
    order.

    All threads that can write, of all requests, take one token in one batch each step; children
    write from the step after their launch.

    width: children of a block that lists no outlines, and threads at once for the other grammars;
    "auto": as many as this machine steps nearly for free. options: of the configuration;
    max_new_tokens (or max_length) and max_time limit as `Budget.tokens_per_thread` and `seconds`
    do, min_new_tokens counts from the last join. logits_processor: called once a thread with its
    worker (`.depth`, `.outline`, `.path`), returns processors for it alone.

    The threads given stay the caller's; all others are released, on any exception too. Raises
    BudgetExceeded with `Budget(at_limit="raise")`.
    """
    several = not isinstance(threads, Thread)
    roots: list[Thread] = list(threads) if not isinstance(threads, Thread) else [threads]
    if not roots or len(set(roots)) != len(roots):
        raise InvalidInput("run: expected at least one thread, each listed once")
    if grammar.needs_keys:
        session.table.need_keys(f"run: grammar {grammar.name!r} joins keys")
    limits = budget or Budget()
    if width is not None:
        width = free_threads(session) if width == "auto" else width
        if grammar.launch is None:
            grammar = dataclasses.replace(grammar, width=width)
        else:
            limits = dataclasses.replace(limits, threads=width)
    if limits.bytes is not None and not (session.spec.bytes_per_token or session.spec.states):
        raise InvalidInput("budget: got bytes, and no keys and values are kept here; leave it out")
    words = Words(tokenizer, [grammar.open, grammar.launch, grammar.sync, grammar.end])
    with stream(session, [], generation_config, tokenizer=tokenizer, **options) as writing:
        limits = _with_config(limits, writing.config, max(map(len, roots)))
        writing.check_words(words.words)
        # A stream begins to count anew at each join, so that the budget's own count comes first.
        writing.config.max_new_tokens = limits.tokens_per_thread or _ENDLESS
        writing.config.max_time = None
        scheduler = Scheduler(
            session, writing, grammar, words, logits_processor or (lambda worker: ())
        )
        most = free_threads(session) if limits.threads == "auto" else limits.threads
        try:
            for root in roots:
                scheduler.admit(root, Request(limits, int(most), Record()))
            scheduler.steps(on_step)
        except BaseException:
            scheduler.abandon()
            raise
    stats = session.stats
    results: list[Outcome] = [
        outcome(grammar, words, request, stats, session.trace) for request in scheduler.requests
    ]
    return results if several else results[0]


def _with_config(budget: Budget, config: GenerationConfig, prompt: int) -> Budget:
    """The budget, with what the configuration limits: a stream would begin to count anew at each
    join.
    """
    most, seconds = budget.tokens_per_thread, budget.seconds
    if config.max_new_tokens is not None or config.max_length not in (None, _UNSET_LENGTH):
        most = min(most or _ENDLESS, new_token_limit(config, prompt))
    if config.max_time is not None:
        seconds = min(seconds or float("inf"), float(config.max_time))
    if most is not None and most < 1:
        raise InvalidInput(
            f"run: max_length leaves {most} new tokens; raise it, or use max_new_tokens"
        )
    return dataclasses.replace(budget, tokens_per_thread=most, seconds=seconds)


def free_threads(session: Session) -> int:
    """Threads that this machine steps nearly for free with this model; measured, about a second."""
    return measure_width(session).free_width()
