"""Monte Carlo tree search by UCT (Kocsis and Szepesvari, 2006) over thoughts: every node stays a thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from apr.errors import InvalidInput
from apr.session import Session
from apr.strategies._requests import Result, run_requests
from apr.strategies._sample import check_count
from apr.strategies._thoughts import Grove, Node, check_budget


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

    An iteration descends from the root by UCT, gives the leaf it meets up to `n` children (thoughts, ended by
    `stop`, an end token or `max_new_tokens`), lets a fork of one child write to the end (`rollout_tokens`) and
    adds reward(text since the prompt) to all nodes above it. parallel: leaves that are taken at a time, each under
    a virtual loss so that the next goes elsewhere; their thoughts and rollouts are one batch each. Old nodes
    are forked again without running their text. enough: a reward that ends the search; most_nodes,
    most_tokens: budgets (None: none). The best rollout is the text; `threads` holds the most visited line.
    """
    for name, value in (("iterations", iterations), ("parallel", parallel), ("depth", depth)):
        check_budget(name, value)
    check_count(n)
    check_budget("most_nodes", most_nodes)
    check_budget("most_tokens", most_tokens)
    if exploration < 0:
        raise InvalidInput(f"exploration: got {exploration}; expected 0 or more")

    def search(session: Session, ids: list[int], request: int) -> Result:
        grove = Grove(session, tokenizer, generation_config, options, most_nodes, most_tokens)
        best_text, best_reward = "", -math.inf
        try:
            root = grove.plant(ids, (seed, request))
            left = iterations
            while (
                left > 0 and not grove.spent and not (enough is not None and best_reward >= enough)
            ):
                leaves = _leaves(root, min(parallel, left), exploration)
                left -= len(leaves)
                nodes = _expand(grove, leaves, n, depth, stop)
                texts = grove.rollouts(nodes, rollout_tokens)
                for leaf, node, text in zip(leaves, nodes, texts, strict=True):
                    gained = float(reward(text))
                    if gained > best_reward:
                        best_text, best_reward = text, gained
                    _learn(leaf, node, gained)
            stats = session.stats
            line = _most_visited(root)
        finally:
            grove.release()
        return Result(
            text=best_text,
            answer=best_text,
            threads=[node.decoded(request) for node in line],
            stats=stats,
            trace=session.trace,
            scores=[best_reward],
            total_tokens=grove.tokens,
            critical_path_tokens=grove.longest,
        )

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        return [
            search(session, ids, request) for ids, request in zip(prompts, requests, strict=True)
        ]

    return run_requests(model_or_session, tokenizer, prompt, seed, n * parallel, run)


def uct(node: Node, exploration: float) -> float:
    """Mean reward and the bonus of few visits; a node that was never visited comes first."""
    if node.visits == 0:
        return math.inf
    above = node.parent.visits if node.parent is not None else node.visits
    return node.total / node.visits + exploration * math.sqrt(math.log(max(above, 1)) / node.visits)


def _leaves(root: Node, count: int, exploration: float) -> list[Node]:
    """Leaves to work on, found one after the other; each descent counts as a visit without reward."""
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


def _expand(grove: Grove, leaves: list[Node], n: int, depth: int, stop: Any) -> list[Node]:
    """A node a leaf to roll out from: its first child, or itself where it cannot grow."""
    growing = []
    for leaf in leaves:
        if not leaf.finished and leaf.depth < depth and leaf not in growing:
            growing.append(leaf)
    if growing:
        grove.grow(growing, n, stop)
    # A leaf that was taken twice gives its children in turn.
    taken: dict[Node, int] = {}
    nodes = []
    for leaf in leaves:
        place = taken.get(leaf, 0)
        taken[leaf] = place + 1
        nodes.append(leaf.children[place % len(leaf.children)] if leaf.children else leaf)
    return nodes


def _learn(leaf: Node, node: Node, reward: float) -> None:
    """The visit of a leaf was counted on the way down; that of its child was not."""
    if node is not leaf:
        node.visits += 1
    above: Node | None = node
    while above is not None:
        above.total += reward
        above = above.parent


def _most_visited(root: Node) -> list[Node]:
    line, node = [], root
    while node.children:
        node = max(node.children, key=lambda child: child.visits)
        line.append(node)
    return line
