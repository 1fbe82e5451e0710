"""Trees of thoughts: nodes that are threads, and how they grow, are valued and let go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apr.decode import Decoded, decode
from apr.errors import InvalidInput
from apr.session import Session
from apr.strategies._requests import encode_plain
from apr.thread import Thread


@dataclass(eq=False)
class Node:
    """A beginning of a text: its thread can be forked at any time, without running anything again."""

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
        if self.thread.alive:
            self.thread.release()

    def decoded(self, request: int) -> Decoded:
        reason = "eos" if self.finished else "stop"
        return Decoded(self.thread, self.tokens, self.logprobs, reason, self.text, request)


Evaluate = Callable[[Sequence[Node]], Sequence[float]]


class ModelValue:
    """Values of texts by the model itself: it is asked after each, and its words are weighed.

    question: what follows a text, e.g. "\\nCan this reach the goal (sure, likely, impossible)?"; values: the
    value of each answer. The score is the mean value under the probabilities of the answers' first tokens.
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
                f"ModelValue: answers {list(values)} begin with the same token; expected different ones"
            )
        self._values = list(values.values())

    def __call__(self, nodes: Sequence[Node]) -> list[float]:
        """One score a node; the questions run in one step and are let go."""
        if not nodes:
            return []
        session = nodes[0].thread.session
        asked = [node.thread.fork(1)[0] for node in nodes]
        try:
            for thread in asked:
                thread.extend(self._question)
            logits = session.step(asked)
        finally:
            for thread in asked:
                if thread.alive:
                    thread.release()
        weights = logits[:, self._first].softmax(-1).tolist()
        return [sum(w * v for w, v in zip(row, self._values, strict=True)) for row in weights]


def per_text(score: Callable[[str], float]) -> Evaluate:
    """An evaluator of a callable on texts."""
    return lambda nodes: [float(score(node.text)) for node in nodes]


def check_budget(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidInput(f"{name}: got {value!r}; expected a positive number, or None")


class Grove:
    """All nodes of one search, within a budget of nodes and of sampled tokens."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        generation_config: Any,
        options: dict[str, Any],
        most_nodes: int | None,
        most_tokens: int | None,
    ) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._config = generation_config
        self._options = options if generation_config is not None else {"do_sample": True, **options}
        self._most_nodes, self._most_tokens = most_nodes, most_tokens
        self.count = self.tokens = self.longest = 0  # longest: tokens one after the other
        self.nodes: list[Node] = []

    def plant(self, ids: list[int], key: tuple[int, int]) -> Node:
        """The root of a prompt."""
        node = Node(self._session.thread(ids, request=key))
        self.nodes.append(node)
        return node

    @property
    def spent(self) -> bool:
        over = self._most_tokens is not None and self.tokens >= self._most_tokens
        return over or (self._most_nodes is not None and self.count >= self._most_nodes)

    def _write(self, threads: list[Thread], options: dict[str, Any]) -> list[Decoded]:
        written = decode(self._session, threads, self._config, tokenizer=self._tokenizer, **options)
        lengths = [len(item.tokens) for item in written]
        self.tokens += sum(lengths)
        self.longest += max(lengths, default=0)
        return written

    def grow(self, parents: Sequence[Node], n: int, stop: Any) -> list[Node]:
        """`n` children of each parent, all in one batch; equal siblings are kept once."""
        if self._most_nodes is not None:
            room = self._most_nodes - self.count
            if room <= 0:
                return []
            n = min(n, room)
            parents = parents[: room // n]
        forks = [(parent, thread) for parent in parents for thread in parent.thread.fork(n)]
        try:
            written = self._write([t for _, t in forks], {**self._options, "stop": stop})
        except BaseException:
            for _, thread in forks:
                if thread.alive:
                    thread.release()
            raise
        grown = []
        for (parent, thread), item in zip(forks, written, strict=True):
            if any(c.tokens[len(parent.tokens) :] == item.tokens for c in parent.children):
                thread.release()
                continue
            tokens = [*parent.tokens, *item.tokens]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
            logprobs = [*parent.logprobs, *item.logprobs]
            ended = item.finish == "eos"
            child = Node(thread, parent, text, tokens, logprobs, parent.depth + 1, ended)
            parent.children.append(child)
            grown.append(child)
        self.count += len(grown)
        self.nodes += grown
        return grown

    def rollouts(self, nodes: Sequence[Node], tokens: int) -> list[str]:
        """How each text may end: forks write on in one batch, and are let go."""
        texts = [node.text for node in nodes]
        open_ones = [i for i, node in enumerate(nodes) if not node.finished]
        forks = [nodes[i].thread.fork(1)[0] for i in open_ones]
        try:
            options = {**self._options, "max_new_tokens": tokens}
            written = self._write(forks, options) if forks else []
            for i, item in zip(open_ones, written, strict=True):
                whole = [*nodes[i].tokens, *item.tokens]
                texts[i] = self._tokenizer.decode(whole, skip_special_tokens=True).strip()
        finally:
            for thread in forks:
                if thread.alive:
                    thread.release()
        return texts

    def release(self) -> None:
        for node in self.nodes:
            node.release()
