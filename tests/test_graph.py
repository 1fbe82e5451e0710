"""Captured decode steps: replays equal planned steps whatever happens to the threads between
them.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apr
from apr import _core, ops
from apr.bench.sessions import small_llama
from apr.errors import InvalidInput, NonFiniteLogits, OutOfPages
from apr.hf.graph import ViewPlan, capacity_of
from kernel_cases import emulate

if _core.gpu(True) is None:
    pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated():
    emulate(90)
    yield
    _core.force_instruction_set("")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = small_llama(hidden=128, layers=2, heads=4, kv_heads=2)
    for name, p in built.named_parameters():
        if p.ndim > 1:  # weights large enough that attention matters
            p.data = torch.randn(p.shape) * (0.3 if "emb" in name else 0.9 * p.shape[-1] ** -0.5)
    return built


@pytest.fixture(scope="module")
def half(model):
    """The same in bfloat16, for long runs: the emulator multiplies by whole matrices there."""
    return copy.deepcopy(model).to(torch.bfloat16)


# Two layers in float32: planned and replayed steps take their sums in the same order, but cut them
# into other shares.
CLOSE = 2e-5


def both(model, script, **options):
    """What a script of steps gives with planned steps and with replayed ones, and the second's
    session.
    """
    outs = []
    for graphs in (None, True):
        with apr.Session(model, 4096, cuda_graphs=graphs, self_test=False, **options) as s:
            outs.append(torch.cat(script(s)))
            if graphs:
                counts = (s._graphs.captures, s._graphs.uploads)
    assert (outs[0] - outs[1]).abs().max().item() < CLOSE
    # Power: the bound is far below what the logits of another step differ by.
    assert (outs[0][0] - outs[0][-1]).abs().max().item() > 1000 * CLOSE
    return counts


def step(session, threads, t):
    for i, thread in enumerate(threads):
        thread.extend([(5 * t + 3 * i + 1) % 64])
    return session.step(threads)


def test_edits_between_replays_never_capture_again(model):
    def script(s):
        root = s.thread(list(range(40)))
        kids = root.fork(3)
        out = [step(s, kids, 0)]
        for t in range(30):
            if t == 8:
                kids[0].trim(len(kids[0]) - 3)
            if t == 10:
                kids[1].drop(7, 29)
            if t == 12:
                kids.extend(kids[1].fork(1))
            if t == 18:
                kids.pop(0).release()
            if t == 22:
                kids[0].join([kids.pop()])
            out.append(step(s, kids, t))
        return out

    captures, uploads = both(model, script)
    assert captures == 1
    assert uploads <= 8  # one after each edit, and not one more


def test_hidden_pages_serve_replays_too(model):
    for graphs in (None, True):
        with apr.Session(model, 160, page_size=16, cuda_graphs=graphs, self_test=False) as s:
            root = s.thread(list(range(60)) * 2)
            child = root.fork()[0]
            s.step([root, child])
            root.drop(16, 96)
            child.release()
            other = s.thread([5] * 31)
            s.step([other])
            for t in range(3):
                step(s, [root, other], t)
            assert s.stats.used_pages <= 7


@pytest.mark.parametrize("visibility", ["current", "previous"])
def test_live_views_with_moving_offsets(model, visibility):
    """Hogwild: every worker sees the others' text before its own, which therefore moves at every
    step.
    """

    def script(s):
        prompt = s.segment(list(range(20)))
        tails = [s.region([i + 1] * (i + 2), base=20) for i in range(3)]
        workers = []
        for i in range(3):
            others = [tails[j] for j in range(3) if j != i]
            workers.append(
                s.thread(view=[prompt, *others, tails[i]], writes=tails[i], visibility=visibility)
            )
        return [step(s, workers, t) for t in range(25)]

    captures, uploads = both(model, script)
    assert (captures, uploads) == (1, 1)


@pytest.mark.trap(12)
def test_a_thousand_steps_without_the_host(half):
    """Views, offsets, angles and lengths after 1,000 device steps, against a plan made by the
    host.
    """
    with apr.Session(half, 1 << 15, self_test=False) as s:
        prompt = s.segment(list(range(20)))
        tails = [s.region(base=20) for _ in range(3)]
        workers = [
            s.thread(
                view=[prompt, tails[i - 1], tails[i - 2], tails[i]],
                writes=tails[i],
                visibility="current",
            )
            for i in range(3)
        ]
        step(s, workers, 0)
        for pool in s.pools:
            pool.k.normal_()
            pool.v.normal_()
        for worker in workers:
            worker.extend([1])
        views = _core.ViewTables()
        assert views.refresh(s.table.ask(), [w._id for w in workers])
        capacity = capacity_of(views.sizes)
        plan = ViewPlan(_core.gpu(True), s.attachment, s.pools, views, capacity, False)
        plan.upload(views)
        for _ in range(1000):
            plan.step()
        q = torch.randn(plan.num_rows, 4, 32).bfloat16()
        rotation = s.spec.layers[0].rotation
        got = ops.attention(q, s.pools[0], plan, 0.2, rotation)[0][:3]
        # The host's way to the same state: 999 tokens in one step, and one in another.
        for more in (998, 1):
            for worker in workers:
                worker.extend([1] * more)
            core_step = s.begin_step(workers, 1 << 30, workers)
            assert core_step.next()
            host = ops.Plan(core_step.plan)
            if more == 1:
                want = ops.attention(q[:3], s.pools[0], host, 0.2, rotation)[0]
            s.end_step(core_step, workers, commit=True)
        assert plan.slots[:3].tolist() == host.core.slots.tolist()
        assert plan.positions[0, :3].tolist() == host.core.positions.tolist()
    # Outputs of order 0.1 (means of a thousand values), rounded to bfloat16 after other orders of
    # sums.
    assert (got.float() - want.float()).abs().max().item() < 4e-3
    assert want.float().abs().max().item() > 0.1


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.sampled_from(["step", "fork", "trim", "drop", "release", "join", "reverse"]), max_size=12
    )
)
def test_any_edits(model, actions):
    def script(s):
        threads = s.thread(list(range(30))).fork(2)
        out = [step(s, threads, 0)]
        for t, action in enumerate([*actions, "step"]):  # "step" changes nothing before its step
            if action == "fork" and len(threads) < 4:
                threads.extend(threads[-1].fork(1))
            elif action == "trim" and len(threads[0]) > 5:
                with contextlib.suppress(InvalidInput):
                    threads[0].trim(len(threads[0]) - 2)
            elif action == "drop" and len(threads[-1]) > 9:
                threads[-1].drop(2, 8)
            elif action == "release" and len(threads) > 1:
                threads.pop(0).release()
            elif action == "join" and len(threads) > 1:
                try:
                    threads[0].join([threads[-1]])
                    threads.pop()
                except apr.errors.ForeignThread:
                    pass
            elif action == "reverse":
                threads.reverse()
            out.append(step(s, threads, t))
        return out

    emulate(90)
    results = []
    for graphs in (None, True):
        with apr.Session(model, 4096, cuda_graphs=graphs, self_test=False) as s:
            results.append(torch.cat(script(s)))
    assert (results[0] - results[1]).abs().max().item() < CLOSE


def test_windows_of_layers_are_kinds_of_their_own():
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3 import Gemma3ForCausalLM

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    built = Gemma3ForCausalLM(config).eval().to(torch.bfloat16)

    def script(s):
        threads = s.thread(list(range(3, 43))).fork(2)
        return [step(s, threads, t) for t in range(12)]

    outs = []
    for graphs in (None, True):
        with apr.Session(built, 2048, cuda_graphs=graphs, self_test=False) as s:
            outs.append(torch.cat(script(s)))
            kinds = len(s._graphs._current.plan._views) if graphs else 0
    assert kinds == 2
    assert (outs[0] - outs[1]).abs().max().item() < CLOSE


@pytest.mark.trap(13)
def test_a_failed_replay_is_taken_back(model):
    with apr.Session(model, 2048, cuda_graphs=True, self_test=False) as s:
        threads = s.thread(list(range(20))).fork(2)
        step(s, threads, 0)
        step(s, threads, 1)
        weight = model.lm_head.weight
        kept = weight.detach().clone()
        before = [len(t) for t in threads]
        for thread in threads:
            thread.extend([9])
        weight.data.fill_(float("nan"))
        try:
            with pytest.raises(NonFiniteLogits, match="taken back"):
                s.step(threads)
        finally:
            weight.data.copy_(kept)
        assert [len(t) for t in threads] == [n + 1 for n in before]  # still queued
        again = s.step(threads)
        with apr.Session(model, 2048, self_test=False) as plain:
            other = plain.thread(list(range(20))).fork(2)
            step(plain, other, 0)
            step(plain, other, 1)
            for thread in other:
                thread.extend([9])
            assert (again - plain.step(other)).abs().max().item() < CLOSE


def test_pages_run_out_before_anything_runs(model):
    with apr.Session(model, 3 * 64, cuda_graphs=True, self_test=False) as s:
        thread = s.thread(list(range(60)))
        s.step([thread])
        with pytest.raises(OutOfPages):
            for t in range(200):
                step(s, [thread], t)
        before = len(thread)
        thread.trim(before - 1)
        assert s.step([thread]).isfinite().all()


def test_pages_granted_ahead_go_back(half):
    """Threads that were stepped and left, joined children, released parents: none keeps what it did
    not use.
    """
    used = []
    for graphs in (None, True):
        with apr.Session(half, 32 * 64, cuda_graphs=graphs, self_test=False) as s:
            parent = s.thread(list(range(3)))
            for _ in range(9):
                kids = parent.fork(2)
                for t in range(3):
                    step(s, kids, t)
                parent.join(kids)
                step(s, [parent], 0)
                step(s, [parent], 1)
            for _ in range(4):
                step(s, [s.thread([1, 2, 3])], 0)
            (child,) = parent.fork(1)
            parent.release()
            used.append(s.stats.used_pages)
            prompt = s.thread([1] * 64 * (31 - used[-1]))
            s.step([prompt])  # all that is not used can be had
            assert child.alive
    assert used[0] == used[1]


@pytest.mark.parametrize("where", ["refresh", "run", "commit"])
def test_interrupts_leave_host_and_device_in_step(model, where, monkeypatch):
    """Control-C wherever it strikes: the next step equals that of a session that never was
    interrupted.
    """
    outs = []
    for interrupted in (False, True):
        with apr.Session(model, 4096, cuda_graphs=True, self_test=False) as s:
            threads = s.thread(list(range(30))).fork(2)
            step(s, threads, 0)
            step(s, threads, 1)
            threads[0].trim(25)
            for thread in threads:
                thread.extend([9])
            if interrupted:
                graphs = s._graphs
                target = graphs._current if where == "run" else graphs._views
                original = graphs._views
                pages = s.stats.used_pages

                class Broken:
                    """Does what the original does, then is interrupted."""

                    def __getattr__(self, name, target=target):
                        value = getattr(target, name)
                        if name != where:
                            return value

                        def call(*args):
                            value(*args)
                            raise KeyboardInterrupt

                        return call

                if where == "run":
                    monkeypatch.setattr(graphs, "_ready", lambda held: Broken())
                else:
                    graphs._views = Broken()
                with pytest.raises(KeyboardInterrupt):
                    s.step(threads)
                monkeypatch.undo()
                graphs._views = original
                if where == "commit":  # the host has counted the step: it is done
                    assert [t.queued for t in threads] == [0, 0]
                    for thread in threads:
                        thread.extend([9])
                else:
                    assert s.stats.used_pages <= pages
            elif where == "commit":
                s.step(threads)
                for thread in threads:
                    thread.extend([9])
            outs.append(torch.stack([s.step(threads), step(s, threads, 4)]))
    assert (outs[0] - outs[1]).abs().max().item() < 1e-3


def test_closing_frees_the_pools(model):
    import gc
    import weakref

    with apr.Session(model, 2048, cuda_graphs=True, self_test=False) as s:
        threads = s.thread(list(range(9))).fork(2)
        step(s, threads, 0)
        step(s, threads, 1)
        pool = weakref.ref(s.pools[0].k)
    gc.collect()
    assert pool() is None


def test_threads_that_wait_for_a_queued_token_get_its_logits(model):
    with apr.Session(model, 2048, cuda_graphs=True, self_test=False) as s:
        thread = s.thread(list(range(9)))
        step(s, [thread], 0)
        thread.extend([7])
        kids = thread.fork(3)
        logits = s.step([thread])[0]
        assert all(kid.logits is not None and torch.equal(kid.logits, logits) for kid in kids)


def test_bounds_of_a_step_hold_for_replays(model):
    with apr.Session(model, 2048, cuda_graphs=True, step_tokens=2, self_test=False) as s:
        threads = s.thread(list(range(9))).fork(3)
        step(s, threads, 0)
        forwards = s.stats.forwards
        step(s, threads, 1)
        assert s.stats.forwards == forwards + 2  # two rows, and one


def test_steps_that_would_take_too_much_memory_are_planned(model, monkeypatch):
    monkeypatch.setattr("apr.hf.graph._MOST_PART_BYTES", 1000)
    with apr.Session(model, 2048, cuda_graphs=True, self_test=False) as s:
        threads = s.thread(list(range(9))).fork(2)
        for t in range(3):
            assert step(s, threads, t).isfinite().all()
        assert s._graphs.captures == 0


def test_switching_the_emulator_off_plans_the_step(model):
    with apr.Session(model, 2048, cuda_graphs=True, self_test=False) as s:
        threads = s.thread(list(range(9))).fork(2)
        step(s, threads, 0)
        step(s, threads, 1)
        _core.force_instruction_set("")
        mixed = step(s, threads, 2)
        emulate(90)
        mixed = torch.cat([mixed, step(s, threads, 3)])
    with apr.Session(model, 2048, self_test=False) as s:
        threads = s.thread(list(range(9))).fork(2)
        plain = [step(s, threads, t) for t in range(4)]
    assert (mixed - torch.cat(plain[2:])).abs().max().item() < CLOSE


def test_a_session_without_a_gpu_refuses_graphs(model):
    _core.force_instruction_set("")
    with pytest.raises(InvalidInput, match="on a GPU"):
        apr.Session(model, 2048, cuda_graphs=True, self_test=False)


def test_few_classes_hold_many_shapes():
    sizes = {capacity_of((rows, rows * 5, rows + 3, 40)) for rows in range(1, 200)}
    assert len(sizes) == 4
