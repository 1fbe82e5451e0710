"""The loop: what processors read, what an error leaves behind, what becomes of logits."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

import apr
from apr.loop.text import GrowingText, written_text
from models import build, tokens

PROMPT = tokens(11)
SAMPLED = {"do_sample": True, "temperature": 1.3, "eos_token_id": []}


class Spy(LogitsProcessor):
    """Notes the token ids that it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(ids.tolist())
        return scores


class Breaks(LogitsProcessor):
    """Raises at one length, once."""

    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores):
        if ids.shape[1] == self.length:
            self.length = -1
            raise KeyboardInterrupt
        return scores


def ragged(session):
    """Three threads of one length, and one of another."""
    kids = session.thread(PROMPT, request=0).fork(4)
    kids[3].extend([5, 6])
    return kids


def calls_of(monkeypatch, processor):
    """A list that gets the number of rows of each call of a class of transformers."""
    rows, stock = [], processor.__call__

    def counted(self, ids, scores):
        rows.append(len(scores))
        return stock(self, ids, scores)

    monkeypatch.setattr(processor, "__call__", counted)
    return rows


def test_processors_read_the_threads_own_tokens(llama):
    """Through trims, tokens that the user puts in, and a thread that leaves and comes back."""
    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        spies = {kid: Spy() for kid in kids}
        with apr.stream(s, kids, logits_processor=lambda t: [spies[t]], **SAMPLED) as run:
            for number, _ in zip(range(9), run, strict=False):
                if number == 2:
                    kids[0].trim(len(kids[0]) - 2)
                    kids[0].extend([9, 9])  # of the same length, but others
                if number == 4:
                    kids[1].extend([7, 8, 9])
                if number == 5:
                    run.remove(kids[2])
                if number == 7:
                    run.add(kids[2])
        for kid, spy in spies.items():
            for ids in spy.seen:
                assert len(ids) == 1
            assert spy.seen[-1][0] == kid.tokens[:-1]
        assert spies[kids[0]].seen[3][0][-2:] == [9, 9]


def test_processors_of_a_configuration_are_called_for_all_threads_of_a_length(llama, monkeypatch):
    rows = calls_of(monkeypatch, RepetitionPenaltyLogitsProcessor)
    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        apr.decode(s, kids, repetition_penalty=1.7, max_new_tokens=5, do_sample=False)
        assert rows == [3, 1] * 5


def test_penalties_are_those_of_each_thread(llama):
    """Rows of a batch against each thread alone."""
    options = dict(
        repetition_penalty=1.7,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=[3],
    )
    with apr.Session(llama, max_tokens=4096) as s:
        together = [item.tokens for item in apr.decode(s, ragged(s), **options)]
    for i, written in enumerate(together):
        with apr.Session(llama, max_tokens=4096) as s:
            assert apr.decode(s, [ragged(s)[i]], **options)[0].tokens == written


@pytest.mark.parametrize("where", ["processor", "stop"])
def test_an_error_changes_no_token(llama, where):
    """A run that is interrupted and iterated again draws what it would have drawn."""

    def written(interrupt):
        with apr.Session(llama, max_tokens=4096) as s:
            kids = ragged(s)
            broken = [True] if interrupt else []

            def stop(tokens):
                if where == "stop" and len(tokens) == 3 and broken:
                    broken.clear()
                    raise KeyboardInterrupt
                return False

            processors = [Breaks(len(PROMPT) + 2)] if interrupt and where == "processor" else []
            run = apr.stream(
                s, kids, stop=stop, logits_processor=processors, max_new_tokens=6, **SAMPLED
            )
            interrupts = 0
            while run.threads:
                lengths = [len(kid) for kid in kids]
                draws = [kid.draws for kid in kids]
                try:
                    next(iter(run))
                except KeyboardInterrupt:
                    interrupts += 1
                    assert [len(kid) for kid in kids] == lengths
                    assert [kid.draws for kid in kids] == draws
            assert (interrupts > 0) == interrupt
            assert [kid.draws for kid in kids] == [6] * 4
            return [kid.tokens for kid in kids]

    assert written(True) == written(False)


def test_greedy_draws_nothing(llama):
    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        apr.decode(s, kids, do_sample=False, max_new_tokens=3)
        assert [kid.draws for kid in kids] == [0] * 4
        assert len({kid.key for kid in kids}) == 4


def test_logits_stay_as_the_model_gave_them():
    model = build("llama").to(torch.bfloat16)
    with apr.Session(model, max_tokens=4096) as s:
        kids = ragged(s)
        assert s.step(kids).dtype is torch.float32
        step = next(iter(apr.stream(s, kids, **SAMPLED)))
        assert step.choice.logits.dtype is torch.bfloat16
        assert step.logits.dtype is torch.float32
        log = step.logits.log_softmax(-1)
        for row, kid in enumerate(kids):
            assert step.logprobs[kid] == pytest.approx(float(log[row, step.tokens[kid]]), abs=2e-6)
            entropy = -float((log[row].exp() * log[row]).sum())
            assert step.entropies[kid] == pytest.approx(entropy, abs=1e-5)


def test_a_step_with_nan_is_taken_back(llama):
    head = llama.lm_head.weight
    kept = head.detach().clone()
    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        run = apr.stream(s, kids, max_new_tokens=3, **SAMPLED)
        next(iter(run))
        lengths, queued = [len(kid) for kid in kids], [kid.queued for kid in kids]

        def poison(module, args, out):
            out[:] = torch.nan

        hook = llama.lm_head.register_forward_hook(poison)
        try:
            with pytest.raises(apr.NonFiniteLogits, match=r"step 2 of this run.*taken back"):
                next(iter(run))
        finally:
            hook.remove()
        assert [len(kid) for kid in kids] == lengths and [kid.queued for kid in kids] == queued
        assert [len(step.tokens) for step in run] == [4, 4]
    assert head.equal(kept)


def test_a_temperature_that_makes_scores_infinite_is_told(llama):
    with apr.Session(llama, max_tokens=4096) as s:
        options = {**SAMPLED, "temperature": 1e-44}
        with pytest.raises(apr.InvalidInput, match="temperature makes scores infinite"):
            apr.decode(s, ragged(s), max_new_tokens=2, **options)


@pytest.mark.parametrize("skip", [False, True])
def test_growing_text_is_the_text(tok, skip):
    """Characters of several bytes among control words; after each token, but for what is open."""
    text = "<think> naïve – 12 € 🙂 </think> und nun?"
    ids = tok(text).input_ids
    growing = GrowingText(tok, skip)
    for i, token in enumerate(ids):
        growing.add(token)
        so_far = written_text(tok, ids[: i + 1], "", skip)
        assert so_far.startswith(growing.text)
        if not so_far.endswith("\ufffd"):
            assert growing.text == so_far
    assert "🙂" in growing.text

    class Plain:
        def decode(self, ids, **options):
            return tok.decode(ids, **options)

    other = GrowingText(Plain(), skip)
    for token in ids:
        other.add(token)
    assert other.text == growing.text


def test_bytes_that_make_no_text_do_not_end_a_live_view():
    """tokenizers' stream gives up on some bytes of a tokenizer with byte fallback."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "\u2581a": 257, "b": 258}
    raw = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        growing = GrowingText(tokenizer)
        for token in torch.randint(1, 259, (20,), generator=generator).tolist():
            growing.add(token)
        growing.add(257)
        assert growing.text.endswith("a")


def test_a_thread_that_comes_back_takes_its_new_configuration(llama):
    from transformers import GenerationConfig

    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        run = apr.stream(s, kids, **{**SAMPLED, "temperature": 8.0})
        next(iter(run))
        run.remove(kids[3])
        run.add(kids[3], GenerationConfig(do_sample=False, eos_token_id=[]))
        for _ in range(4):
            step = next(iter(run))
            assert step.tokens[kids[3]] == int(step.logits[3].argmax())
        assert kids[3].draws == 1


def test_a_run_keeps_no_thread(llama):
    with apr.Session(llama, max_tokens=4096) as s:
        kids = s.thread(PROMPT).fork(2)
        with apr.stream(s, kids, repetition_penalty=1.1, **SAMPLED) as run:
            step = next(iter(run))
        del kids, step
        assert s.stats.threads == 0 and s.stats.used_pages == 0


def test_a_steps_logits_are_the_callers_own(llama):
    with apr.Session(llama, max_tokens=4096) as s:
        root = s.thread(PROMPT)
        s.step([root])
        step = next(iter(apr.stream(s, [root.fork()[0]], **SAMPLED)))
        before = root.logits
        step.logits.zero_()
        assert root.logits.equal(before)


def test_a_stop_rule_that_releases_a_thread_leaves_the_others_as_they_were(llama):
    with apr.Session(llama, max_tokens=4096) as s:
        a, b = s.thread(PROMPT).fork(2)
        seen = []

        def stop(tokens):
            seen.append(list(tokens))
            if b.alive:
                b.release()
            return False

        run = apr.stream(s, [a, b], stop=stop, **SAMPLED)
        with pytest.raises(apr.ThreadReleased):
            next(iter(run))
        assert a.own_tokens == [] and a.draws == 0
        run.remove(b)
        next(iter(run))
        assert seen[-1] == a.own_tokens and a.draws == 1


def test_what_a_criterion_keeps_does_not_change(llama):
    kept = []

    def note(ids, scores):
        kept.append((ids, ids.clone()))
        return False

    with apr.Session(llama, max_tokens=4096) as s:
        kids = ragged(s)
        run = apr.stream(s, kids, stopping_criteria=[note], **SAMPLED)
        next(iter(run))
        kids[0].trim(4)
        kids[0].extend([1, 2, 3])
        next(iter(run))
        assert kept[-4][0][0].tolist() == kids[0].tokens
        assert all(ids.equal(then) for ids, then in kept)


def test_warpers_that_the_sampler_has_not_run_once_a_step(llama, monkeypatch):
    from transformers import TypicalLogitsWarper

    rows = calls_of(monkeypatch, TypicalLogitsWarper)
    with apr.Session(llama, max_tokens=4096) as s:
        apr.decode(s, ragged(s), typical_p=0.5, max_new_tokens=3, **SAMPLED)
    assert rows == [4] * 3


def test_infinite_logits_that_a_processor_repairs(llama):
    def spoil(module, args, out):
        out[..., 7] = torch.inf

    hook = llama.lm_head.register_forward_hook(spoil)
    try:
        with apr.Session(llama, max_tokens=4096) as s:
            out = apr.decode(
                s, ragged(s), remove_invalid_values=True, max_new_tokens=2, do_sample=False
            )
            assert all(item.tokens == [7, 7] for item in out)
    finally:
        hook.remove()
