"""Kernels against the float64 oracle: dtypes, head sizes, groups, ranges, rotation, windows,
sinks.
"""

from __future__ import annotations

import pytest
import torch

from apr import _core, ops
from apr.errors import InvalidInput
from apr.ops import Rotation, View, reference
from kernel_cases import UNIT, check, make, rope, rounds_weights, run, tolerance, tree


@pytest.mark.trap(1, 6, 10)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 256, 512])
def test_head_dims_and_dtypes(dtype, head_dim, instruction_set):
    pool, generator = make(dtype, 2, head_dim)
    got, want, *_ = run(tree(), pool, 4, generator)
    check(got, want, dtype)


@pytest.mark.trap(9)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("kv_heads,group", [(1, 1), (1, 2), (2, 3), (1, 5), (2, 7), (1, 16)])
def test_groups(kv_heads, group, dtype, instruction_set):
    """Also few rows at a time: single rows of a group have kernels of their own."""
    pool, generator = make(dtype, kv_heads, 64)
    got, want, *_ = run(tree(), pool, kv_heads * group, generator)
    check(got, want, dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("dim_k,dim_v", [(192, 128), (576, 512)])
def test_values_narrower_than_keys(dim_k, dim_v, dtype, instruction_set):
    """Latent attention (MLA): keys of 192, values of 128; as latents 576 and 512."""
    generator = torch.Generator().manual_seed(0)
    pool = ops.empty_pool(40, 1, dim_k, dtype, head_dim_v=dim_v)
    pool.k.copy_(torch.randn(pool.k.shape, generator=generator))
    pool.v.copy_(torch.randn(pool.v.shape, generator=generator))
    q = torch.randn(77, 4, dim_k, generator=generator).to(dtype)
    got = ops.attention(q, pool, ops.plan(tree(), pool, 4), dim_k**-0.5)
    check(got, reference.attention(q, pool, tree(), dim_k**-0.5), dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotation(interleaved, part, dtype, instruction_set):
    pool, generator = make(dtype, 2, 64)
    rotation = rope(64, interleaved, part)
    rounded = rounds_weights(dtype, instruction_set)
    got, want, q, plan = run(
        tree(rotated=True),
        pool,
        4,
        generator,
        rotation=rotation,
        turned_dtype=dtype if rounded else None,
    )
    if rounded:
        # A query that lies half-way between two 16-bit numbers in float32 may go to either side: a
        # score moves by a unit of one number of the query, scale * unit * |q| * |k| <= 2^-3 * unit
        # * 16.
        unit = UNIT[dtype]
        assert (got[1].double() - want[1]).abs().max().item() <= 2 * unit
        assert (got[0].double() - want[0]).abs().max().item() <= 5 * (2 * unit + unit)
    else:
        check(got, want, dtype)
    # Negative control: without re-rotation the same plan is far off.
    off, _ = ops.attention(q, pool, plan, 64**-0.5)
    assert (off.double() - want[0]).abs().max().item() > 0.25


@pytest.mark.trap(7, 8)
def test_windows_chunks_softcap_and_sinks(instruction_set):
    dtype = torch.float32
    pool, generator = make(dtype, 2, 64)
    sinks = torch.randn(4, generator=generator)
    for options in (
        {"window": 20},
        {"chunk": 32},
        {"softcap": 3.0},
        {"sinks": sinks},
        {"window": 9, "sinks": sinks, "softcap": 2.0},
    ):
        got, want, q, _plan = run(tree(), pool, 4, generator, **options)
        check(got, want, dtype)
        plain, _ = ops.attention(q, pool, ops.plan(tree(), pool, 4), 64**-0.5)
        assert (plain.double() - want[0]).abs().max().item() > 0.01, options


def test_strided_slots(instruction_set):
    dtype = torch.float32
    pool, generator = make(dtype, 1, 64)
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
    check(got, want, dtype)


@pytest.mark.trap(1, 2)
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
    bound = tolerance(dtype, 100, 12.0, 5.0, rounds_weights(dtype, instruction_set))
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


def test_a_steps_plan_is_refused_by_a_pool_that_does_not_hold_it():
    """Nothing is written: before, this ended the process."""
    table = _core.ThreadTable(500, 16, True)
    thread = table.create([1] * 3000)
    step = _core.Step(table, [thread], [False], 1 << 20)
    assert step.next()
    plan = ops.Plan(step.plan)
    k = torch.ones(3000, 2, 16)
    for pages, page_size in ((1, 16), (187, 16), (500, 32)):
        pool = ops.empty_pool(pages, 2, 16, torch.float32, page_size=page_size)
        pool.k.zero_()
        for call in (
            lambda pool=pool: ops.append(k, k, pool, plan),
            lambda pool=pool: ops.attention(k, pool, plan, 0.25),
            lambda pool=pool: ops.copy_tokens(pool, plan),
        ):
            with pytest.raises(InvalidInput, match=r"made for \(188, 16\).*used with a pool of"):
                call()
        assert not pool.k.any()
    pool = ops.empty_pool(188, 2, 16, torch.float32, page_size=16)
    ops.append(k, k, pool, plan)
    assert pool.k[:188].flatten(0, 2)[: 3000 * 2].any()


@pytest.mark.parametrize("how", ["resized", "replaced"])
def test_a_pool_whose_tensors_are_gone_is_refused(how):
    pool = ops.Pool(torch.zeros(64, 2, 64, 16), torch.zeros(64, 2, 64, 16))
    plan = ops.plan([(3, [View([5], 0, 3, 0, 0, own=True)])], pool, 4)
    k = torch.randn(3, 2, 16)
    if how == "resized":
        pool.v.untyped_storage().resize_(0)
    else:
        pool.k = torch.zeros_like(pool.k)
    with pytest.raises(InvalidInput, match="resized or replaced"):
        ops.append(k, k, pool, plan)
    with pytest.raises(InvalidInput, match="resized or replaced"):
        ops.attention(torch.randn(3, 4, 16), pool, plan, 0.25)


def test_merge_of_several_devices_is_refused():
    with pytest.raises(InvalidInput, match="lse on meta; expected all on cpu"):
        ops.merge([(torch.randn(2, 3, 4), torch.randn(2, 3, device="meta"))])


@pytest.mark.parametrize(
    "options,word",
    [
        ({"scale": float("nan")}, "scale nan"),
        ({"scale": float("inf")}, "scale inf"),
        ({"softcap": -3.0}, "softcap -3.0"),
        ({"softcap": float("nan")}, "softcap nan"),
        ({"window": -1}, "window: got -1"),
        ({"window": 0}, "window: got 0"),
        ({"chunk": -4}, "chunk: got -4"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, word):
    pool, _ = make(torch.float32, 2, 64)
    plan = ops.plan(tree(), pool, 4)
    call = {"scale": 0.125, **options}
    with pytest.raises(InvalidInput, match=word):
        ops.attention(torch.randn(plan.num_rows, 4, 64), pool, plan, **call)
    if "window" in options:
        with pytest.raises(InvalidInput, match=word):
            ops.plan(tree(), pool, 4, **options)


@pytest.mark.parametrize("shape", [(2, 0, 16, 16), (2, 1, 0, 16), (2, 1, 16, 0)])
def test_pools_of_nothing_are_refused(shape):
    with pytest.raises(InvalidInput, match="at least one KV head"):
        ops.Pool(torch.zeros(shape), torch.zeros(shape))
