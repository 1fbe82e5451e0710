"""Beam search, with the scores and the end rules of transformers' `generate(num_beams=...)`.

Beams are threads: a beam that goes on twice is forked, one that drops out is released, so the
prompt and every common beginning are stored once and no cache is reordered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.sampling import Rules, late_ones, make_rules, resolve
from apr.loop.stream import StreamStep
from apr.ops.device import uploaded
from apr.strategies._requests import Result, Writing, let_go, run_requests
from apr.threads.session import Session
from apr.threads.thread import Thread

# What transformers uses for "cannot be chosen"; sums with it stay below every real score.
_NEVER = -1.0e9


@dataclass
class _Hypothesis:
    score: float  # log-probability over length ** length_penalty
    item: Decoded


class _Next(NamedTuple):
    """A beam, and a token that it may go on with."""

    beam: int
    token: int
    score: float  # of the whole beam, by processed log-probabilities
    logprob: float  # of the token, by the model


@dataclass
class _Search:
    """Beams of one prompt."""

    rules: Rules
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    request: int
    threads: list[Thread]
    scores: list[float]
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    logprobs: list[list[float]] = field(default_factory=lambda: [[]])
    finished: list[_Hypothesis] = field(default_factory=list)
    improvable: bool = True
    done: bool = False
    sampled: int = 0
    steps: int = 0

    def advance(self, logits: Tensor, late: bool) -> None:
        """Take one token further; logits [beams, vocab] of the threads as they are. late: whether
        the time is over.
        """
        self.steps += 1
        self.sampled += len(self.threads)
        own = logits.log_softmax(-1)
        processed = self._processed(own)
        scores = torch.tensor(self.scores, dtype=torch.float32, device="cpu")
        total = (processed + uploaded(scores, logits.device)[:, None]).flatten()
        keep = max(2, 1 + len(self.rules.eos)) * self.num_beams
        best, where = total.topk(min(keep, len(total)))
        told = torch.stack([where.double(), best.double(), own.flatten()[where].double()])
        nexts = [
            _Next(*divmod(int(place), logits.shape[-1]), score, logprob)
            for place, score, logprob in told.T.tolist()
        ]
        reasons = [self._reason(one, processed, late) for one in nexts]
        self._collect(nexts, reasons)
        ends = [reason is not None for reason in reasons]
        running = [one.score + _NEVER * end for one, end in zip(nexts, ends, strict=True)]
        # Stable: of equals the earlier goes on, as topk has it.
        going = sorted(range(len(nexts)), key=running.__getitem__, reverse=True)[: self.num_beams]
        self._check_end(running[going[0]], all(ends))
        self._move([nexts[i] for i in going], [running[i] for i in going])

    def _processed(self, own: Tensor) -> Tensor:
        logprobs = own.clone() if self.rules.history else own
        for row, thread in enumerate(self.threads if self.rules.history else ()):
            ids = uploaded([thread.tokens], own.device)
            for processor in self.rules.history:
                logprobs[row : row + 1] = processor(ids, logprobs[row : row + 1])
        renormalized: Tensor = self.rules.warpers(None, logprobs)
        return renormalized

    def _reason(self, one: _Next, processed: Tensor, late: bool) -> str | None:
        """Why a beam would end with a token, or None."""

        def all_tokens() -> Tensor:
            return torch.tensor([[*self.threads[one.beam].tokens, one.token]], device="cpu")

        scores, text = processed[one.beam : one.beam + 1], self.texts[one.beam]
        return self.rules.finish_reason(text, one.token, late, all_tokens, lambda: scores)

    def _collect(self, nexts: list[_Next], reasons: list[str | None]) -> None:
        """Finished continuations among the best `num_beams`, kept where they beat what is kept."""
        if not self.improvable or (self.early_stopping is True and self._full()):
            return
        length = len(self.texts[0]) + 1
        for one, reason in zip(nexts[: self.num_beams], reasons, strict=False):
            if reason is None:
                continue
            item = Decoded(
                self.threads[one.beam],
                [*self.texts[one.beam], one.token],
                [*self.logprobs[one.beam], one.logprob],
                reason,
                request=self.request,
            )
            self.finished.append(_Hypothesis(one.score / length**self.length_penalty, item))
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.num_beams]

    def _full(self) -> bool:
        return len(self.finished) == self.num_beams

    def _check_end(self, running: float, nothing_goes_on: bool) -> None:
        length = len(self.texts[0]) + 1
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            length = self.rules.limit
        possible = running / length**self.length_penalty
        worst = self.finished[-1].score if self._full() else -math.inf
        self.improvable = self.improvable and possible > worst
        stop_now = self.early_stopping is True and self._full()
        self.done = nothing_goes_on or stop_now or not self.improvable

    def release(self) -> None:
        for thread in self.threads:
            let_go(thread)

    def _move(self, chosen: list[_Next], scores: list[float]) -> None:
        """Threads, texts and scores of those that go on; the others are released."""
        if self.done:
            return
        users: dict[int, list[Thread]] = {}
        for one in chosen:
            users.setdefault(one.beam, []).append(self.threads[one.beam])
        for beam, taken in users.items():
            taken[1:] = self.threads[beam].fork(len(taken) - 1) if len(taken) > 1 else []
        for beam, thread in enumerate(self.threads):
            if beam not in users:
                thread.release()
        threads, texts, logprobs = [], [], []
        for one in chosen:
            threads.append(users[one.beam].pop())
            texts.append([*self.texts[one.beam], one.token])
            logprobs.append([*self.logprobs[one.beam], one.logprob])
        for thread, one in zip(threads, chosen, strict=True):
            thread.extend([one.token])
        self.threads, self.texts, self.logprobs, self.scores = threads, texts, logprobs, scores


def _or(asked: Any, configured: Any, otherwise: Any) -> Any:
    """What was asked for, else what the configuration says, else transformers' default."""
    given = configured if asked is None else asked
    return otherwise if given is None else given


def _step_of(searches: list[_Search]) -> StreamStep:
    """The last token of every beam that goes on."""
    tokens, logprobs = {}, {}
    for search in searches:
        for thread, text, row in zip(search.threads, search.texts, search.logprobs, strict=True):
            tokens[thread], logprobs[thread] = text[-1], row[-1]
    return StreamStep(tokens, logprobs, {})


def beam_search(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    num_beams: int = 4,
    generation_config: Any = None,
    seed: int = 0,
    *,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    stop: Any = None,
    on_step: Callable[[StreamStep], None] | None = None,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """The `num_beams` best texts by log-probability / length ** length_penalty.

    Tokens are those of transformers' `generate(num_beams=...)`; length_penalty and early_stopping
    (False, True, "never") mean the same as there, and come from the configuration where they are
    not given. on_step gets the tokens of the beams that go on. `threads` holds the texts, best
    first, `scores` their scores. logits_processor: called with one beam's tokens at a time, so none
    that keeps a state between calls. prompt, options: as in `majority_vote`, without sampling.
    """
    writing = Writing(tokenizer, generation_config, options, sample=False)
    settings = {name: value for name, value in writing.options.items() if name != "sample"}
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise InvalidInput(f"num_beams: got {num_beams!r}; expected a positive number")
    if early_stopping not in (None, True, False, "never"):
        raise InvalidInput(
            f'early_stopping: got {early_stopping!r}; expected True, False or "never"'
        )

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        session.table.need_logits("beam_search")
        config = resolve(session.model, generation_config, settings, sample=False)
        penalty = _or(length_penalty, config.length_penalty, 1.0)
        ends_early = _or(early_stopping, config.early_stopping, False)
        if config.do_sample:
            raise InvalidInput(
                "beam_search: got do_sample=True; expected False: beams are not sampled"
            )
        searches: list[_Search] = []
        for ids, request in zip(prompts, requests, strict=True):
            root = session.thread(ids, request=(seed, request))
            device = session.spec.device
            searches.append(
                _Search(
                    make_rules(
                        config,
                        len(ids),
                        device,
                        tokenizer=tokenizer,
                        stop=stop,
                        logits_processor=logits_processor,
                        stopping_criteria=stopping_criteria,
                    ),
                    num_beams,
                    penalty,
                    ends_early,
                    request,
                    [root],
                    [0.0],
                )
            )
            made.append(searches[-1])
        while open_ones := [s for s in searches if not s.done]:
            logits = session.step([t for s in open_ones for t in s.threads])
            parts = torch.split(logits, [len(s.threads) for s in open_ones])
            late = late_ones([search.rules for search in open_ones], session.ranks)
            for search, part, over in zip(open_ones, parts, late, strict=True):
                search.advance(part, over)
            if on_step is not None:
                on_step(_step_of([s for s in open_ones if not s.done]))
        stats = session.stats
        results = []
        for search in searches:
            items = [h.item for h in search.finished]
            for item in items:
                item.text = writing.text(item.tokens, item.finish)
            results.append(
                Result(
                    text=items[0].text,
                    answer=items[0].text,
                    threads=items,
                    stats=stats,
                    trace=session.trace,
                    scores=[h.score for h in search.finished],
                    total_tokens=search.sampled,
                    critical_path_tokens=search.steps,
                )
            )
        return results

    return run_requests(model_or_session, writing, prompt, seed, num_beams, run)
