"""One answer of a server, piece by piece, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from apr.errors import EngineError

if TYPE_CHECKING:
    from apr.remote.engine import Engine

_PASSING = (408, 409, 425, 429)  # refused for a while; and all that are the server's own, from 500


class Piece(NamedTuple):
    """What came: text, and its token ids and log-probability where the server tells them."""

    text: str
    ids: list[int]
    logprob: float


@dataclass
class Request:
    """A prompt as text, or as token ids, and the fields that go with it."""

    prompt: str | list[int]
    fields: dict[str, Any]
    most: int  # tokens
    text: str = ""  # that has come
    ids: list[int] = field(default_factory=list)  # the same where they are told
    tokens: int = 0  # that have come, as far as can be told
    task: asyncio.Task[Any] | None = None  # that runs it
    is_connecting: bool = False
    is_unwanted: bool = False

    def stop(self) -> None:
        """End it; not while a connection is made, which its library does not leave in order."""
        self.is_unwanted = True
        if self.task is not None and not self.is_connecting:
            self.task.cancel()

    @property
    def rest(self) -> str | list[int]:
        """The prompt of what is still to come."""
        if isinstance(self.prompt, str):
            return self.prompt + self.text
        return [*self.prompt, *self.ids]


async def pause(attempt: int, error: Exception | None) -> None:
    """Wait before another attempt: longer each time, never as long as others; no less than the
    server says, up to a minute.
    """
    said = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    try:
        told = min(max(float(said), 0.0), 60.0)
    except ValueError:  # nothing, or a date
        told = 0.0
    own = min(0.25 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
    await asyncio.sleep(max(own, told * random.uniform(1.0, 1.25)))


def passes(error: Exception) -> bool:
    """Whether a request that failed so may be answered when it is sent again."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in _PASSING or error.status_code >= 500
    return isinstance(error, (openai.APIError, json.JSONDecodeError, ConnectionError))


async def answer(engine: Engine, request: Request) -> AsyncIterator[Piece | str]:
    """Pieces as they come; the last item is the reason of the end, "stop" or "length".

    An answer that is cut off goes on behind what has come, in a request of its own. Raises
    EngineError where that does not help either.
    """
    failed: Exception | None = None
    for attempt in range(engine.retries + 1):
        if attempt:
            engine.usage.retries += 1
            await pause(attempt, failed)
        try:
            async for item in _once(engine, request):
                yield item
                if isinstance(item, str):
                    return
        except Exception as error:
            if not passes(error):
                raise
            failed = error
        request.is_connecting = False
        if request.is_unwanted:
            raise asyncio.CancelledError
        if request.tokens >= request.most:
            yield "length"
            return
    said = repr(getattr(failed, "body", None) or failed or "it ended in the middle")
    raise EngineError(
        f"engine: no whole answer in {engine.retries + 1} requests: {said}; see the server's own "
        "output, or open the Engine with more retries"
    ) from failed


async def _once(engine: Engine, request: Request) -> AsyncIterator[Piece | str]:
    import openai

    engine.usage.requests += 1
    request.is_connecting = True
    stream: Any = await engine.client.completions.create(
        model=engine.name,
        prompt=request.rest,
        max_tokens=request.most - request.tokens,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=1 if engine.logprobs else openai.omit,
        **request.fields,
    )
    reason, counted, came = "", 0, 0
    request.is_connecting = False
    try:
        async with stream:
            if request.is_unwanted:
                raise asyncio.CancelledError
            async for chunk in stream:
                if chunk.usage is not None:
                    engine.usage.prompt_tokens += chunk.usage.prompt_tokens
                    counted = chunk.usage.completion_tokens
                if not chunk.choices:
                    continue
                choice = chunk.choices[0]
                ids = list(getattr(choice, "token_ids", None) or ())
                if choice.text or ids:
                    request.text += choice.text
                    request.ids += ids
                    came += len(ids) or 1
                    yield Piece(choice.text, ids, _logprob(choice.logprobs))
                reason = choice.finish_reason or reason
    except Exception:
        if reason not in ("stop", "length"):  # else it was whole, and only its last line is lost
            raise
    finally:  # also where nobody wants the rest
        request.tokens += came
        engine.usage.completion_tokens += counted or came
    if reason in ("stop", "length"):
        yield reason
    elif reason:  # "abort", "error": what came is no answer
        raise ConnectionError(f"the server ended the answer: {reason}")


def _logprob(told: Any) -> float:
    values = [x for x in (told.token_logprobs or ()) if x is not None] if told else []
    return sum(values) if values else math.nan
