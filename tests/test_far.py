"""What changes far out is found when a model is attached, and refused where it would be wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Gemma4UnifiedConfig,
    GenerationConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Ministral3Config,
    Ministral3ForCausalLM,
)

import apr
from apr.hf.far import NEVER
from models import CLOSE, COMMON, FAR, build, distance, random_weights, stock, tokens

BORDER = 128


@pytest.fixture(scope="module")
def llama4():
    """Queries of layers without rotation are scaled by how long the model's own cache is."""
    config = Llama4TextConfig(
        **COMMON,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        moe_layers=[1],
        no_rope_layers=[1, 0],
        attention_chunk_size=16,
        layer_types=["chunked_attention", "full_attention"],
        floor_scale=BORDER,
        attn_scale=1.0,
    )
    return random_weights(Llama4ForCausalLM(config))


@pytest.fixture(scope="module")
def ministral3():
    """Queries are scaled by their position."""
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=16.0,
        original_max_position_embeddings=BORDER,
        llama_4_scaling_beta=0.5,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    config = Ministral3Config(**COMMON, head_dim=16, rope_parameters=rope, sliding_window=None)
    return random_weights(Ministral3ForCausalLM(config))


def test_most_models_have_no_border(family):
    _, model = family
    with apr.Session(model, max_tokens=256) as s:
        assert s.spec.reach == NEVER


def test_a_scale_that_counts_from_a_cache(llama4):
    """A step has no cache that would say how long each thread is: it is right up to the border."""
    text = tokens(BORDER + 4)
    want = stock(llama4, text)
    with apr.Session(llama4, max_tokens=1024) as s:
        assert s.spec.reach.past == BORDER - 1
        thread = s.thread(text[: BORDER - 2])
        s.step([thread])
        thread.extend(text[BORDER - 2 : BORDER - 1])
        assert distance(s.step([thread])[0], want[BORDER - 2]) < CLOSE
        thread.extend(text[BORDER - 1 : BORDER])
        with pytest.raises(apr.UnsupportedRope, match=r"passes 127.*apr\.Cache"):
            s.step([thread])
        # Rows are counted too: short threads that together pass the border run in pieces.
        both = [s.thread(text[:90]), s.thread(text[1:91])]
        assert distance(s.step(both)[1], stock(llama4, text[1:91])[-1]) < CLOSE
    settings = GenerationConfig(pad_token_id=0, eos_token_id=None, max_new_tokens=6)
    cache = apr.Cache(llama4, max_tokens=1024)  # which says how long it is
    ids = torch.tensor([text])
    got = llama4.generate(ids, past_key_values=cache, generation_config=settings)
    assert torch.equal(got, llama4.generate(ids, generation_config=settings))
    cache.close()


def test_a_scale_by_position(ministral3):
    """Forks are right everywhere; a query that is turned keeps the scale of its own position."""
    text = tokens(BORDER + 20)
    want = stock(ministral3, text)
    with apr.Session(ministral3, max_tokens=1024) as s:
        assert s.spec.reach.turning == BORDER
        (child,) = s.thread(text[:-6]).fork(1)
        child.extend(text[-6:])
        assert distance(s.step([child])[0], want[-1]) < CLOSE

        def turned(base):
            head, tail = s.segment(text[:20]), s.region(base=base)
            thread = s.thread(view=[(head, 0), (tail, 20)], writes=tail)
            thread.extend(text[20:24])
            return distance(s.step([thread])[0], want[23])

        assert turned(BORDER - 20 - 4) < CLOSE
        with pytest.raises(apr.UnsupportedRope, match="scales queries by their position"):
            turned(BORDER)


def test_without_the_look_it_would_be_wrong(ministral3, monkeypatch):
    monkeypatch.setattr("apr.hf.spec.ModelSpec.check_turn", lambda *_: None)
    text = tokens(24)
    with apr.Session(ministral3, max_tokens=1024, self_test=False) as s:
        head, tail = s.segment(text[:20]), s.region(base=BORDER)
        thread = s.thread(view=[(head, 0), (tail, 20)], writes=tail)
        thread.extend(text[20:24])
        assert distance(s.step([thread])[0], stock(ministral3, text)[-1]) > FAR


@pytest.mark.filterwarnings("ignore:.*runs by rows:UserWarning")
def test_a_mask_that_looks_up_each_calls_tokens_is_not_measured():
    """Its window cannot be seen far out; rows of the model's own cache serve it."""
    text = {k: v for k, v in COMMON.items() if k != "num_hidden_layers"}
    config = Gemma4UnifiedConfig(
        text_config=dict(
            **text,
            num_hidden_layers=2,
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    model = random_weights(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))
    with apr.Session(model, max_tokens=512) as s:
        assert "looks up each call's own tokens" in s.spec.states.reason
        kids = s.thread(tokens(30)).fork(2)
        kids[0].extend(tokens(3, 1))
        got = s.step(kids)
        assert distance(got[0], stock(model, tokens(30) + tokens(3, 1))[-1]) < CLOSE


def test_attach_costs_few_forwards():
    model, calls = build("llama"), []
    hook = model.register_forward_hook(lambda *_: calls.append(0))
    apr.Session(model, max_tokens=256).close()
    hook.remove()
    assert 0 < len(calls) <= 13
