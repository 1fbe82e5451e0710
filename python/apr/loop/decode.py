"""Let threads write until they end, and what each wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from apr.errors import InvalidInput
from apr.loop.stream import Stop, StreamStep, stream
from apr.loop.text import written_text
from apr.threads.session import Session
from apr.threads.thread import Thread


@dataclass
class Decoded:
    """What one thread wrote in a run; `thread` is None in the Result of a method, which is data
    alone.
    """

    thread: Any  # the Thread, or None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # "" while it writes; then a reason of StreamStep, or "pruned", "left", "done" by a method.
    finish: str = ""
    text: str = ""
    request: int = 0

    @property
    def logprob(self) -> float:
        """Sum of the log-probabilities of the written tokens."""
        return sum(self.logprobs)

    def let_go(self) -> None:
        """Keep what was written, and not the thread."""
        self.thread = None


def decode(
    session: Session,
    threads: Sequence[Thread],
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    streamer: Callable[[Thread], Any] | None = None,
    progress: bool = False,
    stop: Stop = None,
    skip_special_tokens: bool = False,
    on_step: Callable[[StreamStep], None] | None = None,
    prune: Callable[[StreamStep, dict[Thread, Decoded]], Iterable[Thread]] | None = None,
    **options: Any,
) -> list[Decoded]:
    """Let every thread write until it ends; one batched step a token for all of them.

    streamer: called once a thread, returns a transformers streamer (put, end) for it alone.
    progress: show a bar of finished threads. prune: called after each step with what all threads
    have so far; the threads that it returns end there ("pruned"). Other options are those of
    `stream`. Returns one Decoded a thread, in order; with `tokenizer` its text, as it was written:
    special tokens stand in it, but for the end token, unless `skip_special_tokens`.
    """
    threads = list(threads)
    results = {thread: Decoded(thread) for thread in threads}
    if len(results) != len(threads):
        raise InvalidInput("decode: got a thread twice; list each once")
    streamers: dict[Thread, Any] = {}
    if streamer is not None:
        streamers = {thread: streamer(thread) for thread in threads}
    run = stream(session, threads, generation_config, tokenizer=tokenizer, stop=stop, **options)
    for thread, its in streamers.items():
        its.put(torch.tensor([thread.tokens], device="cpu"))

    def finish(thread: Thread, reason: str) -> None:
        result = results[thread]
        result.finish = reason
        result.text = written_text(tokenizer, result.tokens, reason, skip_special_tokens)
        label = " ".join(result.text.split())  # one line of the trace's tree
        label = label if len(label) <= 60 else label[:57] + "..."
        session.trace.end(thread._id, reason, len(result.tokens), label)

    with _bar(len(threads), progress) as bar, run:
        for step in run:
            for thread, token in step.tokens.items():
                results[thread].tokens.append(token)
                results[thread].logprobs.append(step.logprobs[thread])
                if thread in streamers:
                    streamers[thread].put(torch.tensor([token], device="cpu"))
            ended = dict(step.finished)
            for thread, reason in ended.items():
                finish(thread, reason)
            for thread in prune(step, results) if prune is not None else ():
                if not results[thread].finish:
                    run.remove(thread)
                    finish(thread, "pruned")
                    ended[thread] = "pruned"
            for thread in ended:
                if thread in streamers:
                    streamers[thread].end()
                bar.update(1)
            if progress:
                bar.set_postfix(rows=session.stats.rows, refresh=False)
            if on_step is not None:
                on_step(step)
    return [results[thread] for thread in threads]


def _bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm  # comes with transformers

    return tqdm(total=total, desc="threads", unit="thread", disable=not show)
