"""Self-consistency (arXiv 2203.11171): sample n threads from one prompt, return the most common answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from apr.session import Session
from apr.strategies._requests import Result, run_requests
from apr.strategies._sample import check_count, sample


def last_number(text: str) -> str | None:
    """The last number of a text, thousands separators and trailing zeros of a fraction left out."""
    found: list[str] = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def majority_vote(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 16,
    generation_config: Any = None,
    seed: int = 0,
    *,
    extract: Callable[[str], Any] = last_number,
    **options: Any,
) -> Any:
    """Sample `n` threads and vote over `extract(text)`; threads without an answer do not vote.

    prompt: a string, chat messages, or a list of them (then a list of Results comes back). Samples with
    the model's own GenerationConfig unless one is given; `options` override its fields, or go to
    `apr.decode` (streamer, progress, stop). `answer` is None where nothing could be extracted.
    """
    check_count(n)

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        groups, stats = sample(
            session, tokenizer, prompts, requests, n, seed, generation_config, options
        )
        results = []
        for group in groups:
            answers = [extract(item.text) for item in group]
            votes = Counter(a for a in answers if a is not None)
            # Counter keeps the first seen first, so ties go to the earliest thread.
            winner = votes.most_common(1)[0][0] if votes else None
            chosen = next((d for d, a in zip(group, answers, strict=True) if a == winner), group[0])
            results.append(
                Result(
                    text=chosen.text,
                    answer=winner,
                    votes=dict(votes.most_common()),
                    threads=group,
                    stats=stats,
                    trace=session.trace,
                )
            )
        return results

    return run_requests(model_or_session, tokenizer, prompt, seed, n, run)
