"""Ways to end a block, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses

import pytest

import apr
import scripted
from apr import Budget, protocols
from protocol_scripts import GUIDE, SCRIPTS, kid

NPR = protocols.npr


# ---- ways to end a block
# --------------------------------------------------------------------------


def test_the_first_success_cancels_the_rest(session, tok, net):
    grammar = dataclasses.replace(
        NPR, until="success", success="yes", returns="message", after="", before=""
    )
    script = {(): GUIDE + "so", kid(1): "no</step>", kid(2): " a long way to yes</step>"}
    outcome, logits = scripted.play(session, tok, "Q", grammar, script)
    assert outcome.text == GUIDE + "\n" + "a long way to yesso"
    assert [c.finish for c in outcome.root.children] == ["end", "end"]
    early = script | {kid(1): "yes</step>"}
    outcome, logits = scripted.play(session, tok, "Q", grammar, early)
    assert outcome.text == GUIDE + "\nyesso"
    assert [c.finish for c in outcome.root.children] == ["end", "cancelled"]
    winner = outcome.root.children[0].sampled
    assert outcome.critical_path_tokens == outcome.root.sampled + winner
    scripted.check(net, outcome, logits)
    neither = script | {kid(2): "nor here</step>"}
    outcome, logits = scripted.play(session, tok, "Q", grammar, neither)
    assert outcome.text == GUIDE + "\nnoso"  # one stands for all that failed
    slowest = max(c.sampled for c in outcome.root.children)
    assert outcome.critical_path_tokens == outcome.root.sampled + slowest
    scripted.check(net, outcome, logits)


def test_nothing_returns(session, tok, net):
    grammar = dataclasses.replace(NPR, returns="nothing")
    outcome, logits = scripted.play(session, tok, "Q", grammar, SCRIPTS["npr"][0])
    assert outcome.text == GUIDE + "\n\n<takeaway>\nok</takeaway>"
    scripted.check(net, outcome, logits)


def test_samples_repeat_and_siblings_differ(session, tok):
    def texts(seed):
        with apr.Session(session.model, max_tokens=1 << 14, seed=seed) as s:
            grammar = dataclasses.replace(protocols.parathinker, width=4)
            thread = s.thread(tok("Q").input_ids)
            budget = Budget(tokens_per_thread=12)
            outcome = apr.run(
                s, thread, grammar, tokenizer=tok, budget=budget, do_sample=True, eos_token_id=0
            )
            return [c.tokens for c in outcome.root.children]

    first = texts(0)
    assert first == texts(0) and first != texts(1)
    assert len({tuple(t) for t in first}) == 4


# ---- refusals
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"returns": "kv"}, "returns='kv'"),
        ({"context": "all"}, "context='all'"),
        ({"until": "later"}, "until='later'"),
        ({"launch": None}, "no width"),
        ({"open": None}, "without an open word"),
        ({"open": None, "launch": None, "width": 2, "blocking": False}, "without an open word"),
        ({"returns": "keep", "context": "outline"}, "returns='keep'"),
        ({"until": "success"}, "needs the pattern"),
        ({"after": ""}, "without a token to go on from"),
        ({"context": "fresh"}, "no place in their parent's positions"),
        ({"rollback": True}, "cut off"),
        ({"blocking": False, "returns": "text"}, "sync"),
        ({"outline": "("}, "outline"),
        ({"outline": "(a)(b)"}, "2 groups"),
    ],
)
def test_a_grammar_that_cannot_be_obeyed_is_refused(changes, message):
    with pytest.raises(apr.InvalidInput, match=message):
        dataclasses.replace(NPR, **changes)


def test_bad_arguments(session, tok):
    root = session.thread(tok("Q").input_ids)
    with pytest.raises(apr.InvalidInput, match="at least one thread"):
        apr.run(session, [], NPR, tokenizer=tok)
    with pytest.raises(apr.InvalidInput, match="listed once"):
        apr.run(session, [root, root], NPR, tokenizer=tok)
    for bad in (
        {"threads": 0},
        {"threads": 0.5},
        {"depth": -1},
        {"tokens": -5},
        {"seconds": 0},
        {"at_limit": "ask"},
    ):
        with pytest.raises(apr.InvalidInput, match="budget"):
            Budget(**bad)
    with pytest.raises(apr.InvalidInput, match="blank"):
        apr.run(session, root, dataclasses.replace(NPR, open=" <guideline>"), tokenizer=tok)
    assert root.alive and session.stats.threads == 1
