"""Kernels against the float64 oracle: dtypes, head sizes, groups, ranges, rotation, windows, sinks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from apr import _core, machine, ops, reference
from apr.errors import InvalidInput
from apr.ops import Rotation, View

# Relative rounding of one stored number. Inputs are exact in the pool's dtype for both sides, so what
# differs is the output rounding (half a unit) and float32 arithmetic over the visible tokens.
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tolerance(
    dtype: torch.dtype, tokens: int, score: float, v_max: float, paired: bool = False
) -> float:
    """Output rounding + float32 error: a score of size s in base 2 errs by s * 2^-23 * head sums.

    Where products are taken on pairs of bfloat16, weights are rounded to it too: half a unit each, so the
    weighted mean moves by at most that part of v_max.
    """
    arithmetic = 2.0**-23 * (8 * max(score, 1.0) + 4 * tokens**0.5)
    roundings = 2 if paired and dtype is torch.bfloat16 else 1
    return v_max * (roundings * 0.5 * UNIT[dtype] + arithmetic + 4e-7)


# Every set that was built; the emulated matrix unit runs the source of `amx` on any machine.
SETS = ["amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"]
PAIRED = {"amx", "avx512_bf16", "amx_emulated"}  # bfloat16 products by pairs of bfloat16


@pytest.fixture(params=SETS)
def instruction_set(request):
    try:
        _core.force_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"{request.param} was not built or does not run on this machine")
    yield request.param
    _core.force_instruction_set("")


def make(dtype, kv_heads, head_dim, pages=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pool = ops.empty_pool(pages, kv_heads, head_dim, dtype)
    pool.k.copy_(torch.randn(pool.k.shape, generator=generator))
    pool.v.copy_(torch.randn(pool.v.shape, generator=generator))
    return pool, generator


def tree(rotated: bool = False):
    """A ragged mix: prefill and decode, a shared prefix, a joined pair of segments, a live neighbour."""
    shift = 7 if rotated else 0
    prefix = [3, 1, 8]
    return [
        (1, [View(prefix, 0, 150, 0, 0), View([2], 0, 5, 150 + shift, 150, own=True)]),
        (3, [View(prefix, 0, 150, 0, 0), View([4, 5], 10, 70, 140, 140 + shift, own=True)]),
        (1, [View(prefix, 0, 90, 0, 0), View([6], 0, 1, 90, 90, own=True)]),
        (
            2,
            [
                View(prefix, 0, 150, 0, 0),
                View([2], 0, 5, 150, 150),
                View([4, 5], 10, 70, 300 - shift, 140),
                View([7], 0, 40, 260, 250, own=True),
            ],
        ),
        (70, [View([9, 10], 0, 100, 0, 0, own=True)]),
    ]


def run(
    row_sets,
    pool,
    heads,
    generator,
    *,
    rotation=None,
    window=None,
    invariant=False,
    turned_dtype=None,
    **options,
):
    plan = ops.plan(row_sets, pool, heads, window=window, invariant=invariant)
    rows = plan.num_rows
    shape = (rows, pool.num_kv_heads, pool.head_dim)
    k = torch.randn(shape, generator=generator).to(pool.dtype)
    v = torch.randn(shape, generator=generator).to(pool.dtype)
    q = torch.randn(rows, heads, pool.head_dim, generator=generator).to(pool.dtype)
    ops.append(k, v, pool, plan)
    scale = pool.head_dim**-0.5
    got = ops.attention(q, pool, plan, scale, rotation, **options)
    want = reference.attention(
        q, pool, row_sets, scale, rotation, window=window, turned_dtype=turned_dtype, **options
    )
    return got, want, q, plan


def check(got, want, dtype, tokens=400):
    out, lse = got
    bound = tolerance(dtype, tokens, 12.0, 5.0, _core.instruction_set() in PAIRED)
    assert (out.double() - want[0]).abs().max().item() <= bound
    finite = want[1].isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert (lse.double() - want[1])[finite].abs().max().item() <= 2e-5


def rope(head_dim, interleaved=False, part=1.0):
    size = int(head_dim * part) // 2 * 2
    inv_freq = tuple(10000.0 ** (-2 * i / size) for i in range(size // 2))
    return Rotation(inv_freq, (0, size), interleaved)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 256])
def test_head_dims_and_dtypes(dtype, head_dim, instruction_set):
    pool, generator = make(dtype, 2, head_dim)
    got, want, *_ = run(tree(), pool, 4, generator)
    check(got, want, dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("kv_heads,group", [(1, 1), (1, 2), (2, 3), (1, 5), (2, 7), (1, 16)])
def test_groups(kv_heads, group, dtype, instruction_set):
    """Also few rows at a time: single rows of a group have kernels of their own."""
    pool, generator = make(dtype, kv_heads, 64)
    got, want, *_ = run(tree(), pool, kv_heads * group, generator)
    check(got, want, dtype)


def test_values_narrower_than_keys(instruction_set):
    """Latent attention (MLA) has keys of 192 and values of 128."""
    generator = torch.Generator().manual_seed(0)
    for dtype in UNIT:
        pool = ops.empty_pool(40, 1, 192, dtype, head_dim_v=128)
        pool.k.copy_(torch.randn(pool.k.shape, generator=generator))
        pool.v.copy_(torch.randn(pool.v.shape, generator=generator))
        q = torch.randn(77, 4, 192, generator=generator).to(dtype)
        got = ops.attention(q, pool, ops.plan(tree(), pool, 4), 192**-0.5)
        check(got, reference.attention(q, pool, tree(), 192**-0.5), dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotation(interleaved, part, dtype, instruction_set):
    pool, generator = make(dtype, 2, 64)
    rotation = rope(64, interleaved, part)
    rounded = dtype is torch.bfloat16 and instruction_set in PAIRED
    got, want, q, plan = run(
        tree(rotated=True),
        pool,
        4,
        generator,
        rotation=rotation,
        turned_dtype=dtype if rounded else None,
    )
    if rounded:
        # A query that lies half-way between two bfloat16 numbers in float32 may go to either side: a score
        # moves by a unit of one number of the query, scale * 2^-8 * |q| * |k| <= 2^-3 * 2^-8 * 16.
        assert (got[1].double() - want[1]).abs().max().item() <= 2.0**-7
        assert (got[0].double() - want[0]).abs().max().item() <= 5 * (2.0**-7 + 2 * 2.0**-9)
    else:
        check(got, want, dtype)
    # Negative control: without re-rotation the same plan is far off.
    off, _ = ops.attention(q, pool, plan, 64**-0.5)
    assert (off.double() - want[0]).abs().max().item() > 0.25


def test_windows_chunks_softcap_and_sinks(instruction_set):
    pool, generator = make(torch.float32, 2, 64)
    sinks = torch.randn(4, generator=generator)
    for options in (
        {"window": 20},
        {"chunk": 32},
        {"softcap": 3.0},
        {"sinks": sinks},
        {"window": 9, "sinks": sinks, "softcap": 2.0},
    ):
        got, want, q, _plan = run(tree(), pool, 4, generator, **options)
        check(got, want, torch.float32)
        plain, _ = ops.attention(q, pool, ops.plan(tree(), pool, 4), 64**-0.5)
        assert (plain.double() - want[0]).abs().max().item() > 0.01, options


def test_strided_slots():
    pool, generator = make(torch.float32, 1, 64)
    sets = [
        (
            1,
            [
                View([1], 0, 30, 0, 0),
                View([2], 0, 9, 30, 30, 3),
                View([3], 0, 9, 31, 31, 3, own=True),
            ],
        )
    ]
    got, want, *_ = run(sets, pool, 2, generator, window=25)
    check(got, want, torch.float32)


def worst_case(q, pool, scale, tokens, paired):
    """A bound on the output's error that holds for any input, from the data's sizes.

    A dot product of d numbers errs by (d + 4) 2^-24 sum |q k| <= (d + 4) 2^-24 ||q|| ||k||; a weight by twice
    that and its exponential (4e-7); sums over t tokens, above and below the line, by t 2^-24 each. Weights
    and outputs are rounded as in `tolerance`.
    """
    k_norm = pool.k.float().norm(dim=-1).max().item()
    size = scale * q.float().norm(dim=-1).max().item() * k_norm
    score = (pool.head_dim + 4) * 2.0**-24 * size
    half = 0.5 * UNIT[pool.dtype]
    weight = 2 * score + 4e-7 + 2 * tokens * 2.0**-24 + (half if paired else 0.0)
    return pool.v.float().abs().max().item() * (weight + half), 2 * score + tokens * 2.0**-24 + 4e-7


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("case", ["large scores", "long range", "one token"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_adversarial_inputs_stay_within_the_worst_case(rows, case, dtype, instruction_set):
    generator = torch.Generator().manual_seed(rows)
    tokens = {"large scores": 150, "long range": 5000, "one token": 1}[case]
    pages = list(range(-(-tokens // 64)))
    pool = ops.empty_pool(len(pages) + rows, 1, 64, dtype)
    pool.k.copy_(torch.randn(pool.k.shape, generator=generator))
    pool.v.copy_(torch.randn(pool.v.shape, generator=generator))
    if case == "large scores":
        pool.k.mul_(60)
    sets = []
    for i in range(rows):
        own = View([len(pages) + i], 0, 1, tokens, tokens, own=True)
        sets.append((1, [View(pages, 0, tokens, 0, 0), own]))
    if case == "one token":
        sets = [(1, [View([i], 0, 1, 0, 0, own=True)]) for i in range(rows)]
    q = torch.randn(rows, 2, 64, generator=generator).to(dtype)
    out, lse = ops.attention(q, pool, ops.plan(sets, pool, 2), 0.125)
    want, want_lse = reference.attention(q, pool, sets, 0.125)
    paired = dtype is torch.bfloat16 and instruction_set in PAIRED
    bound, lse_bound = worst_case(q, pool, 0.125, tokens + 1, paired)
    assert (out.double() - want).abs().max().item() <= bound
    lse_bound += 2.0**-23 * want_lse.abs().max().item()  # the sum's and its own rounding
    assert (lse.double() - want_lse).abs().max().item() <= lse_bound
    # The bound has power: the mean of the values, which a kernel blind to scores gives, is far outside.
    if case == "large scores":
        mean = pool.v[pages].double().flatten(0, 2).mean(0)
        assert (want - mean).abs().max().item() > 10 * bound


def test_empty_ranges_and_rows_that_see_little(instruction_set):
    """Segments without a visible token, and whole tiles that a window hides from some rows of a block."""
    for dtype in UNIT:
        pool, generator = make(dtype, 1, 64)
        shared = [3, 1, 8, 20, 21]
        sets = [
            (
                1,
                [
                    View(shared, 7, 7, 0, 0),
                    View(shared[:3], 0, 150, 0, 0),
                    View([2], 0, 1, 150, 0, own=True),
                ],
            ),
            (1, [View(shared[:3], 0, 150, 0, 0), View([4], 0, 9, 600, 0, own=True)]),
            (1, [View([], 0, 0, 0, 0), View([5], 0, 3, 151, 0, own=True)]),
        ]
        got, want, *_ = run(sets, pool, 3, generator, window=170)
        check(got, want, dtype)


def test_half_conversions_cover_every_bit_pattern(instruction_set):
    """V of one visible token comes out unchanged: every finite number, infinities, and NaN as NaN."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 64)
        pool = ops.empty_pool(len(every), 1, 64, dtype)
        pool.k.zero_()
        pool.v.fill_(float("nan"))
        sets = [(1, [View([i], 0, 1, 0, 0, own=True)]) for i in range(len(every))]
        plan = ops.plan(sets, pool, 1)
        ops.append(torch.zeros_like(every), every.contiguous(), pool, plan)
        out, _ = ops.attention(torch.zeros_like(every), pool, plan, 1.0)
        numbers = ~every.isnan()
        want = every
        if dtype is torch.bfloat16 and instruction_set in PAIRED:
            # The instruction takes subnormal numbers for 0: an absolute error below 2^-126.
            want = torch.where(every.abs() < 2.0**-126, torch.zeros_like(every), every)
        assert torch.equal(out[numbers], want[numbers])
        assert torch.equal(out.isnan(), every.isnan())


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 71])
def test_poisoned_pages_beyond_the_visible_are_never_read(tokens, dtype, instruction_set):
    """Few rows and many; odd counts, whose last token has no partner in products of pairs."""
    pool, generator = make(dtype, 1, 64)
    pool.k.fill_(float("nan"))
    pool.v.fill_(float("nan"))
    prefill = ops.plan([(tokens, [View([5, 6], 0, tokens, 0, 0, own=True)])], pool, 2)
    decode = ops.plan([(1, [View([5, 6], 0, tokens, 0, 0, own=True)])], pool, 2)
    k = torch.randn(tokens, 1, 64, generator=generator).to(dtype)
    ops.append(k, k, pool, prefill)
    q = torch.randn(tokens, 2, 64, generator=generator).to(dtype)
    for plan, rows in ((prefill, q), (decode, q[-1:])):
        out, lse = ops.attention(rows, pool, plan, 0.1)
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_unwritten_slots_between_two_ranges_are_never_read(dtype, instruction_set):
    pool, generator = make(dtype, 1, 64)
    pool.k[3, :, 10:50] = float("nan")
    pool.v[3, :, 10:50] = float("nan")
    own = View([4], 0, 1, 60, 60, own=True)
    sets = [
        (1, [View([3], 0, 10, 0, 0), own]),
        (1, [View([3], 50, 60, 0, 0), own._replace(pages=[5])]),
        (1, [View([3], 50, 60, 0, 0), View([3], 2, 7, 0, 0), own._replace(pages=[6])]),
    ]
    for invariant in (False, True):
        got, want, *_ = run(sets, pool, 2, generator, invariant=invariant)
        check(got, want, dtype)


@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_one_row_of_one_head(head_dim, instruction_set):
    for dtype in UNIT:
        pool, generator = make(dtype, 1, head_dim)
        for invariant in (False, True):
            sets = [(1, [View([3, 1], 0, 97, 0, 0), View([2], 0, 5, 97, 97, own=True)])]
            got, want, *_ = run(sets, pool, 1, generator, invariant=invariant)
            check(got, want, dtype)


def test_very_low_scores_are_scores(instruction_set):
    pool, _generator = make(torch.float32, 1, 64)
    pool.k.fill_(1e16)
    sets = [(1, [View([0], 0, 8, 0, 0, own=True)])]
    q = torch.full((1, 1, 64), -1e16)
    out, lse = ops.attention(q, pool, ops.plan(sets, pool, 1), 0.125)
    # Eight equal scores of -64e32 / 8: the mean of the values.
    assert (out[0, 0] - pool.v[0, 0, :8].mean(0)).abs().max().item() < 1e-6
    assert abs(float(lse) / -8e32 - 1) < 1e-6


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_nan_is_not_swallowed(dtype, instruction_set):
    pool, generator = make(dtype, 1, 64)
    sets = [(1, [View([0], 0, 8, 0, 0, own=True)]), (1, [View([1], 0, 8, 0, 0, own=True)])]
    plan = ops.plan(sets, pool, 1)
    x = torch.randn(2, 1, 64, generator=generator).to(dtype)
    ops.append(x, x, pool, plan)
    q = x.clone()
    q[0, 0, 3] = float("nan")
    out, lse = ops.attention(q, pool, plan, 0.1)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_invariant_bits_do_not_depend_on_the_company(dtype, instruction_set):
    pool, generator = make(dtype, 2, 64, pages=80)
    long = list(range(40, 60))
    alone = (1, [View(long, 0, 1200, 0, 0), View([2], 0, 9, 1200, 1200, own=True)])
    other = [
        (1, [View(long, 0, 700 + i, 0, 0), View([3 + i], 0, 5, 900, 900, own=True)])
        for i in range(7)
    ]
    q = torch.randn(8, 6, 64, generator=generator).to(dtype)
    small = ops.plan([alone], pool, 6, invariant=True)
    big = ops.plan([*other, alone], pool, 6, invariant=True)
    one, one_lse = ops.attention(q[7:], pool, small, 0.125)
    all_, all_lse = ops.attention(q, pool, big, 0.125)
    assert torch.equal(one[0], all_[7]) and torch.equal(one_lse[0], all_lse[7])


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_invariant_bits_follow_the_view_not_the_step(dtype, instruction_set):
    """Another thread that lists the same segments in another order makes the step number them so."""
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
    """Tokens [first, first + half) random over many magnitudes, the next `half` their negatives, all else 0.

    With equal weights their sum is nothing but rounding: another order of additions is another result, in
    the leading digits.
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


def test_own_workers_and_torchs_threads_agree():
    pool, generator = make(torch.float32, 2, 64, pages=80)
    sets = [
        (1, [View(list(range(40, 70)), 0, 1900, 0, 0), View([i], 0, 9, 1900, 1900, own=True)])
        for i in range(9)
    ]
    q = torch.randn(9, 6, 64, generator=generator)
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
    pool, generator = make(torch.float32, 2, 64, pages=80)
    sets = [
        (1, [View(list(range(40, 70)), 0, 1900, 0, 0), View([i], 0, 9, 1900, 1900, own=True)])
        for i in range(9)
    ]
    q = torch.randn(9, 6, 64, generator=generator)
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outs.append(ops.attention(q, pool, ops.plan(sets, pool, 6), 0.125)[0])
    torch.set_num_threads(before)
    for out in outs[1:]:
        assert (out - outs[0]).abs().max().item() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_round_to_nearest_even(dtype, instruction_set):
    """The mean of two values, exact in float32, against torch's rounding: ties, subnormals, overflow."""
    generator = torch.Generator().manual_seed(0)
    pool = ops.empty_pool(512, 1, 40, dtype)
    bits = torch.randint(-(2**15), 2**15, (512, 1, 2, 40), generator=generator)
    values = bits.to(torch.int16).view(dtype)
    near = values[:, :, 1:].clone().view(torch.int16) + torch.randint(
        1, 4, (512, 1, 1, 40), generator=generator, dtype=torch.int16
    )
    values[:256, :, :1] = near.view(dtype)[:256]  # neighbours, whose mean is a tie or close to one
    values[~values.isfinite()] = 1.0
    if dtype is torch.bfloat16:
        values[values.abs() < 2.0**-100] = 1.0  # see test_half_conversions for subnormal numbers
    pool.k.zero_()
    pool.v[:, :, :2] = values
    sets = [(1, [View([i], 0, 2, 0, 0, own=True)]) for i in range(512)]
    out, _ = ops.attention(torch.zeros(512, 1, 40, dtype=dtype), pool, ops.plan(sets, pool, 1), 1.0)
    want = (values[:, 0].float().sum(1) * 0.5).to(dtype)
    assert torch.equal(out[:, 0], want)


def test_merging_one_part_keeps_every_bit_pattern(instruction_set):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 2, 32)
        out, lse = ops.merge([(every, torch.full((len(every), 2), 3.0))])
        numbers = ~every.isnan()
        if instruction_set in PAIRED and dtype is torch.bfloat16:  # subnormal numbers may become 0
            tiny = every.abs() < 2.0**-126
            assert bool(((out == every) | (out == 0))[tiny].all())
            numbers &= ~tiny
        assert torch.equal(out[numbers], every[numbers])
        assert torch.equal(out.isnan(), every.isnan())
        assert bool((lse == 3.0).all())


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_merge(head_dim, dtype, instruction_set):
    pool, generator = make(dtype, 2, head_dim)
    q = torch.randn(1, 4, head_dim, generator=generator).to(dtype)
    halves, whole = (
        [View([1, 2], 0, 60, 0, 0), View([1, 2], 60, 100, 0, 0, own=True)],
        [View([1, 2], 0, 100, 0, 0, own=True)],
    )
    parts = []
    for view in halves:
        plan = ops.plan([(1, [view._replace(own=True)])], pool, 4)
        parts.append(ops.attention(q, pool, plan, 0.125))
    nothing = (torch.full_like(parts[0][0], float("nan")), torch.full((1, 4), -float("inf")))
    out, lse = ops.merge([parts[0], nothing, parts[1]])
    want_out, want_lse = reference.attention(q, pool, [(1, whole)], 0.125)
    # Two roundings: the parts' and the merged output's.
    bound = tolerance(dtype, 100, 12.0, 5.0, instruction_set in PAIRED)
    assert (out.double() - want_out).abs().max().item() <= 2 * bound
    assert (lse.double() - want_lse).abs().max().item() <= 2e-5
    empty, empty_lse = ops.merge([nothing, nothing])
    assert bool((empty == 0).all()) and bool((empty_lse == -float("inf")).all())
    # Negative control: the plain mean of the parts is not the merge.
    mean = (parts[0][0].double() + parts[1][0].double()) / 2
    assert (mean - want_out).abs().max().item() > 0.01


def test_bad_input_is_named():
    pool, _generator = make(torch.float32, 2, 64)
    view = View([0], 0, 4, 0, 0, own=True)
    plan = ops.plan([(1, [view])], pool, 4)
    q = torch.zeros(1, 4, 64)
    cases = [
        (lambda: ops.plan([(1, [view])], pool, 3), "multiple"),
        (lambda: ops.plan([], pool, 4), "no row sets"),
        (lambda: ops.plan([(1, [view._replace(own=False)])], pool, 4), "own view"),
        (lambda: ops.plan([(5, [view])], pool, 4), "own view"),
        (lambda: ops.plan([(1, [view._replace(hi=65)])], pool, 4), "slots"),
        (lambda: ops.plan([(1, [view._replace(pages=[40])])], pool, 4), "pages"),
        (lambda: ops.attention(q.half(), pool, plan, 1.0), "float16"),
        (lambda: ops.attention(q[:, :, :32], pool, plan, 1.0), "expected"),
        (lambda: ops.attention(torch.zeros(2, 4, 64), pool, plan, 1.0), "expected"),
        (lambda: ops.append(torch.zeros(1, 1, 64), q[:, :2], pool, plan), "append: k"),
        (lambda: ops.empty_pool(4, 2, 64, torch.float64), "dtype"),
        (lambda: ops.empty_pool(4, 2, 64, torch.float32, "meta"), "device"),
        (lambda: ops.merge([]), "no parts"),
        (lambda: ops.Pool(pool.k, pool.v.bfloat16()), "of one dtype"),
        (lambda: ops.Pool(pool.k, pool.v[:3]), "two contiguous"),
        (lambda: ops.plan([(1, [view._replace(stride=0)])], pool, 4), "stride"),
        (lambda: ops.attention(q, pool, plan, 1.0, Rotation((1.0,), (64, 66))), "dimensions"),
        (lambda: ops.attention(q, ops.empty_pool(4, 2, 64, torch.float32), plan, 1.0), "made for"),
        (lambda: Rotation((1.0,), (0, 4)), "frequency"),
    ]
    for call, word in cases:
        with pytest.raises(InvalidInput, match=word):
            call()
