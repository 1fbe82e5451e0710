"""What all strategies share: prompts in every form, one session, waves of requests, one Result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from apr.decode import Decoded
from apr.errors import InvalidInput
from apr.session import Session
from apr.trace import Stats, Trace

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

# Threads that decode side by side; further requests wait for the next wave.
MOST_THREADS = 256


@dataclass
class Result:
    """What a strategy returns for one prompt."""

    text: str  # of the chosen thread
    answer: Any
    threads: list[Decoded]
    stats: Stats
    trace: Trace
    votes: dict[Any, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    # Tokens that were sampled for this prompt, those of dropped threads included; and those that had to be
    # sampled one after the other.
    total_tokens: int = -1
    critical_path_tokens: int = -1

    def __post_init__(self) -> None:
        lengths = [len(item.tokens) for item in self.threads]
        if self.total_tokens < 0:
            self.total_tokens = sum(lengths)
        if self.critical_path_tokens < 0:
            self.critical_path_tokens = max(lengths, default=0)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "role" in item


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one (a string, chat messages, or token ids)."""
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidInput(
            f"prompt: got {prompt!r:.60}; expected a string, chat messages, token ids, or a list of them"
        )
    return not _is_message(prompt[0]) and not isinstance(prompt[0], Integral)


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of one prompt; chat messages go through the tokenizer's chat template."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
    elif prompt and _is_message(prompt[0]):
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInput(
                "prompt: got chat messages, but the tokenizer has no chat template; pass a string, or "
                "set tokenizer.chat_template"
            )
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = list(prompt)
    if not ids:
        raise InvalidInput("prompt: got no tokens; expected at least one")
    return ids


def encode_plain(tokenizer: Any, text: Any) -> list[int]:
    """Token ids of a piece of text that continues another, without special tokens; ids stay as they are."""
    if not isinstance(text, str):
        return list(text)
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


@contextlib.contextmanager
def as_session(model_or_session: Any, seed: int) -> Iterator[Session]:
    """The given session, or one on the given model for the duration."""
    if isinstance(model_or_session, Session):
        yield model_or_session
    else:
        with Session(model_or_session, seed=seed) as session:
            yield session


def run_requests(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    seed: int,
    threads_each: int,
    run: Callable[[Session, list[list[int]], list[int]], list[Result]],
) -> Any:
    """Call `run(session, prompts, request numbers)` on waves of prompts; a Result, or a list of them."""
    batch = is_batch(prompt)
    prompts = [encode(tokenizer, p) for p in (prompt if batch else [prompt])]
    return _in_waves(model_or_session, prompts, batch, seed, threads_each, run)


def run_texts(
    model_or_session: Any,
    question: Any,
    seed: int,
    threads_each: int,
    run: Callable[[Session, list[str], list[int]], list[Result]],
) -> Any:
    """The same for methods that make prompts of a question: `run(session, questions, request numbers)`."""
    batch = not isinstance(question, str)
    questions = list(question) if batch else [question]
    if not questions or not all(isinstance(q, str) and q for q in questions):
        raise InvalidInput(
            f"prompt: got {question!r:.60}; this method makes prompts of a question: expected a string, or "
            "a list of them"
        )
    return _in_waves(model_or_session, questions, batch, seed, threads_each, run)


def _in_waves(
    model_or_session: Any,
    prompts: list[Any],
    batch: bool,
    seed: int,
    threads_each: int,
    run: Callable[[Session, list[Any], list[int]], list[Result]],
) -> Any:
    wave = max(1, MOST_THREADS // threads_each)
    results: list[Result] = []
    with as_session(model_or_session, seed) as session:
        for first in range(0, len(prompts), wave):
            part = prompts[first : first + wave]
            results += run(session, part, list(range(first, first + len(part))))
    return results if batch else results[0]
