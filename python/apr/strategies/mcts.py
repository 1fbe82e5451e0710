"""Monte Carlo tree search by UCT (Kocsis and Szepesvari, 2006) over thoughts: every node stays a
thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from apr.errors import InvalidInput
from apr.strategies._requests import Result, Writing, run_requests
from apr.strategies._sample import check_count
from apr.strategies._thoughts import (
    Grove,
    Node,
    check_budget,
    grow_all,
    judged,
    plant_all,
    roll_all,
)
from apr.threads.session import Session


def mcts(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 4,
    generation_config: Any = None,
    seed: int = 0,
    *,
    reward: Callable[[str], float],
    iterations: int = 16,
    parallel: int = 4,
    exploration: float = math.sqrt(2),
    depth: int = 8,
    rollout_tokens: int = 64,
    enough: float | None = None,
    most_nodes: int | None = None,
    most_tokens: int | None = None,
    stop: Any = "\n",
    **options: Any,
) -> Any:
    """Search for the text of highest reward; rewards are best in [0, 1].

    An iteration descends from the root by UCT, gives the leaf it meets up to `n` children
    (thoughts, ended by `stop`, an end token or `max_new_tokens`), lets a fork of one child write to
    the end (`rollout_tokens`) and adds reward(text since the prompt) to all nodes above it.
    parallel: leaves that are taken at a time, each under a virtual loss so that the next goes
    elsewhere; their thoughts and rollouts are one batch each. Old nodes are forked again without
    running their text. enough: a reward that ends the search; most_nodes, most_tokens: budgets
    (None: none). The best rollout is the text; `threads` holds the most visited line.
    """
    for name, value in (("iterations", iterations), ("parallel", parallel), ("depth", depth)):
        check_budget(name, value)
    writing = Writing(tokenizer, generation_config, options)
    check_count(n)
    check_budget("most_nodes", most_nodes)
    check_budget("most_tokens", most_tokens)
    if exploration < 0:
        raise InvalidInput(f"exploration: got {exploration}; expected 0 or more")

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        keys = [(seed, request) for request in requests]
        planted = plant_all(session, writing, prompts, keys, most_nodes, most_tokens, made)
        searches = [
            _Search(grove, root, iterations, parallel, exploration, depth, enough)
            for grove, root in planted
        ]
        while going := [search for search in searches if not search.over]:
            grow_all([(s.grove, s.descend()) for s in going], n, stop)
            texts = roll_all([(s.grove, s.leaves_to_roll()) for s in going], rollout_tokens)
            for search, found in zip(going, texts, strict=True):
                search.learn(found, reward)
        stats = session.stats
        return [
            Result(
                text=search.best_text,
                answer=search.best_text,
                threads=[node.decoded(request) for node in _most_visited(search.root)],
                stats=stats,
                trace=session.trace,
                scores=[search.best_reward],
                total_tokens=search.grove.tokens,
                critical_path_tokens=search.grove.longest,
            )
            for search, request in zip(searches, requests, strict=True)
        ]

    return run_requests(model_or_session, writing, prompt, seed, n * parallel, run)


def uct(node: Node, exploration: float) -> float:
    """Mean reward and the bonus of few visits; a node that was never visited comes first."""
    if node.visits == 0:
        return math.inf
    above = node.parent.visits if node.parent is not None else node.visits
    return node.total / node.visits + exploration * math.sqrt(math.log(max(above, 1)) / node.visits)


def _leaves(root: Node, count: int, exploration: float) -> list[Node]:
    """Leaves to work on, found one after the other; each descent counts as a visit without
    reward.
    """
    found = []
    for _ in range(count):
        node = root
        while node.children:
            node = max(node.children, key=lambda child: uct(child, exploration))
        found.append(node)
        _visit(node)
    return found


def _visit(node: Node | None) -> None:
    while node is not None:
        node.visits += 1
        node = node.parent


@dataclass
class _Search:
    """One prompt's search: it says what to grow and what to roll out, and learns from it."""

    grove: Grove
    root: Node
    left: int
    parallel: int
    exploration: float
    depth: int
    enough: float | None
    best_text: str = ""
    best_reward: float = -math.inf
    leaves: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    @property
    def over(self) -> bool:
        reached = self.enough is not None and self.best_reward >= self.enough
        return self.left <= 0 or self.grove.spent or reached

    def descend(self) -> list[Node]:
        """The leaves of this turn that can grow, each once."""
        self.leaves = _leaves(self.root, min(self.parallel, self.left), self.exploration)
        self.left -= len(self.leaves)
        growing: list[Node] = []
        for leaf in self.leaves:
            if not leaf.finished and leaf.depth < self.depth and leaf not in growing:
                growing.append(leaf)
        return growing

    def leaves_to_roll(self) -> list[Node]:
        """A child of each leaf, in turn where a leaf was taken twice; itself where it has none."""
        taken: dict[Node, int] = {}
        self.nodes = []
        for leaf in self.leaves:
            place = taken.get(leaf, 0)
            taken[leaf] = place + 1
            kids = leaf.children
            self.nodes.append(kids[place % len(kids)] if kids else leaf)
        return self.nodes

    def learn(self, texts: list[str], reward: Callable[[str], float]) -> None:
        """Add the rewards of the rollouts to all nodes above them."""
        for leaf, node, text in zip(self.leaves, self.nodes, texts, strict=True):
            gained = judged("reward", reward(text))
            if gained > self.best_reward:
                self.best_text, self.best_reward = text, gained
            if node is not leaf:  # the visit of the leaf was counted on the way down
                node.visits += 1
            above: Node | None = node
            while above is not None:
                above.total += gained
                above = above.parent


def _most_visited(root: Node) -> list[Node]:
    line, node = [], root
    while node.children:
        node = max(node.children, key=lambda child: child.visits)
        line.append(node)
    return line
