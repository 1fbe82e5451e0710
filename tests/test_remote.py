"""Methods and protocols on a served engine: what a session on the same model writes."""

from __future__ import annotations

import re

import pytest

import apr
import scripted
from apr import remote
from apr.protocols import PRESETS
from served import GREEDY, KINDS, PROMPT


def methods():
    return [
        (apr.majority_vote, {"n": 3, "extract": len}),
        (apr.best_of_n, {"n": 3, "verifier": lambda text, item: len(set(text))}),
        (apr.skeleton, {"parse": lambda text: ["one", "two", "three"]}),
        (apr.tree_search, {"n": 2, "depth": 3, "stop": None, "evaluate": lambda text: len(text)}),
        (
            apr.mcts,
            {"n": 2, "depth": 2, "iterations": 3, "stop": None, "reward": lambda t: len(set(t))},
        ),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_write_what_they_write_on_a_session(serve, local, tok, kind):
    server = serve(kind)
    with remote.Engine(server.url, "m", concurrency=3) as engine:
        for method, options in methods():
            far = method(engine, tok, PROMPT, **options, **GREEDY)
            near = local(method, tok, **options, **GREEDY)
            assert far.text == near.text and far.answer == near.answer, method
            assert [t.text for t in far.threads] == [t.text for t in near.threads], method
            assert far.total_tokens == near.total_tokens, method
        many = apr.majority_vote(engine, tok, [PROMPT, "Why?"], n=5, extract=len, **GREEDY)
        assert (
            many[1].text == local(apr.majority_vote, tok, "Why?", n=1, extract=len, **GREEDY).text
        )
        assert server.most == 3  # and no more at once
        stats = engine.stats
        assert (stats.retries, stats.requests) == (0, len(server.requests) - _asked(kind))
        assert engine.table.ask().num_threads == 0 and not engine.table.check()


def _asked(kind):
    """Requests that find out how a server is spoken to."""
    return {"fields": 1, "generation_config": 4, "none": 9}[kind]


def test_log_probabilities_and_samples(serve, local, tok):
    server = serve()
    with remote.Engine(server.url, "m", logprobs=True) as engine:
        far = apr.best_of_n(engine, tok, PROMPT, n=2, **GREEDY)
        near = local(apr.best_of_n, tok, n=2, **GREEDY)
        assert far.threads[0].logprobs == pytest.approx(near.threads[0].logprobs, abs=1e-4)
        assert far.threads[0].tokens == near.threads[0].tokens
        sampled = [
            apr.majority_vote(engine, tok, PROMPT, n=4, extract=len, seed=seed, max_new_tokens=8)
            for seed in (1, 1, 2)
        ]
        texts = [[t.text for t in result.threads] for result in sampled]
        assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4
        asked = server.requests[-1]
        assert asked["top_k"] > 1 << 16 and (asked["temperature"], asked["min_p"]) == (1.0, 0.0)


SCRIPTS = {
    "threadweaver": [
        (
            r"far\?$",
            "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>",
        ),
        (r"<Thread>\n1:$", " one</Thread>"),
        (r"<Thread>\n2:$", " two</Thread>"),
        (r"</Thread>\n$", "so 3"),
    ],
    "parallel_r1": [
        (r"far\?$", "Let <Parallel>"),
        (r"<Path>$", "three</Path>"),
        (r"<Summary>$", "so 3"),
    ],
    "recursive": [
        (r"far\?$", "Ask <call>what?</call>"),
        (r"^(<bos>)?what\?$", "that"),
        (r"</result>$", " so 3"),
    ],
    "sprint": [
        (r"far\?$", "<Plan><prompt>a</prompt><prompt>b</prompt></Plan>"),
        (r"<execution>$", "done</execution>"),
        (r"</Execution>$", "so 3"),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_protocols_on_an_engine(serve, net, name, kind):
    """The same script, played by a server and, token by token, on a session."""
    tok = scripted.tokenizer(whole=())  # control words are plain text, that servers show

    def written(text):
        return next((w for pattern, w in SCRIPTS[name] if re.search(pattern, text)), "x")

    server = serve(kind, script=written, tokenizer=tok)
    grammar = PRESETS[name]
    with remote.Engine(server.url, "m") as engine:
        outcome = apr.run(
            engine,
            engine.thread(tok("How far?").input_ids),
            grammar,
            tokenizer=tok,
            max_new_tokens=99,
        )
    assert outcome.text.endswith("so 3") and outcome.finish == "eos"
    assert outcome.threads == len(outcome.root.children) > 0 and not outcome.events
    for child in outcome.root.children:
        assert child.text in outcome.text
        assert child.finish == ("eos" if name == "recursive" else "end")
    assert outcome.critical_path_tokens < outcome.total_tokens or name == "recursive"


def test_special_control_words_need_ids(serve, net, tok):
    """A server that hides special tokens would hide the control words among them."""
    script = lambda text: "x</Parallel>" if text.endswith("<Path>") else "a <Parallel>"  # noqa: E731
    grammar = PRESETS["parallel_r1"]
    with remote.Engine(serve("none", script=script).url, "m") as engine:
        with pytest.raises(apr.InvalidInput, match="special tokens"):
            apr.run(engine, engine.thread([5]), grammar, tokenizer=tok, max_new_tokens=9)
        with pytest.raises(apr.UnsupportedModel, match="keys and values"):
            apr.run(engine, engine.thread([5]), PRESETS["npr"], tokenizer=tok, max_new_tokens=9)
