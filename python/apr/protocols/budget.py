"""Hard limits of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apr.errors import InvalidInput


@dataclass(frozen=True)
class Budget:
    """Limits of one request; None or the default leaves a thing free.

    threads: most that write at once; children beyond that wait in line, waiting parents do not
    count, so a run never blocks itself. "auto": as many as this machine steps nearly for free
    (`free_width`). depth: of children; a thread at the limit cannot write the opening word.
    tokens_per_thread: a thread that has sampled so many ends there, and a child is taken as it is.
    tokens (sampled, all threads), seconds, bytes (of keys, values and layer states held): the
    request ends where it is. at_limit: "stop", the outcome says which limit; or "raise" a
    BudgetExceeded after every thread was given back.
    """

    threads: int | Literal["auto"] = 64
    depth: int = 8
    tokens: int | None = None
    tokens_per_thread: int | None = 8192
    seconds: float | None = None
    bytes: int | None = None
    at_limit: Literal["stop", "raise"] = "stop"

    def __post_init__(self) -> None:
        for name in ("threads", "tokens", "tokens_per_thread", "seconds", "bytes"):
            value = getattr(self, name)
            if value is None or (value == "auto" and name == "threads"):
                continue
            kinds = (int, float) if name == "seconds" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                what = "a number" if name == "seconds" else "an integer"
                raise InvalidInput(f"budget: {name}={value!r}; expected {what} above 0")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise InvalidInput(f"budget: depth={self.depth!r}; expected an integer from 0 on")
        if self.at_limit not in ("stop", "raise"):
            raise InvalidInput(f'budget: at_limit={self.at_limit!r}; expected "stop" or "raise"')
