"""Outlines and their points: what each thread sees, what is shared, routes and errors."""

from __future__ import annotations

import pytest

import apr
from apr.strategies.skeleton import parse_points, point_prompt, shared_beginning
from models import build, stock, tokens
from test_beam_search import Words

HEAD, OUTLINE = tokens(40, 1), tokens(6, 2)
OPTIONS = {"max_new_tokens": 6, "eos_token_id": []}


def outline(question):
    return [*HEAD, int(question)]


def expand(question, text, number, point):
    return [*HEAD, int(question), *map(int, text.split()), 100 + number, int(point)]


def parse(text):
    return text.split()[:3]


def greedy(model, ids, count):
    written = []
    for _ in range(count):
        written.append(int(stock(model, [*ids, *written])[-1].argmax()))
    return written


def test_every_point_is_the_stock_answer_to_its_own_prompt():
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        results = apr.skeleton(
            s, Words(), ["3", "4"], outline=outline, expand=expand, parse=parse, **OPTIONS
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
    for question, result in zip(["3", "4"], results, strict=True):
        first, *points = result.threads
        assert first.tokens == greedy(model, outline(question), 6)
        assert len(points) == 3
        for i, (point, item) in enumerate(zip(parse(first.text), points, strict=True)):
            assert item.tokens == greedy(model, expand(question, first.text, i + 1, point), 6)
        lines = [
            f"{i + 1}. {p}: {t.text}"
            for i, (p, t) in enumerate(zip(parse(first.text), points, strict=True))
        ]
        assert result.text == "\n".join(lines)


def test_the_shared_beginning_runs_once():
    model = build("llama")
    with apr.Session(model, max_tokens=8192) as s:
        apr.skeleton(s, Words(), "3", outline=outline, expand=expand, parse=parse, **OPTIONS)
        # Outline: 41 and 5 of 6 tokens; points: 47 shared, 3 x (2 and 5 of 6).
        assert s.stats.rows == 46 + 47 + 3 * 7


def test_routes_and_outlines_without_points_answer_at_once():
    model = build("llama")
    asked = []

    def route(question):
        asked.append(question)
        return question == "3"

    class Encodes(Words):
        def __call__(self, text, **_):
            return type("Ids", (), {"input_ids": [*HEAD, int(text)]})()

    results = apr.skeleton(
        model,
        Encodes(),
        ["3", "4"],
        outline=outline,
        expand=expand,
        parse=parse,
        route=route,
        **OPTIONS,
    )
    assert asked == ["3", "4"]
    assert [len(r.threads) for r in results] == [4, 1]
    assert results[1].threads[0].tokens == greedy(model, [*HEAD, 4], 6)
    empty = apr.skeleton(
        model, Words(), "3", outline=outline, expand=expand, parse=lambda t: [], **OPTIONS
    )
    assert empty.text == empty.threads[0].text


def test_parsing_and_common_beginnings():
    text = "Causes of it\n2. What follows\n\n 3) Remedies \nnot a point"
    assert parse_points(text) == ["Causes of it", "What follows", "Remedies"]
    assert parse_points("") == []
    assert shared_beginning([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_beginning([[1, 2], [1, 2]]) == 1  # one of its own is left
    assert shared_beginning([[1], [2]]) == 0
    a, b = (point_prompt("Why?", "1. x\n2. y", i, p) for i, p in ((1, "x"), (2, "y")))
    assert a != b and a.startswith("Why?")


def test_bad_input_is_named():
    model = build("llama")
    for question in ([], "", [3, 4], [{"role": "user", "content": "x"}]):
        with pytest.raises(apr.InvalidInput, match="prompt"):
            apr.skeleton(model, Words(), question, outline=outline, expand=expand)
