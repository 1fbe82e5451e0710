"""What a served engine was asked for, and what it is not able to do."""

from __future__ import annotations

from dataclasses import dataclass

from apr.threads.trace import Stats


@dataclass
class Usage(Stats):
    """Counters of an engine; those of pages and forwards stay 0."""

    requests: int = 0  # that were sent, those sent again among them
    retries: int = 0  # sent again: refused for a while, or cut off in the middle
    cancelled: int = 0  # ended before the server did, as nobody wanted the rest
    prompt_tokens: int = 0  # as the server counts them, 0 where it does not
    completion_tokens: int = 0  # as the server counts them, else as the tokenizer does


@dataclass(frozen=True)
class ServedSpec:
    """Where a session has what was measured of its model."""

    vocab_size: int = 1 << 31
    can_rotate: bool = True  # there are no keys to turn
    states: None = None
    bytes_per_token: int = 0

    tells_logprobs: bool = False

    @property
    def no_logprobs(self) -> str:
        """Why texts have no log-probabilities; empty where they were asked for."""
        return "" if self.tells_logprobs else "needs an Engine that was made with logprobs=True"

    @property
    def no_keys(self) -> str:
        """Why no thread can see another's keys and values."""
        return (
            "a served engine shares no keys and values; expected forks, trims, and joins with "
            "reencode=True, or an apr.Session on a model of your own"
        )

    @property
    def no_logits(self) -> str:
        """Why there are no logits to look at."""
        return (
            "a served engine tells no logits; give a callable on texts, or use an apr.Session on a "
            "model of your own"
        )
