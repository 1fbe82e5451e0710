"""How the command line calls each method: with a text model, or on a Countdown problem with the
shipped one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import apr
from apr import countdown
from apr.countdown.problems import Problem
from apr.errors import InvalidInput
from apr.strategies import Board, ModelValue

METHODS = (
    "sequential",
    "majority_vote",
    "best_of_n",
    "beam_search",
    "tree_search",
    "mcts",
    "skeleton",
    "parathinker",
    "group_think",
    "hogwild",
)
SHOWS_STEPS = {"sequential", "majority_vote", "best_of_n", "parathinker", "group_think", "hogwild"}
TEXT_ONLY = {"skeleton", "parathinker"}


def run_method(
    options: argparse.Namespace,
    session: apr.Session,
    tokenizer: Any,
    problem: Problem | None,
    on_step: Callable[[Any], None],
    countdown_texts: bool = False,
) -> Any:
    """A prompt, or a list of them, by `options.method`; with `problem` the Countdown model's
    settings. countdown_texts: whole texts are answers.
    """
    name = options.method
    if problem is not None and name in TEXT_ONLY:
        raise InvalidInput(
            f"--method {name}: the Countdown model knows no such words; give a text model with "
            "--model"
        )
    prompt: Any = options.prompt
    if options.chat:
        prompt = _as_chat(prompt)
    arguments: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    if name in SHOWS_STEPS:
        arguments["on_step"] = on_step
    if name != "beam_search":
        arguments |= {"do_sample": True, "temperature": options.temperature}
    method, more = _settings(options, tokenizer, problem)
    if countdown_texts and method is apr.majority_vote:
        more["extract"] = _whole
    result: Any = method(session, tokenizer, prompt, **{**arguments, **more})
    if problem is not None and name in ("group_think", "hogwild"):
        result.text = result.answer = next(
            (a for item in result.threads if (a := right_attempt(problem, item.text))), result.text
        )
    return result


def _whole(text: str) -> str | None:
    return text or None


def _as_chat(prompt: Any) -> Any:
    """A user's message of each text; messages stay."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [_as_chat(p) if isinstance(p, str) else p for p in prompt]


def right_attempt(problem: Problem, text: str) -> str:
    """The first right solution among attempts that stand one after the other; "" without one."""
    words, size = text.split(), 4 * (len(problem.numbers) - 1)
    tries = (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
    return next((attempt for attempt in tries if countdown.verify(problem, attempt)), "")


def _settings(
    options: argparse.Namespace, tokenizer: Any, problem: Problem | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    n = options.n
    if options.method in ("sequential", "majority_vote"):
        more: dict[str, Any] = {"n": 1 if options.method == "sequential" else n}
        if problem is not None:
            more["extract"] = _whole
        return apr.majority_vote, more
    if options.method == "best_of_n":
        more = {"n": n}
        if problem is not None:
            more["verifier"] = lambda text, thread: float(countdown.verify(problem, text))
        return apr.best_of_n, more
    if options.method == "beam_search":
        return apr.beam_search, {"num_beams": n}
    if options.method in ("tree_search", "mcts"):
        return _search(options, tokenizer, problem)
    if options.method == "skeleton":
        return apr.skeleton, {"n": n}
    if options.method == "parathinker":
        return apr.parathinker, {"n": min(n, 8)}
    return _live(options, tokenizer, problem)


def _search(
    options: argparse.Namespace, tokenizer: Any, problem: Problem | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Searches over lines of a text, valued by the model; over operations of a problem, by
    arithmetic.
    """
    if problem is None:
        if options.method == "mcts":
            raise InvalidInput(
                "--method mcts: a text has no reward here; call apr.mcts(reward=...) from Python"
            )
        question = "\nIs this on the way to a right answer? Answer yes or no:"
        judge = ModelValue(tokenizer, question, {" yes": 1.0, " no": 0.0})
        return apr.tree_search, {"n": min(options.n, 4), "evaluate": judge, "width": 2, "depth": 6}

    def right(text: str) -> bool:
        return countdown.verify(problem, text)

    more = {"n": 4, "depth": len(problem.numbers), "stop": lambda tokens: len(tokens) % 4 == 0}
    if options.method == "mcts":
        return apr.mcts, {
            **more,
            "reward": lambda text: float(right(text)),
            "enough": 1.0,
            "iterations": options.n,
            "rollout_tokens": options.max_new_tokens,
        }
    return apr.tree_search, {**more, "evaluate": lambda text: float(right(text)), "goal": right}


def _live(
    options: argparse.Namespace, tokenizer: Any, problem: Problem | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Threads that read each other; on Countdown each step is an attempt, and a right one ends
    all.
    """
    if problem is None:
        if options.method == "group_think":
            return apr.group_think, {"n": options.workers}
        return apr.hogwild, {"workers": options.workers}
    words: dict[str, Any] = {"answer_prompt": None, "eos_token_id": []}
    start = [tokenizer.convert_tokens_to_ids("<try>")]
    if options.method == "group_think":
        return apr.group_think, {
            **words,
            "n": options.workers,
            "start": lambda number: start,
            "eos_token_id": tokenizer.eos_token_id,
        }
    board = Board(
        past="",
        others="",
        own="",
        step=lambda name, number: start,
        end=[tokenizer.eos_token_id],
        check="",
    )
    return apr.hogwild, {
        **words,
        "workers": options.workers,
        "board": board,
        "max_new_tokens": 3 * options.max_new_tokens,
        "done": lambda text: bool(right_attempt(problem, text)),
    }
