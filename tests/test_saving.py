"""Sessions in files: they go on as they would have, and what is damaged or foreign is refused."""

from __future__ import annotations

import random

import pytest
import torch

import apr
from apr import _core
from core_table import PAGE, step
from models import CLOSE, FAR, build, distance, stock, tokens

SIZES = {"max_tokens": 2048}
SAMPLED = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 8}


def thought(s):
    """A tree in the middle of its work: joined, forked, sampled, with tokens queued."""
    root = s.thread(tokens(40))
    kids = root.fork(3)
    kids[1].label = "second"
    apr.decode(s, kids, **{**SAMPLED, "max_new_tokens": 3})
    root.join(kids[:1])
    root.extend([7, 8])
    grandchild = kids[1].fork()[0]
    return {"root": root, "kid": kids[1], "other": kids[2], "grandchild": grandchild}


def go_on(s, named):
    apr.decode(s, [named["kid"], named["grandchild"]], **SAMPLED)
    named["kid"].join([named["grandchild"]])
    named["root"].join([named["kid"], named["other"]], positions="sum")
    named["root"].extend([9])
    logits = s.step([named["root"]])[0]
    made = s.thread(tokens(5))
    fork = named["root"].fork()[0]
    return named["root"].tokens, logits, made.key, fork.key


def test_it_goes_on_as_it_would_have(llama, tmp_path):
    with apr.Session(llama, **SIZES, page_size=16, seed=5) as s:
        named = thought(s)
        s.save(tmp_path / "tree", named)
        want = go_on(s, named)
    opened, found = apr.Session.open(tmp_path / "tree", llama, **SIZES)
    with opened as s:
        assert set(found) == set(named) and (s.page_size, s.seed) == (16, 5)
        assert found["kid"].label == "second" and found["root"].label is None
        got = go_on(s, found)
        assert got[0] == want[0] and got[2:] == want[2:]
        assert distance(got[1], want[1]) < CLOSE
        s.check()


def test_a_prefix_that_several_sessions_read(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        prefix = s.segment(tokens(50))
        reader = s.thread([3], view=[prefix])
        want = s.step([reader])[0]
        s.save(tmp_path / "prefix", {"prefix": prefix})
    for _ in range(2):
        opened, found = apr.Session.open(tmp_path / "prefix", llama, **SIZES)
        with opened as s:
            reader = s.thread([3], view=[found["prefix"]])
            assert distance(s.step([reader])[0], want) < CLOSE
            assert s.stats.rows == 1  # the prefix is not run again
            del found, reader
            assert s.stats.used_pages == 0


def test_a_writer_that_is_not_saved(llama, tmp_path):
    """Its region is as one that its writer has left, queued tokens included."""
    with apr.Session(llama, **SIZES) as s:
        region, seen = s.region(), s.segment(tokens(5))
        writer = s.thread([4, 5], view=[seen, region], writes=region)
        s.step([writer])
        writer.extend([6])
        reader = s.thread([9], view=[seen, (region, None, 3)])
        s.save(tmp_path / "reader", {"reader": reader})
        want = s.step([reader])[0]
    opened, found = apr.Session.open(tmp_path / "reader", llama, **SIZES)
    with opened as s:
        assert distance(s.step([found["reader"]])[0], want) < CLOSE


def test_nothing_of_others_is_in_the_file(llama, tmp_path):
    """Pages hold what was there before them; only what the saved threads see is written."""
    with apr.Session(llama, max_tokens=64, page_size=64) as s:
        other = s.thread(tokens(60))
        s.step([other])
        other.release()
        mine = s.thread(tokens(3, 1))
        s.step([mine])
        s.save(tmp_path / "mine", {"mine": mine})
        assert s.pools[0].k[:, :, 3:].abs().max() > 0
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "mine")
    assert saved["0.k"].shape[0] == 1
    assert saved["0.k"][:, :, :3].abs().min() > 0 and not saved["0.k"][:, :, 3:].any()


def test_what_is_not_this_models_is_refused(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        s.save(tmp_path / "one", {"root": s.thread(tokens(5))})
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(apr.InvalidInput, match=r"another model: \{'weights'"):
        apr.Session.open(tmp_path / "one", other, **SIZES)
    with pytest.raises(apr.InvalidInput, match=r"another model: .*'dtype'"):
        apr.Session.open(tmp_path / "one", build("llama").to(torch.bfloat16), **SIZES)
    with pytest.raises(apr.InvalidInput, match=r"another model: .*'class'"):
        apr.Session.open(tmp_path / "one", build("qwen2"), **SIZES)


def test_a_model_of_other_settings_is_refused(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        s.save(tmp_path / "one", {"root": s.thread(tokens(5))})
    other = build("llama")
    other.model.rotary_emb.inv_freq.mul_(0.9)
    with pytest.raises(apr.InvalidInput, match="another model"):
        apr.Session.open(tmp_path / "one", other, **SIZES)
    other = build("llama")
    for layer in other.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    with pytest.raises(apr.InvalidInput, match=r"answers otherwise, by .* with other settings"):
        apr.Session.open(tmp_path / "one", other, **SIZES)
    with pytest.raises(apr.InvalidInput, match="got seed; it is the file's"):
        apr.Session.open(tmp_path / "one", llama, seed=1)


def test_numbers_of_what_was_not_saved_are_not_used_again(llama, tmp_path):
    """A new thread would have its vectors, and what it wrote would count as the new one's own."""
    with apr.Session(llama, **SIZES) as s:
        region = s.region()
        writer = s.thread([4, 5], view=[region], writes=region)
        s.step([writer])
        kid = s.thread(tokens(5)).fork()[0]
        s.save(tmp_path / "region", {"region": region, "kid": kid, "same": kid})
        last = kid._id
    opened, found = apr.Session.open(tmp_path / "region", llama, **SIZES)
    with opened as s:
        assert s.thread([1])._id > last
        assert found["region"].sealed  # as release() leaves it
        assert found["kid"] is found["same"]
        del found["kid"]
        assert len(found["same"]) == 5


def test_damaged_files_are_refused(llama, tmp_path, record_property):
    path, broken = tmp_path / "whole", tmp_path / "broken"
    with apr.Session(llama, **SIZES, page_size=16) as s:
        s.save(path, thought(s))
    whole, rng = path.read_bytes(), random.Random(0)
    record_property("damaged", 200)
    for i in range(200):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        broken.write_bytes(data)
        with pytest.raises(apr.InvalidInput, match="open: "):
            apr.Session.open(broken, llama, **SIZES)
    for data in (b"", b"{}", b"x" * 100):
        broken.write_bytes(data)
        with pytest.raises(apr.InvalidInput, match="cannot be read, or is cut short"):
            apr.Session.open(broken, llama, **SIZES)
    with pytest.raises(apr.InvalidInput, match="cannot be read"):
        apr.Session.open(tmp_path / "nowhere", llama)
    with pytest.raises(apr.OutOfPages):
        apr.Session.open(path, llama, max_tokens=16)


def test_a_save_that_fails_leaves_the_file_that_was_there(llama, tmp_path, monkeypatch):
    with apr.Session(llama, **SIZES) as s:
        root = s.thread(tokens(5))
        s.save(tmp_path / "file", {"root": root})
        before = (tmp_path / "file").read_bytes()

        def fails(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr("apr.threads.files.os.replace", fails)
        with pytest.raises(OSError, match="no space"):
            s.save(tmp_path / "file", {"root": root})
    assert (tmp_path / "file").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_nobody_sees_is_left_out(llama, tmp_path):
    """Of a parent that stays behind, what stands behind a fork's last token."""
    with apr.Session(llama, **SIZES, page_size=16) as s:
        parent = s.thread(tokens(60))
        s.step([parent])
        (kid,) = parent.fork(1)
        kid.trim(33)
        s.save(tmp_path / "kid", {"kid": kid}, keys=False)
    opened, found = apr.Session.open(tmp_path / "kid", llama, **SIZES)
    with opened as s:
        part = found["kid"].view[0].segment
        assert part.tokens == tokens(60)[:33]
        reader = s.thread([9], view=[part])
        assert distance(s.step([reader])[0], stock(llama, [*tokens(60)[:33], 9])[-1]) < CLOSE


def test_vectors_go_on_with_their_threads(llama, tmp_path):
    def go_on(s, named):
        for thread in named.values():
            thread.extend([8])
        return s.step(list(named.values()))

    size = (2, llama.config.num_key_value_heads, llama.config.hidden_size // 4)
    with apr.Session(llama, **SIZES) as s:
        kids = s.thread(tokens(20)).fork(3)
        for kid in kids[:2]:
            kid.vectors = apr.PathVectors(torch.randn(size).bfloat16(), torch.randn(size))
            kid.extend([5, 6])
        s.step(kids[:1])
        reader = s.thread([7], view=[kids[1].tail])  # of what waits, whose writer goes
        kids[1].release()
        named = {"kid": kids[0], "plain": kids[2], "reader": reader}
        s.save(tmp_path / "file", named)
        want = go_on(s, named)
        kids[0].vectors = None
        assert distance(go_on(s, named)[0], want[0]) > FAR
    opened, found = apr.Session.open(tmp_path / "file", llama, **SIZES)
    with opened as s:
        assert found["kid"].vectors is not None and found["plain"].vectors is None
        assert distance(go_on(s, found), want) < CLOSE


def test_what_cannot_be_saved_is_refused(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s, apr.Session(llama, **SIZES) as other:
        root = s.thread(tokens(5))
        for named, error in (
            ({}, apr.InvalidInput),
            ([root], apr.InvalidInput),
            ({"x": 5}, apr.ForeignThread),
            ({"x": other.thread([1])}, apr.ForeignThread),
            ({"x": other.region()}, apr.InvalidInput),
        ):
            with pytest.raises(error):
                s.save(tmp_path / "file", named)
        root.release()
        with pytest.raises(apr.ThreadReleased):
            s.save(tmp_path / "file", {"x": root})
    assert not list(tmp_path.iterdir())


def test_no_row_of_integers_breaks_the_core(record_property):
    """Of an archive with some numbers changed nothing is loaded, or a table that is whole."""
    table = _core.ThreadTable(100, PAGE, True)
    root = table.create(list(range(20)))
    step(table, [root])
    parent = table.fork(root, 1)[0]
    table.extend(parent, [20, 21])
    step(table, [parent])
    child = table.fork(parent, 1)[0]
    table.extend(child, [30])
    step(table, [child])  # it copies its parent's two
    region = table.create_region([1, 2], 5, 1)
    writer = table.create_with_view([(region, None, None, 0, False)], region, False, [3])
    numbers, pages, _ = table.save([root, parent, child, writer], [region])
    numbers, loaded, rng = numbers.tolist(), 0, random.Random(0)
    again = _core.ThreadTable(100, PAGE, True)
    assert len(again.load(numbers)) == len(pages) and not again.check(0)
    assert again.tokens(child) == table.tokens(child)
    record_property("damaged", 20_000)
    for _ in range(20_000):
        changed = list(numbers)
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(changed))
            near = max(-(1 << 63), min((1 << 63) - 1, changed[i] + rng.choice((-1, 1))))
            changed[i] = rng.choice((0, 1, -1, 5, near, 1 << 40))
        fresh = _core.ThreadTable(20, PAGE, True)
        try:
            fresh.load(changed)
        except apr.Error:
            assert (fresh.num_threads, fresh.num_segments, fresh.used_pages) == (0, 0, 0)
            continue
        loaded += 1
        assert not fresh.check(0)
        alive = [n for n in range(12) if fresh.alive(n)]
        try:
            if alive:
                step(fresh, alive)
        except apr.Error:
            pass
    assert loaded > 1000
