"""Two phases against one stock forward of the flattened tree; the first end, forced tags, pages."""

from __future__ import annotations

import pytest
import torch

import apr
from models import FAMILIES, build, stock, tokens
from test_beam_search import Words
from test_oracles import flat

PROMPT = tokens(11, 0)
TAGS = {
    "think": lambda i: [100 + i],
    "end_think": lambda i: [110 + i],
    "summary": lambda i: [120],
    "end_summary": lambda i: [121],
}
OPTIONS = {
    "max_new_tokens": 14,
    "eos_token_id": [],
    "temperature": 1.5,
    "summary_tokens": 7,
    **TAGS,
}


def flattened(result):
    """The paths and the summary as they were written, tags included."""
    *paths, summary = result.threads
    texts = []
    for i, item in enumerate(paths):
        end = [111 + i]
        text = [101 + i, *item.tokens]
        texts.append(text if text[-1:] == end else [*text, *end])
    return texts, [120, *summary.tokens]


def logprobs(model, result, mask_all=False):
    texts, summary = flattened(result)
    ids, positions, mask = flat(PROMPT, texts, summary, FAMILIES["llama"].window)
    if mask_all:
        mask = torch.ones_like(mask).tril()
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    rows = stock(model, ids, position_ids=positions, attention_mask=additive).log_softmax(-1)
    got, at = [], len(PROMPT)
    for item, text in zip(result.threads, [*texts, summary], strict=True):
        got.append([float(rows[at + i][token]) for i, token in enumerate(item.tokens)])
        at += len(text)
    return got


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("first_finish", [True, False])
def test_two_phases_are_one_forward_of_the_flattened_tree(name, first_finish):
    model = build(name)
    # The end tag of path 2 comes early, that of others by chance.
    bias = {(112,): 5.0, (121,): 2.0}
    with apr.Session(model, max_tokens=4096) as s:
        result = apr.parathinker(
            s, Words(), PROMPT, n=3, first_finish=first_finish, sequence_bias=bias, **OPTIONS
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        written = sum(map(len, flattened(result)[0])) + len(flattened(result)[1])
        assert result.stats.rows <= len(PROMPT) + written  # nothing runs twice
    lengths = [len(item.tokens) for item in result.threads[:3]]
    if first_finish:
        assert len(set(lengths)) == 1 and lengths[0] < 14
        assert {item.finish for item in result.threads[:3]} == {"pruned"}
    else:
        assert max(lengths) == 14 and lengths[1] < 14
    want = logprobs(model, result)
    for item, expected in zip(result.threads, want, strict=True):
        assert max(abs(a - b) for a, b in zip(item.logprobs, expected, strict=True)) < 2e-4
    # Power: under a plain causal mask paths see each other.
    wrong = logprobs(model, result, mask_all=True)[2]
    assert max(abs(a - b) for a, b in zip(result.threads[2].logprobs, wrong, strict=True)) > 1e-2


def test_path_vectors_are_added_before_rotation():
    """Against the stock forward with hooks on the projections of keys and values."""
    model = build("llama")
    generator = torch.Generator().manual_seed(3)
    shape = (2, 2, 16)  # layers, KV heads, head_dim
    vectors = [
        apr.PathVectors(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        )
        for _ in range(3)
    ]
    with apr.Session(model, max_tokens=4096) as s:
        result = apr.parathinker(s, Words(), PROMPT, n=3, vectors=vectors, **OPTIONS)
        assert s.stats.used_pages == 0 and not s.table.vectors
    texts, _ = flattened(result)
    rows, at = {}, len(PROMPT)
    for i, text in enumerate(texts):
        rows[i] = slice(at, at + len(text))
        at += len(text)

    def adds(side, layer):
        def hook(module, inputs, output):
            output = output.clone()
            for i, part in rows.items():
                output[:, part] += vectors[i][side][layer].flatten()
            return output

        return hook

    hooks = []
    for layer, block in enumerate(model.model.layers):
        hooks.append(block.self_attn.k_proj.register_forward_hook(adds(0, layer)))
        hooks.append(block.self_attn.v_proj.register_forward_hook(adds(1, layer)))
    try:
        want = logprobs(model, result)
    finally:
        for hook in hooks:
            hook.remove()
    for item, expected in zip(result.threads, want, strict=True):
        assert max(abs(a - b) for a, b in zip(item.logprobs, expected, strict=True)) < 5e-4
    without = logprobs(model, result)[3]  # power: the summary sees them
    assert max(abs(a - b) for a, b in zip(result.threads[3].logprobs, without, strict=True)) > 1e-2
    for bad, word in (
        (vectors[:2], "vectors: got 2"),
        ([v._replace(keys=v.keys[:1]) for v in vectors], "keys"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.parathinker(model, Words(), PROMPT, n=3, vectors=bad, **OPTIONS)


def test_batches_and_bad_tags():
    model = build("llama")
    prompts = [tokens(6 + i, i) for i in range(3)]
    with apr.Session(model, max_tokens=8192) as s:
        many = apr.parathinker(s, Words(), prompts, n=2, **OPTIONS)
        alone = apr.parathinker(s, Words(), prompts[0], n=2, **OPTIONS)
        assert [t.tokens for t in many[0].threads] == [t.tokens for t in alone.threads]
        assert many[0].text == alone.text
        assert "121" not in alone.text.split()
        with pytest.raises(apr.InvalidInput, match="no tokens"):
            apr.parathinker(s, Words(), PROMPT, **{**OPTIONS, "think": lambda i: []})
        assert s.stats.used_pages == 0
