"""Servers that fail, fall silent, or end otherwise: nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

import apr
import scripted
from apr import remote
from apr.protocols import PRESETS
from served import GREEDY, KINDS, PROMPT, FaultProxy


@pytest.mark.parametrize("kind", KINDS)
def test_faults_lose_nothing_and_count_nothing_twice(serve, local, tok, kind):
    names = ["pass", "drop", "429", "cut", "slow", "garbage"]
    draw = random.Random(7)
    calm = itertools.repeat("pass", 8)  # while the engine asks how the server is spoken to
    proxy = FaultProxy(serve(kind).url, itertools.chain(calm, iter(lambda: draw.choice(names), "")))
    options = {"n": 1, "extract": len, "do_sample": False, "max_new_tokens": 16}
    prompts = [f"How far is {i}?" for i in range(10)]
    with remote.Engine(proxy.url, "m", retries=12, concurrency=6) as engine:
        far = apr.majority_vote(engine, tok, prompts, **options)
        near = local(apr.majority_vote, tok, prompts, **options)
        assert [result.text for result in far] == [result.text for result in near]
        assert [result.total_tokens for result in far] == [result.total_tokens for result in near]
        assert engine.stats.retries > 1 and all(proxy.seen.get(name, 0) for name in names)
    proxy.end()


def test_what_is_not_wanted_is_cancelled(serve, tok):
    server = serve(pause=0.02)
    with remote.Engine(server.url, "m") as engine:
        begun = time.monotonic()
        result = apr.majority_vote(
            engine,
            tok,
            PROMPT,
            n=6,
            extract=lambda text: "same" if text else None,
            stop=lambda tokens: len(tokens) >= 4,
            max_new_tokens=400,
        )
        assert [t.finish for t in result.threads] == ["stop"] * 6
        assert all(len(t.tokens) == 4 for t in result.threads)
        late = apr.majority_vote(
            engine, tok, PROMPT, n=2, extract=len, max_new_tokens=400, max_time=0.3
        )
        assert [t.finish for t in late.threads] == ["time", "time"]
        assert time.monotonic() - begun < 5 and engine.stats.cancelled == 8
        for _ in range(100):
            if server.running == 0:
                break
            time.sleep(0.05)
        assert server.running == 0 and server.cancelled == 8


@pytest.mark.parametrize("ending", ["garbage", "abort"])
def test_what_ends_otherwise_is_taken_for_what_it_is(serve, local, tok, ending):
    """Whole where only the last line is broken; a fragment where the server gave up."""
    server = serve(endings=iter([ending]))
    with remote.Engine(server.url, "m") as engine:
        far = apr.majority_vote(engine, tok, PROMPT, n=1, extract=len, **GREEDY)
        near = local(apr.majority_vote, tok, n=1, extract=len, **GREEDY)
        assert far.threads[0].tokens == near.threads[0].tokens
        assert engine.stats.retries == (ending == "abort")


@pytest.mark.parametrize("busy", [1, 2, 4])
def test_a_server_that_is_busy_at_first_is_understood(serve, tok, busy):
    server = serve(busy=busy)
    with remote.Engine(server.url, "m") as engine:
        apr.majority_vote(engine, tok, PROMPT, n=1, extract=len, do_sample=True, top_k=3)
        assert engine.dialect(tok).takes_ids and server.requests[-1]["top_k"] == 3


def test_an_end_token_that_the_tokenizer_does_not_name(serve, tok):
    """As of chat models, whose turns end with another special token."""
    end = next(i for i, t in tok.added_tokens_decoder.items() if t.content == "</think3>")
    server = serve(script=lambda text: "abc", end_token=end)
    with remote.Engine(server.url, "m") as engine:
        item = apr.majority_vote(engine, tok, PROMPT, n=1, extract=len, max_new_tokens=9).threads[0]
        assert (item.text, item.finish, item.tokens[-1]) == ("abc", "eos", end)


def test_a_stop_rule_that_raises_loses_no_token(serve, tok):
    server, calls = serve(script=lambda text: "abcdef"), []

    def stop(tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyError("once")
        return False

    with remote.Engine(server.url, "m") as engine:
        threads = engine.thread(tok(PROMPT).input_ids).fork(2)
        with apr.stream(engine, threads, tokenizer=tok, stop=stop, max_new_tokens=9) as run:
            with pytest.raises(KeyError, match="once"):
                for _ in run:
                    pass
            for _ in run:
                pass
        assert [tok.decode(t.own_tokens) for t in threads] == ["abcdef<eos>"] * 2


def test_nobody_waits_for_ever(serve, tok):
    server = serve(pause=0.5)
    engine = remote.Engine(server.url, "m")
    said = []

    def read():
        try:
            apr.majority_vote(engine, tok, PROMPT, n=1, extract=len, max_new_tokens=99)
        except apr.Error as error:
            said.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not server.running:
        time.sleep(0.01)
    engine.close()
    reader.join(10)
    assert not reader.is_alive() and "closed" in str(said[0])
    server = serve(pause=3.0, script=None)
    with remote.Engine(server.url, "m") as engine:  # a budget of time, while nothing comes
        begun = time.monotonic()
        outcome = apr.run(
            engine,
            engine.thread(tok(PROMPT).input_ids),
            PRESETS["recursive"],
            tokenizer=scripted.tokenizer(whole=()),
            budget=apr.Budget(seconds=1, tokens_per_thread=9),
        )
        assert outcome.finish == "seconds" and time.monotonic() - begun < 6
        with pytest.raises(apr.InvalidInput, match="twice"):
            apr.stream(engine, [outcome.thread] * 2, tokenizer=tok)


def test_errors_leave_threads_and_engine_usable(serve, tok):
    server = serve()
    proxy = FaultProxy(
        server.url, itertools.chain(["pass"], itertools.repeat("cut", 3), itertools.repeat("pass"))
    )
    with remote.Engine(proxy.url, "m", retries=1, concurrency=1) as engine:
        thread = engine.thread(tok(PROMPT).input_ids)
        with pytest.raises(apr.EngineError, match="no whole answer in 2 requests"):
            apr.decode(engine, [thread], tokenizer=tok, **{**GREEDY, "max_new_tokens": 60})
        kept = len(thread) - len(tok(PROMPT).input_ids)
        rest = apr.decode(engine, [thread], tokenizer=tok, **{**GREEDY, "max_new_tokens": 9})[0]
        again = engine.thread(tok(PROMPT).input_ids)
        options = {**GREEDY, "max_new_tokens": kept + 9}
        whole = apr.decode(engine, [again], tokenizer=tok, **options)[0]
        assert kept > 0 and whole.tokens[kept:] == rest.tokens
        assert thread.tokens == again.tokens
    proxy.end()
    with pytest.raises(apr.InvalidInput, match="closed"):
        apr.decode(engine, [again], tokenizer=tok)
    nobody = remote.Engine("http://127.0.0.1:9/v1", "m", retries=0)
    with nobody, pytest.raises(apr.EngineError, match="no server answers"):
        apr.majority_vote(nobody, tok, PROMPT, extract=len)
