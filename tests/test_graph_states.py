"""Captured decode steps of models with layer states: each thread equals its own sequence through
the stock model, whatever happens to threads between two replays.
"""

from __future__ import annotations

import random

import pytest
import torch

import apr
import models
from apr import _core
from apr.hf import graph_states
from conftest import built
from kernel_cases import emulate
from models import CLOSE, FAR, STATES, distance, edit_lines, stock, tokens

if _core.gpu(True) is None:
    pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)", allow_module_level=True)

PROMPT = tokens(21, 0)
NEAR = 5 * CLOSE  # as in tests/test_states.py
ATTENDING = [name for name in STATES if name not in ("bloom", "bart")]


@pytest.fixture(autouse=True)
def emulated():
    emulate(90)
    yield
    _core.force_instruction_set("")


@pytest.fixture
def lfm2():
    return built("lfm2")


@pytest.fixture
def replays(monkeypatch):
    """The states that replays left, a list for each."""
    seen: list[list[int]] = []
    put = graph_states.GraphStates.put

    def noted(self, ends):
        seen.append(list(ends))
        put(self, ends)

    monkeypatch.setattr(graph_states.GraphStates, "put", noted)
    return seen


def session(model, max_tokens=4096, **options):
    return apr.Session(model, max_tokens, cuda_graphs=True, self_test=False, **options)


def step(s, threads, t):
    for i, thread in enumerate(threads):
        thread.extend([3 + (5 * t + 3 * i) % 100])
    return s.step(threads)


def right(model, threads, logits, bound=CLOSE):
    pairs = zip(threads, logits, strict=True)
    return all(distance(out, stock(model, t.tokens)[-1]) < bound for t, out in pairs)


@pytest.mark.parametrize("name", ATTENDING)
def test_threads_that_step_together(name, replays):
    model = built(name)
    with session(model) as s:
        kids = s.thread(PROMPT).fork(3)
        for t in range(5):
            out = step(s, kids, t)
            assert right(model, kids, out)
        assert s._graphs.captures == 1 and len(replays) == 4  # the first step ran the prompt
        # Power: the threads differ, and each from itself a token before.
        assert distance(out[0], out[1]) > FAR
        assert distance(out[0], stock(model, kids[0].tokens[:-1])[-1]) > FAR
        for kid in kids:
            kid.release()
        assert s.stats.states == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "falcon_h1"])
def test_random_edits(name, seed, replays):
    model, rng = built(name), random.Random(seed)
    with session(model, 8192, page_size=16, checkpoint_tokens=rng.choice([0, 4])) as s:
        threads = [s.thread(tokens(5, seed))]
        for turn in range(60):
            thread = rng.choice(threads)
            kind = rng.choice(["fork", "trim", "join", "release", *["go on"] * 8])
            edit_lines(kind, thread, threads, rng, turn)
            chosen = rng.sample(threads, rng.randint(1, len(threads)))
            # With nothing queued, as after a trim, a step restores what it began with.
            new = step(s, chosen, turn) if rng.random() < 0.8 else s.step(chosen)
            assert right(model, chosen, new, NEAR)
            s.check()
        assert len(replays) > 10
        for thread in threads:
            thread.release()
        assert s.stats.states == 0


def test_what_a_replay_writes_over_is_kept_for_others(lfm2, replays):
    """A fork's state while its parent goes on, and checkpoints that nobody stands on."""
    with session(lfm2, checkpoint_tokens=4) as s:
        root = s.thread(PROMPT)
        step(s, [root], 0)
        for t in range(4):
            step(s, [root], t)
        (kid,) = root.fork(1)
        for t in range(5):
            assert right(lfm2, [root], step(s, [root], t))
        assert right(lfm2, [kid], step(s, [kid], 7))
        assert len(replays) == 4 + 5 + 1
        assert [s.table.ask().nearest_state(root._id, n) for n in (25, 27, 30)] == [24, 24, 28]
        root.trim(25)
        rows = s.stats.rows
        assert right(lfm2, [root], step(s, [root], 9))
        assert s.stats.rows - rows == 2  # the one behind the checkpoint again, and the new one


@pytest.mark.parametrize("first", [0, 1])
def test_two_rows_that_begin_with_one_state_of_one_of_them(first, lfm2, replays):
    """A fork that was made while the state was missing has none of its own."""
    with session(lfm2) as s:
        root = s.thread(PROMPT)
        for t in range(5):
            step(s, [root], t)
        root.trim(23)
        (kid,) = root.fork(1)
        s.step([root])
        pair = [root, kid] if first else [kid, root]
        before = len(replays)
        for t in range(3):
            assert right(lfm2, pair, step(s, pair, t))
        assert len(replays) == before + 3
        s.check()
        root.release()
        kid.release()
        assert s.stats.states == 0


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_a_step_that_is_taken_back(name, replays):
    """What the replay has done to the states is undone, wherever it stopped."""
    model = built(name)
    with session(model) as s:
        threads = s.thread(PROMPT).fork(2)
        for t in range(3):
            step(s, threads, t)
        stood = [list(thread.tokens) for thread in threads]
        for error in (ValueError, KeyboardInterrupt):
            for thread in threads:
                thread.extend([7])

            def choose(logits, error=error):
                raise error("no")

            with pytest.raises(error):
                s.advance(threads, choose)
            for thread, was in zip(threads, stood, strict=True):
                thread.trim(len(was))
                assert thread.tokens == was
            s.check()
        rows, before = s.stats.rows, len(replays)
        assert right(model, threads, step(s, threads, 5))
        assert before == 4 and len(replays) == 5  # none of it was run again
        assert s.stats.rows == rows + 2


def test_graphs_of_one_width_share_states(lfm2, replays, monkeypatch):
    """Another graph of as many rows is captured while states of idle threads lie in the first."""
    with session(lfm2) as s:
        threads = s.thread(PROMPT).fork(4)
        for t in range(3):
            step(s, threads, t)
        pairs = threads[:2], threads[2:]
        sizes = iter(range(100))
        monkeypatch.setattr(
            "apr.hf.graph._room", lambda count, least: max(least, 1024) + next(sizes)
        )
        for t in range(3):
            for pair in pairs:
                assert right(lfm2, pair, step(s, pair, t))
        assert s._graphs.captures == 1 + 6 and len(replays) == 2 + 6


def test_a_forward_that_leaves_another_kind_of_cache_is_planned(lfm2, replays, monkeypatch):
    monkeypatch.setattr(graph_states, "kind", lambda cache: object())
    with session(lfm2) as s:
        threads = s.thread(PROMPT).fork(2)
        for t in range(3):
            assert right(lfm2, threads, step(s, threads, t))
        assert not replays
        s.check()


def test_runs_sample_as_planned(lfm2, replays):
    def run(graphs):
        with apr.Session(lfm2, 2048, seed=3, cuda_graphs=graphs, self_test=False) as s:
            threads = s.thread(PROMPT).fork(4)
            return [o.tokens for o in apr.decode(s, threads, max_new_tokens=8, temperature=4.0)]

    assert run(True) == run(None)
    assert len(replays) == 7


def test_rows_that_grow_are_refused():
    with pytest.raises(apr.InvalidInput, match="none is replayed"):
        session(built("bloom"))


def test_new_weights(replays):
    model = models.build("lfm2")
    with session(model) as s:
        threads = s.thread(PROMPT).fork(2)
        for t in range(2):
            step(s, threads, t)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.1)
        s.refresh()
        threads = s.thread(PROMPT).fork(2)
        for t in range(3):
            assert right(model, threads, step(s, threads, t))
    assert len(replays) == 1 + 2
