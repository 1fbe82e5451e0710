"""A vote that widens where the model is unsure: threads fork at tokens of high entropy, and settle
early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.processors import forbid_first
from apr.loop.stream import Stream, StreamStep
from apr.strategies._answers import last_number
from apr.strategies._requests import Result, Writing, run_requests
from apr.strategies._sample import check_count, resolve_width
from apr.strategies.majority_vote import Extract, count_votes, decided
from apr.threads.session import Session
from apr.threads.thread import Thread


class _Vote:
    """The threads of one prompt."""

    def __init__(
        self,
        session: Session,
        ids: list[int],
        request: tuple[int, int],
        most: int,
        made: list[Any],
    ) -> None:
        self.most, self._made = most, made
        root = session.thread(ids, request=request)
        made.append(root)
        self.items: dict[Thread, Decoded] = {}
        self.enter(root.fork()[0], Decoded(root))

    def enter(self, thread: Thread, so_far: Decoded) -> None:
        self._made.append(thread)
        self.items[thread] = Decoded(thread, list(so_far.tokens), list(so_far.logprobs))

    def writing(self) -> list[Thread]:
        return [thread for thread, item in self.items.items() if not item.finish]


def branching_vote(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int | str = 16,
    generation_config: Any = None,
    seed: int = 0,
    *,
    entropy: float = 1.0,
    extract: Extract = last_number,
    on_step: Callable[[StreamStep], None] | None = None,
    stop: Any = None,
    **options: Any,
) -> Any:
    """Begin with one thread; wherever the model's own distribution has more than `entropy` nats,
    fork another that takes a different token there, up to `n` threads; end once the vote over
    `extract(text)` is settled.

    No training is needed: a prompt that the model is sure of costs one thread. The fork runs one
    token again and stores none twice. n: threads at most, or "auto". Other arguments as in
    `majority_vote`. `total_tokens` counts each token once, however many threads share it.
    """
    n = resolve_width(model_or_session, n, seed)
    check_count(n)
    if not entropy >= 0:
        raise InvalidInput(f"branching_vote: entropy={entropy!r}; expected nats, from 0 on")
    write = Writing(tokenizer, generation_config, options)
    if extract is last_number:
        write.need_tokenizer("branching_vote: extract=last_number")

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        session.table.need_logits("branching_vote")
        votes: list[_Vote] = []
        with write.stream(session) as writing:
            for ids, request in zip(prompts, requests, strict=True):
                votes.append(_Vote(session, ids, (seed, request), n, made))
                writing.add(next(iter(votes[-1].items)), stop=stop)
            sampled = [0] * len(votes)
            while writing.threads:
                step = next(iter(writing))
                for i, vote in enumerate(votes):
                    sampled[i] += _note(vote, step, write)
                    _branch(vote, step, writing, entropy, stop)
                    _settle(vote, writing, extract)
                if on_step is not None:
                    on_step(step)
            stats = session.stats
        return [
            _result(vote, extract, total, stats, session)
            for vote, total in zip(votes, sampled, strict=True)
        ]

    return run_requests(model_or_session, write, prompt, seed, n, run)


def _note(vote: _Vote, step: StreamStep, write: Writing) -> int:
    """Write the step's tokens down; how many they were."""
    mine = [thread for thread in step.tokens if thread in vote.items]
    for thread in mine:
        item = vote.items[thread]
        item.tokens.append(step.tokens[thread])
        item.logprobs.append(step.logprobs[thread])
        if thread in step.finished:
            item.finish = step.finished[thread]
            write.read([item])
    return len(mine)


def _branch(vote: _Vote, step: StreamStep, writing: Stream, entropy: float, stop: Any) -> None:
    mine = [thread for thread in step.tokens if thread in vote.items]
    if len(vote.items) >= vote.most or not mine:
        return
    entropies = step.entropies
    for thread in mine:
        unsure = entropies[thread]
        if unsure <= entropy or len(vote.items) >= vote.most:
            continue
        twin = thread.fork()[0]
        twin.trim(len(twin) - 1)
        vote.enter(twin, vote.items[thread])
        for written in (vote.items[twin].tokens, vote.items[twin].logprobs):
            written.pop()
        other = forbid_first(step.tokens[thread], len(twin))
        so_far = vote.items[twin].tokens
        writing.add(twin, stop=stop, logits_processor=[other], written=so_far)


def _settle(vote: _Vote, writing: Stream, extract: Extract) -> None:
    still = vote.writing()
    to_come = len(still) + vote.most - len(vote.items)  # who writes may still fork
    settled = decided(count_votes(list(vote.items.values()), extract, None)[0], to_come)
    for thread in still if settled and len(still) < len(vote.items) else ():
        writing.remove(thread)
        vote.items[thread].finish = "pruned"


def _result(vote: _Vote, extract: Extract, total: int, stats: Any, session: Session) -> Result:
    items = list(vote.items.values())
    votes, first = count_votes(items, extract, None)
    winner = next(iter(votes), None)
    return Result(
        text=first.get(winner, items[0]).text,
        answer=winner,
        votes=votes,
        threads=items,
        stats=stats,
        trace=session.trace,
        total_tokens=total,
    )
