"""The CUDA kernels' source on the emulated GPU: every instance, any order of threads, and what
faults show.
"""

from __future__ import annotations

import pytest
import torch

from apr import _core, ops
from apr.errors import InvalidInput
from apr.ops import View
from apr.ops import device as gpu
from kernel_cases import UNIT, check, emulate, make, paged_tree, rope, run, tree

if _core.gpu(True) is None:
    pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)", allow_module_level=True)

EMULATED = _core.gpu(True)
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def leave_the_emulator():
    yield
    emulate(90)
    _core.force_instruction_set("")


def chosen(plan):
    """Names of the kernels that ran for a plan."""
    return {one.core.kernel for passes in plan.on_gpu._passes.values() for one in passes}


def parts(name):
    kind, number, dim, rows, stages = name.split("_")
    return kind, NUMBERS[number], int(dim), int(rows), int(stages)


@pytest.mark.trap(10)
@pytest.mark.parametrize("name", [kernel.name for kernel in EMULATED.kernels])
def test_every_instance_against_float64(name):
    kind, dtype, dim, rows, stages = parts(name)
    # A device of 99 KiB has room for two stages, one of 227 for three.
    narrow = stages == 2 and (kind in ("small", "coded") or dtype is not torch.float32)
    emulate(90 if kind == "wide" else 80, shared=99 if narrow and kind != "wide" else 227)
    pool, generator = make(dtype, 2, dim, kv_dtype=torch.int8 if kind == "coded" else None)
    # Seven rows see the prefix: 14 or 28 lanes. The prefill of 70 rows is for the kernel for many.
    sets = tree(rotated=True) if kind == "wide" else tree(rotated=True)[:4]
    heads = 8 if rows == 32 else 4
    for rotation in (None, rope(dim), rope(dim, interleaved=True, part=0.5)):
        got, want, _q, plan = run(
            sets, pool, heads, generator, rotation=rotation, turned_dtype=dtype
        )
        assert chosen(plan) == {name}
        if rotation is None or dtype is torch.float32:
            check(got, want, dtype)
        # As test_rotation.
        assert (got[0].double() - want[0]).abs().max().item() <= 5 * 3 * UNIT[dtype]
    for options in ({"window": 20}, {"softcap": 3.0}, {"sinks": torch.randn(heads)}):
        got, want, _q, plan = run(sets, pool, heads, generator, **options)
        assert chosen(plan) == {name}
        check(got, want, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_threads_and_any_number_of_blocks(seed, capability):
    """Six orders; one to seventeen blocks, so that spans begin and end anywhere."""
    emulate(capability, blocks=(1, 2, 3, 5, 7, 17)[seed], seed=seed + 100)
    pool, generator = make(torch.bfloat16, 2, 64)
    for options in ({}, {"window": 33}, {"invariant": True}):
        got, want, *_ = run(tree(), pool, 6, generator, **options)
        check(got, want, torch.bfloat16)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_pages_of_any_size(page_size, capability):
    """A tile of 64 tokens is several pages, or part of one; windows begin and end inside."""
    emulate(capability)
    pool, generator = make(torch.bfloat16, 2, 64, pages=60, page_size=page_size)
    sets = paged_tree(page_size, generator)
    for options in ({}, {"window": 20}, {"chunk": 24}):
        got, want, _q, plan = run(sets, pool, 6, generator, **options)
        check(got, want, torch.bfloat16)
        assert any(name.startswith("wide") for name in chosen(plan)) == (capability == 90)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_order_of_threads_changes_no_bit(capability):
    outs = []
    for seed in range(4):
        emulate(capability, seed=seed + 7)
        pool, generator = make(torch.float16, 2, 128)
        outs.append(run(tree(), pool, 4, generator)[0])
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


@pytest.mark.trap(9)
@pytest.mark.parametrize("group", [3, 7, 40, 150])
@pytest.mark.parametrize("capability", [80, 90])
def test_groups_larger_than_an_item_are_cut(group, capability):
    emulate(capability)
    pool, generator = make(torch.bfloat16, 1, 64)
    got, want, *_ = run(tree()[:4], pool, group, generator)
    check(got, want, torch.bfloat16)


@pytest.mark.trap(12)
@pytest.mark.parametrize("far", [131_072, 10_000_000])
def test_far_positions(far):
    """The difference is an exact integer; the angle is reduced before it is rounded."""
    emulate(90)
    pool, generator = make(torch.bfloat16, 1, 64)
    sets = [(1, [View([3], 0, 50, 0, far), View([2], 0, 5, 50, 50, own=True)])]
    rotation = rope(64)
    got, want, q, plan = run(
        sets, pool, 4, generator, rotation=rotation, turned_dtype=torch.bfloat16
    )
    assert (got[0].double() - want[0]).abs().max().item() <= 5 * 3 * 2.0**-8
    off, _ = ops.attention(q, pool, plan, 64**-0.5)
    assert (off.double() - want[0]).abs().max().item() > 0.25


def test_long_prefills_run_in_several_passes():
    """More partial results than one pass may hold: rows that see two segments each."""
    emulate(90, blocks=1, part_bytes=1 << 20)
    pool, generator = make(torch.bfloat16, 1, 64)
    rows = 200
    views = [View([30], 0, 40, 0, 0), View(list(range(4)), 0, rows, 40, 40, own=True)]
    got, want, _q, plan = run([(rows, views)], pool, 16, generator)
    assert len(next(iter(plan.on_gpu._passes.values()))) > 1
    check(got, want, torch.bfloat16)


@pytest.mark.trap(14)
def test_plans_of_two_to_the_31_units_run_in_several_passes():
    """A prompt of 262,144 rows, of which 16 lanes share an item: units are counted in 32 bits."""
    emulate(90)
    rows = 1 << 18
    pool = ops.empty_pool(rows // 64, 8, 8, torch.float32)
    plan = ops.plan([(rows, [View(list(range(rows // 64)), 0, rows, 0, 0, own=True)])], pool, 64)
    kind = gpu.kind_of(pool, 64, 0, 0, False)
    passes = EMULATED.plan(plan.core, kind.core, 0)
    assert len(passes) == 2
    small = ops.plan(
        [(rows // 4, [View(list(range(1024)), 0, rows // 4, 0, 0, own=True)])], pool, 64
    )
    assert len(EMULATED.plan(small.core, kind.core, 0)) == 1


def test_every_size_fits_99_kib_for_some_number_of_stages():
    """GPUs of compute capability 8.6, 8.9 and 12.0 give a block 99 KiB."""
    for number in ("bf16", "fp16"):
        for dim in (64, 128, 256):
            fitting = [
                k
                for k in EMULATED.kernels
                if f"small_{number}_{dim}_" in k.name and k.shared_bytes <= 99 * 1024
            ]
            assert fitting, (number, dim)
            assert dim == 256 or {k.item_rows for k in fitting} == {16, 32}
    assert all(k.shared_bytes <= (99 if k.coded else 227) * 1024 for k in EMULATED.kernels)
    small = {k.name for k in EMULATED.kernels if k.shared_bytes <= 99 * 1024}
    assert {"plain_bf16_576_16_2", "plain_fp16_576_16_2", "plain_fp32_256_16_2"} <= small


def test_a_size_that_a_small_gpu_has_no_room_for_is_refused():
    emulate(80, shared=99)
    with pytest.raises(InvalidInput, match="head_dim 512 with 99 KiB of shared memory"):
        ops.empty_pool(2, 1, 512, torch.float32)
    ops.empty_pool(2, 1, 512, torch.bfloat16)


def test_what_no_kernel_takes_is_refused():
    emulate(90)
    for shape, dtype, word in (
        ((2, 1, 64, 20), torch.bfloat16, "multiple of 8"),
        ((2, 1, 64, 584), torch.bfloat16, "up to 576"),
        ((2, 1, 48, 64), torch.bfloat16, "power of two"),
    ):
        with pytest.raises(InvalidInput, match=word):
            ops.empty_pool(shape[0], shape[1], shape[3], dtype, page_size=shape[2])


def test_tensors_on_devices_without_kernels_are_refused():
    """Never a silent copy: the message names what was built and what to do."""
    with pytest.raises(InvalidInput, match=r"kernels for: cpu.*apr info"):
        gpu.backend(torch.device("mps"))
    if _core.gpu(False) is None:
        with pytest.raises(InvalidInput, match=r"cuda:0.*kernels for: cpu"):
            gpu.backend(torch.device("cuda:0"))


@pytest.mark.parametrize("what", ["barrier", "awaited copy"])
def test_the_emulator_lets_correct_kernels_through(what):
    for _ in range(20):
        assert _core.run_broken_kernel(what) == ""


@pytest.mark.parametrize(
    "what,word",
    [
        ("no barrier", "wrong values"),
        ("copy read too early", "wrong values"),
        ("out of bounds", "out of bounds: elements"),
        ("past shared memory", "past the end of shared memory"),
        ("unaligned", "aligned to 16"),
        ("deadlock", "threads 0 to 39 at the block's barrier"),
        ("disagreement", "threads disagree"),
        ("unawaited copy", "nobody awaited"),
        ("late lane", "deadlock"),
    ],
)
def test_the_emulator_sees_faults(what, word):
    """What makes the tests above worth something; races show in nearly every order, so ten are
    plenty.
    """
    assert any(word in _core.run_broken_kernel(what) for _ in range(10))
