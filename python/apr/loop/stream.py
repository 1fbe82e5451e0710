"""The sampling loop: every thread of a run takes one token a step, each with its own generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from apr.errors import InvalidInput, NonFiniteLogits
from apr.loop.sampling import Processors, Rules, make_rules, resolve, row_warpers
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
    # float32 [threads, vocab], before any processor; rows in the order of `tokens`. None from beam
    # search.
    logits: Tensor | None = None


class Stream:
    """A run over threads that may enter and leave at any step; iterate it, one StreamStep at a
    time.

    The threads stay the user's: leaving a run, for whatever reason, releases nothing. The last
    sampled token of a thread is queued on it, so a later join or step does not lose it.
    """

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
        self._warpers: dict[int, Any] = {}
        # What a thread saw when it entered, and how much of that it had written itself.
        self._starts: dict[Thread, tuple[list[int], int]] = {}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._rules.clear()
        self._starts.clear()

    def __contains__(self, thread: Thread) -> bool:
        return thread in self._rules

    @property
    def threads(self) -> list[Thread]:
        """The threads that are still writing."""
        return list(self._rules)

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
        if thread in self._rules:
            raise InvalidInput(f"stream: {thread!r} is already in this run")
        config = self.config if config is None else resolve(self.session.model, config, {})
        device = self.session.spec.device
        if id(config) not in self._warpers:
            self._warpers[id(config)] = (config, row_warpers(config, device))
        self._starts[thread] = (thread.tokens, len(thread.own_tokens))
        self._rules[thread] = make_rules(
            config,
            len(self._starts[thread][0]) - len(written),
            device,
            warpers=self._warpers[id(config)][1],
            tokenizer=self.tokenizer,
            stop=stop,
            logits_processor=[*self._processors.of(thread), *logits_processor],
            stopping_criteria=[*self._criteria, *stopping_criteria],
        )
        self._rules[thread].tokens = list(written)

    def remove(self, thread: Thread) -> None:
        """Take a thread out of the run; it keeps what it wrote."""
        if thread not in self._rules:
            raise InvalidInput(f"stream: {thread!r} is not in this run")
        del self._rules[thread]

    def _history(self, thread: Thread) -> list[int]:
        """What it saw when it entered, and its own tokens since: a view may have grown by those of
        others.
        """
        start, written = self._starts[thread]
        return [*start, *thread.own_tokens[written:]]

    def __iter__(self) -> Iterator[StreamStep]:
        while self._rules:
            yield self._step()

    def _scores(self, threads: list[Thread], logits: Tensor) -> Tensor:
        """Processed scores [threads, vocab]: history processors row by row, warpers group by
        group.
        """
        scores = logits.clone()
        groups: dict[int, list[int]] = {}
        for row, thread in enumerate(threads):
            rules = self._rules[thread]
            if rules.reads_history:
                ids = torch.tensor([self._history(thread)], device=logits.device)
                for processor in rules.history:
                    scores[row : row + 1] = processor(ids, scores[row : row + 1])
            groups.setdefault(id(rules.warpers), []).append(row)
        for rows in groups.values():
            warpers = self._rules[threads[rows[0]]].warpers
            if len(warpers) and len(rows) == len(threads):
                scores = warpers(None, scores)
            elif len(warpers):
                scores[rows] = warpers(None, scores[rows])
        return scores

    def _check_scores(self, threads: list[Thread], logits: Tensor, scores: Tensor) -> None:
        """Raise where a thread has nothing to choose from: a row without a finite best score."""
        best = scores.amax(-1)
        if bool(best.isfinite().all()):
            return
        row = int((~best.isfinite()).int().argmax())
        where = f"{threads[row]!r}, step {self._steps + 1} of this run"
        if not bool(logits[row].amax().isfinite()):
            raise NonFiniteLogits(
                f"{where}: the model's logits hold {float(logits[row].amax())}; nothing was "
                "sampled. Check its dtype and weights"
            )
        if float(best[row]) == float("-inf"):
            raise InvalidInput(
                f"{where}: no token is left, all scores are -inf; the logits processors (a "
                "grammar, bad words, suppressed tokens) forbid everything: let them allow an end "
                "token"
            )
        raise NonFiniteLogits(
            f"{where}: a logits processor made scores of {float(best[row])}; expected numbers, or "
            "-inf for what is forbidden"
        )

    def _sample(self, threads: list[Thread], scores: Tensor) -> list[int]:
        chosen = scores.argmax(-1)
        sampled = [i for i, t in enumerate(threads) if self._rules[t].config.do_sample]
        if sampled:
            weights = scores[sampled].softmax(-1)
            picks = [
                torch.multinomial(weights[row], 1, generator=threads[i].generator)
                for row, i in enumerate(sampled)
            ]
            chosen[sampled] = torch.cat(picks)
        tokens: list[int] = chosen.tolist()  # the one wait for a GPU
        return tokens

    def _choose(self, threads: list[Thread], logits: Tensor) -> tuple[list[int], dict[Thread, str]]:
        """Tokens and the threads that end with them; any exception leaves rules and generators as
        before.
        """
        sampled = [t for t in threads if self._rules[t].config.do_sample]
        states = [t.generator.get_state() for t in sampled]
        noted: list[Rules] = []
        try:
            scores = self._scores(threads, logits)
            self._check_scores(threads, logits, scores)
            tokens = self._sample(threads, scores)
            finished = {}
            for row, (thread, token) in enumerate(zip(threads, tokens, strict=True)):
                rules = self._rules[thread]
                rules.tokens.append(token)
                noted.append(rules)

                def all_tokens(thread: Thread = thread, token: int = token) -> Tensor:
                    return torch.tensor([[*self._history(thread), token]], device=logits.device)

                def its_scores(row: int = row) -> Tensor:
                    return scores[row : row + 1]

                reason = rules.finish_reason(token, all_tokens, its_scores)
                if reason is not None:
                    finished[thread] = reason
        except BaseException:
            for rules in noted:
                rules.tokens.pop()
            for thread, state in zip(sampled, states, strict=True):
                thread.generator.set_state(state)
            raise
        return tokens, finished

    def _step(self) -> StreamStep:
        threads = list(self._rules)
        logits = self.session.step(threads)
        tokens, finished = self._choose(threads, logits)
        self._steps += 1
        chosen = torch.tensor(tokens, device=logits.device)[:, None]
        logprobs = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
        for thread, token in zip(threads, tokens, strict=True):
            thread.extend([token])
        for thread in finished:
            del self._rules[thread]
        return StreamStep(
            dict(zip(threads, tokens, strict=True)),
            dict(zip(threads, logprobs, strict=True)),
            finished,
            logits,
        )


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
