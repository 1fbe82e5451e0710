"""Dropping the middle of a thread: keys that stay and turn, pages that go, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import apr
from apr.errors import ForeignThread, InvalidInput, OutOfPages, UnsupportedModel, UnsupportedRope
from models import CLOSE, FAMILIES, FAR, ROTARY, build, distance, stock, tokens

SIZES = {"max_tokens": 1024, "page_size": 16}


@torch.no_grad()
def cut_cache(model, ids, start, stop, then):
    """Logits of `then` behind a stock cache of `ids` without [start, stop), whose keys behind the
    gap are turned back by its width, with the model's own angles.
    """
    cache = DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=cache)
    head_dim = cache.layers[0].keys.shape[-1]
    theta = FAMILIES[model.config.model_type].theta
    angle = (stop - start) * theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    for layer in cache.layers:
        keys = layer.keys[:, :, stop:].double()
        if FAMILIES[model.config.model_type].interleaved:
            a, b = keys[..., ::2], keys[..., 1::2]
        else:
            a, b = keys.chunk(2, -1)
        turned = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
        if FAMILIES[model.config.model_type].interleaved:
            back = torch.stack(turned, -1).flatten(-2)
        else:
            back = torch.cat(turned, -1)
        layer.keys = torch.cat([layer.keys[:, :, :start], back.float()], 2)
        layer.values = torch.cat([layer.values[:, :, :start], layer.values[:, :, stop:]], 2)
    place = len(ids) - (stop - start)
    positions = torch.arange(place, place + len(then))[None]
    return model(torch.tensor([then]), past_key_values=cache, position_ids=positions).logits[0]


@pytest.mark.parametrize("name", [n for n in ROTARY if FAMILIES[n].window is None])
@pytest.mark.parametrize(("start", "stop"), [(20, 60), (0, 33), (1, 99)])
def test_it_is_a_stock_cache_that_is_cut_and_turned(name, start, stop):
    model, ids, then = build(name), tokens(100), tokens(7, seed=1)
    want = cut_cache(model, ids, start, stop, then)
    with apr.Session(model, **SIZES) as s:
        thread = s.thread(ids)
        s.step([thread])
        thread.drop(start, stop)
        assert thread.tokens == ids[:start] + ids[stop:]
        assert thread.position == len(thread) == 100 - (stop - start)
        thread.extend(then)
        got = s.step([thread])[0]
        assert s.check() is None
    assert distance(got, want[-1]) < CLOSE
    # Power: neither is it what the kept text gives by itself, nor what the whole text does.
    for text in (ids[:start] + ids[stop:] + then, ids + then):
        assert distance(got, stock(model, text)[-1]) > FAR


def test_queued_tokens_run_under_the_new_view(llama):
    ids = tokens(60)
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(ids)
        thread.drop(10, 30)  # nothing has run: it is as if it had never been there
        assert thread.is_line
        assert distance(s.step([thread])[0], stock(llama, ids[:10] + ids[30:])[-1]) < CLOSE


def test_what_another_shows_runs_as_it_would_have(llama):
    ids, then = tokens(60), tokens(4, seed=1)
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(ids)
        child = thread.fork()[0]
        thread.drop(10, 30)
        thread.extend(then)
        mine, its = s.step([thread, child])
        assert distance(its, stock(llama, ids)[-1]) < CLOSE
        assert distance(mine, cut_cache(llama, ids, 10, 30, then)[-1]) < CLOSE


def test_the_last_token_is_run_again_under_the_new_view(llama):
    """And its keys stay those that were stored."""
    with apr.Session(llama, **SIZES) as s:
        a, b = s.thread(tokens(60)), s.thread(tokens(60))
        held = s.step([a, b])[0]
        for thread in (a, b):
            thread.drop(10, 50)
            assert thread.logits is None
        assert s.stats.used_pages == 4  # two of each thread's four are whole in the gap
        again = s.step([a])[0]
        assert distance(again, held) > FAR
        for thread in (a, b):
            thread.extend([9])
        after = s.step([a, b])
        assert distance(after[0], after[1]) < CLOSE


def test_an_endless_thread_in_a_small_pool(llama):
    """Ten times what the pool holds; neither pages nor positions grow."""
    with apr.Session(llama, max_tokens=256, page_size=16) as s:
        thread = s.thread(tokens(100))
        for n, _ in enumerate(
            apr.stream(s, [thread], max_new_tokens=2560, eos_token_id=[], do_sample=True)
        ):
            if len(thread) >= 160:
                thread.drop(4, 84)
            if n % 100 == 0:
                s.check()
            assert thread.position == len(thread) < 161
            assert s.stats.used_pages <= 13
        assert len(thread.view) <= 4
        thread.release()
        assert s.stats.used_pages == 0


def test_forks_keep_what_their_parent_drops(llama):
    ids, then = tokens(160), tokens(3, seed=1)
    with apr.Session(llama, max_tokens=256, page_size=16) as s:
        root = s.thread(ids)
        s.step([root])
        children = root.fork(3)
        root.drop(16, 144)
        assert s.stats.used_pages == 10  # the children show it all
        grandchild = root.fork()[0]
        for thread in (root, grandchild, *children):
            thread.extend(then)
        mine, its, *others = s.step([root, grandchild, *children])
        assert distance(mine, its) < CLOSE
        assert distance(mine, cut_cache(llama, ids, 16, 144, then)[-1]) < CLOSE
        for other in others:
            assert distance(other, stock(llama, ids + then)[-1]) < CLOSE
        for child in children:
            child.release()
        assert s.stats.used_pages == 12
        # Eight of them are seen by nobody now; a step that needs them takes them.
        for thread in (root, grandchild):
            thread.extend(tokens(100, seed=2))
        s.step([root, grandchild])
        s.check()
        assert s.stats.used_pages == 16
        root.extend(tokens(10))
        with pytest.raises(OutOfPages):
            s.step([root])
        s.check()


def test_parts_are_joined_where_their_fork_point_is_now(llama):
    with apr.Session(llama, **SIZES) as s:
        root = s.thread(tokens(60))
        s.step([root])
        one, two, gone = root.fork(3)
        for thread in (one, two, gone):
            thread.extend([5, 6, 7])
        s.step([one, two, gone])
        root.drop(10, 20)
        one.drop(5, 45)
        root.join([one, two])
        assert root.tokens == tokens(60)[:10] + tokens(60)[20:] + [5, 6, 7] * 2
        assert root.position == 53
        own = [(e.offset, len(e.segment)) for e in root.view if len(e.segment) == 3]
        assert own == [(50, 3), (50, 3)]
        root.drop(45, 52)  # where the last one was forked
        with pytest.raises(ForeignThread):
            root.join([gone])


@pytest.mark.parametrize("own", [1, 3])
def test_a_thread_without_own_tokens_goes_on_behind_what_it_sees(llama, own):
    """Two parts that lie over each other, of which the longer one loses its end: a hole stays in
    front of what stands behind, and nothing of it where that goes too.
    """
    with apr.Session(llama, **SIZES) as s:
        root = s.thread()
        (kid,) = root.fork()
        root.extend(tokens(9))
        kid.extend(tokens(6, seed=1))
        s.step([root, kid])
        root.join([kid], "max")
        root.extend(tokens(own, seed=2))
        s.step([root])
        root.drop(5, 9)
        assert root.position == 9 + own
        root.trim(len(root) - own)
        assert root.position == 6
        root.extend([7])
        assert root.position == 7 and s.step([root]).isfinite().all()
        s.check()


@pytest.mark.parametrize("how", ["max", "sum"])
def test_a_part_without_a_hole_is_joined_behind_what_it_saw(llama, how):
    with apr.Session(llama, **SIZES) as s:
        tail = s.thread(tokens(3))
        tail.view = [(s.segment(tokens(10)), 0), (tail.tail, 50)]
        (kid,) = tail.fork()
        kid.extend(tokens(4, seed=1))
        s.step([tail, kid])
        kid.trim(13)
        assert kid.position == 53
        tail.trim(10)
        assert tail.position == 10
        kid, other = tail.fork(2)
        for one in (kid, other):
            one.extend(tokens(2, seed=1))
        tail.join([kid, other], how)
        assert tail.position == (12 if how == "max" else 14)
        tail.extend([5])
        s.step([tail])
        s.check()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_goes_on_alone_is_written_where_it_is_seen(name):
    model = build(name)
    with apr.Session(model, **SIZES) as s:
        thread = s.thread(tokens(5))
        s.step([thread])
        if name == "llama":
            thread.view = [(thread.tail, 20)]
        thread.trim(0)
        thread.extend(tokens(3, seed=1))
        assert distance(s.step([thread])[0], stock(model, tokens(3, seed=1))[-1]) < CLOSE


def test_a_pin_that_is_gone_ends_no_region(llama):
    """Nor the tail of a thread that others follow, or that has a handle."""
    with apr.Session(llama, **SIZES) as s:
        region = s.region()
        writer = s.thread(tokens(20), writes=region)
        plain = s.thread(tokens(20))
        handle = plain.tail
        readers = [s.thread([3], view=[(one, None, None)]) for one in (region, handle)]
        s.step([writer, plain, *readers])
        for thread in (writer, plain):
            thread.fork(1)[0].release()
            thread.trim(10)
            thread.extend(tokens(5, seed=1))
        s.step([writer, plain])
        assert writer.tail == region and plain.tail == handle
        assert [len(one) for one in readers] == [16, 16]
        s.check()


def test_a_former_writer_follows_who_writes_now(llama):
    with apr.Session(llama, **SIZES) as s:
        first = s.thread(tokens(20))
        s.step([first])
        segment = first.tail
        first.writes = s.region()
        second = s.thread(writes=segment)
        second.extend(tokens(4, seed=1))
        s.step([second])
        with pytest.raises(InvalidInput, match="read live"):
            second.drop(5, 8)
        s.check()


def test_a_view_of_ranges_shows_what_a_drop_leaves(llama):
    ids, then = tokens(60), tokens(3, seed=1)
    with apr.Session(llama, **SIZES) as s:
        segment = s.segment(ids)
        fixed = s.thread(view=[(segment, 0, 10), (segment, -20, 60, 30)])
        moving = s.thread(view=[(segment, None, 10), (segment, None, 60, 30)])
        for thread in (fixed, moving):
            assert thread.tokens == ids[:10] + ids[30:] and thread.position == 40
            thread.extend(then)
        want = cut_cache(llama, ids, 10, 30, then)[-1]
        for got in s.step([fixed, moving]):
            assert distance(got, want) < CLOSE
        for wrong in (
            [(segment, 0, 10), (segment, 0, 30, 5)],  # they overlap
            [(segment, 0, 20, 10), (segment, 0, 10)],  # the later one first
            [(segment, 0, 10), (segment, 0, None, 30)],
            [(segment, 0, 10, 11)],
            [(segment, 0, 60, -1)],
        ):
            with pytest.raises(InvalidInput, match=r"expected|stands twice"):
                fixed.view = wrong
        assert s.step([fixed]) is not None


def test_what_was_dropped_is_not_shown_again(llama):
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(tokens(100))
        s.step([thread])
        thread.drop(10, 60)
        part = thread.view[0].segment
        assert len(part) == 100
        with pytest.raises(InvalidInput, match="were dropped"):
            s.thread([1], view=[part])
        again = s.thread([1], view=[(part, 0, 10), (part, -50, 100, 60)])
        assert torch.isfinite(s.step([again])).all()
        held = again.tail  # a handle may be put into any view: what it holds stays whole
        again.extend(tokens(80))
        s.step([again])
        pages = s.stats.used_pages
        again.drop(70, 110)
        assert s.stats.used_pages == pages
        assert len(s.thread([1], view=[held])) == 82


def test_live_regions_are_dropped_whole_or_not_at_all(llama):
    with apr.Session(llama, **SIZES) as s:
        prompt = s.segment(tokens(40))
        regions = [s.region(base=40), s.region(base=40)]
        writers = [
            s.thread(view=[prompt, regions[1 - i], regions[i]], writes=regions[i]) for i in (0, 1)
        ]
        for writer in writers:
            writer.extend(tokens(8))
        s.step(writers)
        for start, stop in ((44, 50), (50, 53), (48, 52)):
            with pytest.raises(InvalidInput, match="written and read live"):
                writers[0].drop(start, stop)
        assert len(writers[0]) == 56
        writers[0].drop(10, 30)  # the prompt alone: it goes on writing what the other reads
        assert writers[0].writes is regions[0]
        writers[0].extend([9])
        s.step(writers[:1])
        assert writers[1].tokens[-17:-8] == [*tokens(8), 9]
        writers[0].drop(15, 28)
        assert writers[0].tokens == tokens(40)[:10] + tokens(40)[30:35] + [*tokens(8), 9]
        s.check()


def test_what_cannot_be_dropped_is_refused_and_nothing_changes(llama):
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(tokens(20))
        for start, stop in ((-1, 3), (3, 2), (0, 21), ("a", 2), (1.5, 2)):
            with pytest.raises(InvalidInput, match="drop"):
                thread.drop(start, stop)
        thread.drop(4, 4)
        assert thread.tokens == tokens(20) and thread.trims == 0
        thread.drop(5, 20)
        assert thread.tokens == tokens(5) and thread.trims == 1
    with apr.Session(build("gpt2"), **SIZES) as s:
        thread = s.thread(tokens(20))
        before = s.step([thread])[0]
        with pytest.raises(UnsupportedRope, match="make a new thread"):
            thread.drop(2, 8)
        assert distance(thread.logits, before) == 0
        assert len(thread) == 20
    with apr.Session(build("lfm2"), **SIZES) as s:
        thread = s.thread(tokens(20))
        with pytest.raises(UnsupportedModel, match="drop"):
            thread.drop(2, 8)
        assert s.step([thread]) is not None


def test_a_saved_thread_goes_on_without_what_it_dropped(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(tokens(100))
        s.step([thread])
        thread.drop(10, 60)
        s.save(tmp_path / "one", {"thread": thread})
        thread.extend([7, 8])
        want = s.step([thread])[0]
    opened, named = apr.Session.open(tmp_path / "one", llama, max_tokens=1024)
    with opened as s:
        assert s.stats.used_pages == 5
        named["thread"].extend([7, 8])
        assert distance(s.step([named["thread"]])[0], want) == 0


def test_one_token_at_a_time(llama):
    """As StreamingLLM evicts: neither pages nor entries of the view pile up."""
    with apr.Session(llama, max_tokens=256, page_size=16) as s:
        thread = s.thread(tokens(60))
        for n in range(600):
            thread.drop(4, 5)
            thread.extend([3 + n % 100])
            s.step([thread])
            assert len(thread) == thread.position == 60
            assert len(thread.view) <= 4 and s.stats.used_pages <= 8
            # Written positions stay small too.
            assert thread.tail.base + len(thread.tail) < 60 + 4 * 16
        s.check()


def test_tokens_that_have_to_run_see_all_before_them(llama):
    """Pages are freed as a step begins, and never those that its own rows read."""
    want = []
    for room in (1024, 96):
        with apr.Session(llama, max_tokens=room, page_size=16) as s:
            region = s.region(tokens(40))
            reader = s.thread([1, 2, 3], view=[(region, 0, 40, 32)])
            del region
            other = s.thread(tokens(60))
            if room == 96:  # 40 + 60 tokens on 6 pages, and one for each of both
                with pytest.raises(OutOfPages):
                    s.step([reader, other])
                s.check()
                other.release()
                other = s.thread(tokens(16))
            want.append(s.step([reader, other])[0])
            s.check()
    assert distance(*want) < CLOSE


def test_a_region_that_is_read_in_part_keeps_what_its_queued_tokens_see(llama):
    with apr.Session(llama, **SIZES) as s:
        region = s.region(tokens(40))
        a = s.thread([1], view=[(region, 0, 24, 16)])
        s.step([a])
        del region
        a.drop(0, 1)
        got = s.thread([1], view=[(a.view[0].segment, 0, 40, 32)])
        want = s.thread([1], view=[(s.segment(tokens(40)), 0, 40, 32)])
        assert distance(*s.step([got, want])) < CLOSE
        s.check()


def test_bounds_far_out_are_refused(llama):
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(tokens(100))
        s.step([thread])
        thread.drop(10, 60)
        part = thread.view[0].segment
        for lo in (-(10**6), 10**6):
            with pytest.raises(InvalidInput, match="got lo"):
                thread.view = [(part, 0, 100, lo)]
        core = s.table.ask()
        for lo in (-(10**11), 10**11):
            with pytest.raises(InvalidInput, match="got lo"):
                core.create_with_view([(part._id, 0, 10, lo, False)], None, False, [1])
