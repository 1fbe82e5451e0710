"""The sampler against transformers' warpers, float64, and itself on every instruction set."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apr import _core, ops
from apr.errors import InvalidInput
from kernel_cases import everywhere

CASES = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 0.5, "min_p": 0.1},
    {"top_k": 1},
    {"top_p": 0.0},
    {"top_k": 1000, "top_p": 0.999},
]


@pytest.fixture(autouse=True)
def best_kernels_afterwards():
    """A test that fails in `everywhere` leaves its generator suspended."""
    yield
    _core.force_instruction_set("")


def warped(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What transformers leaves of float32 scores."""
    made = LogitsProcessorList()
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    if min_p:
        made.append(MinPLogitsWarper(min_p))
    return made(None, scores.float().clone())


def rows(dtype, vocab=33, count=40, seed=0):
    """Random rows, half of them full of ties, some with forbidden tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(count, vocab, generator=generator)
    scores[::2] = scores[::2].round()
    scores[::5, :: max(1, vocab // 7)] = -math.inf
    return scores.to(dtype)


def chi_square(counts, probabilities):
    """How many standard deviations the statistic lies above its mean, of cells with 5 or more."""
    expected = probabilities * counts.sum()
    cells = expected >= 5
    rest = torch.stack([counts[~cells].sum().float(), expected[~cells].sum()])
    seen = torch.cat([counts[cells].float(), rest[:1]])
    want = torch.cat([expected[cells], rest[1:]])
    seen, want = seen[want > 1], want[want > 1]
    degrees = max(len(want) - 1, 1)
    return float(((seen - want) ** 2 / want).sum() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_leaves_what_transformers_leaves(dtype, options):
    """Every token that is drawn was left, with its probability; all of them turn up."""
    draws = 4000
    for number, row in enumerate(rows(dtype)):
        many = row.expand(draws, -1)
        got = ops.sample(many, ops.Draws(draws, key=number, count=range(draws), **options))
        want = warped(row[None], **options)[0]
        log = want.double().log_softmax(-1)
        # Ties that top-p cuts through: transformers' sort may keep others of them, as many.
        values, kept = want[want.isfinite()], set(want.isfinite().nonzero()[:, 0].tolist())
        scaled = row.float() / options.get("temperature", 1.0)
        cut = values.min()
        some = options.get("top_p", 1.0) < 1.0 and int((scaled == cut).sum()) > int(
            (values == cut).sum()
        )
        drawn = got.tokens.tolist()
        if some:
            first = int((scaled == cut).nonzero()[-int((values == cut).sum())])
            left = (scaled > cut) | ((scaled == cut) & (torch.arange(len(row)) >= first))
            kept = set(left.nonzero()[:, 0].tolist())
            log = torch.where(left, scaled, -math.inf)
            log = log.double().log_softmax(-1)
        assert set(drawn) <= kept
        torch.testing.assert_close(
            got.drawn_logprobs.double(), log[got.tokens], atol=4e-6, rtol=0
        )  # float32 numbers up to 8, one rounding each of score, maximum and result
        plain = row.double().log_softmax(-1)
        torch.testing.assert_close(got.logprobs.double(), plain[got.tokens], atol=4e-6, rtol=0)
        assert chi_square(torch.bincount(got.tokens, minlength=len(row)), log.exp()) < 7


def test_chi_square_has_power():
    row = rows(torch.float32)[1]
    got = ops.sample(row.expand(4000, -1), ops.Draws(4000, count=range(4000), temperature=1.1))
    assert chi_square(torch.bincount(got.tokens, minlength=len(row)), row.softmax(-1)) > 7


@pytest.mark.parametrize("spread", [0.5, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_large_vocabulary(top_p, spread):
    """The mass that top-p leaves of 50,000 tokens, against a sort in float64."""
    scores = spread * torch.randn(8, 50_001, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"top_k": 700}):
        got = ops.sample(scores, ops.Draws(8, key=range(8), top_p=top_p, **options))
        for row, token, logprob in zip(scores, got.tokens, got.drawn_logprobs, strict=True):
            best = row.double().sort(descending=True).values[: options.get("top_k", len(row))]
            shares = best.softmax(-1)
            kept = shares[(shares.cumsum(0) - shares) < top_p]
            want = math.log(math.exp(row[token] - best[0]) * shares[0] / kept.sum())
            # One token more or less where float32 rounds 1 - p.
            assert abs(float(logprob) - want) < 2e-6 + float(kept.min() / kept.sum())


def test_greedy_takes_the_first_of_equals():
    scores = rows(torch.bfloat16)
    got = ops.sample(scores, ops.Draws(len(scores), temperature=0))
    assert got.tokens.tolist() == scores.float().argmax(-1).tolist()
    assert got.drawn_logprobs.tolist() == [0.0] * len(scores)


def test_entropy():
    scores = rows(torch.float32)
    got = ops.sample(scores)
    log = scores.double().log_softmax(-1)
    want = -torch.where(log.isfinite(), log * log.exp(), 0.0).sum(-1)
    torch.testing.assert_close(got.entropies.double(), want, atol=4e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_everywhere(dtype):
    """Tokens and log-probabilities on every instruction set, on the (emulated) GPU, in other
    company, with other numbers of processor threads, and of rows that lie apart.
    """
    scores = rows(dtype, vocab=4500, count=12, seed=3)
    columns = {
        "temperature": [0.0, 0.5, 1.0, 1.3] * 3,
        "top_k": [0, 40, 3, 0, 5000, 7, 0, 0, 11, 2, 300, 0],
        "top_p": [1.0, 0.9, 0.3, 0.95, 1.0, 0.0, 0.6, 1.0, 0.7, 1.0, 0.99, 0.5],
        "min_p": [0.0, 0.1, 0.0, 0.02] * 3,
        "key": [(1 << 64) - 1 - 77 * i for i in range(12)],
        "count": [1 << (5 * i) for i in range(12)],
    }
    want = ops.sample(scores, ops.Draws(12, **columns))
    assert len(set(want.tokens.tolist())) > 6
    names = []
    for name in everywhere():
        names.append(name)
        got = ops.sample(scores, ops.Draws(12, **columns))
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.logprobs.tolist() == want.logprobs.tolist()
        assert got.drawn_logprobs.tolist() == want.drawn_logprobs.tolist()
        # Sums of 1,024 float32 numbers in a lane: each addition is half a unit off.
        torch.testing.assert_close(got.entropies, want.entropies, atol=0, rtol=1024 * 2.0**-25)
    assert {"portable", "cuda_emulated_80", _core.instruction_set()} <= set(names)
    wide = torch.zeros(12, 5000, dtype=dtype)
    wide[:, 250:4750] = scores
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert ops.sample(wide[:, 250:4750], ops.Draws(12, **columns)).tokens.equal(want.tokens)
    finally:
        torch.set_num_threads(threads)
    for i in range(12):
        alone = ops.Draws(1, **{name: [column[i]] for name, column in columns.items()})
        assert ops.sample(scores[i : i + 1], alone).tokens.tolist() == [want.tokens[i].item()]


def test_logits_of_before_processors():
    """Tokens follow the scores, log-probabilities and entropies the logits, in another dtype."""
    logits = rows(torch.bfloat16)
    scores = logits.float()
    scores[:, :20] = -math.inf
    for _ in everywhere():
        got = ops.sample(scores, logits=logits)
        assert int(got.tokens.min()) >= 20
        log = logits.float().log_softmax(-1)
        torch.testing.assert_close(
            got.logprobs, log.gather(1, got.tokens[:, None])[:, 0], atol=1e-6, rtol=1e-6
        )
        assert got.entropies.equal(ops.sample(logits).entropies)


def test_rows_without_a_choice():
    scores = rows(torch.float32, count=5)
    scores[0, 3] = math.nan
    scores[1] = -math.inf
    scores[2, 5] = math.inf
    scores[3, :] = -math.inf
    scores[3, 7] = -1e30
    for _ in everywhere():
        for options in ({}, {"temperature": 0}, {"top_p": 0.5, "temperature": 0.7, "top_k": 9}):
            tokens = ops.sample(scores, ops.Draws(5, **options)).tokens.tolist()
            assert tokens[:4] == [-1, -1, -1, 7]
            assert tokens[4] >= 0
    huge = torch.tensor([[3e38, -3e38, 0.0]])
    assert ops.sample(huge, ops.Draws(1, temperature=0.5)).tokens.tolist() == [-1]


def test_random_numbers_are_philox():
    """The authors' known answer (Random123, kat_vectors), and a second implementation."""
    assert _core.random_bits(0, 0) == 0xE169C58D6627E8D5
    for key, count in ((1, 2), (2**64 - 1, 2**63 + 5), (0x299F31D0A4093822, 0x85A308D3243F6A88)):
        x, k = [count & 0xFFFFFFFF, count >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            x = [
                (b >> 32) ^ x[1] ^ k[0],
                b & 0xFFFFFFFF,
                (a >> 32) ^ x[3] ^ k[1],
                a & 0xFFFFFFFF,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert _core.random_bits(key, count) == x[1] << 32 | x[0]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1; expected 0.0 or more"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1e-60}, "float32 can hold"),
        ({"temperature": [0.0, 1e39, 1.0]}, "got 1e\\+39.*float32 can hold"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": [0.1, 2.0, 0.0]}, "min_p: got 2.0"),
        ({"top_k": 1.5}, "whole number"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"key": 1 << 64}, "key"),
        ({"count": [1, 2]}, "count: got 2"),
        ({"temperature": [1.0, 2.0]}, r"temperature: got \[2\]; expected one, or \[3\]"),
    ],
)
def test_refuses_options(options, what):
    with pytest.raises(InvalidInput, match=what):
        ops.Draws(3, **options)


def test_refuses_tensors():
    scores = torch.zeros(2, 8)
    with pytest.raises(InvalidInput, match="expected \\[rows, vocab\\]"):
        ops.sample(scores[0])
    with pytest.raises(InvalidInput, match="dtype"):
        ops.sample(scores.long())
    with pytest.raises(InvalidInput, match="3 draws for 2 rows"):
        ops.sample(scores, ops.Draws(3))
    with pytest.raises(InvalidInput, match="contiguous"):
        ops.sample(torch.zeros(8, 2).T)
    with pytest.raises(InvalidInput, match="logits"):
        ops.sample(scores, logits=torch.zeros(2, 9))
    assert ops.sample(torch.zeros(0, 8)).tokens.tolist() == []


def test_decimal_borders():
    """Of n equal tokens top-p = k / n keeps k, the last ones."""
    for n in (2, 5, 10, 20, 40):
        for k in range(1, n):
            row = torch.zeros(1, n).expand(200, -1)
            drawn = ops.sample(row, ops.Draws(200, count=range(200), top_p=k / n)).tokens
            assert n - k <= int(drawn.min())
            assert k > 20 or len(set(drawn.tolist())) == k
