"""What the emulator counts of kernels: known numbers, and the goals that the kernels keep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from apr import _core, ops
from apr.bench import problems
from apr.errors import InvalidInput
from apr.ops import View, reference
from kernel_cases import check, emulate, make

if _core.gpu(True) is None:
    pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)", allow_module_level=True)


@pytest.fixture(autouse=True)
def leave_the_emulator():
    yield
    _core.count_emulated(False)
    emulate(90)
    _core.force_instruction_set("")


def counted(action):
    _core.count_emulated(True)
    action()
    counts = _core.emulated_counts()
    _core.count_emulated(False)
    return counts


def test_sectors_and_banks_of_a_kernel_that_is_known():
    """32 lanes read four bytes each from sectors of their own, and write them to one bank."""
    counts = counted(lambda: _core.run_broken_kernel("strided"))["strided"]
    traffic = counts.traffic["tables"]
    assert (traffic.requests, traffic.bytes) == (1, 128)
    assert (traffic.sectors, traffic.least_sectors) == (32, 4)
    assert (counts.other.requests, counts.other.rounds, counts.other.least_rounds) == (1, 32, 1)


CASES = {  # the kernel, (P, N, S), (query heads, KV heads, head_dim)
    "small_bf16_64_16_4": ((300, 3, 70), (4, 2, 64)),
    "small_bf16_128_32_3": ((300, 6, 70), (8, 2, 128)),
    "wide_bf16_128_128_5": ((300, 20, 72), (8, 2, 128)),
}


@pytest.mark.parametrize("name", CASES)
def test_keys_are_read_once_in_whole_sectors_and_without_conflicts(name):
    """The goals of docs/cuda-counts.md, exactly: a key or value too much is seen here."""
    emulate(90, blocks=3)
    shape, heads = CASES[name]
    problem = problems.make("tree", shape, heads, torch.bfloat16, torch.device("cpu"), 1)
    step, _ = problems.ours(problem, rotated=False)
    counts = counted(lambda: step(0))
    assert name in counts
    attention = counts[name]
    few = 8 if name.startswith("wide") else 1  # tokens that bulk copies take at least
    prefix, threads, own = shape
    tokens = sum(-(-n // few) * few for n in [prefix, *[own] * threads])
    for side in ("keys", "values"):
        traffic = attention.traffic[side]
        assert traffic.bytes == tokens * heads[1] * heads[2] * 2
        assert traffic.sectors == traffic.least_sectors
    queries = attention.traffic["queries"]
    assert queries.sectors == queries.least_sectors
    assert attention.operands.rounds == attention.operands.least_rounds
    assert attention.other.rounds <= 1.05 * attention.other.least_rounds
    # A block knows where it begins after four look-ups; the next span takes two.
    assert (attention.first_lookups, attention.later_lookups) == (4, 2)
    assert attention.products > 0 and attention.exponentials > 0


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_seen_in_part_is_read_in_part(rows, dims):
    """A view that begins inside a slice of 16 tokens; keys wider than values, as MLA has them."""
    emulate(90, blocks=3)
    pool = ops.empty_pool(8, 1, dims[0], torch.bfloat16, head_dim_v=dims[1])
    pool.k.normal_()
    pool.v.normal_()
    sets = [(1, [View([3, 1, 5], 21, 150, 0, 0, own=True)]) for _ in range(rows)]
    plan = ops.plan(sets, pool, 4)
    q = torch.randn(rows, 4, dims[0]).bfloat16()
    counts = counted(lambda: ops.attention(q, pool, plan, 0.1))
    (name,) = (x for x in counts if x.startswith(("small", "wide")))
    assert name.startswith("wide" if rows > 8 else "small")
    tokens = 152 - 16 if rows > 8 else 150 - 21  # eight at a time: from 16, to 152
    for side, dim in zip(("keys", "values"), dims, strict=True):
        traffic = counts[name].traffic[side]
        assert traffic.bytes == tokens * dim * 2
        assert traffic.sectors == traffic.least_sectors


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 4])
def test_codes_are_read_once_and_decoded_without_conflicts(rows, dim):
    emulate(90, blocks=3)
    pool, _ = make(torch.bfloat16, 1, dim, pages=8, kv_dtype=torch.int8)
    sets = [(1, [View([3, 1, 5], 21, 150, 0, 0, own=True)]) for _ in range(rows)]
    plan = ops.plan(sets, pool, 4)
    q = torch.randn(rows, 4, dim).bfloat16()
    counts = counted(lambda: ops.attention(q, pool, plan, 0.1))
    (name,) = (x for x in counts if x.startswith("coded"))
    for side in ("keys", "values"):
        traffic = counts[name].traffic[side]
        assert traffic.bytes == (150 - 21) * dim
        assert traffic.sectors == traffic.least_sectors
    assert counts[name].operands.rounds == counts[name].operands.least_rounds
    assert counts[name].other.rounds <= 1.05 * counts[name].other.least_rounds


def test_counting_changes_no_result_afterwards():
    emulate(90)
    problem = problems.make("tree", (70, 2, 9), (4, 2, 64), torch.bfloat16, torch.device("cpu"), 1)
    step, _ = problems.ours(problem, rotated=False)
    before = step(0).clone()
    counted(lambda: step(0))
    assert torch.equal(step(0), before)


@pytest.mark.parametrize("name", ["trtllm-128", "fasttree-1", "hogwild"])
def test_problems_of_others_are_what_their_names_say(name):
    """Every node is seen once, every leaf is a row; what comes out is the attention of its path."""
    named = problems.NAMED[name]
    problem = named.make(name, (4, 2), torch.device("cpu"), layers=1)
    levels = zip(named.nodes, named.tokens, strict=True)
    assert problem.unique_tokens() == sum(count * tokens for count, tokens in levels)
    assert len(problem.sets) == named.nodes[-1]
    q, pool, scale = problem.q[0], problem.pools[0], problem.scale
    got = ops.attention(q, pool, problem.plan(), scale)
    check(got, reference.attention(q, pool, problem.sets, scale), named.dtype)


def test_a_problem_that_nobody_has_is_refused():
    with pytest.raises(InvalidInput, match=r"--problem pat-99.*expected one of deft, fasttree"):
        problems.choose(["pat-99"])


def test_the_page_says_what_was_counted(monkeypatch):
    """`python bench/counts.py --page` after every count."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    sys.modules.pop("counts", None)
    import counts

    stored = json.loads(counts.STORED.read_text())
    assert counts.PAGE.read_text() == counts.page(stored)
    assert {title.split(",")[0].split(" ")[0].split("-")[0] for title in stored} >= {
        name.split("-")[0] for name in problems.NAMED
    }
