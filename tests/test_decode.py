"""The sampling loop: equal to generate() where it can be, its own rules where not."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    TextStreamer,
)

import apr
from apr.countdown.tokenizer import build_tokenizer
from models import FAMILIES, VOCAB, distance, stock, tokens

PROMPT = tokens(11)


def letters():
    """A character tokenizer over the test models' vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def generate(model, prompt, **options):
    ids = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)
    return ids[0, len(prompt) :].tolist()


OPTIONS = {
    "plain": lambda first: {},
    "repetition_penalty": lambda first: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda first: {"no_repeat_ngram_size": 1},
    "suppress_tokens": lambda first: {"suppress_tokens": first[:3]},
    "bad_words_ids": lambda first: {"bad_words_ids": [[first[1]]]},
    "begin_suppress_tokens": lambda first: {"begin_suppress_tokens": first[:1]},
    "sequence_bias": lambda first: {"sequence_bias": [[[11], 50.0]]},
    "forced_eos_token_id": lambda first: {"forced_eos_token_id": 2},
    "eos": lambda first: {"eos_token_id": [first[4], 2]},
    "min_new_tokens": lambda first: {"eos_token_id": first[2], "min_new_tokens": 6},
    "exponential_decay": lambda first: {
        "eos_token_id": 2,
        "exponential_decay_length_penalty": (3, 9.0),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_equals_generate(family, name):
    """Each option is aimed at what plain greedy decoding writes, so that it has to change
    something.
    """
    _, model = family
    plain = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": 2}
    first = generate(model, PROMPT, **plain)
    options = plain | OPTIONS[name]((first * 5)[:14])
    want = generate(model, PROMPT, **options)
    varied = len(set(first)) >= 5  # a random model may end at once, or repeat one token
    if varied and name not in ("plain", "min_new_tokens", "exponential_decay"):
        assert want != first
    with apr.Session(model, max_tokens=1024) as s:
        threads = [s.thread(PROMPT), s.thread(tokens(7, 3))]
        got = apr.decode(s, threads, **options)
    assert got[0].tokens == want
    assert got[1].tokens == generate(model, tokens(7, 3), **options)


def test_a_given_config_inherits_the_models_own(llama):
    config = GenerationConfig(max_new_tokens=9, sequence_bias=[[[2], 100.0]])
    assert llama.generation_config.eos_token_id == 2
    with apr.Session(llama, max_tokens=256) as s:
        out = apr.decode(s, [s.thread(PROMPT)], config)[0]
    assert out.tokens == [2]
    assert out.finish == "eos"


def test_a_step_of_a_run_is_a_transaction(llama):
    """A stop rule that raises leaves tokens, rules and generators as they were."""
    options = {"do_sample": True, "max_new_tokens": 4}
    with apr.Session(llama, max_tokens=512) as s:
        whole = [d.tokens for d in apr.decode(s, s.thread(PROMPT, request=0).fork(3), **options)]
        kids = s.thread(PROMPT, request=0).fork(3)
        broken = [True]

        def stop(written):
            if broken[0] and len(written) == 2:
                raise ZeroDivisionError
            return False

        run = apr.stream(s, kids[:1], **options)
        for kid in kids[1:]:
            run.add(kid, stop=stop)
        written = {kid: [] for kid in kids}
        failed = 0
        while run.threads:
            try:
                for step in run:
                    for kid, token in step.tokens.items():
                        written[kid].append(token)
            except ZeroDivisionError:
                failed += 1
                assert [len(k) for k in kids] == [len(PROMPT) + 1] * 3
                broken[0] = failed < 2
        assert failed == 2
        assert [written[k] for k in kids] == whole


def test_warpers_are_those_of_generate(llama):
    """The distribution that a token is drawn from equals generate()'s processed scores."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02}
    out = llama.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=1,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    want = out.scores[0][0].log_softmax(-1)
    with apr.Session(llama, max_tokens=2048) as s:
        kids = s.thread(PROMPT).fork(100)
        step = next(iter(apr.stream(s, kids, **options)))
    got = step.choice.sampled
    assert want[got.tokens].isfinite().all()
    assert len(set(got.tokens.tolist())) > 5
    assert distance(got.drawn_logprobs, want[got.tokens]) < 1e-4


def test_samples_follow_the_distribution(llama):
    """2,000 draws of one token against the model's own probabilities: chi-square, 99.9 % point."""
    n = 2000
    with apr.Session(llama, max_tokens=1024) as s:
        root = s.thread(PROMPT)
        probabilities = s.step([root])[0].softmax(-1)
        counts = torch.zeros_like(probabilities)
        for _ in range(n // 200):
            kids = root.fork(200)
            with apr.stream(s, kids, do_sample=True, max_new_tokens=1, top_k=0) as run:
                for step in run:
                    for token in step.tokens.values():
                        counts[token] += 1
            for kid in kids:
                kid.release()
    likely = probabilities * n >= 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * n
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 8


def test_threads_enter_and_leave(llama):
    with apr.Session(llama, max_tokens=1024) as s:
        first, second, third = s.thread(PROMPT), s.thread(tokens(5, 1)), s.thread(tokens(8, 2))
        seen = {first: [], second: [], third: []}
        with apr.stream(s, [first, second], do_sample=False, max_new_tokens=9) as run:
            for i, step in enumerate(run):
                for thread, token in step.tokens.items():
                    seen[thread].append(token)
                if i == 3:
                    run.remove(second)
                    run.add(third, stop=lambda written: len(written) == 2)
                    with pytest.raises(apr.InvalidInput, match="already"):
                        run.add(third)
                    with pytest.raises(apr.InvalidInput, match="not in this run"):
                        run.remove(second)
                if third in step.finished:
                    assert step.finished[third] == "stop"
    greedy = {"do_sample": False, "max_new_tokens": 9}
    assert seen[first] == generate(llama, PROMPT, **greedy)
    assert seen[second] == generate(llama, tokens(5, 1), **greedy)[:4]
    assert seen[third] == generate(llama, tokens(8, 2), **greedy)[:2]


def test_logprobs_and_the_last_token(llama):
    with apr.Session(llama, max_tokens=256) as s:
        thread = s.thread(PROMPT)
        out = apr.decode(s, [thread], do_sample=True, max_new_tokens=6)[0]
        want = stock(llama, PROMPT + out.tokens).log_softmax(-1)
        for i, (token, logprob) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
            assert abs(float(want[len(PROMPT) - 1 + i, token]) - logprob) < 1e-4
        # The last token was sampled, never fed, and is not lost.
        assert thread.own_tokens == PROMPT + out.tokens and thread.queued == 1
        assert distance(s.step([thread])[0], stock(llama, PROMPT + out.tokens)[-1]) < 1e-4


def test_streamers_stop_strings_and_criteria(llama, capsys):
    tokenizer = build_tokenizer()
    with apr.Session(llama, max_tokens=512) as s:
        kids = s.thread(PROMPT).fork(2)
        made = []

        def streamer(thread):
            made.append(thread)
            return TextStreamer(tokenizer, skip_prompt=True)

        outs = apr.decode(
            s, kids, do_sample=True, max_new_tokens=5, tokenizer=tokenizer, streamer=streamer
        )
        assert made == kids
        printed = capsys.readouterr().out
        assert all(word in printed for out in outs for word in out.text.split())
        spelling = letters()
        plain = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": list(range(90, VOCAB))}
        full = apr.decode(s, [s.thread(PROMPT)], **plain)[0].tokens
        end = spelling.decode(full[2:4])
        stopped = apr.decode(s, [s.thread(PROMPT)], tokenizer=spelling, stop=[end], **plain)[0]
        assert stopped.finish == "stop" and stopped.tokens == full[:4]
        with pytest.raises(apr.InvalidInput, match="cannot spell"):
            apr.decode(s, [s.thread(PROMPT)], tokenizer=tokenizer, stop=["x"])
        limited = apr.decode(
            s,
            [s.thread(PROMPT)],
            do_sample=True,
            max_new_tokens=9,
            stopping_criteria=[MaxLengthCriteria(len(PROMPT) + 4)],
        )[0]
        assert len(limited.tokens) == 4 and limited.finish == "stop"


@pytest.mark.parametrize(
    "options,word",
    [
        ({"num_beams": 4}, "num_beams"),
        ({"num_return_sequences": 2}, "fork the thread"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"max_new_tokenz": 4}, "spelling"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"max_new_tokens": 0}, "greater than 0"),
        ({"output_scores": True}, "belongs to generate"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": -0.5}, "top_p"),
    ],
)
def test_what_cannot_be_honoured_raises(llama, options, word):
    with apr.Session(llama, max_tokens=256) as s:
        thread = s.thread(PROMPT)
        with pytest.raises(apr.InvalidInput, match=word):
            apr.decode(s, [thread], **options)
        assert len(thread) == len(PROMPT)


def test_defaults_come_from_the_models_own_config(llama):
    kept = llama.generation_config
    llama.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    try:
        with apr.Session(llama, max_tokens=256) as s:
            assert len(apr.decode(s, [s.thread(PROMPT)])[0].tokens) == 3
            assert len(apr.decode(s, [s.thread(PROMPT)], max_new_tokens=5)[0].tokens) == 5
    finally:
        llama.generation_config = kept


def test_every_family_is_listed():
    assert len(FAMILIES) == 9
