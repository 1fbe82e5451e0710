"""Ctrl-C at every line of a call in turn: all goes on as if it had not begun, or as if it had
ended.
"""

from __future__ import annotations

import gc
import sys
import weakref
from linecache import getline
from pathlib import Path

import pytest
import torch

import apr
from apr.hf import interface
from models import CLOSE, build, distance, stock, tokens

PACKAGE = str(Path(apr.__file__).parent)
PROMPT = tokens(9)
# torch calls no hook after an interrupt: what puts a cached forward right is not interrupted again.
HOOKED = ("take_back", "stop", "left", "put_back", "_end", "__del__")


class Interrupt:
    """Raises at the n-th line that is run of the watched files, and notes the lines before it."""

    def __init__(self, n, watched, but):
        self.n, self.watched, self.but = n, watched, but
        self.lines, self.where = [], None

    def __call__(self, frame, event, _):
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or not path.endswith(self.watched):
            return None
        if frame.f_code.co_name in self.but:
            return None
        # A with statement is left without a line of its own, but the trace sees one.
        if event == "line" and not getline(path, frame.f_lineno).lstrip().startswith("with "):
            self.lines.append((Path(path).name, frame.f_lineno))
            if len(self.lines) == self.n:
                self.where = self.lines[-1]
                raise KeyboardInterrupt(self.where)
        return self


def interrupted(call, n=0, watched=".py", but=()):
    """A call that is interrupted at its n-th line: where, and the lines that were run."""
    trace = Interrupt(n, watched, but)
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    return trace.where, trace.lines


def each_line(lines):
    """1-based places of each line as it is run first, and in short operations as it is run last."""
    first = {line: n for n, line in reversed([*enumerate(lines, 1)])}
    last = {line: n for n, line in enumerate(lines, 1) if len(lines) < 300}
    return sorted({*first.values(), *last.values()})


# ---- operations on a session ---------------------------------------------------------------------


class World:
    """Threads of all kinds, in the middle of their work."""

    def __init__(self, model):
        self.model = model
        s = self.s = apr.Session(model, max_tokens=4096, page_size=16, step_tokens=7)
        self.root = s.thread(PROMPT)
        self.kids = self.root.fork(3)
        for i, kid in enumerate(self.kids):
            kid.extend([20 + i, 30 + i])
        s.step(self.kids)
        s.step([self.root])
        for i, kid in enumerate(self.kids):
            kid.extend([40 + i])
        one, two, three = s.region([50], 20), s.region(base=40), s.region([60, 61], 60)
        self.regions = one, two, three
        self.a = s.thread(view=[(one, 0), (two, None)], writes=one)
        self.b = s.thread(view=[(one, 0), (two, 5)], writes=two)
        self.b.extend([70, 71])
        s.step([self.a, self.b])

    def state(self):
        """What of it can be told apart, without logits."""
        held = [
            (t.tokens, t.position, t.queued, t.draws, t.trims, t.is_line, [e[1:] for e in t.view])
            for t in (self.root, *self.kids, self.a, self.b)
            if t.alive
        ]
        gc.collect()
        self.s.check()
        core = self.s.table.ask_now()
        return held, core.used_pages, core.num_threads, core.num_segments

    def check_logits(self):
        """Those that are held, and those that a step brings, are those of the thread's tokens."""
        for thread in (self.root, *self.kids):
            if not thread.alive or not thread.is_line:
                continue
            want = stock(self.model, thread.tokens)[-1]
            if thread.logits is not None:
                assert distance(thread.logits, want) < CLOSE
            assert distance(self.s.step([thread])[0], want) < CLOSE

    def check_nothing_stays(self):
        s = self.s
        del self.root, self.kids, self.regions, self.a, self.b
        gc.collect()
        core = s.table.ask_now()
        assert (core.used_pages, core.num_threads, core.num_segments) == (0, 0, 0)


GREEDY = {"do_sample": True, "eos_token_id": []}


def _stream(w):
    """Its step may have run, and no thread have taken a token: it is sampled the same again."""
    next(iter(apr.stream(w.s, w.kids, max_new_tokens=2, stop=lambda t: len(t) > 2, **GREEDY)))


def _vote(w):
    apr.majority_vote(w.s, None, [5, 6], n=2, max_new_tokens=1, extract=len, **GREEDY)


OPERATIONS = {
    "extend": lambda w: w.root.extend([90]),
    "fork": lambda w: w.kids[0].fork(3),
    "thread": lambda w: w.s.thread([5, 6]),
    "writer": lambda w: w.s.thread([5], view=[w.regions[0]], writes=w.regions[2]),
    "segment": lambda w: w.s.segment([5, 6], 0, after=[(w.regions[0], 0)]),
    "region": lambda w: w.s.region([5, 6], 3),
    "tail": lambda w: w.kids[0].tail,
    "view": lambda w: w.a.view,
    "set view": lambda w: setattr(w.a, "view", [(w.regions[1], 0), (w.regions[0], None)]),
    "set writes": lambda w: setattr(w.b, "writes", w.regions[2]),
    "seal": lambda w: w.regions[2].seal(),
    "join": lambda w: w.root.join(w.kids[:2]),
    "join text": lambda w: w.root.join(w.kids[:2], reencode=True),
    "trim": lambda w: w.kids[0].trim(10),
    "trim with logits": lambda w: w.root.trim(5),
    "drop": lambda w: w.root.drop(3, 6),
    "release": lambda w: w.kids[0].release(),
    "step": lambda w: w.s.step(w.kids),
    "step of writers": lambda w: w.s.step([w.a, w.b]),
    "stream": _stream,
    "vote": _vote,
}


@pytest.fixture
def quick_gc():
    """What is there already stays: a collection then takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_gc")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_done_or_not(llama, name, record_property):
    operation = OPERATIONS[name]
    done = World(llama)
    before = done.state()
    _, lines = interrupted(lambda: operation(done))
    states = [before, done.state()]
    done.s.close()
    if name == "stream":
        between = World(llama)
        between.s.step(between.kids)
        states.append(between.state())
        between.s.close()
    taken_back, places = 0, each_line(lines)
    if name in ("stream", "vote"):  # many lines, of which most were interrupted above
        places = places[::3]
    record_property("interrupts", len(places))
    for n in places:
        world = World(llama)
        where, _ = interrupted(lambda world=world: operation(world), n)
        now = world.state()
        assert now in states, where
        taken_back += now == before
        world.check_logits()
        assert llama.config._attn_implementation == "sdpa", where
        world.check_nothing_stays()
        world.s.close()
    assert taken_back


def test_a_forward_that_could_not_leave_is_neither_used_nor_kept(monkeypatch):
    """An interrupt as it leaves: the user's own call is stock, the pools go with the session."""
    model = build("llama")
    want, left = stock(model, PROMPT), interface.Running.left
    s = apr.Session(model, max_tokens=256)
    thread, kept = s.thread(PROMPT), [weakref.ref(pool.k) for pool in s.pools]

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(interface.Running, "left", interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            s.step([thread])
    monkeypatch.setattr(interface.Running, "left", left)
    assert model.config._attn_implementation == "apr"
    assert distance(stock(model, PROMPT), want) == 0.0
    assert model.config._attn_implementation == "sdpa" and not interface._SWITCHED
    assert distance(s.step([thread])[0], want[-1]) < CLOSE
    with monkeypatch.context() as again:
        again.setattr(interface.Running, "left", interrupt)
        thread.extend([5])
        with pytest.raises(KeyboardInterrupt):
            s.step([thread])
    s.close()
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
    assert all(pool() is None for pool in kept)


# ---- cached forwards -----------------------------------------------------------------------------

WATCHED = ("cache/cache.py", "cache/call.py", "cache/forward.py", "hf/interface.py")


def still_right(model, cache, before, new, where):
    """The state is that of before the call, or of after it, and everything can be used."""
    assert distance(stock(model, PROMPT), before) == 0.0
    assert model.config._attn_implementation == "sdpa" and not interface._SWITCHED, where
    texts = [thread.tokens for thread in cache.threads]
    assert texts in ([], [PROMPT] * len(texts), [[*PROMPT, *new]] * len(texts)), texts
    assert cache.get_seq_length() == (len(texts[0]) if texts else 0)
    assert cache.session.stats.threads == len(texts)
    with torch.no_grad():
        ids = torch.tensor([[5]] * (len(texts) or 2))
        logits = model(ids, past_key_values=cache).logits[:, -1]
    for row, text in zip(logits, texts or [[], []], strict=True):
        assert distance(row, stock(model, [*text, 5])[-1]) < CLOSE


@pytest.mark.parametrize("what", ["first call", "further call", "shorter prompt"])
def test_at_every_line(what, record_property):
    model = build("llama")
    before = stock(model, PROMPT)
    new = tokens(3, 4) if what == "further call" else []

    def call(n):
        cache = apr.Cache(model, max_tokens=512, page_size=16)
        ids = torch.tensor([PROMPT, PROMPT])
        with torch.no_grad():
            if what != "first call":
                model(ids, past_key_values=cache)
                ids = torch.tensor([new, new] if new else [PROMPT, PROMPT])
                cache._is_user_defined = not new  # as a generate() begins
            positions = None if new else torch.arange(9)[None]
            trace = interrupted(
                lambda: model(ids, position_ids=positions, logits_to_keep=1, past_key_values=cache),
                n,
                WATCHED,
                HOOKED,
            )
        return cache, trace

    cache, (_, lines) = call(0)
    cache.close()
    places = each_line(lines)
    record_property("interrupts", len(places))
    for n in places:
        cache, (where, _) = call(n)
        assert where is not None
        still_right(model, cache, before, new, where)
        cache.close()
    assert len(places) > 100
