"""apr.Cache in generate(): the tokens of stock transformers, with equal prompts stored once."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import apr
import models
from models import CLOSE, FAR, build, distance, stock, tokens

GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
SAMPLED = dict(max_new_tokens=10, do_sample=True, top_k=20, pad_token_id=0, eos_token_id=None)


def both(model, ids, cache_options=None, seed=0, **options):
    torch.manual_seed(seed)
    want = model.generate(ids, **options)
    torch.manual_seed(seed)
    cache = apr.Cache(model, max_tokens=4096)
    got = model.generate(ids, past_key_values=cache, **options)
    return want, got, cache


def test_greedy(family):
    _, model = family
    want, got, cache = both(model, torch.tensor([tokens(11), tokens(11, 1)]), **GREEDY)
    assert torch.equal(want, got)
    cache.close()


def test_sampling_and_num_return_sequences(family):
    _, model = family
    prompt = torch.tensor([tokens(150)])
    want, got, cache = both(model, prompt, num_return_sequences=8, **SAMPLED)
    assert torch.equal(want, got)
    # One prompt of three pages, and a page for each row's own tokens; eight copies would take 24.
    stats = cache.session.stats
    assert stats.used_pages == 3 + 8 and stats.replicated_pages == 24
    assert [t.own_tokens for t in cache.threads] == [row[150:-1].tolist() for row in got]
    cache.close()


def test_left_padding(family):
    _, model = family
    long, short = tokens(11), tokens(6, 1)
    ids = torch.tensor([long, [0] * 5 + short])
    mask = torch.tensor([[1] * 11, [0] * 5 + [1] * 6])
    want, got, cache = both(model, ids, attention_mask=mask, **GREEDY)
    assert torch.equal(want, got)
    assert [len(t) for t in cache.threads] == [11 + 11, 6 + 11]  # padding takes no slot
    # Negative control: without the mask the short row's logits are others.
    with torch.no_grad():
        right = model(ids, attention_mask=mask).logits[1, -1]
        wrong = model(ids, attention_mask=torch.ones_like(ids)).logits[1, -1]
    assert distance(right, wrong) > FAR
    cache.close()


def test_a_loop_of_ones_own_and_a_second_turn(llama):
    cache = apr.Cache(llama, max_tokens=2048)
    prompt, more = tokens(11), tokens(5, 1)
    with torch.no_grad():
        first = llama(torch.tensor([prompt]), past_key_values=cache).logits[0]
        second = llama(torch.tensor([more]), past_key_values=cache).logits[0]
    want = stock(llama, prompt + more)
    assert distance(torch.cat([first, second]), want) < CLOSE
    # The rows are threads: fork one, and step it in the cache's session.
    child = cache.threads[0].fork(1)[0]
    child.extend([5])
    assert distance(cache.session.step([child])[0], stock(llama, [*prompt, *more, 5])[-1]) < CLOSE
    cache.close()


def test_stock_behaviour_outside_and_after(llama):
    ids = torch.tensor([tokens(11)])
    before = llama.generate(ids, **GREEDY)
    former = llama.config._attn_implementation
    cache = apr.Cache(llama, max_tokens=2048)
    assert torch.equal(llama.generate(ids, **GREEDY), before)  # attached, no apr cache passed
    mask = torch.tensor([[0, 0] + [1] * 9])
    want = llama.generate(ids, attention_mask=mask, **GREEDY)
    del cache
    gc.collect()
    assert llama.config._attn_implementation == former
    assert not llama._forward_hooks and not llama._forward_pre_hooks
    assert torch.equal(llama.generate(ids, attention_mask=mask, **GREEDY), want)


def test_a_failed_forward_is_taken_back(llama):
    cache = apr.Cache(llama, max_tokens=2048)
    prompt = tokens(11)
    with torch.no_grad():
        llama(torch.tensor([prompt]), past_key_values=cache)
        used = cache.session.stats.used_pages
        broken = llama.model.layers[1].mlp.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(torch.tensor([tokens(80, 1)]), past_key_values=cache)
        broken.remove()
        assert cache.get_seq_length() == 11 and len(cache.threads[0]) == 11
        assert cache.session.stats.used_pages == used
        logits = llama(torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
    assert distance(logits, stock(llama, [*prompt, 7])[-1]) < CLOSE
    cache.close()


def test_several_positions_a_token_that_are_the_same(llama):
    """As models for images give them for text alone."""
    cache, text = apr.Cache(llama, max_tokens=256), tokens(11)
    with torch.no_grad():
        planes = torch.arange(11).expand(3, 1, 11)
        got = llama(torch.tensor([text]), position_ids=planes, past_key_values=cache).logits[0]
    assert distance(got, stock(llama, text)) < CLOSE
    cache.close()


def test_layers_that_share_keys_and_are_told_to_keep_one_row():
    """Such a model leaves queries out of its last layers where only the last logits are asked."""
    config = Gemma4TextConfig(
        **{**models.COMMON, "num_hidden_layers": 4},
        head_dim=16,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=models.VOCAB,
    )
    model = models.random_weights(Gemma4ForCausalLM(config))
    ids, cache = torch.tensor([tokens(20)]), apr.Cache(model, max_tokens=512)
    want = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), want)
    cache.close()


def test_what_is_refused_says_so(llama):
    cache = apr.Cache(llama, max_tokens=256)
    ids = torch.tensor([tokens(11)])
    with pytest.raises(apr.InvalidInput, match="2-D padding mask"):
        llama(ids, attention_mask=torch.ones(1, 1, 11, 11).bool(), past_key_values=cache)
    planes = torch.arange(11).repeat(3, 1, 1) * torch.tensor([1, 1, 2])[:, None, None]
    with pytest.raises(apr.InvalidInput, match="several a token"):
        llama(ids, position_ids=planes, past_key_values=cache)
    with pytest.raises(apr.InvalidInput, match=r"position_ids \[2, 11\]; expected \[3, 11\]"):
        two = torch.arange(11).repeat(2, 1)
        llama(ids.repeat(3, 1), position_ids=two, past_key_values=cache)
    with pytest.raises(apr.InvalidInput, match="use_cache=False"):
        llama.generate(ids, use_cache=False, past_key_values=cache, **GREEDY)
    with pytest.raises(apr.InvalidInput, match="crop the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(apr.InvalidInput, match="attention matrix"):
        llama(ids, output_attentions=True, past_key_values=cache)
    with pytest.raises(apr.InvalidInput, match="at least one new token"):
        llama(ids[:, :0], past_key_values=cache)
    with pytest.raises(apr.OutOfPages, match="exhausted"):
        llama(torch.tensor([tokens(300)]), past_key_values=cache)
    assert cache.session.stats.used_pages == 0
    with torch.no_grad():
        logits = llama(ids, past_key_values=cache).logits[0]
    assert distance(logits, stock(llama, ids[0].tolist())) < CLOSE
    with torch.no_grad():
        llama(torch.tensor([[1], [2]]), past_key_values=cache)  # samples of the one row
        with pytest.raises(apr.InvalidInput, match="3 rows; expected 2"):
            llama(torch.tensor([[1], [2], [3]]), past_key_values=cache)
        with pytest.raises(apr.InvalidInput, match="1 columns; expected 13"):
            one = ids[:, :1].repeat(2, 1)
            llama(one, attention_mask=one, past_key_values=cache)
    cache.close()


def test_an_interrupted_generate_leaves_model_and_cache_usable(llama):
    cache = apr.Cache(llama, max_tokens=512)
    ids = torch.tensor([tokens(11)])
    want = stock(llama, tokens(11))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(ids, past_key_values=cache, **GREEDY)
    hook.remove()
    other = apr.Cache(other_model := build("qwen2"), max_tokens=256)
    plain = stock(other_model, tokens(11))  # another attached model, before anything is cleaned up
    other.close()
    assert distance(plain, stock(other_model, tokens(11))) == 0.0
    assert distance(stock(llama, tokens(11)), want) < CLOSE
    got = llama.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(got, llama.generate(ids, **GREEDY))
    cache.close()


def test_a_session_steps_beside_an_interrupted_cache(llama):
    cache = apr.Cache(llama, max_tokens=512)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama(torch.tensor([tokens(11)]), past_key_values=cache)
    hook.remove()
    with apr.Session(llama, max_tokens=512) as s:
        got = s.step([s.thread(tokens(11))])[0]
    assert distance(got, stock(llama, tokens(11))[-1]) < CLOSE
    cache.close()


def test_tokens_that_the_user_queued_are_not_mixed_in(llama):
    cache = apr.Cache(llama, max_tokens=512)
    with torch.no_grad():
        llama(torch.tensor([tokens(11)]), past_key_values=cache)
        cache.threads[0].extend([3, 4])
        with pytest.raises(apr.InvalidInput, match="queued"):
            llama(torch.tensor([[7]]), past_key_values=cache)
    assert cache.threads[0].tokens == [*tokens(11), 3, 4]
    cache.close()
