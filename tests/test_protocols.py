"""Every preset through the real runtime with a scripted model, against a stock forward of the flat
sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apr
import scripted
from apr import protocols
from apr.protocols.markers import Watcher, Words
from models import CLOSE, FAMILIES, FAR
from protocol_scripts import OTHERS, SCRIPTS, kid
from token_loop import Row, TokenLoop


def grammar_of(name):
    preset = protocols.PRESETS[name]
    return dataclasses.replace(preset, width=3) if name == "parathinker" else preset


def test_all_presets_are_scripted():
    assert set(SCRIPTS) == set(protocols.PRESETS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_preset(name, session, tok, net):
    script, text, threads, depth = SCRIPTS[name]
    outcome, logits = scripted.play(session, tok, "Q: why?", grammar_of(name), script)
    assert outcome.text == text
    assert (outcome.threads, outcome.depth, outcome.finish) == (threads, depth, "eos")
    assert outcome.events == []
    # Every sampled token's logits equal those of one stock forward of the flat sequence.
    apart = scripted.distances(net, outcome, logits)
    assert len(apart) == threads + 1
    assert max(apart.values()) < CLOSE
    sampled = sum(len(rows) for rows in logits.values())
    assert outcome.total_tokens == sampled
    assert outcome.critical_path_tokens < sampled or name == "recursive"
    outcome.thread.release()
    assert session.stats.used_pages == 0  # no child outlives its block


@pytest.mark.parametrize("name", OTHERS)
def test_other_grammars(name, session, tok, net):
    grammar, script, text = OTHERS[name]
    outcome, logits = scripted.play(session, tok, "Q: why?", grammar, script)
    assert text is None or outcome.text == text
    apart = scripted.distances(net, outcome, logits)
    assert set(apart) == set(script) and max(apart.values()) < CLOSE
    outcome.thread.release()
    assert session.stats.used_pages == 0


def test_critical_path_is_the_longest_chain(session, tok):
    script, _, _, _ = SCRIPTS["npr"]
    outcome, logits = scripted.play(session, tok, "Q", protocols.npr, script)
    root = len(logits[()])
    assert outcome.critical_path_tokens == root + max(len(logits[kid(1)]), len(logits[kid(2)]))
    assert outcome.acceleration == pytest.approx(
        1 - outcome.critical_path_tokens / outcome.total_tokens
    )
    given = sum(len(p.ids) for p in outcome.record.pieces) - outcome.prompt_tokens
    assert outcome.injected_tokens == given - outcome.total_tokens


def test_a_root_that_is_not_one_line_is_run_but_not_flattened(session, tok):
    outcome, _ = scripted.play(session, tok, "Q", protocols.npr, SCRIPTS["npr"][0])
    again = apr.run(
        session,
        outcome.thread,
        protocols.npr,
        tokenizer=tok,
        do_sample=False,
        budget=apr.Budget(tokens_per_thread=3),
    )
    assert again.total_tokens == 3 and again.prompt_tokens > 80
    with pytest.raises(apr.InvalidInput, match="joined others"):
        apr.training.flatten(again.record)


def test_words_in_other_alphabets_and_tokenizers(net):
    """Non-ASCII words, and a tokenizer that begins every text with a blank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = scripted.tokenizer(whole=())
    words = Words(tok, ["【并】", "end 7}"])
    watcher = Watcher(words)
    written = tok("x【并】y end 7} z", add_special_tokens=False).input_ids
    assert [w for i in written for w in watcher.feed(i)] == ["【并】", "end 7}"]

    letters = {c: i for i, c in enumerate("?▁<>/.ABx", 0)}
    inner = Tokenizer(models.BPE(letters, [], unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    blanks = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    words = Words(blanks, ["<A>"])
    assert blanks.convert_ids_to_tokens(words.encode("<A>")) == ["<", "A", ">"]
    assert len(words.spellings("<A>")) == 2


def record_rows(record):
    """The record as rows of the token loop, in an order in which what they see is there."""
    pieces, done, rows = record.pieces, [0] * len(record.pieces), []
    while any(d < len(p.ids) for d, p in zip(done, pieces, strict=True)):
        for number, piece in enumerate(pieces):
            ready = all(done[other] >= hi for other, hi, _ in piece.sees)
            while ready and done[number] < len(piece.ids):
                sees = [(str(q), pieces[q].position + shift, hi) for q, hi, shift in piece.sees]
                at = piece.position + done[number]
                sees.append((str(number), piece.position, done[number] + 1))
                rows.append((number, Row(str(number), piece.ids[done[number]], at, sees)))
                done[number] += 1
                # A piece that another waits for half-way may go on; the loop keeps prefixes of its
                # keys.
    return rows


@pytest.mark.parametrize("name", ["multiverse", "npr"])
def test_summed_positions_against_the_token_loop(name, session, tok, net):
    grammar = dataclasses.replace(protocols.PRESETS[name], returns="sum")
    outcome, logits = scripted.play(session, tok, "Q", grammar, SCRIPTS[name][0])
    with pytest.raises(apr.InvalidInput, match="one position in a flat sequence"):
        apr.training.flatten(outcome.record)
    loop, after = TokenLoop(net, FAMILIES["llama"]), {}
    for number, row in record_rows(outcome.record):
        after.setdefault(number, []).append(loop.step([row])[0])
    oracle = []
    for number in outcome.root.pieces:
        piece = outcome.record.pieces[number]
        for i, chosen in enumerate(piece.sampled):
            if chosen:
                source = (number, i - 1) if i else piece.follows
                oracle.append(after[source[0]][source[1]])
    apart = (torch.stack(oracle) - logits[()]).abs().max()
    assert apart < CLOSE
    joined_at_max, _ = scripted.play(session, tok, "Q", protocols.PRESETS[name], SCRIPTS[name][0])
    assert joined_at_max.text == outcome.text


def test_join_comparison(session, tok):
    outcome, _ = scripted.play(session, tok, "Q: why?", protocols.npr, SCRIPTS["npr"][0])
    by = {d.returns: d for d in apr.compare_joins(session, outcome, tokenizer=tok)}
    assert set(by) == {"max", "sum", "text", "message"}
    assert by["max"].most < CLOSE and by["max"].agreement == 1.0
    # A join that saw another text, or the same at other places, is another function of the same
    # weights.
    assert all(
        by[name].most > FAR and by[name].divergence > 0 for name in ("sum", "text", "message")
    )
    assert len({round(d.logprob, 6) for d in by.values()}) == 4
    for name, (script, _, _, _) in SCRIPTS.items():
        outcome, _ = scripted.play(session, tok, "Q", grammar_of(name), script)
        own = [
            d
            for d in apr.compare_joins(session, outcome, tokenizer=tok)
            if d.returns == outcome.grammar.returns
        ]
        assert all(d.most < CLOSE for d in own) and (own or name == "pasta")
    plain, _ = scripted.play(session, tok, "Q", protocols.npr, {(): "no block"})
    with pytest.raises(apr.InvalidInput, match="nothing after a join"):
        apr.compare_joins(session, plain, tokenizer=tok)


def test_many_requests_are_each_alone(session, tok):
    def ids(text):
        return tok(text, add_special_tokens=False).input_ids

    scripts = [
        SCRIPTS["npr"][0],
        {(): "plain"},
        {**SCRIPTS["npr"][0], kid(1): " much longer</step>"},
    ]
    alone = [
        scripted.play(session, tok, f"Q{i}", protocols.npr, s)[0] for i, s in enumerate(scripts)
    ]
    forced = {}

    def processors(worker):
        from apr.protocols.replays import _Forced

        number = roots.index(worker.request.root.thread if worker.parent else worker.thread)
        key = (number, worker.path)
        text = scripts[number][worker.path]
        return [forced.setdefault(key, _Forced(worker, ids(text), tok.eos_token_id))]

    roots = [session.thread(tok(f"Q{i}").input_ids) for i in range(3)]
    together = apr.run(
        session, roots, protocols.npr, tokenizer=tok, logits_processor=processors, do_sample=False
    )
    for one, many in zip(alone, together, strict=True):
        assert (one.text, one.total_tokens, one.critical_path_tokens) == (
            many.text,
            many.total_tokens,
            many.critical_path_tokens,
        )
    # One batch a step for all of them: as many steps as the longest request has tokens one after
    # the other.
    alone_steps = sum(o.critical_path_tokens for o in alone)
    steps = sum(1 for e in session.trace.events if e["name"] == "step") - alone_steps
    assert steps == max(o.critical_path_tokens for o in together)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_control_words_are_found_however_they_are_split(data):
    """Tokens are arbitrary pieces of the text; a token may hold a word's end and another's
    beginning.
    """
    text = data.draw(
        st.lists(st.sampled_from(["<A>", "</A>", "<AB>", "x", " ", "<", ">", "A>"]), max_size=12)
    )
    whole = "".join(text)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(whole))), max_size=8)))
    bounds = [0, *[c for c in cuts if c < len(whole)], len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(bounds) if a < b]

    words = ["<A>", "</A>", "<AB>"]
    spelled = pieces + words

    class Pieces:
        def __len__(self):
            return len(spelled)

        def __call__(self, text, **_):
            known = [len(pieces) + words.index(text)] if text in words else []
            return SimpleNamespace(input_ids=known)

        def convert_ids_to_tokens(self, ids):
            return [spelled[i] for i in ids]

        added_tokens_decoder: ClassVar[dict] = {}

        def decode(self, ids, **_):
            return "".join(spelled[i] for i in ids)

    watcher = Watcher(Words(Pieces(), words))
    found = [word for i in range(len(pieces)) for word in watcher.feed(i)]
    for word in words:
        # Twice in one token counts once: a block cannot be opened twice by one token.
        seen = sum(
            whole[:e].count(word) > whole[:b].count(word) for b, e in itertools.pairwise(bounds)
        )
        assert found.count(word) == seen
