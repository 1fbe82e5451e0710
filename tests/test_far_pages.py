"""Pools of more elements than 32 bits count: what lies at their far end is read and written there.

Of their memory only the pages that are used become real.
"""

from __future__ import annotations

import pytest
import torch

from apr import _core, ops
from kernel_cases import SETS, force, make, run, tree

ELEMENTS = 2**31  # of one side
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def far_pool(near):
    """The pages of a small pool at the end of a large one, in reverse order."""
    heads, tokens, dim = near.k.shape[1:]
    pages = ELEMENTS // (heads * tokens * dim) + 1 + near.num_pages
    far = ops.empty_pool(pages, heads, dim, near.dtype, page_size=tokens)
    last = pages - 1
    for page in range(near.num_pages):
        far.k[last - page] = near.k[page]
        far.v[last - page] = near.v[page]
    return far, last


def moved(row_sets, last):
    return [
        (rows, [view._replace(pages=[last - page for page in view.pages]) for view in views])
        for rows, views in row_sets
    ]


@pytest.fixture(params=SETS)
def kernels(request):
    try:
        force(request.param)
    except ValueError:
        pytest.skip(f"{request.param} was not built, or does not run here")
    yield request.param
    _core.force_instruction_set("")


@pytest.mark.trap(14)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_append(kernels, dtype):
    pool, generator = make(DTYPES[dtype], 2, 64)
    far, last = far_pool(pool)
    assert far.k.numel() > ELEMENTS and far.k.stride(0) * (last - 11) > ELEMENTS
    state = generator.get_state()
    near = run(tree(), pool, 8, generator)
    generator.set_state(state)
    got = run(moved(tree(), last), far, 8, generator)
    for one, other in zip(near[0], got[0], strict=True):
        assert torch.equal(one, other)
    for page in range(11):  # appended rows too
        assert torch.equal(far.k[last - page], pool.k[page])
        assert torch.equal(far.v[last - page], pool.v[page])
