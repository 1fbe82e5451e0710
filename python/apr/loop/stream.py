"""The sampling loop: every thread of a run takes one token a step, each with random numbers of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from apr.errors import InvalidInput, OutOfPages
from apr.loop.choice import Choice, Chooser
from apr.loop.history import History
from apr.loop.processors import Processors
from apr.loop.sampling import (
    Rules,
    history_processors,
    late_ones,
    make_rules,
    resolve,
    row_warpers,
)
from apr.threads.session import Session
from apr.threads.thread import Thread

ProcessorsLike = Sequence[LogitsProcessor] | Callable[[Thread], Sequence[LogitsProcessor]]
Stop = Sequence[str] | Callable[[list[int]], bool] | None


@dataclass(frozen=True)
class StreamStep:
    """One step of a run; the dicts are keyed by thread."""

    tokens: dict[Thread, int]
    logprobs: dict[Thread, float]  # natural log-probability under the model, before any processor
    finished: dict[Thread, str]  # "eos", "stop", "length" or "time"
    choice: Choice | None = field(default=None, repr=False)  # None from beam search

    @property
    def logits(self) -> Tensor | None:
        """float32 [threads, vocab], before any processor; rows in the order of `tokens`."""
        choice = self.choice
        return None if choice is None else choice.logits.to(torch.float32, copy=True)

    @property
    def entropies(self) -> dict[Thread, float]:
        """Of the model's own distribution that each token was taken from, in nats."""
        if self.choice is None:
            return {}
        return dict(zip(self.tokens, self.choice.sampled.entropies.tolist(), strict=True))


class Stream:
    """A run over threads that may enter and leave at any step; iterate it, one StreamStep at a
    time.

    The threads stay the user's: leaving a run, for whatever reason, releases nothing. The last
    sampled token of a thread is queued on it, so a later join or step does not lose it.
    """

    # What a run on a served engine (remote/stream.py) does not: it gives no scores to change.
    takes_processors = True

    def __init__(
        self,
        session: Session,
        config: GenerationConfig,
        tokenizer: Any = None,
        processors: Processors | None = None,
        stopping_criteria: Sequence[Any] = (),
    ) -> None:
        self.session, self.config, self.tokenizer = session, config, tokenizer
        self._processors, self._criteria = processors or Processors(), stopping_criteria
        self._steps = 0
        self._rules: dict[Thread, Rules] = {}
        self.waiting: frozenset[Thread] = frozenset()  # for room, until others have ended
        self.patient = False  # the same of a whole run, beside those of other tasks
        # Made once for each configuration, and for each length of a prompt.
        self._key = str(config.to_dict())
        self._warpers: dict[str, Any] = {}
        self._shared: dict[tuple[str, int], list[LogitsProcessor]] = {}
        self._history = History(session.spec.device)
        self._chooser = Chooser(session.table, self._history, session.ranks)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._rules.clear()
        self._history.clear()

    def __contains__(self, thread: Thread) -> bool:
        return thread in self._rules and not self._rules[thread].ended

    @property
    def threads(self) -> list[Thread]:
        """The threads that are still writing, those that wait for room among them."""
        return [t for t, rules in self._rules.items() if rules.ending is None or not rules.ended]

    @property
    def _writing(self) -> dict[Thread, Rules]:
        if not self.waiting:
            return self._rules
        return {t: rules for t, rules in self._rules.items() if t not in self.waiting}

    def add(
        self,
        thread: Thread,
        config: GenerationConfig | None = None,
        stop: Stop = None,
        *,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[Any] = (),
        written: Sequence[int] = (),
    ) -> None:
        """Let `thread` write from the next step on; `stop` is stop strings or a callable on its
        tokens.

        logits_processor, stopping_criteria: for this thread alone, after those of the run. written:
        the last visible tokens that count as written in this run already, towards limits and stops.
        """
        if thread in self:
            raise InvalidInput(f"stream: {thread!r} is already in this run")
        config = self.config if config is None else resolve(self.session.model, config, {})
        device, prompt = self.session.spec.device, len(thread) - len(written)
        key = self._key if config is self.config else str(config.to_dict())
        if key not in self._warpers:
            self._warpers[key] = row_warpers(config, device)
        if (key, prompt) not in self._shared:
            self._shared[key, prompt] = history_processors(config, prompt, device)
        rules = make_rules(
            config,
            prompt,
            device,
            warpers=self._warpers[key],
            shared=self._shared[key, prompt],
            tokenizer=self.tokenizer,
            stop=stop,
            logits_processor=[*self._processors.of(thread), *logits_processor],
            stopping_criteria=[*self._criteria, *stopping_criteria],
        )
        rules.tokens = list(written)
        if rules.reads_history:
            self._history.enter(thread)
        self._rules[thread] = rules

    def check_words(self, words: Sequence[str]) -> None:
        """Any word can be seen in what a thread of a session writes."""

    def remove(self, thread: Thread) -> None:
        """Take a thread out of the run; it keeps what it wrote."""
        if thread not in self:
            raise InvalidInput(f"stream: {thread!r} is not in this run")
        self._end([thread])

    def _end(self, threads: Iterable[Thread]) -> None:
        threads = list(threads)
        for thread in threads:
            self._history.leave(thread)
            del self._rules[thread]
        if self.waiting:  # as many as made room may take it, in the order of the run
            made = sum(thread not in self.waiting for thread in threads)
            waits = [thread for thread in self._rules if thread in self.waiting]
            self.waiting = frozenset(waits[made:])

    def __iter__(self) -> Iterator[StreamStep]:
        while threads := self.going():
            try:
                choice = self.session.advance(threads, self.choose)
            except OutOfPages:
                if not self.make_wait():
                    raise
            else:
                yield self.give(threads, choice)

    def make_wait(self) -> bool:
        """Let the last threads wait until others have ended, where the session offloads; False
        where it does not, or one is left. They take the same tokens as they would have, as company
        changes nothing: threads that read what others are writing never wait.
        """
        writing = list(self._writing)
        if self.session.on_full != "offload" or len(writing) < 2:
            return False
        if self.session.table.ask().follows_others([thread._id for thread in writing]):
            return False
        self.waiting |= set(writing[-max(1, len(writing) // 8) :])
        return True

    def going(self) -> list[Thread]:
        """The threads of the next step, of which this is the first part; then come `choose` and
        `give`.
        """
        threads = self.threads
        if len(threads) < len(self._rules):  # an interrupt came as some ended
            self._end([thread for thread in self._rules if thread not in threads])
        if self.waiting.issuperset(threads):
            self.waiting = frozenset()
        return [t for t in threads if t not in self.waiting] if self.waiting else threads

    def choose(self, logits: Tensor) -> Choice:
        """A token for each thread, of their logits [threads, vocab]."""
        return self._chooser.choose(self._writing, logits, self._steps + 1)

    def give(self, threads: list[Thread], choice: Choice) -> StreamStep:
        """Let the threads take their tokens."""
        finished = self._take(threads, choice)
        self._end(finished)
        logprobs = dict(zip(threads, choice.sampled.logprobs.tolist(), strict=True))
        tokens = dict(zip(threads, choice.tokens, strict=True))
        return StreamStep(tokens, logprobs, finished, choice)

    def _take(self, threads: list[Thread], choice: Choice) -> dict[Thread, str]:
        """Give every thread its token; those that end with it, and why. Until that is done, in one
        call, threads and rules are as before.
        """
        every = list(self._writing.values())
        if any(rules.criteria for rules in every):
            self._history.catch_up()
        finished: dict[Thread, str] = {}
        late = late_ones(every, self.session.ranks)
        for row, (thread, rules) in enumerate(zip(threads, every, strict=True)):
            reads: tuple[Any, ...] = ()
            if rules.criteria:
                reads = (
                    partial(self._history.ids_with, thread, choice.tokens[row]),
                    partial(rules.warped, choice.scores[row : row + 1]),
                )
            reason = rules.finish_reason(rules.tokens, choice.tokens[row], late[row], *reads)
            rules.ending = None if reason is None else len(rules.tokens) + 1
            if reason is not None:
                finished[thread] = reason
        drawn = [rules.samples for rules in every]
        notes = [rules.tokens for rules in every]
        self.session.table.append(threads, choice.tokens, drawn, notes)
        self._steps += 1
        return finished


def stream(
    session: Session,
    threads: Sequence[Thread],
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    stop: Stop = None,
    logits_processor: ProcessorsLike = (),
    stopping_criteria: Sequence[Any] = (),
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
    sample: bool | None = None,
    **options: Any,
) -> Stream:
    """A run over `threads`: `with apr.stream(s, threads) as run: for step in run: ...`.

    `options` override fields of the configuration (the model's own by default). logits_processor: a
    list, of which every thread gets copies of its own, or a callable on the thread that returns
    one. sample: what to do where neither options nor generation_config say; None: as the model's
    configuration says. Raises InvalidInput for a field that a loop over threads cannot honour.
    """
    served = getattr(session, "stream", None)
    if served is not None:  # an engine, which makes the tokens elsewhere
        made: Stream = served(
            threads,
            generation_config,
            tokenizer=tokenizer,
            stop=stop,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            sample=sample,
            **options,
        )
        return made
    run = Stream(
        session,
        resolve(session.model, generation_config, options, sample),
        tokenizer,
        Processors(logits_processor, prefix_allowed_tokens_fn),
        stopping_criteria,
    )
    for thread in threads:
        run.add(thread, stop=stop)
    return run
