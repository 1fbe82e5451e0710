"""Best of n: sample n threads from one prompt, return the one that a verifier scores highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apr.decode import Decoded
from apr.session import Session
from apr.strategies._requests import Result, run_requests
from apr.strategies._sample import check_count, sample

Verifier = Callable[[str, Decoded], float]


def mean_logprob(_: str, item: Decoded) -> float:
    """Length-normalised log-probability under the model: the score where no verifier is given."""
    return item.logprob / max(len(item.tokens), 1)


def best_of_n(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 16,
    generation_config: Any = None,
    seed: int = 0,
    *,
    verifier: Verifier = mean_logprob,
    **options: Any,
) -> Any:
    """Sample `n` threads and keep the best by `verifier(text, thread)`; ties go to the earliest.

    The verifier's second argument is the Decoded thread: its tokens, log-probabilities and `request`, the
    number of the prompt in the list. `answer` is the chosen text, `scores` has one number a thread. Other
    arguments are those of `majority_vote`.
    """
    check_count(n)

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        groups, stats = sample(
            session, tokenizer, prompts, requests, n, seed, generation_config, options
        )
        results = []
        for group in groups:
            scores = [float(verifier(item.text, item)) for item in group]
            chosen = group[max(range(n), key=lambda i: scores[i])]
            results.append(
                Result(
                    text=chosen.text,
                    answer=chosen.text,
                    scores=scores,
                    threads=group,
                    stats=stats,
                    trace=session.trace,
                )
            )
        return results

    return run_requests(model_or_session, tokenizer, prompt, seed, n, run)
