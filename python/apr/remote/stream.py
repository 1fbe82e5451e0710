"""A run over threads whose tokens a server makes: the same to its user as one on a session."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from apr.errors import EngineError, InvalidInput
from apr.loop.sampling import Rules, make_rules, resolve
from apr.loop.stream import StreamStep
from apr.loop.text import continued
from apr.remote.dialect import Dialect, request_fields
from apr.remote.request import Piece, Request, answer
from apr.threads.thread import Thread

if TYPE_CHECKING:
    from apr.remote.engine import Engine

_CPU = torch.device("cpu")
_SILENCE = 1.0  # seconds
CLOSED = "engine: it was closed; open another one"


@dataclass(eq=False)
class _Line:
    """A thread, what of its answer has come and was not taken yet, and how the answer ended."""

    rules: Rules
    config: GenerationConfig
    request: Request | None = None
    # The thread's length and trims, when its request was sent, and with what it took since.
    stood: tuple[int, int] = (-1, 0)
    sent: int = 0  # requests: what comes of others than the last one is not looked at
    came: deque[tuple[int, float]] = field(default_factory=deque)
    end: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether a token can be taken: of the last one it must be known that it is the last."""
        return len(self.came) > 1 or bool(self.end)


class ServedStream:
    """Iterate it, in a task too, a StreamStep at a time: each thread that has a token takes one; of
    a server that is silent, a step without any each second. A thread that was changed between steps
    is asked for anew.

    Stops are looked for here, so that they mean what they mean on a session, whatever a server
    makes of its own; a request that nobody needs any more is cancelled.
    """

    takes_processors = False

    def __init__(
        self,
        engine: Engine,
        config: GenerationConfig,
        tokenizer: Any,
        dialect: Dialect,
        stopping_criteria: Sequence[Any],
    ) -> None:
        self.session, self.config, self.tokenizer = engine, config, tokenizer
        self._dialect, self._criteria = dialect, stopping_criteria
        self._lines: dict[Thread, _Line] = {}
        self._came: queue.SimpleQueue[tuple[_Line, int, Any]] = queue.SimpleQueue()
        self._told: Callable[[], Any] = lambda: None  # what wakes a task that waits for it
        added = tokenizer.added_tokens_decoder.items()
        self._special = {number: token.content for number, token in added if token.special}
        request_fields(config, dialect)  # refused before anything is sent

    def __enter__(self) -> ServedStream:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in list(self._lines):
            self.remove(thread)

    def __contains__(self, thread: Thread) -> bool:
        return thread in self._lines

    @property
    def threads(self) -> list[Thread]:
        """The threads that are still writing."""
        return list(self._lines)

    def takes_none(self, processors: Any) -> None:
        """Raise InvalidInput for processors, which look at scores that are not told."""
        if callable(processors) or len(processors):
            raise InvalidInput(
                "logits_processor: a served engine takes none; use an apr.Session on a model of "
                "your own"
            )

    def check_words(self, words: Sequence[str]) -> None:
        """Raise InvalidInput where control words are special tokens, which this server hides."""
        special = [] if self._dialect.tells_ids else self._special.values()
        hidden = [word for word in words if word in special]
        if hidden:
            raise InvalidInput(
                f"run: {hidden} are special tokens, which this server leaves out of its texts; "
                "use one that tells token ids (vLLM), or words that are plain text"
            )

    def add(
        self,
        thread: Thread,
        config: GenerationConfig | None = None,
        stop: Any = None,
        *,
        logits_processor: Any = (),
        stopping_criteria: Sequence[Any] = (),
        written: Sequence[int] = (),
    ) -> None:
        """Let `thread` write: its request is sent now."""
        if thread in self:
            raise InvalidInput(f"stream: {thread!r} is already in this run")
        self.takes_none(logits_processor)
        config = self.config if config is None else resolve(None, config, {})
        rules = make_rules(
            config,
            len(thread) - len(written),
            _CPU,
            tokenizer=self.tokenizer,
            stop=stop,
            stopping_criteria=[*self._criteria, *stopping_criteria],
        )
        rules.tokens = list(written)
        self._lines[thread] = _Line(rules, config)
        self._send(thread)

    def _send(self, thread: Thread) -> None:
        """Ask for what follows the thread as it is now."""
        line, tokens = self._lines[thread], thread.tokens
        self._stop(line)
        line.came.clear()
        line.sent, line.stood, line.end = line.sent + 1, (len(tokens), thread.trims), ""
        seed = (thread.key ^ thread.draws) % 2**31
        line.request = request = Request(
            tokens if self._dialect.takes_ids and self._dialect.tells_ids else self._text(tokens),
            {**request_fields(line.config, self._dialect), "seed": seed},
            max(1, line.rules.limit - len(line.rules.tokens)),
        )
        self.session.begin(self._write(line, line.sent, request))

    def _stop(self, line: _Line) -> None:
        if line.request is not None:
            self.session.call(line.request.stop)

    def _text(self, tokens: list[int]) -> str:
        """A prompt as text: without the first token that the server's tokenizer puts before it."""
        first = self.tokenizer("").input_ids
        ids = tokens[len(first) :] if first and tokens[: len(first)] == first else tokens
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    async def _write(self, line: _Line, sent: int, request: Request) -> None:
        """Ask for an answer, and hand on what comes of it."""

        def hand_on(item: Piece | str | Exception) -> None:
            self._came.put((line, sent, item))
            self._told()

        engine, request.task = self.session, asyncio.current_task()
        if request.is_unwanted:
            return
        try:
            async with engine.places:
                async for item in answer(engine, request):
                    hand_on(item)
        except asyncio.CancelledError:
            hand_on(EngineError(CLOSED))
            raise
        except Exception as error:  # whatever it is, it is raised where it is waited for
            hand_on(error)

    def remove(self, thread: Thread) -> None:
        """Take a thread out of the run; it keeps what it wrote."""
        if thread not in self:
            raise InvalidInput(f"stream: {thread!r} is not in this run")
        line = self._lines.pop(thread)
        if not line.end:
            self._stop(line)
            self.session.usage.cancelled += 1

    # ---- tokens ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[StreamStep]:
        while self._lines:
            silent = self._begin()
            while isinstance(step := self._step(silent), float):
                with contextlib.suppress(queue.Empty):
                    self._note(*self._came.get(timeout=step))
            yield step

    async def __aiter__(self) -> AsyncIterator[StreamStep]:
        loop, came = asyncio.get_running_loop(), asyncio.Event()

        def told() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed meanwhile
                loop.call_soon_threadsafe(came.set)

        self._told = told
        while self._lines:
            await asyncio.sleep(0)  # others have their turn, however fast tokens come
            silent = self._begin()
            while isinstance(step := self._step(silent), float):
                if self._told is not told:
                    raise InvalidInput("stream: another task iterates this run; each needs its own")
                # Not by asyncio.wait_for, which can lose a cancellation (before Python 3.12).
                timer = loop.call_later(step, came.set)
                try:
                    await came.wait()
                finally:
                    timer.cancel()
                came.clear()
            yield step

    def _begin(self) -> float:
        """Ask for what is missing; when a step is made even if nothing comes."""
        for thread, line in self._lines.items():
            if (len(thread), thread.trims) != line.stood:  # it failed, or was changed since
                self._send(thread)
        return time.monotonic() + _SILENCE

    def _step(self, silent: float) -> StreamStep | float:
        """The next step, when some thread can take a token, when the time of one is over, or, so
        that limits can be looked at, after a second; else in how many seconds to look again.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                self._note(*self._came.get_nowait())
        now = time.monotonic()
        times = {t: x.rules.deadline for t, x in self._lines.items() if x.rules.deadline}
        late = [thread for thread, deadline in times.items() if now > deadline]
        if not (late or now > silent or any(line.is_ready for line in self._lines.values())):
            return max(min(deadline - now for deadline in (*times.values(), silent)), 0.001)
        step = self._take()
        for thread in late:
            if thread in self._lines:
                step.finished[thread] = "time"
                self.remove(thread)
        return step

    def _note(self, line: _Line, sent: int, item: Piece | str | Exception) -> None:
        if line not in self._lines.values() or line.sent != sent:
            return  # it was taken out of the run meanwhile, or asked anew
        if isinstance(item, Exception):
            line.stood = (-1, 0)  # whoever goes on asks again
            if isinstance(item, EngineError):
                raise item
            raise EngineError(f"engine: {type(item).__name__}: {item}") from item
        if isinstance(item, Piece):
            ids = item.ids or continued(self.tokenizer, item.text)
            values = [item.logprob, *([math.nan if math.isnan(item.logprob) else 0.0] * len(ids))]
            line.came.extend(zip(ids, values, strict=False))
            return
        line.end = item
        ends = self.tokenizer.eos_token_id
        # A chat model ends with tokens that its tokenizer may not name as the end.
        last = line.came[-1][0] if line.came else None
        ended = last in line.rules.eos or (self._dialect.tells_ids and last in self._special)
        if (item == "stop" or not line.came) and ends is not None and not ended:
            line.came.append((ends, 0.0 if self.session.logprobs else math.nan))

    def _take(self) -> StreamStep:
        """One token for each thread that has one."""
        step = StreamStep({}, {}, {})
        ready = {t: line for t, line in self._lines.items() if line.is_ready}
        for thread, line in ready.items():
            if not line.came:
                step.finished[thread] = line.end
                continue
            token, logprob = line.came[0]
            step.tokens[thread], step.logprobs[thread] = token, logprob
            reason = line.rules.finish_reason(
                line.rules.tokens, token, False, *_reads(thread, token)
            )
            if reason is None and line.end and len(line.came) == 1:
                reason = "eos" if line.end == "stop" else "length"
            if reason is not None:
                step.finished[thread] = reason
        takers = list(step.tokens)
        lines = [self._lines[thread] for thread in takers]
        self.session.table.append(
            takers,
            list(step.tokens.values()),
            [line.rules.samples for line in lines],
            [line.rules.tokens for line in lines],
        )
        for line in lines:
            line.came.popleft()
            line.stood = (line.stood[0] + 1, line.stood[1])
        for thread in step.finished:
            self.remove(thread)
        return step


def _reads(thread: Thread, token: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What stopping criteria are given: the tokens; scores there are none."""

    def scores() -> Tensor:
        return torch.full((1, 1), math.nan, dtype=torch.float32, device="cpu")

    return lambda: torch.tensor([[*thread.tokens, token]], device="cpu"), scores
