"""Budgets, malformed blocks and failures: each has a defined end, the parent is never lost, nothing
hangs.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest
import torch
from transformers import LogitsProcessor

import apr
import scripted
from apr import Budget, protocols
from apr.protocols.grammar import Part
from apr.protocols.markers import Words
from apr.protocols.replays import replay
from protocol_scripts import GUIDE, SCRIPTS, kid

NPR = protocols.npr


def guide(*labels):
    return "<guideline>" + "".join(f"<plan>{x}: p</plan>" for x in labels) + "</guideline>"


# ---- malformed text ----------------------------------------------------------------------------


def test_no_outlines_closes_the_block_at_once(session, tok, net):
    outcome, logits = scripted.play(
        session, tok, "Q", NPR, {(): "<guideline>nothing</guideline>so</takeaway>"}
    )
    assert outcome.text == "<guideline>nothing</guideline>\n\n<takeaway>\nso</takeaway>"
    assert outcome.threads == 0 and "without outlines" in outcome.events[0]
    scripted.check(net, outcome, logits)


def test_hundreds_of_outlines_wait_in_line(session, tok, net):
    script = {(): guide(*range(250)) + "so"} | {kid(n): "x</step>" for n in range(1, 251)}
    budget = Budget(threads=25, tokens_per_thread=None)
    outcome, _ = scripted.play(session, tok, "Q", NPR, script, budget)
    assert outcome.threads == 250 and outcome.finish == "eos"
    assert outcome.text.endswith("<step>\n249:x</step>\n<takeaway>\nso")
    root = len(tok(script[()], add_special_tokens=False).input_ids) + 1
    each = len(tok(script[kid(1)], add_special_tokens=False).input_ids)
    assert outcome.critical_path_tokens == root + 10 * each  # ten waves of 25


def test_gaps_and_duplicates_are_taken_as_written(session, tok, net):
    script = {(): guide(2, 2, 7) + "so"} | {kid(n): f"x{n}</step>" for n in (1, 2, 3)}
    outcome, logits = scripted.play(session, tok, "Q", NPR, script)
    assert [c.outline for c in outcome.root.children] == ["2", "2", "7"]
    assert [c.text for c in outcome.root.children] == ["x1", "x2", "x3"]
    scripted.check(net, outcome, logits)


@pytest.mark.parametrize("grammar", ["npr", "threadweaver", "multiverse"])
def test_a_child_that_ends_the_whole_answer_ends_itself(grammar, session, tok, net):
    """EOS in a child is taken back and its end word put in; the parent goes on."""
    script = SCRIPTS[grammar][0] | {kid(1): " gone"}
    outcome, logits = scripted.play(session, tok, "Q", protocols.PRESETS[grammar], script)
    first = outcome.root.children[0]
    assert (first.finish, first.text) == ("eos", " gone")
    assert f" gone{protocols.PRESETS[grammar].end}" in outcome.text and "<eos>" not in outcome.text
    assert outcome.finish == "eos"
    scripted.check(net, outcome, logits)


def test_eos_inside_a_head_ends_the_thread(session, tok, net):
    outcome, logits = scripted.play(session, tok, "Q", NPR, {(): "<guideline><plan>1: a</plan>"})
    assert outcome.finish == "eos" and outcome.threads == 0
    assert "never launched" in outcome.events[0]
    scripted.check(net, outcome, logits)


def test_stray_words_are_text(session, tok, net):
    text = "</guideline></step>a<guideline><guideline><plan>1: x</plan></guideline>end</step>"
    outcome, logits = scripted.play(session, tok, "Q", NPR, {(): text, kid(1): "k</step>"})
    assert outcome.threads == 1 and outcome.finish == "eos"
    assert any("inside the head" in event for event in outcome.events)
    scripted.check(net, outcome, logits)


def test_a_promise_that_is_never_collected_is_joined_at_the_end(session, tok, net):
    script = {(): 'a<promise tokens="9"/>b', kid(1): "long enough to outlive its parent</async>"}
    outcome, logits = scripted.play(session, tok, "Q", protocols.pasta, script)
    assert outcome.text == 'a<promise tokens="9"/><async>long enough to outlive its parent</async>b'
    scripted.check(net, outcome, logits)


def test_a_token_may_end_one_word_and_begin_the_next(net):
    tok = scripted.tokenizer(whole=("><", "></"))
    net = scripted.model(tok)
    cases = [
        (
            protocols.sprint,
            "<Plan><prompt>p1</prompt><prompt>p2</prompt></Plan>so",
            "execution",
            2,
        ),
        (NPR, GUIDE + "so", "step", 2),
        (protocols.recursive, "a<call></call>done", "", 0),
    ]
    with apr.Session(net, max_tokens=1 << 14, page_size=16) as session:
        for grammar, text, end, children in cases:
            script = {(): text, kid(1): f"a</{end}>", kid(2): f"b</{end}>"}
            outcome, logits = scripted.play(session, tok, "Q", grammar, script)
            assert [c.text for c in outcome.root.children] == ["a", "b"][:children]
            assert outcome.finish == "eos"
            scripted.check(net, outcome, logits)


def test_an_empty_promise_does_not_disturb_those_that_are_out(session, tok, net):
    script = {(): 'go <promise tokens="20"/>x<promise/>y', kid(1): "one</async>"}
    outcome, logits = scripted.play(session, tok, "Q", protocols.pasta, script)
    assert outcome.threads == 1 and "without outlines" in outcome.events[0]
    assert outcome.text == 'go <promise tokens="20"/><async>one</async>x<promise/>y'
    scripted.check(net, outcome, logits)


def test_a_promise_of_any_size(session, tok, net):
    script = {(): '<promise tokens="99999999999"/>x', kid(1): "one</async>"}
    outcome, _ = scripted.play(session, tok, "Q", protocols.pasta, script)
    assert outcome.finish == "eos" and outcome.root.children[0].text == "one"
    assert outcome.thread.position > protocols.grammar.MOST_RESERVED


def test_promises_of_promises_leave_no_page(session, tok):
    """Segments whose contexts hold one another are found when their last outside holder goes."""
    for tokens in (0, 3, 20):
        script = {
            (): 'x<promise tokens="3"/>',
            kid(1): f'x<promise tokens="{tokens}"/>xxxx</async>',
            kid(1, 1): "x</async>",
        }
        outcome, _ = scripted.play(session, tok, "Q", protocols.pasta, script)
        outcome.thread.release()
        assert session.stats.used_pages == 0


def test_an_end_word_that_is_the_eos(session, tok, net):
    grammar = dataclasses.replace(NPR, end="<eos>")
    script = {(): GUIDE + "so", kid(1): "a", kid(2): "bc"}
    outcome, logits = scripted.play(session, tok, "Q", grammar, script)
    assert [(c.text, c.finish) for c in outcome.root.children] == [("a", "end"), ("bc", "end")]
    scripted.check(net, outcome, logits)


# ---- limits ------------------------------------------------------------------------------------


def test_depth_forbids_the_opening_word(session, tok):
    class Wants(LogitsProcessor):
        """Would write the opening word, which is one token, and nothing else."""

        def __call__(self, ids, scores):
            scores = scores.clone()
            scores[:, word] += 1e4
            return scores

    word = tok("<Parallel>", add_special_tokens=False).input_ids
    assert len(word) == 1
    grammar = dataclasses.replace(protocols.parallel_r1, nested=True)

    def opened(depth):
        thread = session.thread(tok("Q").input_ids)
        budget = Budget(depth=depth, tokens_per_thread=4)
        outcome = apr.run(
            session,
            thread,
            grammar,
            tokenizer=tok,
            budget=budget,
            do_sample=False,
            logits_processor=lambda worker: [Wants()],
        )
        thread.release()
        return outcome

    assert opened(0).threads == 0 and word[0] not in opened(0).root.tokens
    deep = opened(2)
    assert deep.depth == 2 and deep.threads > 2
    assert session.stats.used_pages == 0


def test_forbidden_words_are_not_written(session, tok):
    """A model that wants nothing but one word writes it where it may, and not in a child that may
    not.
    """
    word = tok("<Parallel>", add_special_tokens=False).input_ids
    assert len(word) == 1

    class Wants(LogitsProcessor):
        def __call__(self, ids, scores):
            scores = scores.clone()
            scores[:, word] += 100.0
            return scores

    for forbidden in (("<Parallel>",), ()):
        grammar = dataclasses.replace(protocols.parathinker, width=2, forbidden=forbidden)
        thread = session.thread(tok("Q").input_ids)
        outcome = apr.run(
            session,
            thread,
            grammar,
            tokenizer=tok,
            budget=Budget(tokens_per_thread=3),
            do_sample=False,
            logits_processor=lambda worker: [Wants()],
        )
        written = [word[0] in child.tokens for child in outcome.root.children]
        assert written == ([False, False] if forbidden else [True, True])
        assert word[0] in outcome.root.tokens


def test_depth_reads_a_forced_opening_as_text(session, tok, net):
    script = {(): GUIDE + "so", kid(1): GUIDE + "x</step>", kid(2): "y</step>"}
    outcome, logits = scripted.play(session, tok, "Q", NPR, script, Budget(depth=1))
    assert outcome.depth == 1 and outcome.threads == 2
    assert "keeps it closed" in outcome.events[0]
    assert outcome.root.children[0].text == GUIDE + "x"
    scripted.check(net, outcome, logits)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_wait_in_line_and_never_block_each_other(threads, session, tok, net):
    script = SCRIPTS["multiverse"][0]
    free, _ = scripted.play(session, tok, "Q", protocols.multiverse, script)
    outcome, logits = scripted.play(
        session, tok, "Q", protocols.multiverse, script, Budget(threads=threads)
    )
    assert outcome.text == free.text
    assert outcome.critical_path_tokens >= free.critical_path_tokens
    # Parents that go on need a place too.
    steps = [e["threads"] for e in session.trace.events if e["name"] == "step"]
    assert max(map(len, steps[free.critical_path_tokens :])) == threads
    if threads == 1:
        assert outcome.critical_path_tokens == outcome.total_tokens
    scripted.check(net, outcome, logits)


@pytest.mark.parametrize("grammar", ["npr", "threadweaver", "parallel_r1", "recursive"])
def test_a_child_that_never_ends_is_ended(grammar, session, tok, net):
    script = SCRIPTS[grammar][0] | {kid(2 if grammar != "recursive" else 1): "z" * 500}
    budget = Budget(tokens_per_thread=120)
    outcome, logits = scripted.play(session, tok, "Q", protocols.PRESETS[grammar], script, budget)
    endless = outcome.root.children[1 if grammar != "recursive" else 0]
    assert (endless.finish, endless.sampled, endless.text) == ("length", 120, "z" * 120)
    assert outcome.finish == "eos" and "z" * 120 in outcome.text
    scripted.check(net, outcome, logits)


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        ("tokens", {"tokens": 90}),
        ("seconds", {"seconds": 1e-6}),
        ("bytes", {"bytes": 60_000}),
        ("bytes", {"bytes": 25_000}),
    ],
)
def test_a_request_ends_at_its_limit(limit, budget, session, tok, net):
    script = SCRIPTS["npr"][0] | {kid(1): "z" * 5000}
    outcome, logits = scripted.play(session, tok, "Q", NPR, script, Budget(**budget))
    assert outcome.finish == limit and limit in outcome.events[0]
    assert outcome.total_tokens < 5000
    if limit == "tokens":
        assert 90 <= outcome.total_tokens < 90 + 3  # a step of all threads is the grain
    scripted.check(net, outcome, logits)
    outcome.thread.release()
    assert session.stats.used_pages == 0
    with pytest.raises(apr.BudgetExceeded, match=limit):
        scripted.play(session, tok, "Q", NPR, script, Budget(**budget, at_limit="raise"))


def test_bytes_count_what_was_joined(session, tok):
    """Six blocks of a hundred tokens each: the parent holds them all, though no child lives."""
    script = {(): GUIDE * 6}
    script |= {((n, k),): "z" * 100 + "</step>" for n in range(6) for k in (1, 2)}
    limit = 900 * session.spec.bytes_per_token
    outcome, _ = scripted.play(session, tok, "Q", NPR, script, Budget(bytes=limit))
    assert outcome.finish == "bytes" and outcome.threads < 12
    assert session.stats.stored_tokens < 900 + 3


def test_a_configuration_limits_too(session, tok):
    def sampled(**options):
        thread = session.thread(tok("Q").input_ids)
        outcome = apr.run(session, thread, NPR, tokenizer=tok, eos_token_id=0, **options)
        thread.release()
        return outcome

    assert sampled(max_new_tokens=5).total_tokens == 5
    assert sampled(max_length=9).total_tokens == 8
    assert sampled(max_new_tokens=50, budget=Budget(tokens_per_thread=7)).total_tokens == 7
    assert sampled(max_time=0.05, budget=Budget(tokens_per_thread=1 << 20)).finish == "seconds"


def test_no_depth_means_no_children_even_where_the_driver_opens(session, tok):
    outcome, _ = scripted.play(
        session, tok, "Q", protocols.parathinker, {(): "alone"}, Budget(depth=0)
    )
    assert (outcome.text, outcome.threads) == ("alone", 0)


def test_a_failing_step_gives_every_thread_back(net, tok):
    with apr.Session(net, max_tokens=400, page_size=16) as session:
        script = {(): guide(*range(30)) + "so"} | {kid(n): "z" * 99 for n in range(1, 31)}
        with pytest.raises(apr.OutOfPages):
            scripted.play(session, tok, "Q", NPR, script)
        assert session.stats.used_pages == 0
        again, _ = scripted.play(session, tok, "Q", NPR, SCRIPTS["npr"][0])
        assert again.text == SCRIPTS["npr"][1]


def test_ctrl_c_gives_every_thread_back(session, tok):
    def stop(step):
        if session.stats.threads > 2:
            raise KeyboardInterrupt

    ids = tok(GUIDE, add_special_tokens=False).input_ids
    root = session.thread(tok("Q").input_ids)

    class Say(LogitsProcessor):
        said = 0

        def __call__(self, _ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, ids[min(self.said, len(ids) - 1)]] = 0
            self.said += 1
            return forced

    with pytest.raises(KeyboardInterrupt):
        apr.run(
            session,
            root,
            NPR,
            tokenizer=tok,
            on_step=stop,
            do_sample=False,
            logits_processor=lambda worker: [Say()],
        )
    assert root.alive and session.stats.threads == 1
    assert session.step([root]).shape == (1, len(tok))  # and it is as usable as before


# ---- hostile text ------------------------------------------------------------------------------

# What patterns look for, or nearly, over and over.
PIECES = (
    "Goal Reached ",
    "<prompt>",
    "<prompt>a</prompt>",
    "<Outline> ",
    "<Outline>1.1.1",
    "<plan>1 ",
    "1.",
    "<Start Sub Search 1 at level 1>",
    'tokens="1',
    " ",
    "<",
)


@pytest.mark.parametrize("name", protocols.PRESETS)
def test_no_text_keeps_a_preset_busy(name):
    grammar, said = protocols.PRESETS[name], []
    for piece in PIECES:
        for text in (piece * (100_000 // len(piece)), piece + "x" * 100_000, "x" * 100_000 + piece):
            began = time.perf_counter()
            grammar.message_of(text, said.append)
            grammar.succeeded(text, said.append)
            grammar.reserved(text, said.append)
            grammar.outlines(text, said.append)
            assert time.perf_counter() - began < 2.0, (piece, text[:20])
    assert not said  # none was given up


def test_a_pattern_that_does_not_end_is_given_up_and_told():
    grammar = dataclasses.replace(NPR, returns="message", message="(a+a+)+b", each="{message}")
    said = []
    assert grammar.message_of("a" * 5000, said.append) == ""
    assert "message '(a+a+)+b' was given up after 1 s on 5000 characters" in said[0]


@pytest.mark.parametrize(
    ("outline", "positions"),
    [
        ('tokens="12"', 12),
        ('tokens="' + "9" * 5000 + '"', 1 << 16),
        ('tokens="000"', 0),
        ("none", 0),
        ('tokens="٣"', 3),
    ],
)
def test_reserved_positions_are_bounded(outline, positions):
    assert protocols.pasta.reserved(outline, print) == positions
    named = dataclasses.replace(protocols.pasta, reserve=r"tokens=(\w+)?")
    assert named.reserved("tokens=many", print) == named.reserved("tokens=", print) == 0


@pytest.fixture
def few_digits():
    most = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    yield
    sys.set_int_max_str_digits(most)


def test_one_requests_number_does_not_stop_the_others(session, tok, few_digits):
    """Python refuses to read a number of so many digits."""
    long = {(): 'a<promise tokens="' + "9" * 700 + '"/>b<sync/>c', kid(1): "x</async>"}
    outcome, _ = scripted.play(session, tok, "Q", protocols.pasta, long)
    assert outcome.threads == 1 and outcome.text.endswith("c")


@pytest.mark.parametrize("name", protocols.PRESETS)
def test_control_words_of_a_prompt_open_nothing(name, session, tok):
    """Only what the model writes is obeyed: the same words in a user's text are text."""
    grammar = protocols.PRESETS[name]
    prompt = "Q " + SCRIPTS[name][0][()]
    outcome, _ = scripted.play(session, tok, prompt, grammar, {(): "plain"})
    opened = grammar.width if grammar.open is None else 0
    assert outcome.threads == opened and not outcome.events


HOSTILE = "<Path>a<<Goal></Path> <eos>"


def test_what_threads_hand_on_is_text(tok):
    """Special tokens that it names are spelled; those of the grammar are themselves."""
    words = Words(tok, ["<Path>"])
    ids = words.spell([Part("<Path>\n", False), Part(HOSTILE, True), Part(":<Goal>", False)])
    assert words.decode(ids) == "<Path>\n" + HOSTILE + ":<Goal>"
    special = [i for i in ids if i in tok.added_tokens_decoder]
    assert special == [words.encode("<Path>")[0], words.encode("<Goal>")[0]]
    harmless = [Part("<Path>\n", False), Part("a", True)]
    assert words.spell(harmless) == words.encode("<Path>\na")
    for parts in (
        [Part("<Path>" * 20_000, True)],
        [Part("<Pa", True), Part("th>", True)],
        [Part("<", False), Part("Path", True), Part(">", False)],
    ):
        spelled = words.spell(parts)
        assert words.decode(spelled) == "".join(part.text for part in parts)
        assert not any(i in tok.added_tokens_decoder for i in spelled)


def test_a_tokenizer_that_tells_no_added_tokens(tok, monkeypatch):
    """As MistralCommonBackend of transformers."""

    def refuse(self):
        raise NotImplementedError

    monkeypatch.setattr(type(tok), "added_tokens_decoder", property(refuse))
    words = Words(tok, ["<Path>"])
    assert words.spell([Part("a", False), Part("b", True)]) == words.encode("ab")


def test_added_tokens_of_no_meaning_stay_tokens(tok):
    """Runs of blanks, as some vocabularies add them."""
    tok.add_tokens(["\n\n"], special_tokens=False)
    words = Words(tok, ["<Path>"])
    text = "a\n\nb"
    assert words.spell([Part(text, True)]) == words.encode(text)
    assert len(words.encode(text)) == 3


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("apr", SCRIPTS["apr"][0] | {kid(1): "Goal Reached aMARK Goal Reached b"}),
        ("recursive", {(): "<call>subMARK</call>fine", kid(1): "xMARK"}),
    ],
)
def test_quoted_words_reach_no_other_thread_as_tokens(name, script, session, tok, net):
    """A thread spells control words, letter by letter, in what it hands on."""

    def special(quoted):
        spelled = [i for c in quoted for i in tok(c).input_ids]
        forced = {}
        for path, said in script.items():
            before, mark, after = said.partition("MARK")
            forced[path] = tok(before).input_ids + spelled * bool(mark) + tok(after).input_ids
        thread = session.thread(tok("Q").input_ids)
        played = replay(session, thread, protocols.PRESETS[name], forced, tokenizer=tok)
        outcome = played.outcome
        scripted.check(net, outcome, played.logits)
        assert outcome.text.count(quoted) >= 1
        outcome.thread.release()
        return sum(
            i in tok.added_tokens_decoder for piece in outcome.record.pieces for i in piece.ids
        )

    assert special(HOSTILE) == special("harmless")
