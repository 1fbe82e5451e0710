"""Votes and verifiers: prompts in every form, seeds, ties, pages given back."""

from __future__ import annotations

import pytest
import torch

import apr
from apr import countdown, hf
from apr.strategies.majority_vote import last_number

PROMPTS = ["<bos> 24 : 8 6 4 <try>", "<bos> 30 : 9 5 2 <try>", "<bos> 11 : 9 5 3 <try>"]
OPTIONS = {"do_sample": True, "max_new_tokens": 10, "temperature": 2.5}


@pytest.fixture(scope="module")
def pair():
    return hf.load(str(countdown.CHECKPOINT), dtype=torch.float32)


def texts(result):
    return [t.text for t in result.threads]


def test_prompts_in_every_form(pair):
    model, tokenizer = pair
    tokenizer.chat_template = "<bos> {{ messages[0].content }} <try>"
    messages = [{"role": "user", "content": "24 : 8 6 4"}]
    try:
        one = apr.majority_vote(model, tokenizer, PROMPTS[0], n=4, **OPTIONS)
        chat = apr.majority_vote(model, tokenizer, messages, n=4, **OPTIONS)
        ids = apr.majority_vote(model, tokenizer, tokenizer(PROMPTS[0]).input_ids, n=4, **OPTIONS)
        many = apr.majority_vote(model, tokenizer, PROMPTS, n=4, **OPTIONS)
        chats = apr.majority_vote(model, tokenizer, [messages, messages], n=4, **OPTIONS)
    finally:
        tokenizer.chat_template = None
    assert texts(one) == texts(chat) == texts(ids) == texts(many[0]) == texts(chats[0])
    assert len(many) == 3
    assert len(set(texts(one))) > 1
    with pytest.raises(apr.InvalidInput, match="chat template"):
        apr.majority_vote(model, tokenizer, messages)


def test_company_does_not_change_a_requests_samples(pair):
    model, tokenizer = pair
    with apr.Session(model, max_tokens=8192) as s:
        first = apr.majority_vote(s, tokenizer, PROMPTS, n=4, seed=3, **OPTIONS)
        again = apr.majority_vote(s, tokenizer, PROMPTS[:1], n=4, seed=3, **OPTIONS)
        other = apr.majority_vote(s, tokenizer, PROMPTS[:1], n=4, seed=4, **OPTIONS)
        assert s.stats.used_pages == 0
        assert s.stats.threads == 0
    assert texts(first[0]) == texts(again[0])
    assert texts(first[0]) != texts(other[0])


def test_the_vote_counts_what_was_extracted(pair):
    model, tokenizer = pair
    result = apr.majority_vote(model, tokenizer, PROMPTS[0], n=16, **OPTIONS)
    answers = [last_number(t) for t in texts(result)]
    assert sum(result.votes.values()) == sum(a is not None for a in answers)
    assert result.answer == max(result.votes, key=result.votes.get)
    assert last_number(result.text) == result.answer
    nothing = apr.majority_vote(
        model, tokenizer, PROMPTS[0], n=3, extract=lambda t: None, **OPTIONS
    )
    assert nothing.answer is None
    assert nothing.votes == {}


def test_last_number():
    cases = {"so 1,234.50.": "1234.5", "x = -7": "-7", "no": None, "3.0": "3", "10": "10"}
    assert {text: last_number(text) for text in cases} == cases


def test_best_of_n(pair):
    model, tokenizer = pair
    longest = apr.best_of_n(
        model, tokenizer, PROMPTS, n=8, verifier=lambda text, thread: len(text), **OPTIONS
    )
    for result in longest:
        assert len(result.text) == max(map(len, texts(result)))
    by_model = apr.best_of_n(model, tokenizer, PROMPTS[0], n=8, **OPTIONS)
    means = [t.logprob / len(t.tokens) for t in by_model.threads]
    assert by_model.scores == means
    assert by_model.text == by_model.threads[means.index(max(means))].text


def test_the_prompt_is_run_and_stored_once(pair):
    model, tokenizer = pair
    with apr.Session(model, max_tokens=8192) as s:
        result = apr.majority_vote(s, tokenizer, PROMPTS[0], n=8, **OPTIONS)
        written = sum(len(t.tokens) for t in result.threads)
        assert result.stats.rows == 7 + written - 8  # the last token of each is never run
        assert result.stats.stored_tokens == 7 + written - 8
        assert result.stats.shared_pages == 1


def test_bad_input_is_named(pair):
    model, tokenizer = pair
    for prompt, n, word in [("", 4, "no tokens"), ([], 4, "prompt"), (PROMPTS[0], 0, "n: got 0")]:
        with pytest.raises(apr.InvalidInput, match=word):
            apr.majority_vote(model, tokenizer, prompt, n=n)


def test_a_failing_verifier_leaves_the_session_clean(pair):
    model, tokenizer = pair
    with apr.Session(model, max_tokens=8192) as s:
        with pytest.raises(ZeroDivisionError):
            apr.best_of_n(s, tokenizer, PROMPTS[0], n=4, verifier=lambda *_: 1 / 0, **OPTIONS)
        assert s.stats.used_pages == 0

        def stop(step):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            apr.majority_vote(s, tokenizer, PROMPTS[0], n=4, on_step=stop, **OPTIONS)
        assert s.stats.used_pages == 0
        assert apr.majority_vote(s, tokenizer, PROMPTS[0], n=4, **OPTIONS).threads
