"""A served model in the place of a session: threads are kept here, tokens are made there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from types import SimpleNamespace, TracebackType
from typing import Any, TypeVar, cast

from transformers import GenerationConfig

from apr.errors import EngineError, InvalidInput
from apr.hf.ranks import Ranks
from apr.loop.sampling import resolve
from apr.loop.stream import StreamStep
from apr.remote.dialect import Dialect, check_ends, listen
from apr.remote.stream import CLOSED, ServedStream
from apr.remote.usage import ServedSpec, Usage
from apr.threads.table import ThreadTable
from apr.threads.thread import Thread, TokenIds, check_integer
from apr.threads.trace import Trace

Answer = TypeVar("Answer")


def _result(future: Future[Answer]) -> Answer:
    try:
        return future.result()
    except CancelledError as error:
        raise EngineError(CLOSED) from error


class Engine:
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`).

    It stands where a session would: `apr.majority_vote(engine, tokenizer, prompt)`. A fork is a
    request that begins as its siblings do, which the server's prefix cache makes cheap; a join is
    the text of the children, read again. Prompts are made with the tokenizer of the call, which is
    the model's. Methods in which threads see one another's keys, or that look at logits, raise
    UnsupportedModel by name.

    model: its name on the server. concurrency: requests at once. retries: how often a request is
    sent again that was refused for a while (429, 5xx), lost, or cut off in the middle: it then goes
    on behind what has come. timeout: seconds without a word. seed: as in a session, and as far as
    the server keeps to it. logprobs: ask for log-probabilities (some servers then split characters
    of several tokens).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "none",
        concurrency: int = 16,
        retries: int = 4,
        timeout: float = 120.0,
        seed: int = 0,
        logprobs: bool = False,
    ) -> None:
        check_integer("concurrency", concurrency, 1)
        check_integer("retries", retries, 0)
        check_integer("seed", seed)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise InvalidInput(f"timeout: got {timeout!r}; expected seconds above 0")
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise InvalidInput(
                "remote.Engine needs the openai package: pip install 'apr[remote]'"
            ) from error
        self.name, self.retries, self.logprobs, self.seed = model, retries, logprobs, seed
        self.spec = cast(Any, ServedSpec(tells_logprobs=logprobs))
        self.ranks = Ranks()
        # Its threads only queue, and take none of the pages; so many threads there may be.
        self.table = ThreadTable(1 << 20, 64, self.spec, seed)
        self.usage = Usage()
        self._asked: Future[Dialect] | None = None
        self._loop = asyncio.new_event_loop()
        self._worker = threading.Thread(
            target=self._loop.run_forever, name="apr-remote", daemon=True
        )
        self._worker.start()
        self.client = AsyncOpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0
        )
        self.places = asyncio.Semaphore(concurrency)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go; safe to call twice."""
        if self.table.is_open:
            self.table.close()
            _result(self.begin(self._end()))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._worker.join()
            self._loop.close()

    # ---- what methods ask of a session ----------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """What happened: a thread tree as text, a Chrome-trace file."""
        return self.table.trace

    @property
    def stats(self) -> Usage:
        """Counters so far."""
        return replace(self.usage)

    def thread(self, ids: TokenIds = (), *, request: int | tuple[int, ...] | None = None) -> Thread:
        """A new thread that begins with `ids`."""
        return self.table.thread(ids, None, None, "previous", request)

    def segment(self, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedModel, as `region` does: segments are keys and values."""
        self.table.need_keys("segment")

    region = segment

    def step(self, threads: Sequence[Thread]) -> Any:
        """Raises UnsupportedModel: logits are not told."""
        self.table.need_logits("step")

    def stream(
        self,
        threads: Sequence[Thread],
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any = None,
        stop: Any = None,
        logits_processor: Any = (),
        stopping_criteria: Sequence[Any] = (),
        prefix_allowed_tokens_fn: Any = None,
        sample: bool | None = None,
        **options: Any,
    ) -> ServedStream:
        """`apr.stream` on this engine; raises InvalidInput for what a server cannot honour.

        Stopping criteria are given token ids, and NaN for the scores that no server tells.
        """
        self.table.ask()
        if tokenizer is None:
            raise InvalidInput("tokenizer: got None; an engine sends and gets text: pass one")
        if prefix_allowed_tokens_fn is not None:
            raise InvalidInput("prefix_allowed_tokens_fn: a served engine takes no processors")
        ends = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        owner = SimpleNamespace(generation_config=ends)
        config = resolve(owner, generation_config, options, sample)
        check_ends(config, tokenizer)
        dialect = self.dialect(tokenizer)
        if self.logprobs and not dialect.tells_logprobs:
            raise InvalidInput("logprobs: got True, and this server tells none; leave it False")
        run = ServedStream(self, config, tokenizer, dialect, stopping_criteria)
        run.takes_none(logits_processor)
        if len(set(threads)) != len(threads):
            raise InvalidInput("stream: got a thread twice; list each once")
        try:
            for thread in threads:
                run.add(thread, stop=stop)
        except BaseException:
            run.__exit__()
            raise
        return run

    async def astream(
        self,
        threads: Sequence[Thread],
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> AsyncIterator[StreamStep]:
        """`apr.astream` on this engine: tasks wait for their own tokens, and for nobody's step."""
        self.table.ask()
        if options.get("tokenizer") is not None:
            asked = self._ask(options["tokenizer"])
            try:
                await asyncio.shield(asyncio.wrap_future(asked))  # others may wait for it too
            except asyncio.CancelledError:
                if asked.cancelled():
                    raise EngineError(CLOSED) from None
                raise
        with self.stream(threads, generation_config, **options) as run:
            async for step in run:
                yield step

    # ---- the server -----------------------------------------------------------------------------

    def _ask(self, tokenizer: Any) -> Future[Dialect]:
        """What the server takes: asked once, and again where that failed."""
        asked = self._asked
        if asked is None or (asked.done() and (asked.cancelled() or asked.exception())):
            ids = tokenizer("One").input_ids
            asked = self._asked = self.begin(
                listen(self.client, self.name, ids, "One", self.retries)
            )
        return asked

    def dialect(self, tokenizer: Any) -> Dialect:
        """What the server takes."""
        return _result(self._ask(tokenizer))

    def begin(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Start something in the engine's own loop, whichever loop the caller has."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, action: Callable[[], None]) -> None:
        """Do something at once there, where it is alone."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    async def _end(self) -> None:
        """Cancel what still runs; those who wait for it are told."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()
