"""A model that was changed after it was attached, and calls of it that are not what was measured:
noticed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import apr
from apr.hf import interface
from models import CLOSE, COMMON, FAR, VOCAB, build, distance, random_weights, stock, tokens
from test_beside import IDS, PROMPT, generated


def changes(model):
    """(what is done to a model, what undoes it, what the error says)."""
    return [
        (model.train, model.eval, "training mode"),
        (model.half, None, "torch.float16"),
        (lambda: model.resize_token_embeddings(VOCAB + 8), None, "its embeddings were"),
        (lambda: model.lm_head.weight.data.add_(0) is None or scale(model), None, "weights were"),
    ]


@torch.no_grad()
def scale(model):
    model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)


@pytest.mark.parametrize("which", range(4))
def test_a_changed_model_is_refused_and_taken_after_refresh(which):
    model = build("llama")
    s, cache = apr.Session(model, max_tokens=512), apr.Cache(model, max_tokens=512)
    thread, segment = s.thread(PROMPT), s.segment([3, 4])
    s.step([thread])
    generated(model, cache)
    change, undo, says = changes(model)[which]
    change()
    thread.extend([7])
    with pytest.raises(apr.InvalidInput, match=says):
        s.step([thread])
    with pytest.raises(apr.InvalidInput, match=says):
        generated(model, cache)
    assert thread.tokens == [*PROMPT, 7]
    if undo is not None:
        undo()
        assert distance(s.step([thread])[0], stock(model, [*PROMPT, 7])[-1]) < CLOSE
    s.refresh()
    cache.reset()
    assert not thread.alive and s.stats.used_pages == 0
    with pytest.raises(apr.InvalidInput, match="let go by refresh"):
        s.thread(view=[segment])
    del thread, segment
    fresh, close = s.thread(PROMPT), CLOSE if model.dtype is torch.float32 else FAR
    assert distance(s.step([fresh])[0], stock(model, PROMPT)[-1]) < close
    assert torch.equal(generated(model, cache), generated(model))
    s.close()
    cache.close()


def test_another_dtype_after_refresh():
    model = build("llama")
    s = apr.Session(model, max_tokens=512)
    model.bfloat16()
    with apr.Session(model, max_tokens=512) as second:
        assert second.spec.dtype is torch.bfloat16
    s.refresh()
    got = s.step([s.thread(PROMPT)])[0]
    assert s.pools[0].k.dtype is torch.bfloat16
    want = stock(model, PROMPT)[-1]
    assert distance(got, want) < 0.1 * float(want.std())
    s.close()


def test_a_module_replaced_is_noticed_and_the_attention_chosen_by_the_user_kept():
    model = build("llama")
    s, cache = apr.Session(model, max_tokens=512), apr.Cache(model, max_tokens=512)
    model.set_attn_implementation("eager")
    assert distance(s.step([s.thread(PROMPT)])[0], stock(model, PROMPT)[-1]) < CLOSE
    assert model.config._attn_implementation == "eager"
    layer = model.model.layers[0]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    for call in (lambda: s.step([s.thread(PROMPT)]), lambda: generated(model, cache)):
        with pytest.raises(apr.UnsupportedModel, match="a module was replaced"):
            call()
    cache.reset()
    assert torch.equal(generated(model, cache), generated(model))
    s.close()
    cache.close()


def test_a_configuration_set_anew_is_measured_anew():
    model = build("mistral")
    long = tokens(30)
    s, cache = apr.Session(model, max_tokens=512), apr.Cache(model, max_tokens=512)
    thread = s.thread(long)
    model.config.use_cache = False  # nothing that is measured
    assert distance(s.step([thread])[0], stock(model, long)[-1]) < CLOSE
    model.config.sliding_window = 3
    thread.extend([5])
    for _ in range(2):
        with pytest.raises(apr.InvalidInput, match="configuration was changed"):
            s.step([thread])
    with pytest.raises(apr.InvalidInput, match="configuration was changed"):
        model(torch.tensor([long]), past_key_values=cache)
    s.refresh()
    cache.reset()
    want = stock(model, long)[-1]
    assert distance(s.step([s.thread(long)])[0], want) < CLOSE
    with torch.no_grad():
        assert (
            distance(model(torch.tensor([long]), past_key_values=cache).logits[0, -1], want) < CLOSE
        )
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(apr.InvalidInput, match="attention matrix"):
        model(torch.tensor([[5]]), past_key_values=cache)
    s.close()
    cache.close()


def test_a_reset_after_a_change_lets_copies_go_and_a_plain_one_does_not():
    model = build("llama")
    cache = apr.Cache(model, max_tokens=512)
    generated(model, cache)
    other, kept = copy.deepcopy(cache), cache.threads[0].fork(1)[0]
    cache.reset()
    assert kept.alive and torch.equal(generated(model, other), generated(model))
    scale(model)
    with pytest.raises(apr.InvalidInput, match=r"cache.reset\(\)"):
        generated(model, other)
    cache.reset()
    assert torch.equal(generated(model, cache), generated(model))
    with pytest.raises(apr.InvalidInput, match=r"was released.*reset\(\)"):
        generated(model, other)
    other.reset()
    assert torch.equal(generated(model, other), generated(model))
    cache.close()
    assert torch.equal(generated(model, other), generated(model))
    other.close()


def long_rope(kind, **more):
    parameters = dict(rope_type=kind, rope_theta=1e4, factor=4.0, **more)
    config = {**COMMON, "max_position_embeddings": 64 if kind == "dynamic" else 256}
    if kind == "dynamic":
        return random_weights(LlamaForCausalLM(LlamaConfig(**config, rope_parameters=parameters)))
    return random_weights(
        Phi3ForCausalLM(
            Phi3Config(**config, original_max_position_embeddings=64, rope_parameters=parameters)
        )
    )


@pytest.mark.parametrize(
    "kind, more",
    [("dynamic", {}), ("longrope", dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8))],
)
def test_frequencies_that_change_with_company_are_refused_before_they_do(kind, more):
    model, long = long_rope(kind, **more), tokens(70)
    cache = apr.Cache(model, max_tokens=1024)
    with apr.Session(model, max_tokens=1024) as s:
        short = s.thread(PROMPT)
        with pytest.raises(apr.UnsupportedRope, match="passes 64"):
            s.step([short, s.thread(long)])
        assert distance(s.step([short])[0], stock(model, PROMPT)[-1]) < CLOSE
    with pytest.raises(apr.UnsupportedRope, match="passes 64"):
        generated(model, cache, torch.tensor([long]))
    with pytest.raises(apr.UnsupportedRope, match="passes 64"):  # in the midst of a generate()
        generated(model, cache, torch.tensor([long[:60]]), max_new_tokens=20)
    assert torch.equal(generated(model, cache), generated(model))
    cache.close()


def test_rows_that_differ_inside_of_the_model_are_not_merged():
    model = build("llama")

    def second_row(module, args, output):
        output = output.clone()
        output[1:] += 0.5
        return output

    ids = torch.tensor([PROMPT, PROMPT])
    hook = model.model.embed_tokens.register_forward_hook(second_row)
    want = generated(model, ids=ids)
    assert not torch.equal(want[0], want[1])
    cache = apr.Cache(model, max_tokens=512)
    with pytest.raises(apr.InvalidInput, match="share_rows=False"):
        generated(model, cache, ids)
    assert cache.session.stats.used_pages == 0
    cache.close()
    apart = apr.Cache(model, max_tokens=512, share_rows=False)
    assert torch.equal(generated(model, apart, ids), want)
    apart.close()
    hook.remove()


def test_rows_with_other_embeddings_or_types_are_not_merged(llama):
    cache = apr.Cache(llama, max_tokens=512)
    embeddings = llama.get_input_embeddings()(
        torch.tensor([PROMPT, PROMPT, tokens(11, 4)])
    ).detach()
    with torch.no_grad():
        want = llama(inputs_embeds=embeddings, past_key_values=DynamicCache()).logits
        got = llama(inputs_embeds=embeddings, past_key_values=cache).logits
    assert distance(got, want) < CLOSE
    assert cache.session.stats.replicated_pages > cache.session.stats.used_pages  # two are one
    cache.close()


def test_a_mask_that_looks_ahead_is_refused():
    model = build("gemma3")
    cache = apr.Cache(model, max_tokens=512)
    block = torch.tensor([[-1] * 3 + [0] * 5 + [-1] * 3])
    original = interface.AttentionMaskInterface()["apr"]

    def both_ways(*args, mask_function, **kwargs):
        def function(b, h, q, k):
            same = (block[0, q.clamp_max(10)] == block[0, k.clamp_max(10)]) & (
                block[0, q.clamp_max(10)] >= 0
            )
            return mask_function(b, h, q, k) | same

        return original(*args, mask_function=function, **kwargs)

    interface.AttentionMaskInterface.register("apr", both_ways)
    try:
        with pytest.raises(apr.InvalidInput, match="see what stands behind them"):
            model(IDS, past_key_values=cache)
    finally:
        interface.AttentionMaskInterface.register("apr", original)
    assert cache.session.stats.used_pages == 0
    assert torch.equal(generated(model, cache), generated(model))
    cache.close()
