"""Bits of a row: whatever the company, the passes, the threads, and what else uses the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from apr import ops
from apr.ops import View, machine
from kernel_cases import UNIT, make, tree


@pytest.mark.trap(5)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_invariant_bits_do_not_depend_on_the_company(dtype, instruction_set):
    pool, generator = make(dtype, 2, 64, pages=100)
    long = list(range(70, 90))
    alone = (1, [View(long, 0, 1200, 0, 0), View([2], 0, 9, 1200, 1200, own=True)])
    other = [
        (1, [View(long, 0, 700 + i, 0, 0), View([3 + i], 0, 5, 900, 900, own=True)])
        for i in range(63)
    ]
    q = torch.randn(64, 6, 64, generator=generator).to(dtype)
    small = ops.plan([alone], pool, 6, invariant=True)
    big = ops.plan([*other, alone], pool, 6, invariant=True)
    one, one_lse = ops.attention(q[63:], pool, small, 0.125)
    all_, all_lse = ops.attention(q, pool, big, 0.125)
    assert torch.equal(one[0], all_[63]) and torch.equal(one_lse[0], all_lse[63])


@pytest.mark.trap(5)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_invariant_bits_follow_the_view_not_the_step(dtype, instruction_set):
    """Another thread that lists the same segments in another order makes the step number them
    so.
    """
    pool, generator = make(dtype, 1, 64)
    pages = {name: [i] for i, name in enumerate("abcxy")}

    def sees(order, own):
        views = [View(pages[name], 0, 40, 0, 0) for name in order]
        return (1, [*views, View(pages[own], 0, 3, 40, 40, own=True)])

    q = torch.randn(2, 2, 64, generator=generator).to(dtype)
    alone = ops.plan([sees("abc", "x")], pool, 2, invariant=True)
    after = ops.plan([sees("cba", "y"), sees("abc", "x")], pool, 2, invariant=True)
    one, one_lse = ops.attention(q[1:], pool, alone, 0.125)
    both, both_lse = ops.attention(q, pool, after, 0.125)
    assert torch.equal(one[0], both[1]) and torch.equal(one_lse[0], both_lse[1])


def values_that_cancel(pool, pages, first, half):
    """Tokens [first, first + half) random over many magnitudes, the next `half` their negatives,
    all else 0.

    With equal weights their sum is nothing but rounding: another order of additions is another
    result, in the leading digits.
    """
    generator = torch.Generator().manual_seed(1)
    pool.v.zero_()
    x = torch.randn(half, pool.head_dim, generator=generator)
    x *= torch.exp2(torch.randint(-12, 4, x.shape, generator=generator).float())
    for i, row in enumerate(x.to(pool.dtype)):
        for slot, value in ((first + i, row), (first + half + i, -row)):
            pool.v[pages[slot // pool.page_size], 0, slot % pool.page_size] = value


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("options", [{"window": 180}, {"chunk": 300}], ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_invariant_with_windows(page_size, options, dtype, instruction_set):
    pool = ops.empty_pool(-(-1100 // page_size) + 3, 1, 64, dtype, page_size=page_size)
    pool.k.zero_()
    shared = list(range(pool.num_pages - 3))
    values_that_cancel(pool, shared, 923, 88)
    mine, theirs = ([pool.num_pages - i] for i in (1, 2))
    alone = (1, [View(shared, 0, 1100, 0, 0), View(mine, 0, 3, 1100, 1100, own=True)])
    q = torch.zeros(2, 4, 64, dtype=dtype)
    outs = []
    for at in (
        None,
        970,
        971,
        1003,
    ):  # the other row's window starts elsewhere in a tile, or a pair
        sets = [alone]
        if at is not None:
            other = View(theirs, 0, 3, at, at, own=True)
            sets = [(1, [View(shared, 0, 1100, 0, 0), other]), alone]
        plan = ops.plan(sets, pool, 4, invariant=True)
        outs.append(ops.attention(q[: len(sets)], pool, plan, 0.125, **options)[0][-1])
    assert outs[0].count_nonzero() > 0  # or there would be nothing to see
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_invariant_bits_survive_several_passes():
    """Partial results of a long prefill do not fit in one pass; a row alone has them in one."""
    pool, generator = make(torch.float32, 1, 64, pages=210)
    long = list(range(200))
    rows, tokens = 1300, 12800
    whole = ops.plan([(rows, [View(long, 0, tokens, 0, 0, own=True)])], pool, 32, invariant=True)
    q = torch.randn(rows, 32, 64, generator=generator)
    out, _ = ops.attention(q, pool, whole, 0.125)
    for row in (0, 649, 650, rows - 1):
        seen = tokens - rows + row + 1
        alone = ops.plan([(1, [View(long, 0, seen, 0, 0, own=True)])], pool, 32, invariant=True)
        assert torch.equal(out[row], ops.attention(q[row : row + 1], pool, alone, 0.125)[0][0])


def nine_threads():
    """Pool, row sets and queries of nine threads on a prefix of 1,900 tokens."""
    pool, generator = make(torch.float32, 2, 64, pages=80)
    sets = [
        (1, [View(list(range(40, 70)), 0, 1900, 0, 0), View([i], 0, 9, 1900, 1900, own=True)])
        for i in range(9)
    ]
    q = torch.randn(9, 6, 64, generator=generator)
    return pool, sets, q


def test_own_workers_and_torchs_threads_agree():
    pool, sets, q = nine_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    plan = ops.plan(sets, pool, 6)
    theirs, _ = ops.attention(q, pool, plan, 0.125)
    machine.use_own_workers(True)
    try:
        for _ in range(50):
            assert torch.equal(ops.attention(q, pool, plan, 0.125)[0], theirs)
    finally:
        machine.use_own_workers(False)
        torch.set_num_threads(before)


FORKING = """
import os
import torch
from apr import ops
from apr.ops import View

torch.set_num_threads(4)
torch.randn(600, 600) @ torch.randn(600, 600)  # torch's threads exist, and die with the fork
pool = ops.empty_pool(40, 2, 64, torch.float32)
pool.k.normal_(), pool.v.normal_()
plan = ops.plan([(1, [View(list(range(40)), 0, 2500, 0, 0, own=True)])], pool, 6)
q = torch.randn(1, 6, 64)
child = os.fork()
if child == 0:
    out, _ = ops.attention(q, pool, plan, 0.125)
    os._exit(0 if bool(out.isfinite().all()) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_computes_alone():
    """Threads do not survive fork(2); waiting for them would never end."""
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=120)


def test_the_matrix_unit_is_shared_with_torch():
    """oneDNN configures and releases the tiles on the same threads: nothing may be remembered."""
    if "amx" not in machine.kernels().cpu:
        pytest.skip("this machine has no AMX (or the build has none)")
    pool, generator = make(torch.bfloat16, 2, 64)
    q = torch.randn(77, 4, 64, generator=generator).bfloat16()
    x = torch.randn(512, 512, generator=generator).bfloat16()
    plan = ops.plan(tree(), pool, 4)
    first, product = ops.attention(q, pool, plan, 0.125)[0], x @ x
    for _ in range(20):
        assert torch.equal(x @ x, product)
        assert torch.equal(ops.attention(q, pool, plan, 0.125)[0], first)


def test_threads_do_not_change_the_result_beyond_rounding():
    pool, sets, q = nine_threads()
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outs.append(ops.attention(q, pool, ops.plan(sets, pool, 6), 0.125)[0])
    torch.set_num_threads(before)
    for out in outs[1:]:
        assert (out - outs[0]).abs().max().item() <= 1e-6
