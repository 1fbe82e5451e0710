"""A pool that is too small: what a step does not read waits elsewhere, and nothing is another."""

from __future__ import annotations

import asyncio
import os
import random
import weakref

import pytest
import torch

import apr
from apr import _core
from apr.errors import InvalidInput, OutOfPages
from kernel_cases import emulate
from models import CLOSE, build, distance, edit_lines, stock, tokens

LARGE = {"max_tokens": 2048, "page_size": 16}
SMALL = {"max_tokens": 192, "page_size": 16, "on_full": "offload"}  # 12 pages
SAMPLED = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 40}


def test_threads_come_back_as_they_were(llama):
    """Ten threads of 50 tokens take 40 pages, and 12 are there."""
    with apr.Session(llama, **SMALL) as s:
        threads = [s.thread(tokens(50, seed=i)) for i in range(10)]
        for turn in range(3):
            for thread in threads:
                got = s.step([thread])[0]
                assert distance(got, stock(llama, thread.tokens)[-1]) < CLOSE
                thread.extend([5 + turn])
            s.check()
            assert s.stats.used_pages <= 12 and s.stats.offloaded_pages >= 28
        assert s.stats.stored_tokens == 10 * 52
        for thread in threads:
            thread.release()
        assert s.stats.used_pages == s.stats.offloaded_pages == 0
        s.step([s.thread(tokens(20))])
        assert s.memory.offload.nbytes == 0


def test_what_is_shared_stays_while_it_is_read(llama):
    with apr.Session(llama, **SMALL) as s:
        root = s.thread(tokens(96))
        s.step([root])
        kids = root.fork(8)
        for i, kid in enumerate(kids):
            kid.extend(tokens(20, seed=i))
        for kid in kids:
            assert distance(s.step([kid])[0], stock(llama, kid.tokens)[-1]) < CLOSE
        # Joins, trims and drops change what is away as what is here.
        kids[0].trim(70)
        kids[1].trim(100)
        kids[2].drop(4, 90)
        for kid in kids[:2]:
            assert distance(s.step([kid])[0], stock(llama, kid.tokens)[-1]) < CLOSE
        s.step([kids[2]])
        with pytest.raises(OutOfPages):
            s.step(kids)
        s.check()
        root.join(kids[3:5])
        root.extend([9])
        s.step([root])
        s.check()
        root.trim(96)
        assert distance(s.step([root])[0], stock(llama, root.tokens)[-1]) < CLOSE


@pytest.mark.parametrize("n", [2, 7, 20])
def test_a_run_that_does_not_fit_takes_the_same_tokens(llama, n):
    wanted = []
    for options in (LARGE, SMALL):
        with apr.Session(llama, **options, seed=3) as s:
            root = s.thread(tokens(60))
            found = apr.decode(s, root.fork(n), **SAMPLED)
            wanted.append([(x.tokens, x.finish) for x in found])
            s.check()
    assert wanted[0] == wanted[1]
    assert len({tuple(x) for x, _ in wanted[0]}) == n


def test_tasks_share_the_room(llama):
    async def write(s, seed):
        threads = s.thread(tokens(20, seed=seed), request=seed).fork(4)
        async for _ in apr.astream(s, threads, **SAMPLED):
            pass
        return [thread.own_tokens for thread in threads]

    async def both(s):
        return await asyncio.gather(write(s, 1), write(s, 2))

    wanted = []
    for options in (LARGE, SMALL):
        with apr.Session(llama, **options) as s:
            wanted.append(asyncio.run(both(s)))
    assert wanted[0] == wanted[1]


def test_tasks_of_a_thread_each_wait_for_their_turn(llama):
    async def write(s, seed):
        thread = s.thread(tokens(50, seed=seed), request=seed)
        async for _ in apr.astream(s, [thread], **SAMPLED):
            pass
        return thread.own_tokens

    async def all_of_them(s):
        return await asyncio.wait_for(asyncio.gather(*(write(s, i) for i in range(5))), 60)

    wanted = []
    for options in (LARGE, SMALL):
        with apr.Session(llama, **options) as s:
            wanted.append(asyncio.run(all_of_them(s)))
    assert wanted[0] == wanted[1] and all(len(x) == 90 for x in wanted[0])


def test_who_reads_what_others_write_does_not_wait(llama):
    with apr.Session(llama, **SMALL) as s:
        prompt, regions = s.segment(tokens(60)), [s.region(base=60) for _ in range(4)]
        writers = [
            s.thread(view=[prompt, *(r for r in regions if r is not own), own], writes=own)
            for own in regions
        ]
        for writer in writers:
            writer.extend([5])
        with pytest.raises(OutOfPages):
            apr.decode(s, writers, **{**SAMPLED, "max_new_tokens": 60})
        s.check()


def test_one_thread_too_long_is_told_of_and_the_others_go_on(llama):
    with apr.Session(llama, **SMALL) as s:
        short, long = s.thread(tokens(100)), s.thread(tokens(193))
        s.step([short])
        with pytest.raises(OutOfPages):
            s.step([long])
        s.check()
        short.extend([5])
        assert distance(s.step([short])[0], stock(llama, short.tokens)[-1]) < CLOSE


def test_an_interrupt_while_pages_move_loses_nothing(llama, monkeypatch):
    with apr.Session(llama, **SMALL) as s:
        threads = [s.thread(tokens(50, seed=i)) for i in range(6)]
        for thread in threads:
            s.step([thread])
        for at in range(12):
            calls = iter(range(100))

            def move(*args, real=torch.Tensor.to, at=at, calls=calls, **options):
                if next(calls) == at:
                    raise KeyboardInterrupt
                return real(*args, **options)

            thread = threads[at % 6]
            thread.extend([at + 3])
            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "to", move)
                try:
                    s.step([thread])
                except KeyboardInterrupt:
                    s.check()
            got = s.step([thread])[0]
            assert distance(got, stock(llama, thread.tokens)[-1]) < CLOSE


def test_saved_from_where_it_lies(llama, tmp_path):
    with apr.Session(llama, **SMALL) as s:
        threads = [s.thread(tokens(50, seed=i)) for i in range(6)]
        for thread in threads:
            s.step([thread])
        s.save(tmp_path / "one", {"first": threads[0]})
        with pytest.raises(OutOfPages):
            s.save(tmp_path / "all", {str(i): thread for i, thread in enumerate(threads)})
        s.check()
    opened, named = apr.Session.open(tmp_path / "one", llama, max_tokens=512)
    with opened as s:
        named["first"].extend([5])
        want = stock(llama, [*tokens(50), 5])[-1]
        assert distance(s.step([named["first"]])[0], want) < CLOSE


def test_saved_with_what_its_queued_tokens_will_see(llama, tmp_path):
    with apr.Session(llama, **SMALL) as s:
        first = s.segment(tokens(60))
        second = s.segment(tokens(40, seed=1), after=[first])
        reader = s.thread([5], view=[(second, 0, 20)])
        s.step([reader])
        s.step([s.thread(tokens(150, seed=2))])  # both texts go
        assert s.stats.offloaded_pages > 0
        s.save(tmp_path / "one", {"reader": reader, "second": second})
        s.check()
    opened, named = apr.Session.open(tmp_path / "one", llama, max_tokens=512)
    with opened as s:
        whole = s.thread([6], view=[(named["second"], None)])
        assert torch.isfinite(s.step([whole])).all()


@pytest.mark.skipif(_core.gpu(True) is None, reason="built without the emulated GPU")
def test_replayed_steps_find_their_pages(llama):
    emulate(90)
    try:
        with apr.Session(llama, **SMALL, self_test=False, cuda_graphs=True) as s:
            threads = [s.thread(tokens(50, seed=i)) for i in range(6)]
            for turn in range(3):
                for thread in threads:
                    got = s.step([thread])[0]
                    assert distance(got, stock(llama, thread.tokens)[-1]) < CLOSE
                    thread.extend([5 + turn])
                    got = s.step([thread])[0]
                    thread.extend([6 + turn])
            s.check()
    finally:
        _core.force_instruction_set("")


@pytest.mark.filterwarnings("ignore:BloomForCausalLM runs by rows")
def test_policies_are_named(llama):
    with pytest.raises(InvalidInput, match="on_full"):
        apr.Session(llama, on_full="evict")
    for name in ("bloom", "mamba"):
        with pytest.raises(InvalidInput, match="lie in no pages"):
            apr.Session(build(name), max_tokens=256, on_full="offload")


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "falcon_h1", "jamba"])
def test_keys_wait_elsewhere_while_layer_states_stay(name):
    model, rng = build(name), random.Random(0)
    with apr.Session(model, **SMALL) as s:
        threads, away = [s.thread(tokens(50, seed=i)) for i in range(8)], 0
        for turn in range(60):
            kind = rng.choice(["fork", "trim", "join", "release", ""])
            kind = "fork" if len(threads) < 3 else kind
            edit_lines(kind, rng.choice(threads), threads, rng, turn)
            thread = rng.choice(threads)
            if len(thread) > 100:
                thread.trim(40)
            thread.extend([5 + turn])
            assert distance(s.step([thread])[0], stock(model, thread.tokens)[-1]) < CLOSE
            away = max(away, s.stats.offloaded_pages)
        assert away >= 8
        s.check()


def test_a_folder_that_is_full_is_told_of_before_anything_moves(llama, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with apr.Session(llama, **SMALL) as s:
        threads = [s.thread(tokens(100, seed=i)) for i in range(2)]
        s.step(threads[:1])
        with monkeypatch.context() as patched:
            patched.setattr("os.posix_fallocate", full)
            with pytest.raises(OutOfPages, match="TMPDIR"):
                s.step(threads[1:])
        s.check()
        for thread in threads:
            assert distance(s.step([thread])[0], stock(llama, thread.tokens)[-1]) < CLOSE


def test_many_that_wait_take_few_files(llama):
    before = len(os.listdir("/proc/self/fd"))
    with apr.Session(llama, **SMALL) as s:
        threads = [s.thread(tokens(20, seed=i)) for i in range(60)]
        for thread in threads:
            s.step([thread])
        assert s.stats.offloaded_pages > 100
        assert len(os.listdir("/proc/self/fd")) - before <= 5
        pool = weakref.ref(s.pools[0].k)
    assert pool() is None  # nor does what is away hold the pool


def test_what_was_dropped_needs_no_room_and_no_way_back(llama):
    with apr.Session(llama, **SMALL) as s:
        a, b = s.thread(tokens(160)), s.thread(tokens(160, seed=1))
        for thread in (a, b):
            s.step([thread])
        for thread in (a, b):  # the one is away, the other here
            thread.drop(16, 150)
        assert s.stats.offloaded_pages + s.stats.used_pages == 2 * 2
        for thread in (a, b):
            thread.extend([5])
        both = s.step([a, b])
        s.check()
        other = s.thread(tokens(150, seed=2))
        s.step([other])  # what is left of both makes room
        assert s.stats.offloaded_pages > 0
        for thread in (a, b):
            thread.extend([6])
        assert torch.isfinite(s.step([a, b])).all() and torch.isfinite(both).all()
        s.check()


def test_what_nobody_sees_any_more_does_not_come_back(llama):
    with apr.Session(llama, **SMALL) as s:
        text = s.segment(tokens(60))
        reader, other = s.thread([1], view=[text]), s.thread([2], view=[(text, 0, 0)])
        del text
        s.step([reader])
        large = s.thread(tokens(180, seed=2))
        s.step([large])
        assert s.stats.offloaded_pages >= 4
        reader.release()  # the other lists the text, and sees none of it
        other.extend(tokens(20))
        s.step([other])
        s.check()


def test_queued_tokens_of_others_are_not_asked_for(llama):
    with apr.Session(llama, **SMALL) as s:
        private, region = s.segment(tokens(150)), s.region()
        writer = s.thread([5], view=[private, region], writes=region)
        s.step([writer])
        writer.extend([6])
        reader = s.thread(tokens(100), view=[region])
        s.step([reader])  # eight pages of twelve; the ten of the private text go
        assert writer.queued == 1
        s.check()
