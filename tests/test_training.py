"""Flat sequences: the mask against its definition, labels against the runtime, lengths without a
dense mask.
"""

from __future__ import annotations

import dataclasses
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import apr
import scripted
from apr import protocols
from apr.protocols.record import Record, Seen
from apr.training import collate, flatten, microbatches
from models import CLOSE, FAR, distance, stock
from protocol_scripts import SCRIPTS


@st.composite
def records(draw):
    """Trees of pieces, cut and joined at random."""
    record = Record()
    record.start(draw(st.lists(st.integers(3, 99), min_size=1, max_size=6)))
    for _ in range(draw(st.integers(0, 7))):
        source = draw(st.integers(0, len(record.pieces) - 1))
        length = len(record.pieces[source].ids)
        if draw(st.booleans()) or len(record.pieces) < 3:
            made = record.after(source, draw(st.integers(0, length)))
        else:
            others = [p for p in range(len(record.pieces)) if p != source]
            mine = {seen.piece for seen in record.pieces[source].sees}
            other = draw(st.sampled_from(others))
            size = len(record.pieces[other].ids)
            parts = [] if other in mine or not size else [Seen(other, draw(st.integers(1, size)))]
            made = record.parts_after(source, parts, record.pieces[source].end + 3)
        record.write(made, draw(st.lists(st.integers(3, 99), max_size=5)), sampled=False)
    return record


@settings(max_examples=150, deadline=None)
@given(records())
def test_the_mask_is_what_each_piece_sees(record):
    flat = flatten(record)
    visible = set()  # (place of a reader, place of what it sees), straight from the record
    starts = flat.starts.tolist()
    for number, piece in enumerate(record.pieces):
        for i in range(len(piece.ids)):
            for other, hi, _ in piece.sees:
                visible |= {(starts[number] + i, starts[other] + j) for j in range(hi)}
            visible |= {(starts[number] + i, starts[number] + j) for j in range(i + 1)}
    mask = flat.mask()
    assert {(i, j) for i, j in mask.nonzero().tolist()} == visible
    q, k = torch.meshgrid(torch.arange(len(flat)), torch.arange(len(flat)), indexing="ij")
    assert torch.equal(flat.mask_mod()(None, None, q, k), mask)


@settings(max_examples=25, deadline=None)
@given(records(), st.integers(100, 300))
def test_the_block_mask_agrees_with_torchs_own(record, stretch):
    """Longer pieces, so that blocks of 128 matter; torch makes its own from every pair of
    tokens.
    """
    record.write(len(record.pieces) - 1, [5] * stretch, sampled=False)
    flat = flatten(record)
    ours = flat.block_mask()
    theirs = create_block_mask(flat.mask_mod(), None, None, len(flat), len(flat), device="cpu")
    # Blocks that ours visits must cover theirs (theirs also knows which are full).
    assert bool((ours.to_dense() >= theirs.to_dense()).all())
    assert int(ours.to_dense().sum()) == int(theirs.to_dense().sum())


def test_flex_attention_takes_the_block_mask():
    from torch.nn.attention.flex_attention import flex_attention

    record = Record()
    root = record.start([5] * 150)
    children = [record.after(root) for _ in range(2)]
    for child in children:
        record.write(child, [6] * 90, sampled=True)
    last = record.parts_after(root, [Seen(c, 90) for c in children], 240)
    record.write(last, [7] * 20, sampled=False)
    flat = flatten(record)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, len(flat), 16).unbind(0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=flat.mask())
    with pytest.warns(
        UserWarning, match="unfused"
    ):  # uncompiled, it needs no compiler on the test machine
        out = flex_attention(q, k, v, block_mask=flat.block_mask())
    assert distance(out, dense) < CLOSE


def test_32k_tokens_without_a_dense_mask():
    rng = random.Random(0)
    record = Record()
    piece = record.start([5] * 1000)
    while sum(len(p.ids) for p in record.pieces) < 32_000:
        child = record.after(piece if rng.random() < 0.5 else len(record.pieces) - 1)
        record.write(child, [6] * rng.randint(50, 400), sampled=True)
    tracemalloc.start()
    flat = flatten(record)
    block_mask = flat.block_mask()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(flat) >= 32_000 and block_mask.shape[-2:] == (len(flat), len(flat))
    # tracemalloc sees numpy and Python; a dense boolean mask alone would be 1 GB.
    assert peak < 64 << 20


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_the_loss_counts_what_was_sampled_and_nothing_else(name, tok, net):
    with apr.Session(net, max_tokens=1 << 14, page_size=16) as session:
        # Nothing is closed here: a closed word would be missing from the runtime's distribution.
        grammar = dataclasses.replace(protocols.PRESETS[name], nested=True, forbidden=())
        outcome, logits = scripted.play(session, tok, "Q", grammar, SCRIPTS[name][0])
    flat = flatten(outcome.record)
    assert int(flat.loss_mask.sum()) == outcome.total_tokens
    batch = collate([flat, flat], multiple=16)
    with torch.no_grad():
        out = net(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits
    assert out.isfinite().all()
    # The loss of the batch is the runtime's own log-probability of every sampled token.
    own, pieces = 0.0, outcome.record.pieces

    def visit(branch):
        nonlocal own
        rows = logits.get(branch.path)
        tokens = [i for p in branch.pieces for i, s in zip(pieces[p].ids, pieces[p].sampled) if s]  # noqa: B905
        for row, token in zip(rows if rows is not None else (), tokens, strict=True):
            own -= float(row.log_softmax(-1)[token])
        for child in branch.children:
            visit(child)

    visit(outcome.root)
    assert float(batch.loss(out, "sum")) / 2 == pytest.approx(own, rel=1e-4)


def test_a_causal_line_is_the_stock_forward(net):
    record = Record()
    record.start([5, 6, 7])
    record.write(0, [8, 9], sampled=True)
    flat = flatten(record)
    assert flat.targets.tolist() == [3, 4] and flat.sources.tolist() == [2, 3]
    assert torch.equal(flat.mask(), torch.ones(5, 5, dtype=torch.bool).tril())
    rows = scripted.flat_logits(net, record)[0]
    assert distance(torch.stack(rows), stock(net, [5, 6, 7, 8, 9])[2:4]) < CLOSE


def test_siblings_do_not_see_each_other(net):
    """The test has power: with the siblings visible the logits are far away."""
    record = Record()
    root = record.start([5, 6, 7])
    first, second = record.after(root), record.after(root)
    record.write(first, [8, 9, 10], sampled=True)
    record.write(second, [11, 12, 13], sampled=True)
    rows = scripted.flat_logits(net, record)
    assert distance(torch.stack(rows[second]), stock(net, [5, 6, 7, 11, 12])[2:]) < CLOSE
    record.pieces[second].sees.append(Seen(first, 3))
    assert (
        distance(
            torch.stack(scripted.flat_logits(net, record)[second])[1:],
            torch.stack(rows[second])[1:],
        )
        > FAR
    )


def test_refusals():
    record = Record()
    root = record.start([5, 6])
    with pytest.raises(apr.InvalidInput, match="token 3 of a piece of 2"):
        record.after(root, 3)
    joined = record.parts_after(root, [], 9)
    record.write(joined, [7], sampled=True)
    with pytest.raises(apr.InvalidInput, match="sampled after nothing"):
        flatten(record)


def test_microbatches_hold_every_row_once():
    flats = []
    for n in (3, 40, 17, 64, 65, 9, 200):
        record = Record()
        record.start([5])
        record.write(0, [n % 90 + 3] * n, sampled=True)
        flats.append(flatten(record))
    batches = microbatches(flats, 256, multiple=16)
    assert sum(len(b.labels) for b in batches) == sum(len(f.targets) for f in flats)
    assert all(b.input_ids.numel() <= 256 or len(b.input_ids) == 1 for b in batches)
    assert sum(len(b.input_ids) for b in batches) == len(flats)
