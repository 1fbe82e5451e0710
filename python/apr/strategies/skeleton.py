"""Skeleton of thought (arXiv 2307.15337): an outline first, then all of its points at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from apr.loop.decode import Decoded
from apr.strategies._requests import Result, Writing, run_texts
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Thread

Ask = Callable[..., Any]  # returns a prompt: a string, chat messages, or token ids


def outline_prompt(question: str) -> str:
    """What asks for the skeleton, unless a callable of yours does."""
    return (
        f"{question}\n\nDo not answer yet. Outline the answer: a numbered list of 3 to 8 points, "
        "one line and "
        "at most five words each.\n1."
    )


def point_prompt(question: str, outline: str, number: int, point: str) -> str:
    """What asks for one point; prompts of one outline share their beginning, which is run once."""
    return (
        f"{question}\n\nThe outline of the answer:\n{outline}\n\nWrite only point {number} in one "
        "or two "
        f"sentences, and nothing of the other points.\n{number}. {point}:"
    )


def parse_points(outline: str) -> list[str]:
    """The lines of a numbered list, without their numbers; a first line without one counts too."""
    points: list[str] = []
    for line in outline.splitlines():
        found = re.match(r"\s*(?:(\d+)\s*[.):]\s*)?(.*\S)?", line)
        number, text = found.groups() if found else (None, None)
        if text and (number or not points):
            points.append(text)
    return points


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; each keeps at least one of its own."""
    most = min(map(len, prompts)) - 1
    same = (len({p[i] for p in prompts}) == 1 for i in range(most))
    return next((i for i, equal in enumerate(same) if not equal), most)


def skeleton(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 8,
    generation_config: Any = None,
    seed: int = 0,
    *,
    outline: Ask = outline_prompt,
    expand: Ask = point_prompt,
    parse: Callable[[str], list[str]] = parse_points,
    route: Callable[[str], bool] | None = None,
    **options: Any,
) -> Any:
    """Let the model outline its answer, then write at most `n` points in parallel; the text is all
    of them.

    prompt: a question, or a list of them. outline(question) and expand(question, outline, number,
    point) return prompts in any form; parse(outline) its points. route(question): False answers at
    once, without an outline; so does an outline without points. `threads` holds the outline and the
    points, in order. Other arguments: as in `majority_vote`; greedy unless told otherwise.
    """
    check_count(n)

    writing = Writing(tokenizer, generation_config, options, sample=False)
    writing.need_tokenizer("skeleton")

    def run(
        session: Session, questions: list[str], requests: list[int], made: list[Any]
    ) -> list[Result]:
        routed = [route is None or route(question) for question in questions]
        for question, request, parallel in zip(questions, requests, routed, strict=True):
            ids = writing.encode(outline(question) if parallel else question)
            made.append(session.thread(ids, request=(seed, request)))
        outlines = writing.decode(session, list(made))
        groups = [
            parse(item.text)[:n] if parallel else []
            for item, parallel in zip(outlines, routed, strict=True)
        ]
        asked: list[Thread] = []
        for question, item, points, request in zip(
            questions, outlines, groups, requests, strict=True
        ):
            prompts = [
                writing.encode(expand(question, item.text, i + 1, point))
                for i, point in enumerate(points)
            ]
            asked += _ask(session, prompts, (seed, request, 1), made)
        written = writing.decode(session, asked)
        return _results(session, session.stats, requests, outlines, groups, written)

    return run_texts(model_or_session, prompt, seed, n, run)


def _ask(
    session: Session, prompts: list[list[int]], key: tuple[int, ...], made: list[Any]
) -> list[Thread]:
    """A thread a prompt, forked from what they have in common."""
    if not prompts:
        return []
    shared = shared_beginning(prompts) if len(prompts) > 1 else 0
    if shared == 0:
        threads = [session.thread(ids, request=(*key, i)) for i, ids in enumerate(prompts)]
        made += threads
        return threads
    root = session.thread(prompts[0][:shared], request=key)
    made.append(root)
    threads = root.fork(len(prompts))
    made += threads
    for thread, ids in zip(threads, prompts, strict=True):
        thread.extend(ids[shared:])
    return threads


def _results(
    session: Session,
    stats: Any,
    requests: list[int],
    outlines: list[Decoded],
    groups: list[list[str]],
    written: list[Decoded],
) -> list[Result]:
    results, at = [], 0
    for item, points, request in zip(outlines, groups, requests, strict=True):
        parts = written[at : at + len(points)]
        at += len(points)
        for part in (item, *parts):
            part.request = request
        lines = [
            f"{i + 1}. {point}: {part.text}"
            for i, (point, part) in enumerate(zip(points, parts, strict=True))
        ]
        text = "\n".join(lines) if parts else item.text
        results.append(
            Result(
                text=text,
                answer=text,
                threads=[item, *parts],
                stats=stats,
                trace=session.trace,
                critical_path_tokens=len(item.tokens)
                + max((len(p.tokens) for p in parts), default=0),
            )
        )
    return results
