"""Keys and values in 8 bits: what pages hold, what attention makes of it, and whole models beside
stock ones whose attention rounds its keys and values alike.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import apr
from apr import _core, ops
from apr.errors import InvalidInput, NonFiniteLogits
from apr.ops import View, reference
from kernel_cases import UNIT, check, emulate, make, paged_tree, rope, rounds_weights, run, tree
from models import build, distance, stock, tokens

CODED = [torch.int8, torch.float8_e4m3fn]
HALVES = (torch.bfloat16, torch.float16)


def served(name, dtype, head_dim):
    """Whether these kernels take codes of such heads."""
    return "cuda" not in name or (dtype in HALVES and head_dim % 16 == 0)


def extremes(dtype):
    """Rows of all magnitudes: zeros, numbers far apart, ties, the largest, and subnormal ones."""
    rows = torch.randn(12, 2, 64, generator=torch.Generator().manual_seed(1)) * 3
    rows[1] = 0
    rows[2, 0] = torch.logspace(-8, 0, 64)
    rows[3] = torch.arange(-32, 32) * 0.5 + 0.25
    rows[3, :, 0] = 127 / 2  # the step is 0.5, and each number lies between two
    rows[4] *= torch.finfo(dtype).max / 64
    rows[5] *= torch.finfo(dtype).tiny
    rows[6] *= torch.finfo(dtype).tiny * 1e-3
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("kv_dtype", CODED, ids=str)
def test_pages_hold_the_codes_bit_by_bit(kv_dtype, dtype, instruction_set):
    if not served(instruction_set, dtype, 64):
        return
    pool = ops.empty_pool(2, 2, 64, dtype, page_size=16, kv_dtype=kv_dtype)
    k, v = extremes(dtype), -extremes(dtype).roll(1, -1)
    v[7, 0, 5], v[8, 1, 63] = torch.inf, torch.nan
    plan = ops.plan([(12, [View([1], 0, 12, 0, 0, own=True)])], pool, 2)
    ops.append(k, v, pool, plan)
    for x, side, scales in zip((k, v), (pool.k, pool.v), pool.scales, strict=True):
        codes, of = ops.encode(x, kv_dtype)
        assert torch.equal(
            side[1, :, :12].transpose(0, 1).view(torch.uint8), codes.view(torch.uint8)
        )
        assert torch.equal(scales[1, :, :12].transpose(0, 1).nan_to_num(-1), of.nan_to_num(-1))
    assert (
        ops.decode(*ops.encode(v, kv_dtype), dtype)[7:9]
        .isnan()
        .any(-1)
        .equal(torch.tensor([[True, False], [False, True]]))
    )


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("kv_dtype", CODED, ids=str)
def test_a_code_is_off_by_half_a_step_at_most(kv_dtype, dtype):
    x = extremes(dtype)[:6]
    codes, scales = ops.encode(x, kv_dtype)
    off = (ops.decode(codes, scales, torch.float32) - x.float()).abs()
    step = scales.repeat_interleave(32, -1)
    if kv_dtype is torch.float8_e4m3fn:  # three bits behind the first, down to 2^-6
        step = step * torch.exp2((x.float().abs() / step).clamp_min(2**-6).log2().floor() - 3)
        step = step.nan_to_num(0.0)
    assert (off <= step * 0.5 * (1 + 1e-5)).all() and off.max() > 0


@pytest.mark.trap(5)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256, 20])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("kv_dtype", CODED, ids=str)
def test_attention_reads_what_the_codes_stand_for(kv_dtype, dtype, head_dim, instruction_set):
    """Beside float64 over the decoded numbers; on the CPU also, bit by bit, the same kernels on a
    pool that holds those.
    """
    if not served(instruction_set, dtype, head_dim):
        return
    for row_sets, page_size in ((tree(rotated=True), 64), (paged_tree(16, torch.Generator()), 16)):
        pool, generator = make(dtype, 2, head_dim, 60, 0, page_size, kv_dtype)
        rotation = rope(head_dim)
        turned = dtype if rounds_weights(dtype, instruction_set) else None
        got, want, q, plan = run(
            row_sets, pool, 4, generator, rotation=rotation, turned_dtype=turned
        )
        check(got, want, dtype)
        if "cuda" in instruction_set:
            continue
        sides = zip((pool.k, pool.v), pool.scales, strict=True)
        numbers = ops.Pool(*(ops.decode(codes, of, dtype) for codes, of in sides))
        plain = ops.attention(q, numbers, plan, pool.head_dim**-0.5, rotation)
        assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


@pytest.mark.parametrize("kv_dtype", CODED, ids=str)
def test_copies_of_tokens_have_their_scales(kv_dtype, instruction_set):
    """Eight tokens of a child's inherited tail go to the head of its own pages."""
    half = copy.deepcopy(build("llama")).to(torch.bfloat16)
    with apr.Session(half, 1024, page_size=16, kv_dtype=kv_dtype, self_test=False) as s:
        root = s.thread(tokens(30))
        kid = root.fork(2)[0]
        kid.extend(tokens(8, seed=1))
        s.step([kid])
        grand = kid.fork(2)[0]
        grand.extend([5])
        s.step([grand])
        assert s.stats.copied_tokens == 8
        core = s.table.ask()
        now, was = (torch.tensor(core.stored_slots(t._id)[30:38].tolist()) for t in (grand, kid))
        assert not set(now.tolist()) & set(was.tolist())
        for pool in s.pools:
            for side in pool.sides.values():
                flat = side.transpose(1, 2).flatten(0, 1).float()
                assert torch.equal(flat[now], flat[was]) and flat[now].any()


@pytest.mark.parametrize("kv_dtype", CODED, ids=str)
def test_values_may_be_the_keys_or_narrower(kv_dtype, instruction_set):
    dtype = torch.bfloat16
    narrow = ops.empty_pool(40, 1, 64, dtype, head_dim_v=32, kv_dtype=kv_dtype)
    one = ops.empty_pool(40, 1, 64, dtype, values_are_keys=True, kv_dtype=kv_dtype)
    assert list(one.sides) == ["k", "k_scales"] and one.bytes_per_token == 64 + 2 * 4
    generator = torch.Generator().manual_seed(2)
    row_sets = [(9, [View([4], 0, 9, 0, 0, own=True)])]
    k = torch.randn(9, 1, 64, generator=generator).to(dtype)
    q = torch.randn(9, 4, 64, generator=generator).to(dtype)
    for pool in (narrow, one):
        plan = ops.plan(row_sets, pool, 4)
        ops.append(k, k[..., : pool.head_dim_v], pool, plan)
        want = reference.attention(q, pool, row_sets, 0.125)
        check(ops.attention(q, pool, plan, 0.125), want, dtype)


# ---- whole models -----------------------------------------------------------------------------


def rounding(kv_dtype):
    """transformers' attention, whose keys and values are what 8 bits leave of them."""

    def attend(module, query, key, value, mask, **options):
        key, value = (ops.decode(*ops.encode(x, kv_dtype), x.dtype) for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("rounding", attend)
    return "rounding"


@pytest.fixture(params=CODED, ids=str)
def twin(request):
    """A dtype of 8 bits, a model, and a stock one that rounds alike."""
    model = build("llama")
    alike = copy.deepcopy(model)
    alike.set_attn_implementation(rounding(request.param))
    return request.param, model, alike


def close(got, twin, ids):
    """Whether logits are the rounding model's. Keys that differ in their last bits may be rounded
    to the next code: a few of thousands, of what all of them cost beside a model of whole numbers.
    """
    _, model, alike = twin
    want = stock(alike, ids)[-1]
    return distance(got, want) < 0.15 * distance(want, stock(model, ids)[-1])


def test_threads_are_the_rounding_models(twin):
    kv_dtype, model, _ = twin
    with apr.Session(model, 4096, page_size=16, kv_dtype=kv_dtype) as s:
        root = s.thread(tokens(70))
        kids = root.fork(3)
        for turn in range(12):
            for i, kid in enumerate(kids):
                kid.extend([3 + 7 * i + turn])
            logits = s.step(kids)
        for kid, row in zip(kids, logits, strict=True):
            assert close(row, twin, kid.tokens)
        grand = kids[0].fork(2)
        for kid in grand:
            kid.extend([9])
        logits = s.step(grand)
        assert s.stats.copied_tokens > 0  # with their scales
        assert close(logits[1], twin, grand[1].tokens)
        kids[1].trim(75)
        kids[1].extend([8])
        assert close(s.step([kids[1]])[0], twin, kids[1].tokens)
        kids[0].join(grand, reencode=True)
        assert close(s.step(kids[:1])[0], twin, kids[0].tokens)
        s.check()


def test_it_takes_less_than_half_of_the_memory_of_float32(twin):
    kv_dtype, model, _ = twin
    with apr.Session(model, 64, kv_dtype=kv_dtype) as s, apr.Session(model, 64) as whole:
        for session in (s, whole):
            assert session.spec.bytes_per_token == sum(p.bytes_per_token for p in session.pools)
        # 16 dimensions, which a scale makes 20 bytes of instead of 64.
        assert s.spec.bytes_per_token * 64 == whole.spec.bytes_per_token * 20


@pytest.mark.parametrize("on_full", ["raise", "offload"])
def test_saved_threads_go_on_alike(twin, tmp_path, on_full):
    kv_dtype, model, _ = twin
    path = tmp_path / "threads.safetensors"
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": []}
    with apr.Session(model, 320, 16, kv_dtype=kv_dtype, on_full=on_full) as s:
        kids = s.thread(tokens(50)).fork(4)
        apr.decode(s, kids, **options)
        if on_full == "offload":  # what is saved was away
            s.step([s.thread(tokens(250, seed=3))])
            assert s.stats.offloaded_pages
        s.save(path, {str(i): kid for i, kid in enumerate(kids)})
        apr.decode(s, kids, **options)
        written = [kid.tokens for kid in kids]
    session, saved = apr.Session.open(path, model, max_tokens=1024)
    with session:
        assert session.pools[0].k.dtype is kv_dtype
        again = [saved[str(i)] for i in range(4)]
        apr.decode(session, again, **options)
        assert [kid.tokens for kid in again] == written
    with pytest.raises(InvalidInput, match="kv_dtype; it is the file's"):
        apr.Session.open(path, model, kv_dtype=torch.int8)


def test_generate_takes_what_a_session_takes(twin):
    kv_dtype, model, _ = twin
    ids = torch.tensor([tokens(20)])
    cache = apr.Cache(model, 1024, kv_dtype=kv_dtype)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, past_key_values=cache, **options)[0].tolist()
    with apr.Session(model, 1024, kv_dtype=kv_dtype) as s:
        thread = s.thread(ids[0].tolist())
        apr.decode(s, [thread], max_new_tokens=10, do_sample=False, eos_token_id=[])
        assert thread.tokens == out
    assert cache.session.pools[0].k.dtype is kv_dtype
    cache.close()


def test_replayed_steps_are_planned_steps(twin):
    if _core.gpu(True) is None:
        pytest.skip("this build has no emulated GPU")
    kv_dtype, model, _ = twin
    half = copy.deepcopy(model).to(torch.bfloat16)
    emulate(90)
    try:
        written = []
        for graphs in (None, True):
            with apr.Session(
                half, 1024, kv_dtype=kv_dtype, cuda_graphs=graphs, self_test=False
            ) as s:
                kids = s.thread(tokens(30)).fork(3)
                options = {"max_new_tokens": 8, "eos_token_id": [], "do_sample": True}
                apr.decode(s, kids, **options)
                written.append([kid.tokens for kid in kids])
                if graphs:
                    assert s._graphs.captures
        assert written[0] == written[1]
    finally:
        _core.force_instruction_set("")


def test_what_cannot_be_honoured_is_refused(twin):
    kv_dtype, model, _ = twin
    for wrong in (torch.int16, torch.float8_e5m2, "int8", 8, [1]):
        with pytest.raises(InvalidInput, match=r"kv_dtype: got .*expected None"):
            apr.Session(model, kv_dtype=wrong)
    with pytest.raises(InvalidInput, match="lie in no pages"):
        apr.Session(build("mamba"), kv_dtype=kv_dtype)
    for x, wrong in (
        (torch.zeros(2, 0), kv_dtype),
        (torch.tensor(1.0), kv_dtype),
        (torch.ones(3), None),
    ):
        with pytest.raises(InvalidInput, match="encode: got"):
            ops.encode(x, wrong)
    k = torch.zeros(2, 1, 16, 16, dtype=kv_dtype)
    of = torch.zeros(2, 1, 16, 1)
    for scales, dtype, said in (
        (None, torch.float32, "without the scales"),
        (of, torch.float32, "without the scales"),
        ((of, of), torch.float32, "got one tensor of two"),
        ((of, of[:1]), torch.float32, "contiguous"),
        ((of, of.double()), torch.float32, "contiguous"),
        ((of, of.clone()), None, "got dtype"),
        ((of, of.clone()), torch.float64, "got dtype"),
    ):
        with pytest.raises(InvalidInput, match=said):
            ops.Pool(k, k.clone(), scales, dtype)
    with pytest.raises(InvalidInput, match="with numbers of"):
        ops.Pool(of, of.clone(), (of, of.clone()))
    if _core.gpu(True) is not None:
        emulate(80)
        try:
            with pytest.raises(InvalidInput, match="in 8 bits the GPU kernels take"):
                apr.Session(model, kv_dtype=kv_dtype, self_test=False)
        finally:
            _core.force_instruction_set("")


def test_numbers_that_are_none_are_named(twin):
    kv_dtype, model, _ = twin
    broken = copy.deepcopy(model)
    with apr.Session(broken, 256, kv_dtype=kv_dtype) as s:
        hook = broken.model.layers[1].self_attn.k_proj.register_forward_hook(
            lambda *a: a[-1].masked_fill(torch.arange(a[-1].shape[-1]) == 3, torch.inf)
        )
        with pytest.raises(NonFiniteLogits):
            s.step([s.thread(tokens(5))])
        hook.remove()
        s.check()
