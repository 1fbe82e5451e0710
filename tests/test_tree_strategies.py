"""Trees of thoughts and MCTS: what nodes hold against the stock forward; orders, budgets, pages,
errors.
"""

from __future__ import annotations

import math

import pytest
import torch

import apr
from apr import countdown, hf
from apr.strategies import ModelValue
from apr.strategies._requests import Writing
from apr.strategies._thoughts import Grove, Node, grow_all
from apr.strategies.mcts import _leaves, uct
from models import CLOSE, build, distance, stock, tokens
from test_beam_search import Words

PROMPT = tokens(9, 3)


def four(written):
    return len(written) % 4 == 0


OPTIONS = {"stop": four, "max_new_tokens": 8, "eos_token_id": [], "temperature": 1.5}


def value(text):
    """A value of any text, different for different ones."""
    return sum((i + 1) * int(word) for i, word in enumerate(text.split())) % 97 / 97


def logprobs_of(model, ids, written):
    rows = stock(model, [*ids, *written])[len(ids) - 1 : -1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, written, strict=True)]


def held_is_right(model, result):
    for item in result.threads:
        want = logprobs_of(model, PROMPT, item.tokens)
        assert max(abs(a - b) for a, b in zip(item.logprobs, want, strict=True)) < 1e-4


@pytest.mark.parametrize("order", ["bfs", "dfs", "best_first"])
def test_nodes_hold_what_the_stock_forward_gives(order):
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        most = 0

        def watch(text):
            nonlocal most
            most = max(most, s.stats.threads)
            return value(text)

        result = apr.tree_search(
            s,
            Words(),
            PROMPT,
            n=3,
            evaluate=watch,
            order=order,
            width=2,
            depth=4,
            most_nodes=40,
            **OPTIONS,
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        if order == "bfs":  # two parents and their six children, whatever was dropped before
            assert most <= 2 + 2 * 3
    held_is_right(model, result)
    assert result.scores == sorted(result.scores, reverse=True)
    assert result.scores == [value(item.text) for item in result.threads]
    assert result.text == result.threads[0].text


def test_breadth_first_is_what_it_says():
    """Level by level by hand, with the same samples: a node's samples depend on its fork path
    alone.
    """
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        result = apr.tree_search(
            s, Words(), PROMPT, n=3, evaluate=value, width=2, depth=3, seed=5, **OPTIONS
        )
        level = [(s.thread(PROMPT, request=(5, 0)), [])]
        for _ in range(3):
            grown = []
            for thread, before in level:
                kids = thread.fork(3)
                for item in apr.decode(s, kids, do_sample=True, tokenizer=Words(), **OPTIONS):
                    grown.append((item.thread, [*before, *item.tokens]))
            text = lambda written: " ".join(map(str, written))  # noqa: E731
            level = sorted(grown, key=lambda pair: -value(text(pair[1])))[:2]
        best = [written for _, written in level]
    assert [item.tokens for item in result.threads[:2]] == best


def test_goals_cutoffs_and_budgets_end_the_search():
    model = build("llama")
    seen: list[str] = []

    def count(text):
        seen.append(text)
        return value(text)

    base = {"n": 3, "width": 2, "depth": 5, **OPTIONS}
    with apr.Session(model, max_tokens=8192) as s:
        hit = apr.tree_search(
            s, Words(), PROMPT, evaluate=count, goal=lambda t: len(t.split()) == 8, **base
        )
        assert len(hit.text.split()) == 8
        seen.clear()
        apr.tree_search(s, Words(), PROMPT, evaluate=count, most_nodes=7, order="dfs", **base)
        assert len(seen) <= 7
        seen.clear()
        tight = apr.tree_search(s, Words(), PROMPT, evaluate=count, most_nodes=4, **base)
        # What the budget left unexpanded still counts.
        level = sorted((t for t in seen if len(t.split()) == 4), key=value, reverse=True)
        assert len(seen) == 4 and level[1] in [item.text for item in tight.threads]
        few = apr.tree_search(s, Words(), PROMPT, evaluate=value, most_tokens=20, **base)
        assert sum(len(t.tokens) for t in few.threads) > 0
        none = apr.tree_search(s, Words(), PROMPT, evaluate=value, cutoff=2.0, **base)
        assert (
            none.text == "" and none.threads[0].tokens == []
        )  # all were dropped: the root is left
        assert s.stats.used_pages == 0

        def broken(text):
            raise ZeroDivisionError

        for method, name in ((apr.tree_search, "evaluate"), (apr.mcts, "reward")):
            with pytest.raises(ZeroDivisionError):
                method(s, Words(), PROMPT, **{name: broken}, **OPTIONS)
            assert s.stats.used_pages == 0 and s.stats.threads == 0
    for options, word in (
        ({"order": "random"}, "order"),
        ({"width": 0}, "n: got 0"),
        ({"most_nodes": 0}, "most_nodes"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.tree_search(model, Words(), PROMPT, evaluate=value, **{**base, **options})


def test_the_model_values_its_own_thoughts():
    model = build("llama")
    question, answers = [5, 6, 7], {(40,): 1.0, (41,): 0.5, (42,): 0.0}
    judge = ModelValue(Words(), question, answers)
    with apr.Session(model, max_tokens=4096) as s:
        result = apr.tree_search(
            s, Words(), PROMPT, n=3, evaluate=judge, width=2, depth=2, **OPTIONS
        )
        assert s.stats.used_pages == 0
    for item, score in zip(result.threads, result.scores, strict=True):
        row = stock(model, [*PROMPT, *item.tokens, *question])[-1][[40, 41, 42]].softmax(-1)
        assert abs(score - float(row @ torch.tensor([1.0, 0.5, 0.0]))) < 1e-5
    with pytest.raises(apr.InvalidInput, match="same token"):
        ModelValue(Words(), [5], {(40, 1): 1.0, (40, 2): 0.0})


def test_old_nodes_are_forked_again_without_a_prefill():
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        options = {k: v for k, v in OPTIONS.items() if k != "stop"}
        grove = Grove(s, Writing(Words(), None, options), None, None)
        root = grove.plant(PROMPT, (0, 0))
        (level,) = grow_all([(grove, [root])], 3, four)
        old = level[1]
        for _ in range(3):
            (level,) = grow_all([(grove, level[:2])], 2, four)
        rows = s.stats.rows
        (again,) = old.thread.fork(1)
        again.extend([11])
        logits = s.step([again])[0]
        # The last sampled token of the old node may still be queued; nothing else runs.
        assert s.stats.rows - rows <= 2
        assert distance(logits, stock(model, [*PROMPT, *old.tokens, 11])[-1]) < CLOSE
        grove.release()


def test_mcts():
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        result = apr.mcts(
            s,
            Words(),
            PROMPT,
            n=3,
            reward=value,
            iterations=20,
            parallel=4,
            depth=4,
            rollout_tokens=6,
            **OPTIONS,
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        again = apr.mcts(
            s,
            Words(),
            PROMPT,
            n=3,
            reward=value,
            iterations=20,
            parallel=4,
            depth=4,
            rollout_tokens=6,
            **OPTIONS,
        )
        assert again.text == result.text  # seeds, not luck
        one = apr.mcts(s, Words(), PROMPT, n=3, reward=value, iterations=1, **OPTIONS)
        found: list[float] = []

        def noted(text: str) -> float:
            found.append(value(text))
            return found[-1]

        enough = one.scores[0]
        early = apr.mcts(
            s,
            Words(),
            PROMPT,
            n=3,
            reward=noted,
            iterations=50,
            parallel=1,
            enough=enough,
            **OPTIONS,
        )
    assert result.scores == [value(result.text)]
    assert result.scores[0] >= one.scores[0]
    assert found.index(max(found)) == len(found) - 1  # the reward that was enough is the last
    assert early.scores == [max(found)] and max(found) >= enough
    held_is_right(model, result)


@pytest.mark.parametrize("method", ["bfs", "dfs", "best_first", "mcts"])
def test_prompts_side_by_side_find_what_they_find_alone(method):
    model = build("llama")
    prompts = [tokens(6 + i, 20 + i) for i in range(3)]
    if method == "mcts":
        options = {"n": 2, "reward": value, "iterations": 7, "parallel": 3, "depth": 3}
        search = apr.mcts
    else:
        options = {"n": 2, "evaluate": value, "width": 2, "depth": 3, "order": method}
        search = apr.tree_search
        options["most_nodes"] = 15
    with apr.Session(model, max_tokens=8192) as s:
        many = search(s, Words(), prompts, **options, **OPTIONS)
        forwards = s.stats.forwards
        for number, (ids, result) in enumerate(zip(prompts, many, strict=True)):
            # With the prompts before it, so that its request number, and its samples, are the same.
            alone = search(s, Words(), [*prompts[:number], ids], **options, **OPTIONS)[number]
            assert alone.text == result.text and alone.scores == result.scores
            assert alone.total_tokens == result.total_tokens
        assert s.stats.used_pages == 0
        assert forwards <= 1.5 * max(r.critical_path_tokens for r in many) + 10  # one batch for all


def test_uct_and_virtual_losses():
    root = Node(None, None)  # type: ignore[arg-type]
    root.visits = 10
    for visits, total in ((5, 4.0), (4, 1.0), (1, 0.5)):
        child = Node(None, None, root)  # type: ignore[arg-type]
        child.visits, child.total = visits, total
        root.children.append(child)
    assert uct(root.children[0], 1.0) == 4 / 5 + math.sqrt(math.log(10) / 5)
    assert uct(Node(None, None, root), 1.0) == math.inf  # type: ignore[arg-type]
    # Descents without rewards in between go elsewhere.
    found = _leaves(root, 8, math.sqrt(2))
    assert len({id(leaf) for leaf in found}) == 3
    greedy = _leaves(root, 1, 0.0)
    assert greedy == [max(root.children, key=lambda c: c.total / c.visits)]


@pytest.mark.parametrize("method", ["bfs", "best_first", "mcts"])
def test_countdown_is_solved_more_often_than_by_one_sample(method):
    model, tokenizer = hf.load(str(countdown.CHECKPOINT), dtype=torch.float32)
    options = {"stop": four, "max_new_tokens": 8, "temperature": 2.0}
    problems = countdown.sample_problems(12, seed=1)
    solved = single = 0
    with apr.Session(model) as s:
        for problem in problems:

            def right(text, problem=problem):
                return countdown.verify(problem, text)

            if method == "mcts":
                result = apr.mcts(
                    s,
                    tokenizer,
                    problem.prompt,
                    reward=lambda t: float(right(t)),
                    enough=1.0,
                    depth=3,
                    rollout_tokens=12,
                    **options,
                )
            else:
                result = apr.tree_search(
                    s,
                    tokenizer,
                    problem.prompt,
                    evaluate=lambda t: float(right(t)),
                    goal=right,
                    order=method,
                    depth=3,
                    most_nodes=60,
                    **options,
                )
            solved += right(result.text)
            one = apr.majority_vote(
                s,
                tokenizer,
                problem.prompt,
                n=1,
                do_sample=True,
                temperature=2.0,
                max_new_tokens=12,
            )
            single += right(one.text)
    assert solved >= 9 and solved > single
