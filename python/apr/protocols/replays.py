"""Runs a given text through the runtime: the same threads and blocks, with what the model would
have said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apr.protocols.budget import Budget
from apr.protocols.grammar import Grammar
from apr.protocols.outcome import Branch, Outcome
from apr.protocols.runtime import run
from apr.protocols.worker import Worker
from apr.threads.session import Session
from apr.threads.thread import Thread

Path = tuple[tuple[int, int], ...]


class _Forced:
    """Lets one thread write given tokens, and keeps the logits that they were chosen from."""

    def __init__(self, worker: Worker, tokens: Sequence[int], after: int | None) -> None:
        self.worker, self.tokens, self.after = worker, list(tokens), after
        self.logits: list[Tensor] = []
        self.joined: int | None = None  # its place when its first join had come back

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = len(self.logits)
        if self.joined is None and self.worker.joins:
            self.joined = place
        self.logits.append(scores[0].clone())
        token = self.tokens[place] if place < len(self.tokens) else self.after
        if token is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced


def script_of(outcome: Outcome) -> dict[Path, list[int]]:
    """What each thread of a run sampled, by its path."""
    record, script = outcome.record, {}

    def visit(branch: Branch) -> None:
        pieces = [record.pieces[p] for p in branch.pieces]
        script[branch.path] = [
            i for p in pieces for i, s in zip(p.ids, p.sampled, strict=True) if s
        ]
        for child in branch.children:
            visit(child)

    visit(outcome.root)
    return script


@dataclass(frozen=True)
class Replay:
    """A run of given text: its outcome, and what the model made of each thread."""

    outcome: Outcome
    logits: dict[
        Path, Tensor
    ]  # float32 [sampled, vocab]: what each token would have been chosen from
    joined: dict[Path, int]  # how many tokens a thread had sampled when its first join came back


def replay(
    session: Session,
    thread: Thread,
    grammar: Grammar,
    script: Mapping[Path, Sequence[int]],
    *,
    tokenizer: Any,
    budget: Budget | None = None,
) -> Replay:
    """Run `script` (token ids of each thread by path, () is the root) as if the model had written
    it.

    A thread whose script is at its end writes EOS.
    """
    after = getattr(tokenizer, "eos_token_id", None)
    forced: dict[Path, _Forced] = {}

    def processors(worker: Worker) -> list[_Forced]:
        forced[worker.path] = _Forced(worker, script.get(worker.path, ()), after)
        return [forced[worker.path]]

    result = run(
        session,
        thread,
        grammar,
        tokenizer=tokenizer,
        budget=budget,
        logits_processor=processors,
        do_sample=False,
    )
    logits = {path: torch.stack(f.logits) for path, f in forced.items() if f.logits}
    joined = {path: f.joined for path, f in forced.items() if f.joined is not None}
    return Replay(result, logits, joined)
