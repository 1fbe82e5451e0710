"""Every preset through the real runtime with a scripted model, against a stock forward of the flat sequence."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apr
import scripted
from apr import protocols
from apr.protocols.markers import Watcher, Words
from models import CLOSE, FAMILIES, FAR
from token_loop import Row, TokenLoop


def kid(*ns):
    """The path of a child in the first block of each ancestor."""
    return tuple((0, n) for n in ns)


PARALLEL = "hm <Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
GUIDE = "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>"
# preset: what the model writes, the text that must come out, (sampled, put in, critical, children, depth)
SCRIPTS = {
    "apr": (
        {
            (): "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> N1\n"
            "<Start Sub Search 1 at level 1> N2\n<End Calling Sub Searches>ok",
            kid(1): "Goal Reached a Goal Reached b",
            kid(2): "none",
        },
        "<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1>\na Goal Reached b\n"
        "<No Solution in Sub Search 1 at level 1>\n<End Sub Searches>\nok",
        2,
        1,
    ),
    "multiverse": (
        {
            (): PARALLEL + "so</Conclusion></Parallel> end",
            kid(1): " one</Path>",
            kid(2): " two" + PARALLEL + "t</Conclusion></Parallel></Path>",
            kid(2, 1): " deep</Path>",
            kid(2, 2): " deeper</Path>",
        },
        PARALLEL + "\n<Path>\n1: one</Path><Path>\n2: two" + PARALLEL + "\n<Path>\n1: deep</Path>"
        "<Path>\n2: deeper</Path>\n<Conclusion>\nt</Conclusion></Parallel></Path>\n<Conclusion>\n"
        "so</Conclusion></Parallel> end",
        4,
        2,
    ),
    "npr": (
        {(): GUIDE + "ok</takeaway>", kid(1): " x</step>", kid(2): " yyy</step>"},
        GUIDE + "\n<step>\n1: x</step><step>\n2: yyy</step>\n<takeaway>\nok</takeaway>",
        2,
        1,
    ),
    "parallel_r1": (
        {
            (): "a<Parallel>sum</Summary>b<Parallel>c</Summary>",
            kid(1): "one</Path>",
            kid(2): "two</Path>",
            ((1, 1),): "three</Path>",
            ((1, 2),): "4</Path>",
        },
        "a<Parallel><Path>one</Path><Path>two</Path></Parallel>\n<Summary>sum</Summary>b<Parallel>"
        "<Path>three</Path><Path>4</Path></Parallel>\n<Summary>c</Summary>",
        4,
        1,
    ),
    "threadweaver": (
        {
            (): "<Parallel><Outlines><Outline>1: a</Outline><Outline>3: b</Outline></Outlines>"
            "</Parallel>x",
            kid(1): " one</Thread>",
            kid(2): " two",
        },
        "<Parallel><Outlines><Outline>1: a</Outline><Outline>3: b</Outline></Outlines>\n"
        "<Thread>\n1: one</Thread><Thread>\n3: two</Thread>\n</Parallel>x",
        2,
        1,
    ),
    "pasta": (
        {
            (): 'go <promise topic="a" tokens="20"/> and <promise topic="b" tokens="9"/>more<sync/> '
            'x <promise topic="c" tokens="12"/>y',
            kid(1): "one</async>",
            ((1, 1),): "two</async>",
            ((2, 1),): "three</async>",
        },
        'go <promise topic="a" tokens="20"/><async>one</async> and '
        '<promise topic="b" tokens="9"/><async>two</async>more<sync/> x '
        '<promise topic="c" tokens="12"/><async>three</async>y',
        3,
        1,
    ),
    "parathinker": (
        {(): "final", kid(1): "abc</think1>", kid(2): "defghijklmnopqrst</think2>", kid(3): "uv"},
        # The third ends first, after "uv" and EOS; the others are taken with their three tokens.
        "<think1>abc</think1><think2>def</think2><think3>uv</think3><summary>final",
        3,
        1,
    ),
    "sprint": (
        {
            (): "<Plan><prompt>p1</prompt><prompt>p2</prompt></Plan>more<Plan><prompt>p3</prompt>"
            "</Plan>done",
            kid(1): "e1</execution>",
            kid(2): "e22</execution>",
            ((1, 1),): "e3</execution>",
        },
        "<Plan><prompt>p1</prompt><prompt>p2</prompt></Plan><Execution><execution>e1</execution>"
        "<execution>e22</execution></Execution>more<Plan><prompt>p3</prompt></Plan><Execution>"
        "<execution>e3</execution></Execution>done",
        3,
        1,
    ),
    "recursive": (
        {(): "<call>sub</call>fine", kid(1): "x<call>deep</call>y", kid(1, 1): "42"},
        "<call>sub</call><result>x<call>deep</call><result>42</result>y</result>fine",
        2,
        2,
    ),
}


@pytest.fixture(scope="module")
def tok():
    return scripted.tokenizer()


@pytest.fixture(scope="module")
def net(tok):
    return scripted.model(tok)


@pytest.fixture
def session(net):
    with apr.Session(net, max_tokens=1 << 15, page_size=16) as s:
        yield s


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


PLANS = "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>"
OTHERS = {
    "promises in promises": (
        protocols.pasta,
        {
            (): 'a<promise tokens="40"/>b<sync/>c',
            kid(1): 'x<promise tokens="5"/>y<sync/>z</async>',
            kid(1, 1): "in</async>",
        },
        'a<promise tokens="40"/><async>x<promise tokens="5"/><async>in</async>y<sync/>z</async>b<sync/>c',
    ),
    "promises that their makers do not collect": (
        protocols.pasta,
        {(): 'a<promise tokens="40"/>b', kid(1): 'x<promise tokens="5"/>y', kid(1, 1): "inner"},
        'a<promise tokens="40"/><async>x<promise tokens="5"/><async>inner</async>y</async>b',
    ),
    "more tokens than were promised": (
        protocols.pasta,
        {
            (): 'a<promise tokens="4"/><promise tokens="4"/>b<sync/>c',
            kid(1): "longer than reserved</async>",
            ((1, 1),): "q</async>",
        },
        'a<promise tokens="4"/><async>longer than reserved</async><promise tokens="4"/>'
        "<async>q</async>b<sync/>c",
    ),
    "promises as text": (
        dataclasses.replace(protocols.pasta, returns="text", reserve=0),
        {
            (): 'a<promise tokens="4"/>b<promise tokens="4"/>c<sync/>d',
            kid(1): "one</async>",
            ((1, 1),): "two",
        },
        'a<promise tokens="4"/>b<promise tokens="4"/>c<sync/><async>one</async><async>two</async>d',
    ),
    "the first of nested children": (
        dataclasses.replace(protocols.npr, until="first"),
        {
            (): PLANS + "end",
            kid(1): "ab" + PLANS + "cd</step>",
            kid(2): "x" * 70 + "</step>",
            kid(1, 1): "1" * 20,
            kid(1, 2): "2" * 30,
        },
        None,
    ),
    "a success among nested children": (
        dataclasses.replace(protocols.npr, until="success", success="yes"),
        {
            (): PLANS + "end",
            kid(1): "ab" + PLANS + "yes</step>",
            kid(2): "x" * 100 + "</step>",
            kid(1, 1): "yes</step>",
            kid(1, 2): "2" * 30,
        },
        PLANS
        + "\n<step>\n1:ab"
        + PLANS
        + "\n<step>\n1:yes</step>\n<takeaway>\nyes</step>\n<takeaway>\nend",
    ),
    "keys where they were written, one after the other": (
        dataclasses.replace(protocols.npr, returns="keep"),
        {(): PLANS + "end", kid(1): "one</step>", kid(2): "two two"},
        PLANS + "\n<step>\n1:one</step><step>\n2:two two</step>\n<takeaway>\nend",
    ),
    "the outline alone": (
        dataclasses.replace(protocols.npr, context="outline"),
        {
            (): PLANS + "end",
            kid(1): "one" + PLANS + "q</step>",
            kid(2): "two two",
            kid(1, 1): "m</step>",
            kid(1, 2): "n",
        },
        PLANS
        + "\n<step>\n1:one"
        + PLANS
        + "\n<step>\n1:m</step><step>\n2:n</step>\n<takeaway>\nq</step><step>\n2:two two</step>"
        "\n<takeaway>\nend",
    ),
}


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
                # A piece that another waits for half-way may go on; the loop keeps prefixes of its keys.
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
    # A join that saw another text, or the same at other places, is another function of the same weights.
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
        from apr.protocols.replay import _Forced

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
    # One batch a step for all of them: as many steps as the longest request has tokens one after the other.
    alone_steps = sum(o.critical_path_tokens for o in alone)
    steps = sum(1 for e in session.trace.events if e["name"] == "step") - alone_steps
    assert steps == max(o.critical_path_tokens for o in together)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_control_words_are_found_however_they_are_split(data):
    """Tokens are arbitrary pieces of the text; a token may hold a word's end and another's beginning."""
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
