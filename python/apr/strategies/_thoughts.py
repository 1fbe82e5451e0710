"""Trees of thoughts: nodes that are threads, and how they grow, are valued and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apr.errors import InvalidInput
from apr.loop.decode import Decoded
from apr.strategies._requests import Writing, encode_plain, let_go, released
from apr.strategies._reward import number
from apr.threads.session import Session
from apr.threads.thread import Thread


@dataclass(eq=False)
class Node:
    """A beginning of a text: its thread can be forked at any time, without running anything
    again.
    """

    session: Session
    thread: Thread
    parent: Node | None = None
    text: str = ""  # since the prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    depth: int = 0
    finished: bool = False  # the model ended the text
    score: float = 0.0
    children: list[Node] = field(default_factory=list)
    visits: float = 0
    total: float = 0.0  # of rewards

    def release(self) -> None:
        """Release its thread, if that was not done yet."""
        if self.thread.alive:
            self.thread.release()

    def decoded(self, request: int) -> Decoded:
        """The text since the prompt as what one thread wrote."""
        reason = "eos" if self.finished else "stop"
        return Decoded(self.thread, self.tokens, self.logprobs, reason, self.text, request)


Evaluate = Callable[[Sequence[Node]], Sequence[float]]


class ModelValue:
    """Values of texts by the model itself: it is asked after each, and its words are weighed.

    question: what follows a text, e.g. "\\nCan this reach the goal (sure, likely, impossible)?";
    values: the value of each answer. The score is the mean value under the probabilities of the
    answers' first tokens.
    """

    def __init__(self, tokenizer: Any, question: Any, values: dict[Any, float]) -> None:
        self._question = encode_plain(tokenizer, question)
        words = [encode_plain(tokenizer, word) for word in values]
        if not self._question or not all(words) or not words:
            raise InvalidInput(
                "ModelValue: got a question or an answer without tokens; expected at least one each"
            )
        self._first = [ids[0] for ids in words]
        if len(set(self._first)) != len(self._first):
            raise InvalidInput(
                f"ModelValue: answers {list(values)} begin with the same token; expected different "
                "ones"
            )
        self._values = list(values.values())

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        """One score a node; the questions run in one step and are let go."""
        if not nodes:
            return []
        session = nodes[0].session
        with released() as asked:
            asked += [node.thread.fork(1)[0] for node in nodes]
            for thread in asked:
                thread.extend(self._question)
            logits = session.step(asked)
        weights = logits[:, self._first].softmax(-1).tolist()
        return [sum(w * v for w, v in zip(row, self._values, strict=True)) for row in weights]


def judged(who: str, value: Any) -> float:
    """A value that a search can compare and add up."""
    found = number(who, value)
    if math.isnan(found):
        raise InvalidInput(
            f"{who}: got {value!r}; a search cannot go on from a thought without a value: return a "
            "number"
        )
    return found


def per_text(score: Callable[[str], float]) -> Evaluate:
    """An evaluator of a callable on texts."""
    return lambda nodes: [judged("evaluate", score(node.text)) for node in nodes]


def check_budget(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidInput(f"{name}: got {value!r}; expected a positive number, or None")


class Grove:
    """All nodes of one search, within a budget of nodes and of sampled tokens."""

    def __init__(
        self,
        session: Session,
        writing: Writing,
        most_nodes: int | None,
        most_tokens: int | None,
    ) -> None:
        self._session, self.writing = session, writing
        self._most_nodes, self._most_tokens = most_nodes, most_tokens
        self.count = self.tokens = self.longest = 0  # longest: tokens one after the other
        self.threads: list[Thread] = []  # all that were made for it

    def plant(self, ids: list[int], key: tuple[int, int]) -> Node:
        """The root of a prompt."""
        node = Node(self._session, self._session.thread(ids, request=key))
        self.threads.append(node.thread)
        return node

    @property
    def spent(self) -> bool:
        over = self._most_tokens is not None and self.tokens >= self._most_tokens
        return over or (self._most_nodes is not None and self.count >= self._most_nodes)

    def allowed(self, parents: Sequence[Node], n: int) -> list[tuple[Node, int]]:
        """How many children each parent may have within the budget."""
        if self._most_nodes is None:
            return [(parent, n) for parent in parents]
        room = self._most_nodes - self.count
        n = min(n, max(room, 0))
        return [(parent, n) for parent in parents[: room // n]] if n else []

    def adopt(self, parent: Node, item: Decoded) -> Node | None:
        """The child that a thread became; None where a sibling says the same."""
        if any(c.tokens[len(parent.tokens) :] == item.tokens for c in parent.children):
            item.thread.release()
            return None
        tokens = [*parent.tokens, *item.tokens]
        text = self.writing.text(tokens, item.finish)
        logprobs = [*parent.logprobs, *item.logprobs]
        ended = item.finish == "eos"
        child = Node(
            self._session, item.thread, parent, text, tokens, logprobs, parent.depth + 1, ended
        )
        parent.children.append(child)
        self.count += 1
        return child

    def note(self, lengths: Sequence[int]) -> None:
        """Tokens that were sampled side by side for this search."""
        self.tokens += sum(lengths)
        self.longest += max(lengths, default=0)

    def release(self) -> None:
        for thread in self.threads:
            let_go(thread)


def plant_all(
    session: Session,
    writing: Writing,
    prompts: Sequence[list[int]],
    keys: Sequence[tuple[int, int]],
    most_nodes: int | None,
    most_tokens: int | None,
    made: list[Any],
) -> list[tuple[Grove, Node]]:
    """A search a prompt, and its root; all within budgets of their own."""
    planted = []
    for ids, key in zip(prompts, keys, strict=True):
        grove = Grove(session, writing, most_nodes, most_tokens)
        made.append(grove)
        planted.append((grove, grove.plant(ids, key)))
    return planted


def _write(
    groves: Sequence[Grove], forks: Sequence[tuple[Grove, Node, Thread]], more: dict[str, Any]
) -> list[Decoded]:
    """Let forks of nodes of any searches write, in one batch."""
    if not forks:
        return []
    for grove, _, thread in forks:
        grove.threads.append(thread)
    first = groves[0]
    written = first.writing.decode(first._session, [thread for _, _, thread in forks], **more)
    for grove in groves:
        mine = zip(forks, written, strict=True)
        grove.note([len(item.tokens) for (owner, _, _), item in mine if owner is grove])
    return written


def grow_all(asked: Sequence[tuple[Grove, Sequence[Node]]], n: int, stop: Any) -> list[list[Node]]:
    """`n` children of each node, for several searches in one batch; equal siblings are kept
    once.
    """
    forks = []
    for grove, parents in asked:
        for parent, count in grove.allowed(parents, n):
            forks += [(grove, parent, thread) for thread in parent.thread.fork(count)]
    written = _write([grove for grove, _ in asked], forks, {"stop": stop})
    grown: dict[int, list[Node]] = {id(grove): [] for grove, _ in asked}
    for (grove, parent, _), item in zip(forks, written, strict=True):
        child = grove.adopt(parent, item)
        if child is not None:
            grown[id(grove)].append(child)
    return [grown[id(grove)] for grove, _ in asked]


def roll_all(asked: Sequence[tuple[Grove, Sequence[Node]]], tokens: int) -> list[list[str]]:
    """How the texts of nodes may end, for several searches in one batch; the forks are let go."""
    forks = [
        (grove, node, node.thread.fork(1)[0])
        for grove, nodes in asked
        for node in nodes
        if not node.finished
    ]
    written = iter(_write([grove for grove, _ in asked], forks, {"max_new_tokens": tokens}))
    for _, _, thread in forks:
        thread.release()
    texts: list[list[str]] = []
    for grove, nodes in asked:
        texts.append([])
        for node in nodes:
            text = node.text
            if not node.finished:
                rest = next(written)
                text = grove.writing.text([*node.tokens, *rest.tokens], rest.finish)
            texts[-1].append(text)
    return texts
