"""Beam search against transformers' own, token by token, on three families; pages and errors."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import apr
from apr import countdown, hf
from models import build, tokens

LONG = {"max_new_tokens": 24}


class Words:
    """A tokenizer of the tiny models: words are numbers."""

    pad_token_id = 0

    def __call__(self, text):
        raise AssertionError("prompts are token ids here")

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def stock(model, ids, num_beams, **options):
    out = model.generate(
        torch.tensor([ids]),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        **options,
    )
    return [row[len(ids) :].tolist() for row in out.sequences], out.sequences_scores.tolist()


def same(result, want, scores, eos):
    for item, row, score, expected in zip(result.threads, want, result.scores, scores, strict=True):
        while len(row) > len(item.tokens) and row[-1] in (0, *eos):
            row = row[:-1]  # transformers pads to the longest
        assert item.tokens == row
        assert abs(score - expected) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 2.0},
        {"length_penalty": 0.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.8, "renormalize_logits": True},
        {"eos_token_id": list(range(2, 40))},
    ],
    ids=str,
)
def test_tokens_and_scores_are_those_of_generate(name, options):
    model = build(name)
    eos = options.get("eos_token_id", [2, 50, 90])
    options = {**LONG, **options, "eos_token_id": eos}
    for seed in range(3):
        ids = tokens(7 + seed, seed)
        for num_beams in (2, 5):
            want, scores = stock(model, ids, num_beams, **options)
            result = apr.beam_search(
                model, Words(), ids, num_beams=num_beams, pad_token_id=0, **options
            )
            same(result, want, scores, eos)


def test_several_prompts_at_once_and_pages_given_back():
    model = build("llama")
    prompts = [tokens(5 + 3 * i, i) for i in range(4)]
    options = {**LONG, "eos_token_id": [2, 50, 90]}
    with apr.Session(model, max_tokens=8192) as s:
        together = apr.beam_search(s, Words(), prompts, num_beams=4, **options)
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        for one, ids in zip(together, prompts, strict=True):
            alone = apr.beam_search(s, Words(), ids, num_beams=4, **options)
            assert [t.tokens for t in one.threads] == [t.tokens for t in alone.threads]


def test_the_prompt_is_stored_once():
    model = build("llama")
    ids = tokens(100)
    with apr.Session(model, max_tokens=8192, page_size=16) as s:
        result = apr.beam_search(s, Words(), ids, num_beams=8, max_new_tokens=16)
        stats = result.stats
        # Prompt, eight beams of at most 15 tokens that were run, and for each a copy of less than a
        # page.
        assert stats.stored_tokens <= 100 + 8 * (15 + 15)
        assert stats.peak_pages <= 7 + 1 + 2 * 8


def test_beams_of_one_are_greedy():
    model, tokenizer = hf.load(str(countdown.CHECKPOINT), dtype=torch.float32)
    prompt = "<bos> 24 : 8 6 4 <try>"
    beam = apr.beam_search(model, tokenizer, prompt, num_beams=1, max_new_tokens=10)
    greedy = apr.majority_vote(model, tokenizer, prompt, n=1, do_sample=False, max_new_tokens=10)
    assert beam.threads[0].tokens == greedy.threads[0].tokens
    steps = []
    wide = apr.beam_search(
        model, tokenizer, prompt, num_beams=6, max_new_tokens=10, on_step=steps.append
    )
    assert max(len(step.tokens) for step in steps) == 6
    assert wide.scores == sorted(wide.scores, reverse=True)
    assert len({t.text for t in wide.threads}) == 6
    for item, score in zip(wide.threads, wide.scores, strict=True):
        assert abs(item.logprob / len(item.tokens) - score) < 1e-4


def test_configurations_are_read(monkeypatch):
    """A chat model's own do_sample does not stop beams; its penalties count; extremes end in a
    text.
    """
    model = build("llama")
    ids = tokens(7)
    greedy = apr.beam_search(model, Words(), ids, num_beams=2, max_new_tokens=4)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    again = apr.beam_search(model, Words(), ids, num_beams=2, max_new_tokens=4)
    assert [t.tokens for t in again.threads] == [t.tokens for t in greedy.threads]
    config = GenerationConfig(length_penalty=0.0, max_new_tokens=4, do_sample=False)
    sums = apr.beam_search(model, Words(), ids, num_beams=2, generation_config=config)
    assert all(abs(t.logprob - x) < 1e-4 for t, x in zip(sums.threads, sums.scores, strict=True))
    extreme = apr.beam_search(
        model, Words(), ids, num_beams=2, length_penalty=-9.0, max_new_tokens=14, eos_token_id=[]
    )
    assert extreme.threads[0].finish == "length"


def test_bad_input_is_named():
    model = build("llama")
    for options, word in (
        ({"num_beams": 0}, "num_beams"),
        ({"do_sample": True}, "not sampled"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.beam_search(model, Words(), [3, 4], max_new_tokens=4, **options)
