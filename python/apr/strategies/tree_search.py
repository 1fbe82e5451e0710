"""Tree of thoughts (arXiv 2305.10601): thoughts are sampled, valued and searched breadth, depth or best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from apr.errors import InvalidInput
from apr.session import Session
from apr.strategies._requests import Result, run_requests
from apr.strategies._sample import check_count
from apr.strategies._thoughts import Evaluate, Grove, ModelValue, Node, check_budget, per_text

ORDERS = ("bfs", "dfs", "best_first")


def tree_search(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 4,
    generation_config: Any = None,
    seed: int = 0,
    *,
    evaluate: Callable[[str], float] | ModelValue,
    goal: Callable[[str], bool] | None = None,
    order: str = "bfs",
    width: int = 2,
    depth: int = 8,
    cutoff: float | None = None,
    most_nodes: int | None = None,
    most_tokens: int | None = None,
    stop: Any = "\n",
    **options: Any,
) -> Any:
    """Grow thoughts until one meets the goal, the tree ends, or the budget is spent; the best text wins.

    n: thoughts that are sampled at a node; equal ones are kept once. A thought ends with `stop`, an end token
    or `max_new_tokens`. evaluate: a callable on the text since the prompt, or `ModelValue`; higher is better.
    goal(text) ends the search. order: "bfs" keeps the `width` best of each level; "dfs" goes on with the best
    child of the latest node and comes back; "best_first" expands the `width` best of all open nodes at a
    time. cutoff: nodes below it are dropped. A dropped node's pages are free at once. depth: thoughts of a
    text at most; most_nodes, most_tokens: budgets (None: none). `threads` holds the ended and the best open
    texts, best first, `scores` their values. Other arguments: as in `majority_vote`.
    """
    check_count(n)
    check_count(width)
    check_count(depth)
    check_budget("most_nodes", most_nodes)
    check_budget("most_tokens", most_tokens)
    if order not in ORDERS:
        raise InvalidInput(f"order: got {order!r}; expected one of {ORDERS}")
    value: Evaluate = evaluate if isinstance(evaluate, ModelValue) else per_text(evaluate)

    def search(session: Session, ids: list[int], request: int) -> Result:
        grove = Grove(session, tokenizer, generation_config, options, most_nodes, most_tokens)
        try:
            root = grove.plant(ids, (seed, request))
            ended = _search(grove, root, n, value, goal, order, width, depth, cutoff, stop)
            stats = session.stats
        finally:
            grove.release()
        best = sorted(ended, key=lambda node: -node.score) or [root]
        reached = [node for node in best if goal is not None and goal(node.text)]
        chosen = (reached or best)[0]
        return Result(
            text=chosen.text,
            answer=chosen.text,
            threads=[
                node.decoded(request) for node in [chosen, *(b for b in best if b is not chosen)]
            ],
            stats=stats,
            trace=session.trace,
            scores=[chosen.score, *(b.score for b in best if b is not chosen)],
            total_tokens=grove.tokens,
            critical_path_tokens=grove.longest,
        )

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        return [
            search(session, ids, request) for ids, request in zip(prompts, requests, strict=True)
        ]

    return run_requests(model_or_session, tokenizer, prompt, seed, n * width, run)


def _search(
    grove: Grove,
    root: Node,
    n: int,
    value: Evaluate,
    goal: Callable[[str], bool] | None,
    order: str,
    width: int,
    depth: int,
    cutoff: float | None,
    stop: Any,
) -> list[Node]:
    """The nodes that ended, and those that were still open when the search did."""
    open_nodes: list[Node] = [root]
    ended: list[Node] = []
    while open_nodes and not grove.spent:
        chosen = _take(open_nodes, order, width)
        grown = grove.grow(chosen, n, stop)
        for node, score in zip(grown, value(grown), strict=True):
            node.score = score
        for node in chosen:
            node.release()
        if goal is not None and any(goal(node.text) for node in grown):
            return [*ended, *open_nodes, *grown]
        kept = [node for node in grown if cutoff is None or node.score >= cutoff]
        for node in grown:
            if node not in kept:
                node.release()
        done = [node for node in kept if node.finished or node.depth >= depth]
        for node in done:
            node.release()
        ended += done
        # Of equal scores the earlier sampled comes first, whatever the order.
        going = sorted((node for node in kept if node not in done), key=lambda x: -x.score)
        if order == "bfs":
            for node in going[width:]:
                node.release()
            open_nodes = going[:width]
        else:
            open_nodes += reversed(going)
    return [*ended, *open_nodes]


def _take(open_nodes: list[Node], order: str, width: int) -> Sequence[Node]:
    """The nodes to expand next, taken out of the open ones."""
    if order == "dfs":
        return [open_nodes.pop()]
    if order == "bfs":
        return [open_nodes.pop(0) for _ in range(len(open_nodes))]
    best = sorted(open_nodes, key=lambda node: -node.score)[:width]
    for node in best:
        open_nodes.remove(node)
    return best
