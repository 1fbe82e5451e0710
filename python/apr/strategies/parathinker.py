"""ParaThinker (arXiv 2509.04475): paths of thought that do not see each other, then a summary of
them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from apr.errors import InvalidInput
from apr.hf.vectors import PathVectors
from apr.loop.decode import Decoded
from apr.loop.stream import StreamStep
from apr.strategies._requests import Result, Writing, encode_plain, run_requests
from apr.strategies._sample import check_count
from apr.threads.session import Session
from apr.threads.thread import Thread

Tag = str | Callable[[int], Sequence[int]]


def _tag_ids(tokenizer: Any, tag: Tag, number: int) -> list[int]:
    ids = list(tag(number)) if callable(tag) else encode_plain(tokenizer, tag.format(i=number))
    if not ids:
        raise InvalidInput(f"parathinker: the tag {tag!r} has no tokens; expected at least one")
    return ids


def parathinker(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 8,
    generation_config: Any = None,
    seed: int = 0,
    *,
    think: Tag = "<think{i}>",
    end_think: Tag = "</think{i}>",
    summary: Tag = "<summary>",
    end_summary: Tag = "</summary>",
    first_finish: bool = True,
    summary_tokens: int = 512,
    vectors: Sequence[PathVectors] | None = None,
    on_step: Callable[[StreamStep], None] | None = None,
    **options: Any,
) -> Any:
    """`n` paths think in parallel behind the prompt; then the summary reads all of them.

    Path i begins with `think` and ends with `end_think`, formatted with i from 1 on (or callables
    of i that give token ids); all start at the same position and see the prompt and themselves.
    first_finish: when one path ends, all do. A path that did not write its end tag is given it.
    Their keys and values are joined side by side, not run again, and the summary goes on after the
    longest path until `end_summary` or `summary_tokens`. vectors: for checkpoints that learned one
    a path, what path i adds to its keys (before rotation) and values. `threads` holds the paths,
    then the summary, which is the text. Other arguments: as in `majority_vote`.
    """
    check_count(n)
    if "prune" in options:
        raise InvalidInput(
            "parathinker: got prune; paths end by their tags, `stop` or first_finish"
        )
    if vectors is not None and len(vectors) < n:
        raise InvalidInput(f"vectors: got {len(vectors)} for {n} paths; expected one each")
    writing = Writing(tokenizer, generation_config, options)

    def run(
        session: Session, prompts: list[list[int]], requests: list[int], made: list[Any]
    ) -> list[Result]:
        session.table.need_keys("parathinker")
        begins = [_tag_ids(tokenizer, think, i + 1) for i in range(n)]
        ends = [_tag_ids(tokenizer, end_think, i + 1) for i in range(n)]
        roots: list[Thread] = []
        paths: list[list[Thread]] = []
        for ids, request in zip(prompts, requests, strict=True):
            roots.append(session.thread(ids, request=(seed, request)))
            made.append(roots[-1])
            paths.append(roots[-1].fork(n))
            made += paths[-1]
            for i, (thread, begin) in enumerate(zip(paths[-1], begins, strict=True)):
                thread.vectors = None if vectors is None else vectors[i]
                thread.extend(begin)
        everyone = [thread for group in paths for thread in group]
        thoughts = _think(session, writing, everyone, ends, n, first_finish, on_step)
        for i, item in enumerate(thoughts):
            end = ends[i % n]
            if item.tokens[-len(end) :] != end:
                item.thread.extend(end)
        for root, group in zip(roots, paths, strict=True):
            root.join(group, positions="max")
            root.extend(_tag_ids(tokenizer, summary, 0))
        closing = _tag_ids(tokenizer, end_summary, 0)
        summaries = writing.decode(
            session,
            roots,
            max_new_tokens=summary_tokens,
            on_step=on_step,
            stop=lambda written: written[-len(closing) :] == closing,
        )
        stats = session.stats
        results = []
        for k, (item, request) in enumerate(zip(summaries, requests, strict=True)):
            parts = [*thoughts[k * n : (k + 1) * n], item]
            text = _without(writing, item, closing)
            for part in parts:
                part.request = request
            results.append(
                Result(
                    text=text,
                    answer=text,
                    threads=parts,
                    stats=stats,
                    trace=session.trace,
                    critical_path_tokens=max(len(p.tokens) for p in parts[:-1]) + len(item.tokens),
                )
            )
        return results

    return run_requests(model_or_session, writing, prompt, seed, n, run)


def _think(
    session: Session,
    writing: Writing,
    everyone: list[Thread],
    ends: list[list[int]],
    n: int,
    first_finish: bool,
    on_step: Callable[[StreamStep], None] | None,
) -> list[Decoded]:
    """All paths of all prompts, until their end tags."""
    place = {thread: i for i, thread in enumerate(everyone)}

    def ended(thread: Thread, item: Decoded) -> bool:
        end = ends[place[thread] % n]
        return bool(item.finish) or item.tokens[-len(end) :] == end

    def prune(_: StreamStep, results: dict[Thread, Decoded]) -> Iterable[Thread]:
        over = {place[t] // n for t, item in results.items() if first_finish and ended(t, item)}
        return [t for t, item in results.items() if ended(t, item) or place[t] // n in over]

    return writing.decode(session, everyone, prune=prune, on_step=on_step)


def _without(writing: Writing, item: Decoded, closing: list[int]) -> str:
    """The text of a summary, without its end tag."""
    if item.tokens[-len(closing) :] == closing:
        return writing.text(item.tokens[: -len(closing)])
    return item.text
