"""Widths: the rule on made-up curves, the measurement on a tiny model, and runs that take their
width from it.
"""

from __future__ import annotations

import dataclasses
import math

import pytest

import apr
import scripted
from apr import Budget, WidthCurve, protocols
from apr.protocols import runtime
from protocol_scripts import SCRIPTS


def curve(*seconds):
    return WidthCurve([1 << i for i in range(len(seconds))], list(seconds), 64)


@pytest.mark.parametrize(
    ("seconds", "width"),
    [
        ((1.0, 1.0, 1.0, 1.0), 8),  # flat: all are free
        ((1.0, 2.0, 4.0, 8.0), 1),  # each costs a lone step
        ((1.0, 1.1, 1.3, 4.0), 4),  # free up to a knee
        ((1.0, 1.7, 1.7, 1.8, 1.9), 16),  # a bump at two, then flat
        ((1.0, 1.0, 1.0, 1.0, 1.0, 20.0), 16),
    ],
)
def test_free_width(seconds, width):
    assert curve(*seconds).free_width() == width
    assert curve(*seconds).free_width(price=math.inf) == 1 << (len(seconds) - 1)


def test_measured_width(tmp_path):
    tok = scripted.tokenizer()
    with apr.Session(scripted.model(tok), max_tokens=1024, page_size=16) as session:
        measured = apr.measure_width(session, widths=(1, 2, 4, 64), context=32, repeats=2)
        assert measured.widths == [1, 2, 4]  # 62 pages are free: 64 threads do not fit
        assert all(s > 0 for s in measured.seconds)
        assert str(measured).count("threads") == 3
        measured.plot(tmp_path / "width.png")
        assert (tmp_path / "width.png").read_bytes().startswith(b"\x89PNG")
        assert session.stats.used_pages == 0 and session.stats.threads == 0
        for bad in ({"widths": ()}, {"widths": (0,)}, {"context": 0}, {"repeats": 0}):
            with pytest.raises(apr.InvalidInput, match="measure_width"):
                apr.measure_width(session, **bad)


def test_a_run_takes_its_width_from_the_machine(monkeypatch):
    tok = scripted.tokenizer()
    with apr.Session(scripted.model(tok), max_tokens=1 << 14, page_size=16) as session:
        script, text, _, _ = SCRIPTS["multiverse"]
        widths = {}
        for name, times in (("narrow", (1.0, 2.0)), ("wide", (1.0, 1.0))):
            monkeypatch.setattr(runtime, "measure_width", lambda _, t=times: curve(*t))
            outcome, _ = scripted.play(
                session, tok, "Q", protocols.multiverse, script, Budget(threads="auto")
            )
            assert outcome.text == text
            widths[name] = outcome.critical_path_tokens / outcome.total_tokens
        assert widths["narrow"] == 1.0 > widths["wide"]
        monkeypatch.setattr(runtime, "measure_width", lambda _: curve(1.0, 1.1, 1.1))
        outcome = apr.run(
            session,
            session.thread(tok("Q").input_ids),
            protocols.parathinker,
            tokenizer=tok,
            width="auto",
            budget=Budget(tokens_per_thread=3),
        )
        assert outcome.threads == 4


def test_votes_take_their_width_from_the_machine(monkeypatch):
    tok = scripted.tokenizer()
    monkeypatch.setattr("apr.strategies._sample.measure_width", lambda _: curve(1.0, 1.1, 1.2))
    result = apr.majority_vote(scripted.model(tok), tok, "Q", n="auto", max_new_tokens=3)
    assert len(result.threads) == 4


def test_a_vote_branches_where_the_model_is_unsure():
    tok = scripted.tokenizer()
    model = scripted.model(tok)
    options = {"max_new_tokens": 8, "extract": lambda text: text or None, "n": 6}
    sure = apr.branching_vote(model, tok, "Q", entropy=1e9, **options)
    assert len(sure.threads) == 1 and sure.total_tokens == len(sure.threads[0].tokens)
    unsure = apr.branching_vote(model, tok, "Q", entropy=0.0, **options)
    assert len(unsure.threads) == 6 and sum(unsure.votes.values()) <= 6
    # A twin takes another token where it forks: no two threads write the same.
    assert len({tuple(t.tokens) for t in unsure.threads}) == 6
    assert all(len(t.tokens) == len(t.logprobs) <= 8 for t in unsure.threads)
    written = sum(len(t.tokens) for t in unsure.threads)
    assert unsure.total_tokens < written  # shared beginnings are counted once
    again = apr.branching_vote(model, tok, "Q", entropy=0.0, **options)
    assert [t.tokens for t in again.threads] == [t.tokens for t in unsure.threads]
    several = apr.branching_vote(model, tok, ["Q", "another"], entropy=0.0, **options)
    assert [t.tokens for t in several[0].threads] == [t.tokens for t in unsure.threads]
    with pytest.raises(apr.InvalidInput, match="entropy"):
        apr.branching_vote(model, tok, "Q", entropy=math.nan, **options)


def test_a_vote_that_is_settled_ends():
    tok = scripted.tokenizer()
    model = scripted.model(tok)
    result = apr.branching_vote(
        model,
        tok,
        "Q",
        n=4,
        entropy=0.0,
        max_new_tokens=30,
        extract=lambda text: "same",
        stop=_short,
    )
    assert result.answer == "same" and result.votes["same"] < 4
    assert any(t.finish == "pruned" for t in result.threads)


def _short(tokens):
    return len(tokens) >= 3 + tokens[0] % 7 * 4


def test_limits_are_data():
    assert dataclasses.replace(Budget(), threads="auto").threads == "auto"
    with pytest.raises(apr.InvalidInput, match="tokens"):
        Budget(tokens=True)
