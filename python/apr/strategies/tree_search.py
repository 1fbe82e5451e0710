"""Tree of thoughts (arXiv 2305.10601): thoughts are sampled, valued and searched breadth, depth or
best first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from apr.errors import InvalidInput
from apr.strategies._requests import Result, Writing, run_requests
from apr.strategies._sample import check_count
from apr.strategies._thoughts import (
    Evaluate,
    Grove,
    ModelValue,
    Node,
    check_budget,
    grow_all,
    per_text,
    plant_all,
)
from apr.threads.session import Session

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
    """Grow thoughts until one meets the goal, the tree ends, or the budget is spent; the best text
    wins.

    n: thoughts that are sampled at a node; equal ones are kept once. A thought ends with `stop`, an
    end token or `max_new_tokens`. evaluate: a callable on the text since the prompt, or
    `ModelValue`; higher is better. goal(text) ends the search. order: "bfs" keeps the `width` best
    of each level; "dfs" goes on with the best child of the latest node and comes back; "best_first"
    expands the `width` best of all open nodes at a time. cutoff: nodes below it are dropped. A
    dropped node's pages are free at once. depth: thoughts of a text at most; most_nodes,
    most_tokens: budgets (None: none). `threads` holds the ended and the best open texts, best
    first, `scores` their values. Other arguments: as in `majority_vote`.
    """
    writing = Writing(tokenizer, generation_config, options)
    check_count(n)
    check_count(width)
    check_count(depth)
    check_budget("most_nodes", most_nodes)
    check_budget("most_tokens", most_tokens)
    if order not in ORDERS:
        raise InvalidInput(f"order: got {order!r}; expected one of {ORDERS}")
    value: Evaluate = evaluate if isinstance(evaluate, ModelValue) else per_text(evaluate)

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        keys = [(seed, request) for request in requests]
        planted = plant_all(session, writing, prompts, keys, most_nodes, most_tokens, made)
        searches = [
            _search(grove, root, goal, order, width, depth, cutoff) for grove, root in planted
        ]
        ended: dict[int, list[Node]] = {}
        asked = {i: next(search) for i, search in enumerate(searches)}
        while asked:  # all searches that still go on take one turn
            turn = [(planted[i][0], parents) for i, parents in asked.items()]
            grown = grow_all(turn, n, stop)
            fresh = [node for nodes in grown for node in nodes]
            for node, score in zip(fresh, value(fresh), strict=True):
                node.score = score
            for i, nodes in zip(list(asked), grown, strict=True):
                try:
                    asked[i] = searches[i].send(nodes)
                except StopIteration as end:
                    ended[i] = end.value
                    del asked[i]
        stats = session.stats
        return [
            _result(*planted[i], ended[i], goal, request, stats, session)
            for i, request in enumerate(requests)
        ]

    return run_requests(model_or_session, writing, prompt, seed, n * width, run)


def _result(
    grove: Grove,
    root: Node,
    ended: list[Node],
    goal: Callable[[str], bool] | None,
    request: int,
    stats: Any,
    session: Session,
) -> Result:
    best = sorted(ended, key=lambda node: -node.score) or [root]
    reached = [node for node in best if goal is not None and goal(node.text)]
    chosen = (reached or best)[0]
    line = [chosen, *(node for node in best if node is not chosen)]
    return Result(
        text=chosen.text,
        answer=chosen.text,
        threads=[node.decoded(request) for node in line],
        stats=stats,
        trace=session.trace,
        scores=[node.score for node in line],
        total_tokens=grove.tokens,
        critical_path_tokens=grove.longest,
    )


def _search(
    grove: Grove,
    root: Node,
    goal: Callable[[str], bool] | None,
    order: str,
    width: int,
    depth: int,
    cutoff: float | None,
) -> Generator[Sequence[Node], list[Node], list[Node]]:
    """Yields the nodes to expand, is sent their children with scores, and returns the nodes that
    ended and those that were still open when the search did.
    """
    open_nodes: list[Node] = [root]
    ended: list[Node] = []
    while open_nodes and not grove.spent:
        chosen = _take(open_nodes, order, width)
        grown = yield chosen
        for node in chosen:
            if node.children:
                node.release()
            else:  # the budget did not reach so far
                ended.append(node)
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
