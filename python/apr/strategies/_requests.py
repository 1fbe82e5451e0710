"""What all strategies share: prompts in every form, one session, waves of requests, one Result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

from apr.errors import InvalidInput
from apr.loop.decode import Decoded, decode
from apr.loop.processors import Processors
from apr.loop.stream import Stream, stream
from apr.loop.text import written_text
from apr.threads.session import Session
from apr.threads.table import ThreadTable
from apr.threads.thread import Thread
from apr.threads.trace import Stats, Trace

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
    # Tokens that were sampled for this prompt, those of dropped threads included; and those that
    # had to be sampled one after the other.
    total_tokens: int = -1
    critical_path_tokens: int = -1

    def __post_init__(self) -> None:
        for item in self.threads:
            item.let_go()  # a result is data, and outlives the session
        lengths = [len(item.tokens) for item in self.threads]
        if self.total_tokens < 0:
            self.total_tokens = sum(lengths)
        if self.critical_path_tokens < 0:
            self.critical_path_tokens = max(lengths, default=0)


class Writing:
    """How the threads of a method write and are read: what every method takes and hands on.

    sample: whether they sample where neither options nor generation_config say. Of the options of a
    call, chat_template_kwargs go to the tokenizer's chat template and skip_special_tokens to the
    texts; all others are fields of the configuration or arguments of `apr.stream`.
    """

    def __init__(
        self, tokenizer: Any, generation_config: Any, options: dict[str, Any], sample: bool = True
    ) -> None:
        self.tokenizer, self.config = tokenizer, generation_config
        self.options = {"sample": sample, **options}
        self.skip_special_tokens = bool(self.options.pop("skip_special_tokens", False))
        if "logits_processor" in self.options:
            # One source for all runs of the method, so that no thread meets what another left
            # behind.
            self.options["logits_processor"] = Processors(self.options["logits_processor"]).of
        self._template = dict(self.options.pop("chat_template_kwargs", None) or {})

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt in any form."""
        return encode(self.tokenizer, prompt, self._template)

    def stream(self, session: Session) -> Stream:
        """A run without threads so far."""
        return stream(session, [], self.config, tokenizer=self.tokenizer, **self.options)

    def decode(self, session: Session, threads: Sequence[Thread], **more: Any) -> list[Decoded]:
        """What `threads` write until they end; `more` goes before the method's options."""
        options = {**self.options, **more, "skip_special_tokens": self.skip_special_tokens}
        return decode(session, threads, self.config, tokenizer=self.tokenizer, **options)

    def text(self, tokens: Sequence[int], finish: str = "") -> str:
        """What a thread wrote, as text."""
        return written_text(self.tokenizer, tokens, finish, self.skip_special_tokens)

    def read(self, items: Sequence[Decoded]) -> None:
        """Give each its text."""
        for item in items:
            item.text = self.text(item.tokens, item.finish)

    def need_tokenizer(self, who: str) -> None:
        """Raise InvalidInput where `who` reads text and there is no tokenizer to make it."""
        if self.tokenizer is None:
            raise InvalidInput(
                f"{who} reads text, and tokenizer is None; pass the model's tokenizer"
            )


@contextlib.contextmanager
def released() -> Iterator[list[Any]]:
    """A list for what a method makes, threads or what holds some: let go when it ends, however it
    ends.
    """
    made: list[Any] = []
    try:
        yield made
    finally:
        with contextlib.ExitStack() as all_of_them:  # also where letting one go fails
            for one in made:
                all_of_them.callback(let_go if isinstance(one, Thread) else type(one).release, one)


def let_go(thread: Thread) -> None:
    """Release a thread, if that was not done yet, and what it adds to keys and values."""
    thread.forget_vectors()
    if thread.alive:
        thread.release()


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "role" in item


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one (a string, chat messages, or token ids)."""
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidInput(
            f"prompt: got {prompt!r:.60}; expected a string, chat messages, token ids, or a list "
            "of them"
        )
    return not _is_message(prompt[0]) and not isinstance(prompt[0], Integral)


def encode(tokenizer: Any, prompt: Any, template: dict[str, Any] | None = None) -> list[int]:
    """Token ids of one prompt; chat messages go through the tokenizer's chat template, with its own
    options in `template`. A last message of the assistant is a beginning, which is continued.
    """
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and _is_message(prompt[0])
    if template and not is_chat:
        raise InvalidInput(
            f"chat_template_kwargs: got {sorted(template)} for a prompt that is no list of "
            "messages; expected "
            'messages, e.g. [{"role": "user", "content": ...}]'
        )
    if is_chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInput(
                "prompt: got chat messages, but the tokenizer has no chat template; pass a string, "
                "or set tokenizer.chat_template"
            )
        begun = prompt[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not begun, "continue_final_message": begun}
        options |= {"tokenize": True, "return_dict": False} | (template or {})
        ids = _made(lambda: tokenizer.apply_chat_template(list(prompt), **options))
    elif isinstance(prompt, str):
        needed = need(tokenizer, "a prompt of text")
        ids = _made(lambda: needed(prompt).input_ids)
    else:
        ids = list(prompt)
    if not ids:
        raise InvalidInput("prompt: got no tokens; expected at least one")
    return ids


def _made(encode: Callable[[], list[int]]) -> list[int]:
    """The token ids that a tokenizer, or its template, makes; raises InvalidInput."""
    try:
        return encode()
    except Exception as error:  # of a template's own, or of a tokenizer that got no text
        raise InvalidInput(
            f"prompt: the tokenizer does not take it ({type(error).__name__}: {error})"
        ) from error


def need(tokenizer: Any, what: str) -> Any:
    """The tokenizer, which `what` needs; raises InvalidInput where there is none."""
    if tokenizer is None:
        raise InvalidInput(f"tokenizer: got None; {what} needs one (token ids, everywhere, do not)")
    return tokenizer


def encode_plain(tokenizer: Any, text: Any) -> list[int]:
    """Token ids of a piece of text that continues another, without special tokens; ids stay as they
    are.
    """
    if not isinstance(text, str):
        return list(text)
    if not text:
        return []
    made = need(tokenizer, f"the text {text!r:.40}")(text, add_special_tokens=False)
    ids: list[int] = made.input_ids
    return ids


@contextlib.contextmanager
def as_session(model_or_session: Any, seed: int) -> Iterator[Session]:
    """The given session, or one on the given model for the duration."""
    if isinstance(getattr(model_or_session, "table", None), ThreadTable):
        yield model_or_session  # or a served engine
    else:
        with Session(model_or_session, seed=seed) as session:
            yield session


PromptT = TypeVar("PromptT")
# Of (session, prompts, their numbers, a list that takes what is to be let go in the end).
Run = Callable[[Session, list[PromptT], list[int], list[Any]], list[Result]]


def run_requests(
    model_or_session: Any,
    writing: Writing,
    prompt: Any,
    seed: int,
    threads_each: int,
    run: Run[list[int]],
) -> Any:
    """Call `run` on waves of prompts; a Result, or a list of them."""
    batch = is_batch(prompt)
    prompts = [writing.encode(p) for p in (prompt if batch else [prompt])]
    return _in_waves(model_or_session, prompts, batch, seed, threads_each, run)


def run_texts(
    model_or_session: Any,
    question: Any,
    seed: int,
    threads_each: int,
    run: Run[str],
) -> Any:
    """The same for methods that make prompts of a question."""
    batch = not isinstance(question, str)
    questions = list(question) if batch else [question]
    if not questions or not all(isinstance(q, str) and q for q in questions):
        raise InvalidInput(
            f"prompt: got {question!r:.60}; this method makes prompts of a question: expected a "
            "string, or a list of them"
        )
    return _in_waves(model_or_session, questions, batch, seed, threads_each, run)


def _in_waves(
    model_or_session: Any,
    prompts: list[Any],
    batch: bool,
    seed: int,
    threads_each: int,
    run: Run[Any],
) -> Any:
    wave = max(1, MOST_THREADS // threads_each)
    results: list[Result] = []
    with as_session(model_or_session, seed) as session:
        for first in range(0, len(prompts), wave):
            part = prompts[first : first + wave]
            with released() as made:
                results += run(session, part, list(range(first, first + len(part))), made)
    return results if batch else results[0]
