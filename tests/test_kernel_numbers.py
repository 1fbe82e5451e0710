"""Kernels on adversarial numbers: extremes, every bit pattern, NaN, memory that nobody wrote,
rounding.
"""

from __future__ import annotations

import pytest
import torch

from apr import ops
from apr.ops import View, reference
from kernel_cases import PAIRED, UNIT, check, make, rounds_weights, run


def worst_case(q, pool, scale, tokens, paired):
    """A bound on the output's error that holds for any input, from the data's sizes.

    A dot product of d numbers errs by (d + 4) 2^-24 sum |q k| <= (d + 4) 2^-24 ||q|| ||k||; a
    weight by twice that and its exponential (4e-7); sums over t tokens, above and below the line,
    by t 2^-24 each. Weights and outputs are rounded as in `tolerance`.
    """
    k_norm = pool.k.float().norm(dim=-1).max().item()
    size = scale * q.float().norm(dim=-1).max().item() * k_norm
    score = (pool.head_dim + 4) * 2.0**-24 * size
    half = 0.5 * UNIT[pool.dtype]
    weight = 2 * score + 4e-7 + 2 * tokens * 2.0**-24 + (half if paired else 0.0)
    return pool.v.float().abs().max().item() * (weight + half), 2 * score + tokens * 2.0**-24 + 4e-7


@pytest.mark.trap(6)
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
    paired = rounds_weights(dtype, instruction_set)
    bound, lse_bound = worst_case(q, pool, 0.125, tokens + 1, paired)
    assert (out.double() - want).abs().max().item() <= bound
    lse_bound += 2.0**-23 * want_lse.abs().max().item()  # the sum's and its own rounding
    assert (lse.double() - want_lse).abs().max().item() <= lse_bound
    # The bound has power: the mean of the values, which a kernel blind to scores gives, is far
    # outside.
    if case == "large scores":
        mean = pool.v[pages].double().flatten(0, 2).mean(0)
        assert (want - mean).abs().max().item() > 10 * bound


@pytest.mark.trap(2, 4)
def test_empty_ranges_and_rows_that_see_little(instruction_set):
    """Segments without a visible token, and whole tiles that a window hides from some rows of a
    block.
    """
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
    """V of one visible token comes out unchanged: every finite number, infinities, and NaN as
    NaN.
    """
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


@pytest.mark.trap(3)
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


@pytest.mark.trap(16)
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_one_row_of_one_head(head_dim, instruction_set):
    for dtype in UNIT:
        pool, generator = make(dtype, 1, head_dim)
        for invariant in (False, True):
            sets = [(1, [View([3, 1], 0, 97, 0, 0), View([2], 0, 5, 97, 97, own=True)])]
            got, want, *_ = run(sets, pool, 1, generator, invariant=invariant)
            check(got, want, dtype)


def test_very_low_scores_are_scores(instruction_set):
    dtype = torch.float32
    pool, _generator = make(dtype, 1, 64)
    pool.k.fill_(2.0**53)
    sets = [(1, [View([0], 0, 8, 0, 0, own=True)])]
    q = torch.full((1, 1, 64), -(2.0**53), dtype=dtype)
    out, lse = ops.attention(q, pool, ops.plan(sets, pool, 1), 0.125)
    # Eight equal scores of -64 * 2^106 / 8: the mean of the values, all below 4.
    mean = pool.v[0, 0, :8].float().mean(0)
    assert (out[0, 0].float() - mean).abs().max().item() < 4 * UNIT[dtype] + 1e-6
    assert abs(float(lse) / -(2.0**109) - 1) < 1e-6


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_round_to_nearest_even(dtype, instruction_set):
    """The mean of two values, exact in float32, against torch's rounding: ties, subnormals,
    overflow.
    """
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
