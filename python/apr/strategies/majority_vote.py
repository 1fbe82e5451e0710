"""Self-consistency (arXiv 2203.11171): sample n threads from one prompt, return the most common
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.stream import StreamStep
from apr.strategies._answers import last_number
from apr.strategies._requests import Result, Writing, run_requests
from apr.strategies._reward import number
from apr.strategies._sample import resolve_width, sample
from apr.threads.session import Session
from apr.threads.thread import Thread

Extract = Callable[[str], Any]
Weight = Callable[[str, Decoded], float]


def count_votes(
    group: list[Decoded], extract: Extract, weight: Weight | None
) -> tuple[dict[Any, float], dict[Any, Decoded]]:
    """Votes of the threads that ended, most first, and the earliest thread of each answer."""
    votes: dict[Any, float] = {}
    first: dict[Any, Decoded] = {}
    for item in group:
        answer = extract(item.text) if item.finish not in ("", "pruned") else None
        counts = 1 if weight is None else number("weight", weight(item.text, item))
        if answer is not None and not math.isnan(counts):
            first.setdefault(answer, item)
            votes[answer] = votes.get(answer, 0) + counts
    # Sorting is stable, so ties go to the answer that the earliest thread gave.
    return dict(sorted(votes.items(), key=lambda pair: -pair[1])), first


def decided(votes: dict[Any, float], open_threads: int) -> bool:
    """Whether votes of weight 1 from so many more threads cannot change who leads."""
    first, second, *_ = [*votes.values(), 0, 0]
    return first > second + open_threads


def majority_vote(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int | str = 16,
    generation_config: Any = None,
    seed: int = 0,
    *,
    extract: Extract = last_number,
    weight: Weight | None = None,
    stop_early: bool = False,
    **options: Any,
) -> Any:
    """Sample `n` threads and vote over `extract(text)`; threads without an answer do not vote.

    n "auto": as many as this machine steps nearly for free with this model (`apr.measure_width`).

    prompt: a string, chat messages, or a list of them (then a list of Results comes back). Samples
    with the model's own GenerationConfig unless one is given, and samples unless do_sample is
    False; `options` override its fields, or go to `apr.decode` (streamer, progress, stop,
    logits_processor, skip_special_tokens), or to the chat template (chat_template_kwargs). Texts
    are what the model wrote, blanks and special tokens too. extract: `last_number`, `boxed`,
    `matching(pattern)` of `apr.strategies`, or a callable of yours. weight(text, thread): what a
    vote counts, 1 if not given; a thread of weight None or NaN does not vote. stop_early: once
    threads that still write cannot change the outcome they end ("pruned"); for votes of weight 1.
    `answer` is None where nothing could be extracted.
    """
    writing = Writing(tokenizer, generation_config, options)
    if extract is last_number:
        writing.need_tokenizer("majority_vote: extract=last_number")
    width = resolve_width(model_or_session, n, seed)
    if stop_early and "prune" in options:
        raise InvalidInput(
            "majority_vote: got stop_early and prune, which both say who ends; leave one of them "
            "out"
        )
    if stop_early and weight is not None:
        raise InvalidInput(
            "majority_vote: got stop_early with a weight; a vote of unknown weight may always "
            "change the outcome; leave one of them out"
        )

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        def prune(step: StreamStep, results: dict[Thread, Decoded]) -> Iterable[Thread]:
            everyone = list(results.values())
            for first in range(0, len(everyone) if step.finished else 0, width):
                group = everyone[first : first + width]
                still = [item.thread for item in group if not item.finish]
                if still and decided(count_votes(group, extract, None)[0], len(still)):
                    yield from still

        more = {"prune": prune} if stop_early else {}
        groups, stats = sample(session, writing, prompts, requests, width, seed, **more)
        results = []
        for group in groups:
            votes, first = count_votes(group, extract, weight)
            winner = next(iter(votes), None)
            chosen = first.get(winner, group[0])
            results.append(
                Result(
                    text=chosen.text,
                    answer=winner,
                    votes=votes,
                    threads=group,
                    stats=stats,
                    trace=session.trace,
                )
            )
        return results

    return run_requests(model_or_session, writing, prompt, seed, width, run)
