"""Best of n: sample n threads from one prompt, return the one that a verifier scores highest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.strategies._requests import Result, Writing, run_requests
from apr.strategies._reward import RewardModel, number
from apr.strategies._sample import check_count, sample
from apr.threads.session import Session

Verifier = Callable[[str, Decoded], float | None]


def _without_first(tokenizer: Any, prompt: list[int]) -> str:
    """The text of a prompt, tags and roles too; a classifier's tokenizer adds the first token
    itself.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    text: str = tokenizer.decode(prompt[1:] if prompt[0] == first else prompt)
    return text


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

    verifier: "logprob", "mean_logprob", a callable on (text, Decoded thread), whose `request` is
    the number of the prompt in the list, or a `RewardModel`, which scores all threads of a prompt
    in batches. One that returns None or NaN abstains: its score is NaN, and the thread is taken
    only where all are, with `answer` None. `answer` is the chosen text, `scores` has one number a
    thread. Other arguments are those of `majority_vote`.
    """
    writing = Writing(tokenizer, generation_config, options)
    check_count(n)
    if isinstance(verifier, RewardModel):
        writing.need_tokenizer("best_of_n: a RewardModel")
    if isinstance(verifier, str) and verifier not in _NAMED:
        raise InvalidInput(f"verifier: got {verifier!r}; expected one of {sorted(_NAMED)}")

    def scores_of(group: list[Decoded], prompt_ids: list[int]) -> list[float]:
        if isinstance(verifier, RewardModel):
            return verifier(_without_first(tokenizer, prompt_ids), [item.text for item in group])
        score = _NAMED[verifier] if isinstance(verifier, str) else verifier
        return [number("verifier", score(item.text, item)) for item in group]

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        if isinstance(verifier, str):
            session.table.need_logprobs(f"best_of_n: verifier={verifier!r}")
        groups, stats = sample(session, writing, prompts, requests, n, seed)
        results = []
        for group, ids in zip(groups, prompts, strict=True):
            scores = scores_of(group, ids)
            judged = [i for i in range(n) if not math.isnan(scores[i])]
            chosen = group[max(judged, key=lambda i: scores[i], default=0)]
            results.append(
                Result(
                    text=chosen.text,
                    answer=chosen.text if judged else None,
                    scores=scores,
                    threads=group,
                    stats=stats,
                    trace=session.trace,
                )
            )
        return results

    return run_requests(model_or_session, writing, prompt, seed, n, run)
