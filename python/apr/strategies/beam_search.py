"""Beam search, with the scores and the end rules of transformers' `generate(num_beams=...)`.

Beams are threads: a beam that goes on twice is forked, one that drops out is released, so the
prompt and every common beginning are stored once and no cache is reordered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.loop.sampling import Rules, late_ones, make_rules, resolve
from apr.loop.stream import StreamStep
from apr.strategies._requests import Result, Writing, let_go, run_requests
from apr.threads.session import Session
from apr.threads.thread import Thread

# What transformers uses for "cannot be chosen"; sums with it stay below every real score.
_NEVER = -1.0e9


@dataclass
class _Hypothesis:
    score: float  # log-probability over length ** length_penalty
    item: Decoded


@dataclass
class _Search:
    """Beams of one prompt."""

    rules: Rules
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    request: int
    threads: list[Thread]
    scores: Tensor  # [beams]
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
        logprobs = self._processed(logits)
        total = (logprobs + self.scores[:, None]).flatten()
        vocab = logits.shape[-1]
        keep = max(2, 1 + len(self.rules.eos)) * self.num_beams
        best, where = total.topk(min(keep, len(total)))
        reasons = [
            self._reason(place // vocab, place % vocab, logprobs, late) for place in where.tolist()
        ]
        ends = [reason is not None for reason in reasons]
        self._collect(best, where, reasons, vocab, logits)
        going = (best + torch.tensor(ends, device=best.device) * _NEVER).topk(
            min(self.num_beams, len(best))
        )
        chosen = [(int(where[i]) // vocab, int(where[i]) % vocab) for i in going.indices]
        self._check_end(going.values, all(ends))
        self._move(chosen, going.values, logits)

    def _processed(self, logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)
        for row, thread in enumerate(self.threads if self.rules.history else ()):
            ids = torch.tensor([thread.tokens], device=logits.device)
            for processor in self.rules.history:
                logprobs[row : row + 1] = processor(ids, logprobs[row : row + 1])
        renormalized: Tensor = self.rules.warpers(None, logprobs)
        return renormalized

    def _reason(self, beam: int, token: int, processed: Tensor, late: bool) -> str | None:
        """Why a beam would end with a token, or None."""

        def all_tokens() -> Tensor:
            return torch.tensor([[*self.threads[beam].tokens, token]])

        scores = processed[beam : beam + 1]
        return self.rules.finish_reason(self.texts[beam], token, late, all_tokens, lambda: scores)

    def _collect(
        self, best: Tensor, where: Tensor, reasons: list[str | None], vocab: int, logits: Tensor
    ) -> None:
        """Finished continuations among the best `num_beams`, kept where they beat what is kept."""
        if not self.improvable or (self.early_stopping is True and self._full()):
            return
        length = len(self.texts[0]) + 1
        for i, reason in enumerate(reasons[: self.num_beams]):
            if reason is None:
                continue
            beam, token = int(where[i]) // vocab, int(where[i]) % vocab
            logprob = float(logits[beam].log_softmax(-1)[token])
            item = Decoded(
                self.threads[beam],
                [*self.texts[beam], token],
                [*self.logprobs[beam], logprob],
                reason,
                request=self.request,
            )
            score = float(best[i]) / length**self.length_penalty
            self.finished.append(_Hypothesis(score, item))
        # Sorting is stable: of equals the earlier stays ahead, as topk has it.
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.num_beams]

    def _full(self) -> bool:
        return len(self.finished) == self.num_beams

    def _check_end(self, running: Tensor, nothing_goes_on: bool) -> None:
        length = len(self.texts[0]) + 1
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            length = self.rules.limit
        possible = float(running[0]) / length**self.length_penalty
        worst = self.finished[-1].score if self._full() else -math.inf
        self.improvable = self.improvable and possible > worst
        stop_now = self.early_stopping is True and self._full()
        self.done = nothing_goes_on or stop_now or not self.improvable

    def release(self) -> None:
        for thread in self.threads:
            let_go(thread)

    def _move(self, chosen: list[tuple[int, int]], scores: Tensor, logits: Tensor) -> None:
        """Threads, texts and scores of the chosen (beam, token); the others are released."""
        if self.done:
            return
        users: dict[int, list[Thread]] = {}
        for beam, _ in chosen:
            users.setdefault(beam, []).append(self.threads[beam])
        for beam, taken in users.items():
            taken[1:] = self.threads[beam].fork(len(taken) - 1) if len(taken) > 1 else []
        for beam, thread in enumerate(self.threads):
            if beam not in users:
                thread.release()
        table = logits.log_softmax(-1)
        threads, texts, logprobs = [], [], []
        for beam, token in chosen:
            threads.append(users[beam].pop())
            texts.append([*self.texts[beam], token])
            logprobs.append([*self.logprobs[beam], float(table[beam, token])])
        for thread, (_, token) in zip(threads, chosen, strict=True):
            thread.extend([token])
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
                    torch.zeros(1, device=device),
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
