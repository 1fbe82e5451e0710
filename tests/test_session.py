"""Sessions: transactions, bad input, splitting, seeds, stock behaviour around them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

import apr
import models
from models import CLOSE, VOCAB, build, distance, stock, tokens

PROMPT = tokens(11)


@pytest.fixture
def session(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        yield s


def still_works(session):
    model = session.model
    thread = session.thread(PROMPT)
    assert distance(session.step([thread])[0], stock(model, PROMPT)[-1]) < CLOSE
    thread.release()


def test_forked_logits_need_no_forward(session):
    root = session.thread(PROMPT)
    kids = root.fork(4)
    got = session.step(kids)
    assert session.stats.forwards == 1 and session.stats.rows == len(PROMPT)
    assert all(distance(row, stock(session.model, PROMPT)[-1]) < CLOSE for row in got)
    session.step(kids[0].fork(2))
    assert session.stats.forwards == 1


def test_a_trimmed_thread_runs_its_last_token_again(session):
    root = session.thread(PROMPT)
    kid = root.fork(1)[0]
    kid.extend([3, 4])
    session.step([kid, root])
    kid.trim(7)  # inside of what the root wrote
    got = session.step([kid])[0]
    assert distance(got, stock(session.model, PROMPT[:7])[-1]) < CLOSE
    kid.extend([9])
    got = session.step([kid])[0]
    assert distance(got, stock(session.model, [*PROMPT[:7], 9])[-1]) < CLOSE


def test_long_prefills_are_split(family):
    _name, model = family
    text = tokens(120)
    want = stock(model, text)[-1]
    with apr.Session(model, max_tokens=1024, step_tokens=17) as s:
        root = s.thread(text[:100])
        kid = root.fork(1)[0]
        kid.extend(text[100:])
        assert distance(s.step([kid])[0], want) < CLOSE
        assert s.stats.forwards == 8 and s.stats.rows == 120


def test_only_awaited_rows_reach_the_head(llama):
    rows = []
    hook = llama.lm_head.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
    with apr.Session(llama, max_tokens=1024) as s:
        rows.clear()
        kids = s.thread(tokens(100)).fork(3)
        kids[1].extend([4, 5, 6])
        s.step(kids)
    hook.remove()
    assert rows == [2]  # the end of the prefix, which two children and the root share, and one tail


def test_a_waiting_threads_logits_hold_no_more_than_a_row(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        root = s.thread(PROMPT)
        kid = root.fork(1)[0]
        kid.extend([3])
        s.step([kid])
        assert root.logits.untyped_storage().nbytes() == VOCAB * 4


def test_a_dtype_without_kernels_is_named():
    model = build("llama").double()
    former = model.config._attn_implementation
    with pytest.raises(apr.InvalidInput, match="float64"):
        apr.Session(model)
    assert model.config._attn_implementation == former


def test_half_precision(llama):
    for dtype, near in ((torch.bfloat16, 0.5), (torch.float16, 0.1)):
        model = build("llama").to(dtype)
        with apr.Session(model, max_tokens=512) as s:
            root = s.thread(PROMPT)
            kids = root.fork(2)
            kids[0].extend([5, 6])
            kids[1].extend([7])
            got = s.step(kids)
        want = stock(model, [*PROMPT, 5, 6])[-1]
        assert distance(got[0], want) < near * float(want.std())


def test_several_sessions_on_one_model(llama):
    former = llama.config._attn_implementation
    a = apr.Session(llama, max_tokens=256)
    b = apr.Session(llama, max_tokens=256)
    one, two = a.thread(PROMPT), b.thread(PROMPT)
    assert distance(a.step([one]), b.step([two])) == 0.0
    a.close()
    assert llama.config._attn_implementation == former  # between forwards the model is the user's
    two.extend([5])
    assert distance(b.step([two])[0], stock(llama, [*PROMPT, 5])[-1]) < CLOSE
    b.close()
    b.close()
    assert llama.config._attn_implementation == former
    with pytest.raises(apr.InvalidInput, match="closed"):
        b.thread([1])


def test_a_step_is_a_transaction(session):
    model = session.model
    root = session.thread(PROMPT)
    kids = root.fork(2)
    session.step(kids)
    for kid in kids:
        kid.extend(tokens(70, 5))
    before = session.stats
    logits = root.logits
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step(kids)
    hook.remove()
    after = session.stats
    assert (after.used_pages, after.rows, after.steps) == (
        before.used_pages,
        before.rows,
        before.steps,
    )
    assert [k.queued for k in kids] == [70, 70]
    assert distance(root.logits, logits) == 0.0
    assert all(k.logits is None for k in kids)
    want = stock(model, PROMPT + tokens(70, 5))[-1]
    assert distance(session.step(kids)[1], want) < CLOSE


def test_siblings_do_not_share_what_they_hand_out(session):
    one, two = session.thread(PROMPT).fork(2)
    session.step([one, two])
    one.logits.fill_(0)
    assert distance(session.step([two])[0], stock(session.model, PROMPT)[-1]) < CLOSE


def test_an_interrupt_is_taken_back_too(session):
    root = session.thread(PROMPT)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = session.model.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.step([root])
    hook.remove()
    assert root.queued == len(PROMPT) and session.stats.used_pages == 0
    still_works(session)


def test_nan_logits_are_named_and_taken_back():
    model = build("llama")
    with apr.Session(model, max_tokens=256) as s:
        root = s.thread(PROMPT)
        weight = model.model.layers[1].mlp.down_proj.weight
        saved = weight.data.clone()
        weight.data[0, 0] = float("nan")
        with pytest.raises(apr.NonFiniteLogits, match="NaN"):
            s.step([root])
        weight.data = saved
        assert root.queued == len(PROMPT)
        still_works(s)


def test_a_dropped_session_gives_the_model_back(llama):
    former = llama.config._attn_implementation
    s = apr.Session(llama, max_tokens=256)
    s.step([s.thread(PROMPT)])
    assert llama.config._attn_implementation == former  # between forwards the model is the user's
    del s
    gc.collect()
    assert llama.config._attn_implementation == former


def test_positions_beyond_a_learned_table_are_named(learned):
    _, model = learned
    with apr.Session(model, max_tokens=2048) as s:
        long = s.thread(tokens(600))
        with pytest.raises(apr.InvalidInput, match="positions up to 599"):
            s.step([long])
        assert long.queued == 600
        still_works(s)


def test_dropped_threads_give_their_pages_back(session):
    kids = session.thread(PROMPT).fork(3)
    session.step(kids)
    assert session.stats.threads == 3  # the root was dropped as soon as it had forked
    del kids
    gc.collect()
    assert session.stats.used_pages == 0 and session.stats.threads == 0


def test_memory_of_sixteen_threads_on_one_prefix(llama):
    prefix, own = tokens(8192, 3), 100
    with apr.Session(llama, max_tokens=16384) as s:
        root = s.thread(prefix)
        kids = root.fork(16)
        for i, kid in enumerate(kids):
            kid.extend(tokens(own, i))
        s.step(kids)
        bound = (len(prefix) + 16 * own) * 1.02 + 64 * 17
        assert s.stats.used_pages * s.page_size <= bound
        assert s.stats.replicated_pages * s.page_size > 8 * bound


def test_seeds(llama):
    def sample(seed, company):
        with apr.Session(llama, max_tokens=2048, seed=seed) as s:
            if company:
                s.thread(PROMPT, request=9).fork(3)
            kids = s.thread(PROMPT, request=0).fork(3)
            return [d.tokens for d in apr.decode(s, kids, max_new_tokens=8, do_sample=True)]

    first = sample(0, False)
    assert first == sample(0, False) == sample(0, True)
    assert first != sample(1, False)
    assert len({tuple(t) for t in first}) == 3


def test_models_that_are_refused():
    config = OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)
    without_cache = OpenAIGPTLMHeadModel(config).eval()
    encoder = BertLMHeadModel(BertConfig(**models.COMMON)).eval()
    for model, says in ((without_cache, "returns no cache"), (encoder, "what stands behind them")):
        former = model.config._attn_implementation
        with pytest.raises(apr.UnsupportedModel, match=f"cannot be attached: .*{says}"):
            apr.Session(model)
        assert model.config._attn_implementation == former
    with pytest.raises(apr.InvalidInput, match="PreTrainedModel"):
        apr.Session(torch.nn.Linear(2, 2))
    with pytest.raises(apr.InvalidInput, match="eval"):
        apr.Session(build("llama").train())


def test_a_wrong_device_is_named(llama):
    model = build("llama").to("meta")
    with pytest.raises(apr.UnsupportedModel, match="meta device, where there are no numbers"):
        apr.Session(model)


def test_bad_input_is_named_and_harmless(llama, session):
    released = session.thread(PROMPT)
    released.release()
    with apr.Session(llama, max_tokens=256) as other:
        stranger = other.thread(PROMPT)
        root = session.thread(PROMPT)
        friend = session.thread(PROMPT)
        cases = [
            (lambda: released.extend([1]), apr.ThreadReleased, "was released"),
            (lambda: released.fork(1), apr.ThreadReleased, "was released"),
            (lambda: len(released), apr.ThreadReleased, "was released"),
            (lambda: session.step([released]), apr.ThreadReleased, "was released"),
            (lambda: session.step([stranger]), apr.ForeignThread, "not a thread of this session"),
            (lambda: root.join([stranger]), apr.ForeignThread, "not a thread of this session"),
            (lambda: root.join([friend]), apr.ForeignThread, "not forked from"),
            (lambda: root.join([], positions="middle"), apr.InvalidInput, "middle"),
            (lambda: session.step([]), apr.InvalidInput, "no threads"),
            (lambda: session.step(root), apr.InvalidInput, "one thread"),
            (lambda: session.step([root, root]), apr.InvalidInput, "twice"),
            (lambda: root.fork(0), apr.InvalidInput, "got 0"),
            (lambda: root.fork(1.5), apr.InvalidInput, "integer of at least 1"),
            (lambda: root.trim(12), apr.InvalidInput, "expected 0 to its length"),
            (lambda: root.trim(-1), apr.InvalidInput, "expected 0 to its length"),
            (lambda: session.thread([VOCAB]), apr.InvalidInput, "vocabulary"),
            (lambda: session.thread([-1]), apr.InvalidInput, "vocabulary"),
            (lambda: session.thread("text"), apr.InvalidInput, "token ids"),
            (lambda: session.thread(torch.ones(3)), apr.InvalidInput, "integers"),
            (lambda: session.thread(torch.ones(1, 3).long()), apr.InvalidInput, "one dimension"),
            (lambda: session.thread([1], visibility="all"), apr.InvalidInput, "all"),
            (lambda: session.segment([]), apr.InvalidInput, "no tokens"),
            (lambda: session.region(base=1 << 33), apr.InvalidInput, "base"),
            (lambda: session.region(stride=1.5), apr.InvalidInput, "stride"),
            (lambda: root.trim("3"), apr.InvalidInput, "trim"),
            (lambda: session.thread(view=[(session.region(), "x")]), apr.InvalidInput, "offset"),
            (lambda: session.thread(view=[(1, 2)]), apr.InvalidInput, "of this session"),
            (lambda: session.region(stride=0), apr.InvalidInput, "stride"),
            (lambda: session.thread(view=[other.region()]), apr.InvalidInput, "of this session"),
            (
                lambda: session.step([session.thread(tokens(5000))]),
                apr.OutOfPages,
                "exhausted",
            ),
            (lambda: apr.Session(llama, max_tokens=0), apr.InvalidInput, "max_tokens"),
            (lambda: apr.Session(llama, page_size=48), apr.InvalidInput, "page_size"),
            (lambda: apr.Session(llama, step_tokens=0), apr.InvalidInput, "step_tokens"),
            (lambda: apr.Session(llama, cuda_graphs=True), apr.InvalidInput, "cuda_graphs"),
        ]
        for call, error, words in cases:
            with pytest.raises(error, match=words) as caught:
                call()
            assert isinstance(caught.value, apr.Error)
            still_works(session)


def test_editing_during_a_step_is_refused(session):
    root = session.thread(PROMPT)
    seen = []

    def edit(*_):
        with pytest.raises(apr.InvalidInput, match="between steps"):
            root.extend([1])
        seen.append(1)

    hook = session.model.model.layers[0].register_forward_hook(edit)
    session.step([root])
    hook.remove()
    assert seen


def test_views_can_be_read_and_set(session):
    model = session.model
    root = session.thread(PROMPT)
    kid = root.fork(1)[0]
    kid.extend([5, 6])
    session.step([kid])
    entries = kid.view
    assert [(e.offset, e.hi) for e in entries] == [(0, 11), (11, None)]
    kid.view = entries
    kid.extend([7])
    assert distance(session.step([kid])[0], stock(model, [*PROMPT, 5, 6, 7])[-1]) < CLOSE
    with pytest.raises(apr.InvalidInput, match="twice"):
        kid.view = [entries[0], entries[0], entries[1]]
    kid.view = [(entries[0].segment, 0, 4), (entries[1].segment, 4)]
    assert kid.tokens == [*PROMPT[:4], 5, 6, 7] and kid.position == 7
    assert kid.writes is kid.tail


def test_a_refresh_that_finds_no_memory_can_be_tried_again(monkeypatch):
    model = models.build("llama")
    with apr.Session(model, max_tokens=1024) as s:
        s.step([s.thread(tokens(5))])
        model.to(torch.float64).to(torch.bfloat16)
        make = type(s.spec).make_pools
        monkeypatch.setattr(type(s.spec), "make_pools", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            s.refresh()
        monkeypatch.setattr(type(s.spec), "make_pools", make)
        s.refresh()
        assert s.step([s.thread(tokens(5))]).isfinite().all()


def test_threads_that_leave_keep_a_row_and_closed_sessions_none(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        kids = s.thread(tokens(5)).fork(3)
        for kid, token in zip(kids, (1, 2, 3), strict=True):
            kid.extend([token])
        rows = s.step(kids)
        whole = weakref.ref(s.table.logits.of(kids[0]._id, s.table.ask())._base)
        assert whole().numel() == 3 * VOCAB
        kids[0].extend([4])
        s.step(kids[:1])
        gc.collect()
        assert whole() is None  # two that did not step hold their own rows
        assert torch.equal(kids[1].logits, rows[1]) and torch.equal(kids[2].logits, rows[2])
        last = weakref.ref(s.table.logits.of(kids[0]._id, s.table.ask())._base)
    gc.collect()
    assert last() is None


@pytest.mark.parametrize("forked", [False, True])
def test_logits_after_a_trim_do_not_depend_on_history(llama, forked):
    """A kept token of a joined child is still queued, or has run under the child's view."""

    def logits(stepped):
        with apr.Session(llama, max_tokens=1024) as s:
            root = s.thread(tokens(4))
            s.step([root])
            one, two = root.fork(2)
            one.extend([20, 21, 22])
            two.extend([30, 31, 32])
            if stepped:
                s.step([one, two])
            root.join([one, two])
            root.trim(len(root) - 1)
            reader = root.fork()[0] if forked else root
            return s.step([reader])[0]

    late, early = logits(False), logits(True)
    assert distance(late, early) < CLOSE
    # It has power: under the child's own view, which does not see the other, they are others.
    assert distance(late, stock(llama, [*tokens(4), 30, 31])[-1]) > 100 * CLOSE


def test_a_fork_of_a_queued_prompt_costs_no_row(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        kids = s.thread(tokens(6)).fork(3)
        s.step(kids)
        assert s.stats.rows == 6


def test_check_finds_what_is_not_whole(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        root = s.thread(tokens(20))
        kids = root.fork(3)
        region, later = s.region([5]), s.segment([6, 7])
        reader = s.thread([8], view=[region, later])
        s.step([*kids, reader])
        root.join(kids[:2])
        s.check()
        s.table._segments.pop(region._id)  # a handle that nobody knows of
        with pytest.raises(apr.Error, match=r"check: .* references of segments for .* handles"):
            s.check()
        s.table._segments[region._id] = region
        s.check()
    with pytest.raises(apr.InvalidInput, match="closed"):
        s.check()


def test_a_moving_place_does_not_depend_on_how_a_step_is_split(llama):
    """What stands behind the own tail follows all of it, though a forward runs a part."""

    def logits(step_tokens):
        with apr.Session(llama, max_tokens=1024, step_tokens=step_tokens) as s:
            mine, other = s.region(base=0), s.region(base=40)
            writer = s.thread(view=[other], writes=other)
            writer.extend([1, 2, 3])
            s.step([writer])
            reader = s.thread(tokens(5), view=[mine, other], writes=mine)
            return s.step([reader])[0]

    assert distance(logits(100), logits(2)) < CLOSE


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
def test_logits_that_are_no_numbers_are_named(llama, value, name):
    def poison(module, args, out):
        out[:, 1, 7] = value
        out[:, :, 3] = -float("inf")  # a word that the model never writes is a number enough
        return out

    with apr.Session(llama, max_tokens=1024) as s:
        kids = s.thread(tokens(5)).fork(3)
        for i, kid in enumerate(kids):
            kid.extend([i])
        hook = llama.lm_head.register_forward_hook(poison)
        try:
            with pytest.raises(apr.NonFiniteLogits, match=f"{name} logits for <Thread 2, 6 tokens"):
                s.step(kids)
        finally:
            hook.remove()
        assert [kid.queued for kid in kids] == [1, 1, 1]
        assert s.step(kids).isfinite().all()


def test_logits_under_a_view_that_shows_more_behind_are_not_taken(llama):
    """A writer sees what stands behind its own tail; a reader that does not is run for itself."""

    def logits(together):
        with apr.Session(llama, max_tokens=1024) as s:
            region, behind = s.region(), s.segment(tokens(6, 3), base=9)
            writer = s.thread(tokens(4), view=[(region, 0), (behind, 9)], writes=region)
            reader = s.thread(view=[(region, None, 4)])
            reader.trim(3)
            return s.step([writer, reader])[1] if together else s.step([reader])[0]

    assert distance(logits(True), logits(False)) < CLOSE


def test_logits_that_were_lost_come_back_with_what_stands_behind(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        region, behind = s.region(), s.segment(tokens(6, 3), base=9)
        writer = s.thread(tokens(4), view=[region, behind], writes=region)
        want = s.step([writer])[0]
        kid = writer.fork()[0]
        s.table.logits.clear()
        assert distance(s.step([writer])[0], want) < CLOSE
        assert distance(s.step([kid])[0], want) < CLOSE
