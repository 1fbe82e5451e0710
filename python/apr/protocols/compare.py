"""One and the same text under several joins: what each way to come back does to the logits that
follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apr.errors import InvalidInput
from apr.protocols.budget import Budget
from apr.protocols.grammar import Grammar, Returns
from apr.protocols.outcome import Outcome
from apr.protocols.replays import Path, Replay, replay, script_of
from apr.threads.session import Session

JOINS: tuple[Returns, ...] = ("max", "sum", "text", "message")


@dataclass(frozen=True)
class JoinDifference:
    """How one join's logits differ from the run's own, over the tokens that parents sampled after
    joins.
    """

    returns: str
    tokens: int
    mean: float  # of the largest |difference| of each token's logits
    most: float
    divergence: float  # mean KL(own || this), nats
    agreement: float  # of the most likely tokens
    logprob: float  # mean natural log-probability of what the run wrote


def _after_joins(played: Replay) -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] and tokens [n] of all that was sampled after a join."""
    script = script_of(played.outcome)
    rows, tokens = [], []
    for path, first in sorted(played.joined.items()):
        logits = played.logits[path][first:]
        rows.append(logits)
        tokens += script[path][first : first + len(logits)]
    if not rows or not tokens:
        raise InvalidInput(
            "compare_joins: the run wrote nothing after a join; there is nothing to compare"
        )
    return torch.cat(rows), torch.tensor(tokens, device="cpu")


def _variant(grammar: Grammar, returns: Returns) -> Grammar:
    silent = returns in ("max", "sum") and not grammar.after
    return replace(
        grammar,
        returns=returns,
        rollback=grammar.rollback and returns not in ("max", "sum"),
        after="\n" if silent else grammar.after,
    )


def _possible(grammar: Grammar) -> list[Returns]:
    possible: list[Returns] = []
    for returns in JOINS:
        with contextlib.suppress(InvalidInput):
            _variant(grammar, returns)
            possible.append(returns)
    return possible


def compare_joins(
    session: Session,
    outcome: Outcome,
    *,
    tokenizer: Any,
    joins: Sequence[Returns] | None = None,
    budget: Budget | None = None,
) -> list[JoinDifference]:
    """Run an outcome's text again under its own join and under each of `joins`; by default under
    all of "max", "sum", "text" and "message" that its grammar could have.

    The children's text is the same every time; what their parents sampled after a join is compared.
    Threads that a limit or a winner had ended early end at the same token.
    """
    script: dict[Path, list[int]] = script_of(outcome)
    prompt = outcome.record.pieces[0].ids[: outcome.prompt_tokens]

    def played(grammar: Grammar) -> Replay:
        thread = session.thread(prompt)
        try:
            return replay(session, thread, grammar, script, tokenizer=tokenizer, budget=budget)
        finally:
            thread.release()

    own, tokens = _after_joins(played(outcome.grammar))
    own_log = own.log_softmax(-1)
    found = []
    for returns in _possible(outcome.grammar) if joins is None else joins:
        other, same = _after_joins(played(_variant(outcome.grammar, returns)))
        if not torch.equal(same, tokens):
            raise InvalidInput(
                f"compare_joins: returns={returns!r} led to other blocks; not comparable"
            )
        log = other.log_softmax(-1)
        per_token = (other - own).abs().amax(-1)
        found.append(
            JoinDifference(
                returns=returns,
                tokens=len(tokens),
                mean=float(per_token.mean()),
                most=float(per_token.max()),
                divergence=float((own_log.exp() * (own_log - log)).sum(-1).mean()),
                agreement=float((other.argmax(-1) == own.argmax(-1)).float().mean()),
                logprob=float(log.gather(-1, tokens[:, None]).mean()),
            )
        )
    return found
