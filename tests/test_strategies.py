"""Votes and verifiers: prompts in every form, seeds, ties, pages given back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import apr
from apr import countdown, hf
from apr.strategies import RewardModel, boxed, last_number, matching
from apr.strategies.majority_vote import decided

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


def test_extractors():
    assert boxed(r"so \boxed{1} or \boxed{ \frac{1}{2} }.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{open") is None and boxed("none") is None
    assert matching(r"x = (\d+)")("x = 1, x = 22") == "22"
    assert matching("[a-c]")("cab") == "b"
    assert matching("q")("cab") is None
    with pytest.raises(apr.InvalidInput, match="no regular expression"):
        matching("(")


def test_weighted_votes(pair):
    model, tokenizer = pair
    by_length = apr.majority_vote(
        model, tokenizer, PROMPTS[0], n=8, weight=lambda text, item: len(item.tokens), **OPTIONS
    )
    want: dict = {}
    for item in by_length.threads:
        answer = last_number(item.text)
        if answer is not None:
            want[answer] = want.get(answer, 0) + len(item.tokens)
    assert by_length.votes == want
    assert by_length.answer == max(want, key=want.get)
    with pytest.raises(apr.InvalidInput, match="stop_early"):
        apr.majority_vote(model, tokenizer, PROMPTS[0], weight=lambda *_: 1, stop_early=True)


def test_a_decided_vote_stops_early(pair):
    """The outcome is that of the full vote, and the threads that were left out are marked."""
    model, tokenizer = pair
    # Threads that end at different times, and mostly agree.
    calm = {**OPTIONS, "temperature": 1.5, "stop": lambda tokens: sum(tokens) % 4 == 0}
    saved = 0
    for seed in range(6):
        full = apr.majority_vote(model, tokenizer, PROMPTS, n=9, seed=seed, **calm)
        early = apr.majority_vote(
            model, tokenizer, PROMPTS, n=9, seed=seed, stop_early=True, **calm
        )
        for a, b in zip(full, early, strict=True):
            assert a.answer == b.answer
            pruned = [i for i, t in enumerate(b.threads) if t.finish == "pruned"]
            saved += len(pruned)
            for i, (x, y) in enumerate(zip(a.threads, b.threads, strict=True)):
                assert y.tokens == x.tokens[: len(y.tokens)]
                assert (i in pruned) or y.finish == x.finish
    assert saved > 0
    assert decided({"a": 3, "b": 1}, 1) and not decided({"a": 3, "b": 1}, 2)
    assert not decided({}, 1) and not decided({"a": 2}, 2) and decided({"a": 3}, 2)


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


def test_scores_by_name_and_by_a_reward_model(pair):
    model, tokenizer = pair
    by_sum = apr.best_of_n(model, tokenizer, PROMPTS[0], n=6, verifier="logprob", **OPTIONS)
    assert by_sum.scores == [t.logprob for t in by_sum.threads]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    classifier = LlamaForSequenceClassification(config).eval()
    reward = RewardModel(
        classifier, tokenizer, batch_size=4, render=lambda p, t: p.strip() + " " + t
    )
    result = apr.best_of_n(model, tokenizer, PROMPTS[:2], n=6, verifier=reward, **OPTIONS)
    for one, prompt in zip(result, PROMPTS, strict=False):
        asked = tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True)
        for item, score in zip(one.threads, one.scores, strict=True):
            ids = tokenizer(f"{asked.strip()} {item.text}", return_tensors="pt")
            want = classifier(**ids).logits[0, 0].item()  # alone, without padding
            assert abs(score - want) < 1e-4
        assert one.text == one.threads[one.scores.index(max(one.scores))].text
    with pytest.raises(apr.InvalidInput, match="logprob"):
        apr.best_of_n(model, tokenizer, PROMPTS[0], verifier="best")
    with pytest.raises(apr.InvalidInput, match="sequence classifier"):
        RewardModel(torch.nn.Linear(1, 1), tokenizer)


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
