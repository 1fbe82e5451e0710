"""What attaching a model with states proves and refuses, and what comes after a change of it."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

import apr
import models
from conftest import built
from models import CLOSE, STATES, distance, stock
from test_states import PROMPT, A

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by rows:UserWarning")


def test_arguments_that_a_model_cannot_honour_are_refused():
    with pytest.raises(apr.InvalidInput, match="checkpoint_tokens: got -1"):
        apr.Session(built("lfm2"), checkpoint_tokens=-1)
    with pytest.raises(apr.InvalidInput, match="one token at a time"):
        apr.Session(built("jamba"), checkpoint_tokens=8)
    with pytest.raises(apr.InvalidInput, match="attention is its own"):
        apr.Session(built("bloom"), invariant=True)


def test_a_failure_of_the_machine_is_not_the_models(monkeypatch):
    """Out of memory while a model is proved says nothing about the model."""
    model = models.build("llama")

    def no_memory(*_):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("apr.hf.attachment.self_test", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            apr.Session(model, max_tokens=256)
    with apr.Session(model, max_tokens=256) as s:
        assert s.spec.states is None


def test_rows_are_named_as_slower():
    with pytest.warns(UserWarning, match="BloomForCausalLM runs by rows.*slower: .*no layer"):
        s = apr.Session(models.build("bloom"), max_tokens=256)
    assert s.stats.attention == "rows"
    for name in ("lfm2", "mamba", "llama"):
        assert apr.Session(built(name), max_tokens=256).stats.attention == "plan"


def test_refresh_after_new_weights():
    model = models.build("bart")
    with pytest.warns(UserWarning), apr.Session(model, max_tokens=512) as s:
        s.step([s.thread(PROMPT)])
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.mul_(2)
        s.refresh()
        thread = s.thread(PROMPT)
        assert distance(s.step([thread])[0], stock(model, PROMPT)[-1]) < CLOSE
        model.config.use_cache = False  # a setting that changes nothing
        thread.extend(A)
        assert distance(s.step([thread])[0], stock(model, PROMPT + A)[-1]) < CLOSE


def test_refresh_in_another_format():
    model = models.build("lfm2")
    with apr.Session(model, max_tokens=512, checkpoint_tokens=4) as s:
        s.step([s.thread(PROMPT)])
        model.to(torch.bfloat16)
        s.refresh()
        assert s.stats.states == 0
        thread = s.thread(PROMPT)
        want = stock(model, PROMPT)[-1]
        assert distance(s.step([thread])[0], want) < 0.1 * float(want.std())
        assert s.stats.states == 6 and s.spec.dtype is torch.bfloat16


def test_the_proof_has_power_in_half_precision(monkeypatch):
    """Steps that ignore the states of a model with transformers' own small weights are off by less
    than bfloat16's noise may be, and are refused all the same.
    """
    model = models.MODEL_FOR_CAUSAL_LM_MAPPING[type(STATES["qwen3_next"])](STATES["qwen3_next"])
    model = model.to(torch.bfloat16).eval()
    apr.Session(model, max_tokens=256).close()
    monkeypatch.setattr("apr.hf.probe.has_states", lambda cache: False)
    monkeypatch.setattr("apr.hf.attachment.measure_rows", lambda model, switch, why: _raise(why))
    again = models.MODEL_FOR_CAUSAL_LM_MAPPING[type(STATES["qwen3_next"])](STATES["qwen3_next"])
    with pytest.raises(apr.UnsupportedModel, match="change places"):
        apr.Session(again.to(torch.bfloat16).eval(), max_tokens=256)


def _raise(error):
    raise error


def test_a_sparse_index_is_served_while_it_leaves_nothing_out():
    config = DeepseekV32Config(
        **models.COMMON | {"num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_topk=16,
        index_head_dim=16,
        index_n_heads=2,
        num_nextn_predict_layers=0,
    )
    model = models.random_weights(DeepseekV32ForCausalLM(config))
    with apr.Session(model, max_tokens=512) as s:
        thread = s.thread(PROMPT[:14])
        assert distance(s.step([thread])[0], stock(model, PROMPT[:14])[-1]) < CLOSE
        thread.extend(A[:2])
        assert distance(s.step([thread])[0], stock(model, PROMPT[:14] + A[:2])[-1]) < CLOSE
        thread.extend(A[2:3])
        with pytest.raises(apr.UnsupportedModel, match="keeps 16"):
            s.step([thread])
        thread.trim(15)
        assert distance(s.step([thread])[0], stock(model, PROMPT[:14] + A[:1])[-1]) < CLOSE
