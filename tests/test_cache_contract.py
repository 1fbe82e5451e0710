"""`apr.Cache` wherever transformers takes a cache: every way of decoding gives stock's tokens,
scores and states.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, WhisperConfig, WhisperForCausalLM

import apr
from conftest import built
from models import CACHED, CLOSE, FAR, VOCAB, build, distance, random_weights, stock, tokens

QUIET = dict(pad_token_id=0, eos_token_id=None)
LONG, SHORT = tokens(13), tokens(6, 1)
IDS = torch.tensor([LONG, [0] * 7 + SHORT])
MASK = (IDS != 0).long()
SAMPLE = dict(do_sample=True, top_k=20)
# What transformers calls generation modes, and what changes the calls that a cache sees.
WAYS = {
    "greedy": dict(do_sample=False),
    "sample": SAMPLE,
    "samples of each": dict(num_return_sequences=3, **SAMPLE),
    "beams": dict(num_beams=3, do_sample=False),
    "beams returned": dict(num_beams=4, num_return_sequences=3, do_sample=False),
    "beam sample": dict(num_beams=3, **SAMPLE),
    "prefill chunks": dict(do_sample=False, prefill_chunk_size=5),
    "chunks of a wide beam": dict(num_beams=2, do_sample=False, prefill_chunk_size=4),
    "guidance": dict(do_sample=False, guidance_scale=1.7),
    "penalties": dict(do_sample=False, repetition_penalty=1.4, no_repeat_ngram_size=2),
}


@pytest.fixture(params=CACHED)
def model(request):
    return built(request.param)


@pytest.fixture
def cache(model):
    made = apr.Cache(model, max_tokens=1 << 13)
    yield made
    made.close()


def both(model, cache, ids, seed=3, **options):
    """(stock's outputs, the outputs with the cache), under the same random numbers."""
    options = {
        "max_new_tokens": 9,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "output_hidden_states": True,
        **QUIET,
        **options,
    }
    torch.manual_seed(seed)
    want = model.generate(ids, **options)
    torch.manual_seed(seed)
    return want, model.generate(ids, past_key_values=cache, **options)


def assert_same(want, got):
    assert torch.equal(want.sequences, got.sequences)
    for name in ("logits", "scores"):
        pairs = zip(getattr(want, name), getattr(got, name), strict=True)
        for a, b in pairs:
            assert torch.equal(a.isfinite(), b.isfinite())
            assert distance(a[a.isfinite()], b[b.isfinite()]) < 10 * CLOSE, name
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        assert [x.shape for x in a] == [x.shape for x in b]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding(model, cache, way):
    want, got = both(model, cache, IDS, attention_mask=MASK, **WAYS[way])
    assert_same(want, got)


@pytest.mark.parametrize("options", [dict(), SAMPLE], ids=["greedy", "sample"])
def test_assisted_generation_and_prompt_lookup(model, cache, options):
    ids = torch.tensor([LONG + LONG[:8]])
    drafts = dict(prompt_lookup_num_tokens=3, do_sample=False) | options
    for _ in range(2):  # again with what is stored of the first
        assert_same(*both(model, cache, ids, **drafts))
    assistant = build("llama", seed=5)
    assistant.generation_config.pad_token_id = 0
    want, got = both(model, cache, ids, assistant_model=assistant, **options)
    assert torch.equal(want.sequences, got.sequences)


def test_embeddings_instead_of_ids(model, cache):
    embeddings = model.get_input_embeddings()(IDS).detach()
    options = dict(max_new_tokens=7, do_sample=False, attention_mask=MASK, **QUIET)
    want = model.generate(inputs_embeds=embeddings, **options)
    got = model.generate(inputs_embeds=embeddings, past_key_values=cache, **options)
    assert torch.equal(want, got)


def turn(model, cache, ids, new, **options):
    options = {"max_new_tokens": new, "do_sample": False, **QUIET, **options}
    return model.generate(ids, past_key_values=cache, **options)


def test_several_turns(model, cache):
    def chat(cache):
        ids = torch.tensor([LONG])
        for seed in (4, 5, 6):
            ids = turn(model, cache, ids, 4)
            ids = torch.cat([ids, torch.tensor([tokens(5, seed)])], 1)
        return ids

    assert torch.equal(chat(DynamicCache(config=model.config)), chat(cache))
    assert len(cache.threads[0]) == 13 + 4 + 2 * (5 + 4) - 1
    # The new tokens alone under a mask of everything, as generate() takes them too.
    new, everything = torch.tensor([tokens(3, 9)]), cache.get_seq_length() + 3
    whole = torch.tensor([[*cache.threads[0].tokens, *tokens(3, 9)]])
    got = turn(model, cache, new, 4, attention_mask=torch.ones(1, everything, dtype=torch.long))
    assert torch.equal(got[0, 3:], turn(model, None, whole, 4)[0, everything:])
    if Version(transformers.__version__) < Version("5.23"):
        return  # in 5.17 stock itself counts anew where chunks follow a cache that holds text
    longer = torch.tensor([tokens(9, 8)])
    whole = torch.tensor([[*cache.threads[0].tokens, *tokens(9, 8)]])
    mask = torch.ones_like(whole)
    got = turn(model, cache, longer, 4, attention_mask=mask, prefill_chunk_size=4)
    assert torch.equal(got[0, 9:], turn(model, None, whole, 4)[0, whole.shape[1] :])


def test_a_full_pool_makes_room_for_another_prompt(llama):
    cache = apr.Cache(llama, max_tokens=256)
    for prompt in (tokens(200, 1), tokens(200, 2), [*tokens(200, 2)[:70], *tokens(130, 3)]):
        ids = torch.tensor([prompt])
        assert torch.equal(turn(llama, cache, ids, 4), turn(llama, None, ids, 4))
    new, stored = torch.tensor([tokens(90, 4)]), cache.threads[0].tokens
    mask = torch.ones(1, len(stored) + 90, dtype=torch.long)
    with pytest.raises(apr.OutOfPages):  # what is stored is a part of this text
        turn(llama, cache, new, 4, attention_mask=mask)
    assert cache.threads[0].tokens == stored
    cache.close()


def test_prompts_are_not_compared_with_embeddings(llama):
    cache = apr.Cache(llama, max_tokens=2048)
    embeddings = llama.get_input_embeddings()(torch.tensor([LONG])).detach()
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)
    for _ in range(2):
        llama.generate(inputs_embeds=embeddings, past_key_values=cache, **options)
    ids = torch.tensor([[0, 0, 0, *LONG[:6]]])  # what embeddings are stored as
    options |= dict(attention_mask=torch.ones_like(ids))
    with pytest.raises(apr.InvalidInput, match="images or embeddings"):
        llama.generate(ids, past_key_values=cache, **options)
    cache.reset()
    want = llama.generate(ids, **options)
    assert torch.equal(llama.generate(ids, past_key_values=cache, **options), want)
    cache.close()


def test_rows_that_end_at_different_lengths_go_on_as_if_alone(model, cache):
    ids = torch.tensor([tokens(6, 1), tokens(6, 2)])
    free = turn(model, None, ids, 8)
    eos = next(int(t) for t in free[0, 7:] if t not in free[1])
    first = turn(model, cache, ids, 8, eos_token_id=eos)
    ended = 6 + first[0, 6:].tolist().index(eos) + 1
    assert (
        ended < first.shape[1] and not first[0, ended:].any()
    )  # stock feeds padding to the ended row
    second = torch.cat([first, torch.tensor([tokens(3, 7), tokens(3, 8)])], 1)
    got = turn(model, cache, second, 5, attention_mask=(second != 0).long())[:, second.shape[1] :]
    for row, new in zip(second.tolist(), got, strict=True):
        alone = torch.tensor([[t for t in row if t]])
        assert torch.equal(new, turn(model, None, alone, 5)[0, alone.shape[1] :])


def test_the_same_cache_for_other_prompts_keeps_what_is_common(model, cache):
    prompts = [LONG, LONG, LONG[:9], [*LONG[:9], *SHORT], SHORT, LONG[:1]]
    used = []
    for i, prompt in enumerate([*prompts, *prompts]):
        ids, chunk = torch.tensor([prompt]), 4 if i >= len(prompts) else None
        got = turn(model, cache, ids, 5, prefill_chunk_size=chunk)
        assert torch.equal(got, turn(model, None, ids, 5))
        used.append(cache.session.stats.threads)
    assert set(used) == {1}  # nothing of the former prompts is left
    both_rows = torch.tensor([LONG[:6], SHORT])
    assert torch.equal(turn(model, cache, both_rows, 5), turn(model, None, both_rows, 5))


def test_a_model_that_generate_gives_no_positions():
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        max_target_positions=256,
        is_encoder_decoder=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = random_weights(WhisperForCausalLM(config))
    cache, ids = apr.Cache(model, max_tokens=2048), torch.tensor([LONG])
    for seed in (4, 5):
        want = turn(model, None, ids, 5)
        assert torch.equal(turn(model, cache, ids, 5), want)
        ids = torch.cat([want, torch.tensor([tokens(4, seed)])], 1)
    cache.close()


def test_many_batches_on_one_cache(llama):
    cache, draw = apr.Cache(llama, max_tokens=1 << 13), random.Random(0)
    for _ in range(12):
        texts = [
            LONG[: draw.randint(3, 13)] + tokens(draw.randint(0, 4), i)
            for i in range(draw.randint(1, 4))
        ]
        width = max(map(len, texts)) + draw.randint(0, 5)
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        more = dict(attention_mask=(ids != 0).long(), **WAYS[draw.choice(list(WAYS))])
        torch.manual_seed(1)
        want = llama.generate(ids, max_new_tokens=6, **QUIET, **more)
        torch.manual_seed(1)
        got = llama.generate(ids, past_key_values=cache, max_new_tokens=6, **QUIET, **more)
        assert torch.equal(got, want)
        assert cache.session.stats.threads == len(cache.threads)
    cache.close()


def test_a_generate_that_failed_can_be_tried_again(model, cache):
    ids, calls = torch.tensor([LONG]), []

    def fails(*_):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return torch.tensor([False])

    with pytest.raises(ZeroDivisionError):
        turn(model, cache, ids, 9, stopping_criteria=[fails])
    assert torch.equal(turn(model, cache, ids, 9), turn(model, None, ids, 9))
    with pytest.raises(ValueError, match="tokenizer"):  # after generate() has taken the cache up
        turn(model, cache, ids, 9, stop_strings=["x"])
    stored = cache.threads[0].tokens
    assert cache.get_seq_length() == len(stored)
    with torch.no_grad():
        logits = model(torch.tensor([[5]]), past_key_values=cache).logits[0, -1]
    assert distance(logits, stock(model, [*stored, 5])[-1]) < CLOSE
    assert torch.equal(turn(model, cache, ids, 9), turn(model, None, ids, 9))


def test_a_prefilled_row_is_asked_for_samples(model, cache):
    with torch.no_grad():
        model(torch.tensor([LONG[:10]]), past_key_values=cache)
    want, got = both(model, cache, torch.tensor([LONG]), num_return_sequences=3, **SAMPLE)
    assert torch.equal(want.sequences, got.sequences)
    assert len(cache.threads) == 3


def test_a_deep_copy_is_a_fork(model, cache):
    with torch.no_grad():
        model(torch.tensor([LONG]), past_key_values=cache)
    pages = cache.session.stats.used_pages
    copies = [copy.deepcopy(cache) for _ in range(3)]
    assert cache.session.stats.used_pages == pages
    for i, other in enumerate(copies):
        ids = torch.tensor([LONG + tokens(4 + i, i)])
        assert torch.equal(turn(model, other, ids, 4), turn(model, None, ids, 4))
        other.close()
    assert cache.get_seq_length() == 13 and cache.threads[0].tokens == LONG
    ids = torch.tensor([[*LONG, 5]])
    assert torch.equal(turn(model, cache, ids, 4), turn(model, None, ids, 4))


def loop(model, cache, ids, mask, steps=6, **more):
    """A loop of one's own: rows go on from the last column; [rows, steps] tokens."""
    out = []
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache, **more).logits[:, -1]
        for _ in range(steps):
            out.append(logits.argmax(-1))
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
            logits = model(out[-1][:, None], attention_mask=mask, past_key_values=cache).logits[
                :, -1
            ]
    return torch.stack(out, 1)


@pytest.mark.parametrize("hidden", [[0, 1], [3, 4], [0, 5, 6, 9]], ids=["left", "inside", "both"])
def test_padding_anywhere_in_a_loop_without_positions(model, cache, hidden):
    ids = torch.tensor([LONG, tokens(13, 2)])
    mask = torch.ones_like(ids)
    mask[0, hidden] = 0
    want = loop(model, DynamicCache(config=model.config), ids, mask)
    assert torch.equal(loop(model, cache, ids, mask), want)
    # Negative control: the places that are hidden matter.
    cache.reset()
    with torch.no_grad():
        seen = model(ids, past_key_values=cache).logits[0, -1]
        unseen = model(ids, attention_mask=mask).logits[0, -1]
    assert distance(seen, unseen) > FAR


def test_positions_of_ones_own(model, cache):
    ids = torch.tensor([LONG, tokens(13, 2)])
    positions = torch.stack([torch.arange(13) + 4, torch.arange(13) * 3])
    more = dict(position_ids=positions)
    if model.config.model_type.startswith("gemma"):  # windows count positions, in stock places
        with pytest.raises(apr.InvalidInput, match="windows count places"):
            model(ids, past_key_values=cache, **more)
        assert cache.session.stats.used_pages == 0
        more = dict(position_ids=positions[:1])
    with torch.no_grad():
        want = model(ids, past_key_values=DynamicCache(), **more).logits
        got = model(ids, past_key_values=cache, **more).logits
    assert distance(got, want) < CLOSE


def test_right_padding(model, cache):
    ids = torch.tensor([LONG, SHORT + [0] * 7])
    mask = (ids != 0).long()
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert distance(got[mask.bool()], want[mask.bool()]) < CLOSE
    cache.reset()
    for chunk in (None, 6):
        with pytest.raises(apr.InvalidInput, match=r'padding_side = "left"'):
            turn(model, cache, ids, 3, attention_mask=mask, prefill_chunk_size=chunk)
        cache.reset()
    assert cache.session.stats.used_pages == 0


def test_the_end_of_the_past_may_be_hidden_and_no_more(model, cache):
    with torch.no_grad():
        model(torch.tensor([LONG]), past_key_values=cache)
        mask = torch.tensor([[1] * 9 + [0] * 4 + [1]])
        place = torch.tensor([[9]])
        more = dict(attention_mask=mask, position_ids=place, past_key_values=cache)
        got = model(torch.tensor([[5]]), **more).logits[0, -1]
        assert distance(got, stock(model, [*LONG[:9], 5])[-1]) < CLOSE
        # As stock, the places stay in the mask, hidden.
        assert cache.get_seq_length() == 14
        grown = torch.cat([mask, mask[:, :1]], 1)
        more |= dict(attention_mask=grown, position_ids=place + 1)
        got = model(torch.tensor([[6]]), **more).logits[0, -1]
        assert distance(got, stock(model, [*LONG[:9], 5, 6])[-1]) < CLOSE
        for hole, says in ((1, "seen ones behind them"), (None, "that were padding")):
            wrong = torch.cat([grown, grown[:, :1]], 1)
            wrong[0, slice(9, 13) if hole is None else hole] = int(hole is None)
            with pytest.raises(apr.InvalidInput, match=says):
                model(torch.tensor([[6]]), attention_mask=wrong, past_key_values=cache)
    assert cache.threads[0].tokens == [*LONG[:9], 5, 6]


def test_the_protocol_of_a_cache(model, cache):
    layers = len(cache.session.spec.layers)
    assert len(cache) == layers == len(cache.is_sliding) and not any(cache.is_linear)
    assert not cache.is_initialized and cache.get_seq_length() == 0 and cache.is_croppable
    with torch.no_grad():
        model(torch.tensor([LONG, LONG]), past_key_values=cache)
    assert cache.is_initialized and cache.batch_size == 2 and not cache.is_compileable
    assert cache.get_mask_sizes(3, 0) == (16, 0) and cache.get_query_offset() == 13
    assert [x.get_seq_length() for x in cache.layers] == [13] * layers
    cache.crop(-4)
    assert cache.get_seq_length() == 9 and [len(t) for t in cache.threads] == [9, 9]
    cache.threads[1].trim(6)  # the user's own edits count
    assert cache.get_seq_length() == 9
    cache.threads[0].trim(6)
    assert cache.get_seq_length() == 6
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert [t.tokens for t in cache.threads] == [LONG[:6]] * 3
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.session.stats.used_pages == 0
