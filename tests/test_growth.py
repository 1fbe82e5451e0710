"""A pool that begins small: it grows when a step needs more, and nothing is another."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

import apr
from apr import _core
from apr.errors import InvalidInput, OutOfPages
from kernel_cases import emulate
from models import CLOSE, build, distance, stock, tokens

SMALL = {"page_size": 16, "start_tokens": 32}
SAMPLED = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 20}


def test_it_grows_when_it_must_and_holds_what_it_held(llama):
    with apr.Session(llama, 1000, **SMALL) as s:  # 63 pages
        core = s.table.ask()
        sizes = [core.num_pages]
        threads = []
        for i in range(12):
            threads.append(s.thread(tokens(40, seed=i)))
            s.step(threads[-1:])
            sizes.append(core.num_pages)
            assert {pool.num_pages for pool in s.pools} == {core.num_pages}
        assert sorted(set(sizes)) == [2, 4, 8, 16, 32, 63]
        s.step([s.thread(tokens(20 * 16))])  # what nobody holds is collected, and not grown for
        for thread in threads:
            thread.extend([5])
            assert distance(s.step([thread])[0], stock(llama, thread.tokens)[-1]) < CLOSE
        with pytest.raises(OutOfPages, match="of 63 pages"):
            s.step([s.thread(tokens(30 * 16))])
        threads.pop().release()
        s.check()
        threads[0].extend([6])
        assert distance(s.step(threads[:1])[0], stock(llama, threads[0].tokens)[-1]) < CLOSE


@pytest.mark.parametrize("on_full", ["raise", "offload"])
def test_a_run_takes_the_same_tokens(llama, on_full, tmp_path):
    written = []
    for sizes in ({"page_size": 16}, SMALL):
        with apr.Session(llama, 640, **sizes, on_full=on_full) as s:
            kids = s.thread(tokens(70)).fork(8)
            apr.decode(s, kids, **SAMPLED)
            if on_full == "offload":  # the most is not enough
                s.step([s.thread(tokens(500, seed=2))])
                assert s.stats.offloaded_pages
                apr.decode(s, kids, **SAMPLED)
            written.append([kid.tokens for kid in kids])
            s.save(tmp_path / "kids", {str(i): kid for i, kid in enumerate(kids)})
            s.check()
    assert written[0] == written[1]
    opened, found = apr.Session.open(tmp_path / "kids", llama, max_tokens=2048, start_tokens=1)
    with opened as s:
        assert [kid.tokens for kid in found.values()] == written[0]
        assert s.table.ask().num_pages < 60
        kid = found["3"]
        kid.extend([7])
        assert distance(s.step([kid])[0], stock(llama, kid.tokens)[-1]) < CLOSE
    with pytest.raises(OutOfPages):
        apr.Session.open(tmp_path / "kids", llama, max_tokens=64, start_tokens=1)


@pytest.mark.parametrize("on_full", ["raise", "offload"])
@pytest.mark.parametrize(
    ("at", "fails"),
    [
        *(
            (f"{n} layer", e)
            for n in ("first", "second")
            for e in (InvalidInput("none"), KeyboardInterrupt())
        ),
        ("core", KeyboardInterrupt()),
        ("arena", KeyboardInterrupt()),
    ],
)
def test_whatever_stops_it_the_session_goes_on(llama, monkeypatch, fails, at, on_full):
    sizes = {"page_size": 16, "start_tokens": 128, "on_full": on_full}
    with apr.Session(llama, 256, **sizes) as s:
        first = s.thread(tokens(30))
        s.step([first])
        make, follow, told = type(s.spec).make_pool, type(s.memory.arena).follow, []

        def make_pool(spec, layer, pages, page_size):
            if at == ("first layer", "second layer")[layer]:
                told.append(at)
                raise fails
            return make(spec, layer, pages, page_size)

        def follow_pools(arena, pools):
            if at == "arena" and pools:
                raise fails
            return follow(arena, pools)

        class Core:  # one that is interrupted when it is told
            def __init__(self, core):
                self.core = core

            def grow(self, pages):
                raise fails

            def __getattr__(self, name):
                return getattr(self.core, name)

        room = type(s.memory).make_room
        with monkeypatch.context() as patched:
            patched.setattr(type(s.spec), "make_pool", make_pool)
            patched.setattr(type(s.memory.arena), "follow", follow_pools)
            if at == "core":
                wrapped = lambda self, core, threads: room(self, Core(core), threads)  # noqa: E731
                patched.setattr(type(s.memory), "make_room", wrapped)
            other = s.thread(tokens(140))
            stops = isinstance(fails, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt if stops else OutOfPages):
                s.step([other])
            assert stops or told == [at] * 2  # twice as many, then no more than needed
            first.extend([4])  # what fits needs nothing
            assert distance(s.step([first])[0], stock(llama, first.tokens)[-1]) < CLOSE
        assert distance(s.step([other])[0], stock(llama, other.tokens)[-1]) < CLOSE
        if on_full == "offload":  # to and from the pools that there are
            s.step([s.thread(tokens(200, seed=1))])
            assert s.stats.offloaded_pages
            other.extend([4])
            assert distance(s.step([other])[0], stock(llama, other.tokens)[-1]) < CLOSE
        assert {pool.num_pages for pool in s.pools} == {s.table.ask().num_pages}
        s.check()


def test_one_layer_at_a_time_is_there_twice(llama, monkeypatch):
    with apr.Session(llama, 1024, **SMALL, on_full="offload") as s:
        s.step([s.thread(tokens(30))])
        old, alive = [weakref.ref(pool.k) for pool in s.pools], []
        make = type(s.spec).make_pool

        def make_pool(spec, layer, pages, page_size):
            alive.append([pool() is not None for pool in old])
            return make(spec, layer, pages, page_size)

        monkeypatch.setattr(type(s.spec), "make_pool", make_pool)
        s.step([s.thread(tokens(100))])
        assert alive == [[True, True], [False, True]]


def test_nothing_grows_for_what_can_never_fit(llama):
    with apr.Session(llama, 1024, **SMALL) as s:
        with pytest.raises(OutOfPages):
            s.step([s.thread(tokens(1100))])
        assert s.table.ask().num_pages == 2
        assert len(s.thread(tokens(5)).fork(1024)) == 1024  # by what it may come to
        with pytest.raises(InvalidInput, match="1024 tokens"):
            s.thread(tokens(5)).fork(1025)


def test_replayed_steps_go_on_in_larger_pools(llama, monkeypatch):
    def full(*_):
        raise OutOfPages

    if _core.gpu(True) is None:
        pytest.skip("this build has no emulated GPU")
    half = copy.deepcopy(llama).to(torch.bfloat16)
    emulate(90)
    try:
        written = []
        for start in (None, 64):
            with apr.Session(
                half, 1024, 16, cuda_graphs=True, self_test=False, start_tokens=start
            ) as s:
                kids = s.thread(tokens(20)).fork(3)
                apr.decode(s, kids, **SAMPLED)
                assert s._graphs.captures
                written.append([kid.tokens for kid in kids])
                pool = weakref.ref(s.pools[0].k)
                captures = s._graphs
                with monkeypatch.context() as patched:
                    patched.setattr(apr.Session, "_run", full)  # behind the growth
                    with pytest.raises(OutOfPages):
                        s.step([s.thread(tokens(600))])
                assert (s._graphs is captures) == (start is None)
                assert (pool() is None) == (start is not None)  # nothing holds the old one
                apr.decode(s, kids, **SAMPLED)
                written[-1] += [kid.tokens for kid in kids]
        assert written[0] == written[1]
    finally:
        _core.force_instruction_set("")


def test_other_users_of_pools_see_the_larger_ones(llama):
    ids = torch.tensor([tokens(90)])
    cache = apr.Cache(llama, 1024, **SMALL)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = llama.generate(ids, past_key_values=cache, **options)
    assert torch.equal(out, llama.generate(ids, **options))
    assert cache.session.table.ask().num_pages >= 8
    cache.close()
    hybrid = build("qwen3_next")
    with apr.Session(hybrid, 1024, **SMALL) as s:
        thread = s.thread(tokens(80))
        kids = thread.fork(2)
        kids[0].extend([5])
        assert distance(s.step([kids[0]])[0], stock(hybrid, kids[0].tokens)[-1]) < CLOSE


def test_what_is_no_size_is_refused(llama):
    for wrong in (0, -1, 1.5, "64"):
        with pytest.raises(InvalidInput, match="start_tokens"):
            apr.Session(llama, 1024, start_tokens=wrong)
    with apr.Session(llama, 64, start_tokens=1 << 20) as s:  # no more than the most
        assert s.table.ask().num_pages == 1
    with pytest.raises(InvalidInput, match=r"2\^31"):
        apr.Session(llama, 1 << 40, start_tokens=64)
    table = _core.ThreadTable(4, 16, True, 8)
    table.grow(2)
    assert table.num_pages == 4
    with pytest.raises(InvalidInput, match="at most 8"):
        table.grow(9)
