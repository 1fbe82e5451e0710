"""Methods whose threads read each other: log-probabilities against the token loop's explicit lists."""

from __future__ import annotations

import pytest
import torch

import apr
from models import FAMILIES, build, tokens
from test_beam_search import Words
from token_loop import Row, TokenLoop

PROMPT = tokens(11, 0)
STARTS = [tokens(2, 5), tokens(3, 6), tokens(2, 7), tokens(1, 8), tokens(4, 9)]


def logprob_of(logits, token):
    return float(logits.log_softmax(-1)[token])


def group_think_oracle(model, family, n, layout, slot, written, current=False):
    """Log-probability of each thinker's tokens, from the statement of what each may see.

    Step 0 runs what everybody begins with; then one token each. A thinker sees the prompt, of every other one
    what was there before the step (`current`: with the step's too), and its own tokens up to the row's.
    """
    loop = TokenLoop(model, FAMILIES[family])
    p = len(PROMPT)
    for i, token in enumerate(PROMPT):
        loop.step([Row("P", token, i, [("P", 0, i + 1)])])
    streams = [[*STARTS[k], *written[k]] for k in range(n)]

    def place(k, i):
        return p + k * slot + i if layout == "slots" else p + i * n + k

    def sees(k, upto, lengths):
        """Entries of one token each, so that any stride can be stated."""
        found = [("P", 0, p)]
        for other in range(n):
            count = upto if other == k else lengths[other]
            if current and other != k:
                count += len(pending[other])
            found += [(f"{other}.{i}", place(other, i), 1) for i in range(count)]
        return found

    got = [[] for _ in range(n)]
    lengths = [0] * n
    pending = [list(range(len(STARTS[k]))) for k in range(n)]
    while any(pending):
        rows, last = [], {}
        for k in range(n):
            for i in pending[k]:
                rows.append(Row(f"{k}.{i}", streams[k][i], place(k, i), sees(k, i + 1, lengths)))
                last[k] = len(rows) - 1
        logits = loop.step(rows)
        for k in range(n):
            lengths[k] += len(pending[k])
            following = lengths[k]
            if k in last and following < len(streams[k]):
                got[k].append(logprob_of(logits[last[k]], streams[k][following]))
            # The last token that was sampled is queued, not run.
            pending[k] = [following] if following < len(streams[k]) - 1 else []
    return got


@pytest.mark.parametrize("layout", ["slots", "interleaved"])
@pytest.mark.parametrize("family,n", [("llama", 2), ("llama", 3), ("cohere", 5), ("qwen2", 3)])
def test_group_think_sees_the_others_up_to_the_step_before(family, n, layout):
    model = build(family)
    # An end token that some thinkers meet early.
    result = apr.group_think(
        model,
        Words(),
        PROMPT,
        n=n,
        layout=layout,
        starts=STARTS[:n],
        answer_prompt=None,
        max_new_tokens=12,
        eos_token_id=list(range(60, 70)),
        temperature=1.5,
    )
    written = [item.tokens for item in result.threads]
    slot = max(map(len, STARTS[:n])) + 12
    want = group_think_oracle(model, family, n, layout, slot, written)
    for item, expected in zip(result.threads, want, strict=True):
        assert len(expected) == len(item.tokens)
        assert max(abs(a - b) for a, b in zip(item.logprobs, expected, strict=True)) < 2e-4
    # Power: thinkers that see the others' current tokens too would get other numbers.
    other = group_think_oracle(model, family, n, layout, slot, written, current=True)
    flat = [a - b for x, y in zip(want, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(map(abs, flat)) > 1e-2


def test_group_think_answers_jointly_and_in_batches():
    model = build("llama")
    prompts = [tokens(5 + i, i) for i in range(3)]
    options = {"n": 3, "starts": STARTS[:3], "max_new_tokens": 6, "answer_prompt": [9, 10]}
    with apr.Session(model, max_tokens=8192) as s:
        many = apr.group_think(s, Words(), prompts, answer_tokens=5, eos_token_id=[], **options)
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        for ids, one in zip(prompts, many, strict=True):
            assert len(one.text.split()) == 5
            assert [len(t.tokens) for t in one.threads] == [6, 6, 6]
            alone = apr.group_think(
                s, Words(), ids, answer_tokens=5, eos_token_id=[], seed=0, **options
            )
            if ids is prompts[0]:  # the same request number, so the same samples
                assert alone.text == one.text
    for bad, word in (
        ({"layout": "rows"}, "layout"),
        ({"starts": STARTS[:2]}, "starts"),
        ({"starts": [[], [1], [2]]}, "starts"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.group_think(model, Words(), PROMPT, **{**options, **bad})


def test_models_without_rotation_think_in_slots():
    model = build("gpt2")
    result = apr.group_think(
        model,
        Words(),
        PROMPT,
        n=2,
        starts=STARTS[:2],
        answer_prompt=None,
        max_new_tokens=5,
        eos_token_id=[],
    )
    assert [len(t.tokens) for t in result.threads] == [5, 5]
    assert torch.tensor(result.threads[0].logprobs).isfinite().all()
