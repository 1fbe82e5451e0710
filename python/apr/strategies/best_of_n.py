"""Best of n: sample n threads from one prompt, return the one that a verifier scores highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apr.decode import Decoded
from apr.errors import InvalidInput
from apr.session import Session
from apr.strategies._requests import Result, run_requests
from apr.strategies._reward import RewardModel
from apr.strategies._sample import check_count, sample

Verifier = Callable[[str, Decoded], float]


def logprob(_: str, item: Decoded) -> float:
    """Log-probability of the whole text under the model."""
    return item.logprob


def mean_logprob(_: str, item: Decoded) -> float:
    """The same by its length: the score where no verifier is given."""
    return item.logprob / max(len(item.tokens), 1)


_NAMED: dict[str, Verifier] = {"logprob": logprob, "mean_logprob": mean_logprob}


def best_of_n(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 16,
    generation_config: Any = None,
    seed: int = 0,
    *,
    verifier: Verifier | RewardModel | str = "mean_logprob",
    **options: Any,
) -> Any:
    """Sample `n` threads and keep the best by a verifier; ties go to the earliest.

    verifier: "logprob", "mean_logprob", a callable on (text, Decoded thread), whose `request` is the number of
    the prompt in the list, or a `RewardModel`, which scores all threads of a prompt in batches. `answer` is
    the chosen text, `scores` has one number a thread. Other arguments are those of `majority_vote`.
    """
    check_count(n)
    if isinstance(verifier, str) and verifier not in _NAMED:
        raise InvalidInput(f"verifier: got {verifier!r}; expected one of {sorted(_NAMED)}")

    def scores_of(group: list[Decoded], prompt_ids: list[int]) -> list[float]:
        if isinstance(verifier, RewardModel):
            text = tokenizer.decode(prompt_ids, skip_special_tokens=True)
            return verifier(text, [item.text for item in group])
        score = _NAMED[verifier] if isinstance(verifier, str) else verifier
        return [float(score(item.text, item)) for item in group]

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        groups, stats = sample(
            session, tokenizer, prompts, requests, n, seed, generation_config, options
        )
        results = []
        for group, ids in zip(groups, prompts, strict=True):
            scores = scores_of(group, ids)
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
