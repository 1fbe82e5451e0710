"""The CUDA kernels on a GPU: `pytest -m cuda`. What the emulated GPU runs in CI, on the real
one.
"""

from __future__ import annotations

import pytest
import torch

import apr
import models
from apr import _core, ops
from apr.bench.sessions import small_llama
from apr.ops import View, reference
from kernel_cases import check, make, paged_tree, rope, tree

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
    pytest.mark.skipif(_core.gpu(False) is None, reason="this build has no CUDA kernels"),
]
GPU = torch.device("cuda:0")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


def on_gpu(pool):
    scales = None if pool.scales is None else tuple(x.to(GPU) for x in pool.scales)
    return ops.Pool(pool.k.to(GPU), pool.v.to(GPU), scales, pool.dtype)


def run(
    row_sets, pool, heads, generator, *, rotation=None, window=None, invariant=False, **options
):
    """Appends and attends on the GPU; the float64 reference on the CPU: (got, want, far pool, q,
    plan).
    """
    far = on_gpu(pool)
    plan = ops.plan(row_sets, far, heads, window=window, invariant=invariant)
    shape = (plan.num_rows, pool.num_kv_heads, pool.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(pool.dtype) for _ in range(2))
    q = torch.randn(plan.num_rows, heads, pool.head_dim, generator=generator).to(pool.dtype)
    ops.append(k.to(GPU), v.to(GPU), far, plan)
    ops.append(k, v, pool, ops.plan(row_sets, pool, heads))
    for name, side in far.sides.items():
        assert torch.equal(side.cpu().view(torch.uint8), pool.sides[name].view(torch.uint8))
    scale = pool.head_dim**-0.5
    moved = {n: x.to(GPU) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out, lse = ops.attention(q.to(GPU), far, plan, scale, rotation, **moved)
    want = reference.attention(
        q, pool, row_sets, scale, rotation, window=window, turned_dtype=pool.dtype, **options
    )
    return (out.cpu(), lse.cpu()), want, far, q, plan


def close(got, want, dtype):
    """The bound of tests/test_ops.py::test_rotation: weights, queries and outputs are rounded."""
    if dtype is torch.float32:
        check(got, want, dtype)
        return
    assert (got[0].double() - want[0]).abs().max().item() <= 5 * 3 * UNIT[dtype]
    finite = want[1].isfinite()
    assert torch.equal(finite, got[1].isfinite())
    assert (got[1].double() - want[1])[finite].abs().max().item() <= 2 * UNIT[dtype]


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 320, 576])
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_trees(head_dim, heads, dtype):
    pool, generator = make(dtype, 2, head_dim)
    for rotation in (None, rope(head_dim), rope(head_dim, interleaved=True, part=0.5)):
        for sets in (tree(rotated=True)[:4], tree(rotated=True)):
            close(*run(sets, pool, heads, generator, rotation=rotation)[:2], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_codes(head_dim, kv_dtype, dtype):
    pool, generator = make(dtype, 2, head_dim, kv_dtype=kv_dtype)
    for sets in (tree(rotated=True)[:4], tree(rotated=True)):
        close(*run(sets, pool, 6, generator, rotation=rope(head_dim))[:2], dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_options(dtype):
    pool, generator = make(dtype, 2, 128)
    for options in (
        {"window": 20},
        {"chunk": 32},
        {"softcap": 3.0},
        {"sinks": torch.randn(4)},
        {"invariant": True},
        {"window": 9, "sinks": torch.randn(4), "softcap": 2.0, "invariant": True},
    ):
        for sets in (tree()[:4], tree()):
            close(*run(sets, pool, 4, generator, **options)[:2], dtype)


def test_short():
    """Few launches of every kernel: what compute-sanitizer runs."""
    for dtype in (torch.bfloat16, torch.float32):
        pool, generator = make(dtype, 2, 64)
        for sets in (tree(rotated=True)[:4], tree(rotated=True)):
            close(*run(sets, pool, 4, generator, rotation=rope(64))[:2], dtype)
    pool, generator = make(torch.bfloat16, 2, 64, pages=60, page_size=16)
    close(*run(paged_tree(16, generator), pool, 6, generator)[:2], torch.bfloat16)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages_of_any_size(page_size):
    pool, generator = make(torch.bfloat16, 2, 128, pages=60, page_size=page_size)
    sets = paged_tree(page_size, generator)
    for options in ({}, {"window": 20}, {"chunk": 24}):
        close(*run(sets, pool, 6, generator, **options)[:2], torch.bfloat16)


def test_runs_repeat_bit_by_bit():
    pool, generator = make(torch.bfloat16, 2, 128)
    (out, lse), _, far, q, plan = run(tree(), pool, 4, generator)
    for _ in range(50):
        again, again_lse = ops.attention(q.to(GPU), far, plan, 128**-0.5)
        assert torch.equal(again.cpu(), out) and torch.equal(again_lse.cpu(), lse)


def test_poisoned_pages_are_never_read():
    for tokens in (1, 64, 71):
        pool, generator = make(torch.bfloat16, 1, 128)
        pool.k.fill_(float("nan"))
        pool.v.fill_(float("nan"))
        views = [View([5, 6], 0, tokens, 0, 0, own=True)]
        got, want, *_ = run([(tokens, views)], pool, 2, generator)
        check(got, want, torch.bfloat16)


def test_a_long_context():
    pool, generator = make(torch.bfloat16, 1, 128, pages=600)
    pages = list(range(550))
    sets = [
        (1, [View(pages, 0, 35_000, 0, 0), View([560 + i], 0, 5, 35_000, 35_000, own=True)])
        for i in range(16)
    ]
    got, want, *_ = run(sets, pool, 4, generator)
    check(got, want, torch.bfloat16, tokens=35_000)


def test_own_streams_and_devices():
    pool, generator = make(torch.bfloat16, 1, 64)
    (out, _), _, far, q, plan = run(tree(), pool, 4, generator)
    stream = torch.cuda.Stream()
    on_device = q.to(GPU)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again, _ = ops.attention(on_device, far, plan, 64**-0.5)
    stream.synchronize()
    assert torch.equal(again.cpu(), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [4500, 151_937])
def test_sampled_tokens_are_the_cpus(dtype, vocab):
    """Tokens exactly; the logarithm may be another library's by a unit."""
    generator = torch.Generator().manual_seed(0)
    scores = (2 * torch.randn(12, vocab, generator=generator)).to(dtype)
    scores[::3, ::7] = -torch.inf
    draws = ops.Draws(
        12,
        temperature=[0.0, 0.5, 1.0, 1.3] * 3,
        top_k=[0, 40, 3, 0, 5000, 7, 0, 0, 11, 2, 300, 0],
        top_p=[1.0, 0.9, 0.3, 0.95, 1.0, 0.0, 0.6, 1.0, 0.7, 1.0, 0.99, 0.5],
        min_p=[0.0, 0.1, 0.0, 0.02] * 3,
        key=range(12),
    )
    want, got = ops.sample(scores, draws), ops.sample(scores.to(GPU), draws).cpu()
    assert got.tokens.tolist() == want.tokens.tolist()
    for name in ("logprobs", "drawn_logprobs", "entropies"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_llama(hidden=256, layers=2, heads=4, kv_heads=2).to(GPU).to(torch.bfloat16)


def step(session, threads, t):
    for i, thread in enumerate(threads):
        thread.extend([(5 * t + 3 * i + 1) % 64])
    return session.step(threads)


@pytest.mark.trap(15)
def test_replayed_steps_equal_planned_ones(model):
    outs = []
    for graphs in (None, True):
        with apr.Session(model, 1 << 14, cuda_graphs=graphs) as s:
            kids = s.thread(list(range(40))).fork(3)
            log = [step(s, kids, 0)]
            for t in range(60):
                if t == 20:
                    kids.extend(kids[0].fork(1))
                if t == 30:
                    kids.pop(0).release()
                if t == 40:
                    kids[0].trim(len(kids[0]) - 3)
                log.append(step(s, kids, t))
            outs.append(torch.cat(log))
            if graphs:
                assert s._graphs.captures == 1 and s._graphs.uploads <= 6
    spread = outs[0].std().item()
    assert (outs[0] - outs[1]).abs().max().item() < 0.1 * spread


def test_replayed_steps_with_layer_states():
    """A conv and an attention layer; states are written in place by the captured graph."""
    hybrid = models.build("lfm2").to(GPU)
    with apr.Session(hybrid, 1 << 12, cuda_graphs=True) as s:
        kids = s.thread(list(range(40))).fork(3)
        for t in range(12):
            if t == 4:
                kids.extend(kids[0].fork(1))
            if t == 8:
                kids[1].trim(len(kids[1]) - 3)
            out = step(s, kids, t)
        assert s._graphs.captures == 1
        for kid, got in zip(kids, out, strict=True):
            want = hybrid(torch.tensor([kid.tokens], device=GPU), use_cache=False).logits[0, -1]
            assert (got - want).abs().max().item() < 2e-3 * want.std().item()


def test_a_session_equals_stock(model):
    """Attachment runs the self-test on the GPU: forks and a far segment against the stock
    forward.
    """
    with apr.Session(model, 1 << 14) as s:
        ids = list(range(50))
        got = s.step([s.thread(ids)])[0]
    want = model(torch.tensor([ids], device=GPU), use_cache=False).logits[0, -1].float()
    assert (got - want).abs().max().item() < 0.1 * want.std().item()
