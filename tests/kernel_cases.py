"""What the kernels' tests share: pools, row sets, the float64 oracle beside the kernels, bounds."""

from __future__ import annotations

import torch

from apr import _core, ops
from apr.ops import Rotation, View, reference

# Relative rounding of one stored number. Inputs are exact in the pool's dtype for both sides, so
# what differs is the output rounding (half a unit) and float32 arithmetic over the visible tokens.
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tolerance(
    dtype: torch.dtype, tokens: int, score: float, v_max: float, paired: bool = False
) -> float:
    """Output rounding + float32 error: a score of size s in base 2 errs by s * 2^-23 * head sums.

    Where matrix units take 16-bit weights (`paired`), weights are rounded too: half a unit each, so
    the weighted mean moves by at most that part of v_max.
    """
    arithmetic = 2.0**-23 * (8 * max(score, 1.0) + 4 * tokens**0.5)
    roundings = 2 if paired else 1
    return v_max * (roundings * 0.5 * UNIT[dtype] + arithmetic + 4e-7)


# Every set that was built; the emulated matrix unit runs the source of `amx` on any machine. The
# emulated GPUs run the source of the CUDA kernels: of compute capability 8.0 and 9.0, few blocks.
GPUS = {"cuda_emulated_80": 80, "cuda_emulated_90": 90}
SETS = ["amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated", *GPUS]
PAIRED = {"amx", "avx512_bf16", "amx_emulated"}  # bfloat16 products by pairs of bfloat16


def rounds_weights(dtype: torch.dtype, name: str) -> bool:
    """Whether these kernels round weights, and re-rotated queries, to the pool's dtype."""
    if name == "cuda_emulated":
        return dtype is not torch.float32
    return name in PAIRED and dtype is torch.bfloat16


def emulate(
    capability: int, blocks: int = 3, shared: int = 227, seed: int = 1, part_bytes: int = 1 << 28
) -> None:
    """Force the emulated GPU: `blocks` multiprocessors with `shared` KiB for a block."""
    _core.force_instruction_set("cuda_emulated")
    per_multiprocessor = (shared + 1) * 1024
    _core.set_emulated_device(
        capability, blocks, shared * 1024, per_multiprocessor, part_bytes, seed
    )


def force(name: str) -> None:
    """Force one of SETS; raises ValueError where it was not built or does not run here."""
    if name in GPUS:
        emulate(GPUS[name])
    else:
        _core.force_instruction_set(name)


def make(dtype, kv_heads, head_dim, pages=40, seed=0, page_size=64, kv_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    pool = ops.empty_pool(pages, kv_heads, head_dim, dtype, page_size=page_size, kv_dtype=kv_dtype)
    for side, name in ((pool.k, "k_scales"), (pool.v, "v_scales")):
        numbers = torch.randn(side.shape, generator=generator)
        if kv_dtype is not None:
            numbers, scales = ops.encode(numbers, kv_dtype)
            pool.sides[name].copy_(scales)
        side.copy_(numbers)
    return pool, generator


def tree(rotated: bool = False):
    """A ragged mix: prefill and decode, a shared prefix, a joined pair of segments, a live
    neighbour.
    """
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


def paged_tree(page_size, generator, pages=60):
    """A prefill and a row that sees a part, on pages of any size in random order."""
    order = torch.randperm(pages, generator=generator).tolist()

    def take(tokens):
        return [order.pop() for _ in range(-(-tokens // page_size))]

    prefix, own, other = take(150), take(70), take(90)
    return [
        (70, [View(prefix, 0, 150, 0, 0), View(own, 0, 70, 150, 150, own=True)]),
        (1, [View(prefix, 19, 131, 0, 0), View(other, 0, 90, 112, 112, own=True)]),
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
    bound = tolerance(dtype, tokens, 12.0, 5.0, rounds_weights(dtype, _core.instruction_set()))
    assert (out.double() - want[0]).abs().max().item() <= bound
    finite = want[1].isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert (lse.double() - want[1])[finite].abs().max().item() <= 2e-5


def rope(head_dim, interleaved=False, part=1.0):
    size = int(head_dim * part) // 2 * 2
    inv_freq = tuple(10000.0 ** (-2 * i / size) for i in range(size // 2))
    return Rotation(inv_freq, (0, size), interleaved)


def everywhere():
    """Each set of kernels in turn, by name; those that do not run here are left out."""
    try:
        for name in SETS:
            try:
                force(name)
            except ValueError:
                continue
            yield name
    finally:
        _core.force_instruction_set("")
