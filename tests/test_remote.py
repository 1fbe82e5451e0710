"""Methods and protocols on a served engine: what a session on the same model writes."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
import time
from pathlib import Path

import pytest

import apr
import scripted
from apr import remote
from apr.protocols import PRESETS
from served import FaultProxy, Server
from test_ranks import saved

KINDS = ["fields", "generation_config", "none"]
PROMPT = "How far is it?"
GREEDY = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def plain(tok):
    """Tokens whose texts are read back as they were: those that a server never samples are the
    others.
    """
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    kept = (i for i in range(len(tok)) if tok.decode([i]).isprintable() and i not in special)
    readable = {i for i in kept if "\ufffd" not in tok.decode([i])} | {tok.eos_token_id}
    return sorted(set(range(len(tok))) - readable)


@pytest.fixture
def serve(net, tok, plain):
    """Servers of the tests' model, which end with the test."""
    made = []

    def start(kind="fields", **settings):
        made.append(Server(net, tok, kind, plain))
        vars(made[-1]).update(settings)
        return made[-1]

    yield start
    for server in made:
        server.end()


@pytest.fixture
def local(session, plain):
    """The oracle: a session that leaves the same tokens out."""

    def run(method, tok, prompt=PROMPT, **options):
        return method(session, tok, prompt, suppress_tokens=plain, **options)

    return run


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


def test_threads_may_be_changed_between_steps(serve, tok):
    """What is put in is read by the next token, as on a session."""
    server = serve(script=lambda text: "abcdef" if text.endswith("?") else "later")
    with remote.Engine(server.url, "m") as engine:
        thread = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [thread], tokenizer=tok, max_new_tokens=9) as run:
            next(iter(run))
            thread.extend(tok("!").input_ids)
            for _ in run:
                pass
        assert tok.decode(thread.own_tokens) == PROMPT + "a!later<eos>"
        kid = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [kid], tokenizer=tok, max_new_tokens=9) as run:
            next(iter(run))
            kid.trim(len(kid) - 1)
            kid.extend(tok("z").input_ids)  # another token in place of the first
            for _ in run:
                pass
        assert tok.decode(kid.own_tokens) == PROMPT + "zlater<eos>"


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
        with pytest.raises(apr.InvalidInput, match="astream"):
            asyncio.run(anext(apr.astream(engine, [outcome.thread], tokenizer=tok)))


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


@pytest.mark.parametrize(
    "options, said",
    [
        ({"logits_processor": [len]}, "takes none"),
        ({"prefix_allowed_tokens_fn": len}, "no processors"),
        ({"top_k": 5}, "top_k"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"num_beams": 2}, "num_beams"),
        ({"tempratur": 2}, "tempratur"),
        ({"n": "auto"}, "logits"),
    ],
)
def test_what_a_server_cannot_do_is_refused(serve, tok, options, said):
    server = serve("none")
    with remote.Engine(server.url, "m") as engine:
        with pytest.raises(apr.Error, match=said):
            apr.majority_vote(engine, tok, PROMPT, extract=len, **options)
        assert not any(asked.get("stream") for asked in server.requests)


@pytest.mark.parametrize(
    "method, options",
    [
        (apr.hogwild, {}),
        (apr.group_think, {}),
        (apr.parathinker, {}),
        (apr.beam_search, {"num_beams": 2}),
        (apr.branching_vote, {"extract": len}),
    ],
)
def test_methods_that_need_keys_or_logits_say_so(serve, tok, method, options):
    with remote.Engine(serve().url, "m") as engine:
        with pytest.raises(apr.UnsupportedModel, match="a served engine"):
            method(engine, tok, PROMPT, max_new_tokens=4, **options)
        assert engine.table.ask().num_threads == 0


def test_threads_of_an_engine(serve, tok):
    with remote.Engine(serve().url, "m") as engine:
        root = engine.thread(tok(PROMPT).input_ids)
        assert len(root.fork(5000)) == 5000  # there are no pages that they could fill
        kids = root.fork(2)
        kids[0].extend([7, 8])
        root.join([kids[0]], reencode=True)
        assert root.tokens == [*tok(PROMPT).input_ids, 7, 8]
        with pytest.raises(apr.UnsupportedModel, match="reencode"):
            root.join([kids[1]])
        whole = kids[1].tokens
        kids[1].drop(1, 3)  # of text alone: its server will run what is left
        assert kids[1].tokens == [whole[0], *whole[3:]] and root.tokens[:3] == whole[:3]
        for call in (engine.segment, engine.region):
            with pytest.raises(apr.UnsupportedModel):
                call([1])
    for wrong in ({"concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"seed": 1.5}):
        with pytest.raises(apr.InvalidInput, match=next(iter(wrong))):
            remote.Engine("http://127.0.0.1:9/v1", "m", **wrong)


def test_inside_a_running_loop(serve, tok):
    """As in a notebook: the engine has a loop of its own."""
    url = serve().url

    async def ask():
        with remote.Engine(url, "m") as engine:
            return apr.majority_vote(engine, tok, PROMPT, n=2, extract=len, **GREEDY)

    assert len(asyncio.run(ask()).threads) == 2


def test_the_program_of_the_page(serve, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    block = re.findall(r"<!-- needs a server -->\n```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my-model").mkdir()
    saved(tmp_path / "my-model", 2)
    monkeypatch.chdir(tmp_path)
    server = serve()
    exec(block[0].replace("http://127.0.0.1:8000/v1", server.url).replace("=200", "=20"), {})
    assert sum(bool(asked.get("stream")) for asked in server.requests) == 16
